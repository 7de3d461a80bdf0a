//! Ending in two phases, and the supervision of named tasks.
//!
//! The first signal stops intake and lets everything in flight reach its end; the second, or the deadline, ends now.

use std::any::Any;
use std::error::Error;
use std::future::Future;
use std::time::Duration;

use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

/// The two phases, shared by all tasks of a process.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    drain: CancellationToken,
    abort: CancellationToken,
}

impl Shutdown {
    /// Nothing has been asked yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for an orderly end: stop intake, finish what is in flight.
    pub fn begin(&self) {
        self.drain.cancel();
    }

    /// Asks for the end now.
    pub fn force(&self) {
        self.drain.cancel();
        self.abort.cancel();
    }

    /// Returns once an orderly (or forced) end has been asked for.
    pub async fn draining(&self) {
        self.drain.cancelled().await;
    }

    /// Returns once the end has been forced.
    pub async fn forced(&self) {
        self.abort.cancelled().await;
    }

    /// Whether an end has been asked for.
    pub fn is_draining(&self) -> bool {
        self.drain.is_cancelled()
    }
}

/// Any error of a task.
pub type TaskError = Box<dyn Error + Send + Sync>;

/// A task ended in a way that ends the role.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// It returned an error.
    #[error("{task} failed")]
    Failed {
        /// Its name.
        task: String,
        /// What it returned.
        #[source]
        source: TaskError,
    },
    /// It panicked.
    #[error("{task} panicked: {message}")]
    Panicked {
        /// Its name.
        task: String,
        /// The panic's message.
        message: String,
    },
    /// It was still running at the deadline.
    #[error("still running after {}: {tasks}", crate::time::render_duration(*.deadline))]
    Deadline {
        /// Names, separated by commas.
        tasks: String,
        /// The deadline that passed.
        deadline: Duration,
    },
    /// It was still running when the end was forced.
    #[error("ended at once, still running: {tasks}")]
    Forced {
        /// Names, separated by commas.
        tasks: String,
    },
}

/// Runs named tasks; the first that fails or panics begins the shutdown of all.
#[derive(Debug, Default)]
pub struct Supervisor {
    tasks: JoinSet<Result<(), TaskError>>,
    names: Vec<(Id, &'static str)>,
}

impl Supervisor {
    /// Without tasks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a task. It must return by itself after the shutdown has begun.
    pub fn spawn<E: Into<TaskError>>(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let handle = self.tasks.spawn(async move { task.await.map_err(Into::into) });
        self.names.push((handle.id(), name));
    }

    /// Waits until all tasks have returned. A failure, or a task that returns before the shutdown has begun with an
    /// error, begins it; after `deadline` from its beginning, or when forced, what still runs is aborted.
    pub async fn run(mut self, shutdown: &Shutdown, deadline: Duration) -> Result<(), SupervisorError> {
        let mut first_error = None;
        let end = async {
            shutdown.draining().await;
            tokio::select! {
                () = tokio::time::sleep(deadline) => false,
                () = shutdown.forced() => true,
            }
        };
        tokio::pin!(end);
        loop {
            let joined = tokio::select! {
                joined = self.tasks.join_next_with_id() => joined,
                forced = &mut end => {
                    let tasks = self.names.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
                    self.tasks.shutdown().await;
                    let late = if forced { SupervisorError::Forced { tasks } } else { SupervisorError::Deadline { tasks, deadline } };
                    return Err(first_error.unwrap_or(late));
                }
            };
            let (id, result) = match joined {
                None => return first_error.map_or(Ok(()), Err),
                Some(Ok((id, Ok(())))) => (id, Ok(())),
                Some(Ok((id, Err(source)))) => (id, Err(SupervisorError::Failed { task: self.name(id), source })),
                Some(Err(error)) => (error.id(), Err(self.panicked(error))),
            };
            self.names.retain(|(known, _)| *known != id);
            if let Err(error) = result {
                tracing::error!(error = %error, cause = error.source().map(tracing::field::display), "Task failed");
                first_error.get_or_insert(error);
                shutdown.begin();
            }
        }
    }

    fn name(&self, id: Id) -> String {
        self.names.iter().find(|(known, _)| *known == id).map_or("task", |(_, name)| name).to_owned()
    }

    fn panicked(&self, error: JoinError) -> SupervisorError {
        let task = self.name(error.id());
        let message = error.try_into_panic().map_or_else(|error| error.to_string(), |panic| panic_message(&*panic));
        SupervisorError::Panicked { task, message }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
    }

    #[test]
    fn a_panic_ends_the_role_and_names_the_task() {
        let result = runtime().block_on(async {
            let shutdown = Shutdown::new();
            let mut supervisor = Supervisor::new();
            let waiting = shutdown.clone();
            supervisor.spawn("waits", async move {
                waiting.draining().await;
                Ok::<_, TaskError>(())
            });
            supervisor.spawn("breaks", async { Err::<(), TaskError>(panic_for_test().into()) });
            supervisor.run(&shutdown, Duration::from_secs(5)).await
        });
        assert_eq!(result.unwrap_err().to_string(), "breaks panicked: on purpose");
    }

    fn panic_for_test() -> String {
        panic!("on purpose")
    }

    #[test]
    fn a_task_that_hangs_is_named_at_the_deadline() {
        let result = runtime().block_on(async {
            let shutdown = Shutdown::new();
            let mut supervisor = Supervisor::new();
            supervisor.spawn("hangs", std::future::pending::<Result<(), TaskError>>());
            shutdown.begin();
            supervisor.run(&shutdown, Duration::from_millis(1)).await
        });
        assert!(matches!(result, Err(SupervisorError::Deadline { tasks, .. }) if tasks == "hangs"));
    }
}
