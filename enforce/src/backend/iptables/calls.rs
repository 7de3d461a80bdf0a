//! Changes, one after the other: single ones through the crate `iptables`, several in one transaction through
//! `iptables-restore`.
//!
//! The crate blocks and cannot end a program that hangs. Such a call may still come into effect late, when what it was
//! planned from has changed, so nothing else is changed, and nothing planned, until it has ended.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use iptables::IPTables;
use tokio::task::JoinHandle;

use crate::command::{self, CommandError};
use crate::config::Table;
use crate::plan::rules::RuleStep;

/// Seconds that iptables waits for the lock that all its users share.
const LOCK_WAIT_S: u32 = 5;
/// How a program ends that did not get it.
const LOCKED: i32 = 4;
/// After that a call that does not return is given up.
const CALL_DEADLINE: Duration = Duration::from_secs(15);

/// The programs of one family in one variant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Programs {
    pub(super) change: &'static str,
    pub(super) save: &'static str,
    pub(super) restore: &'static str,
    /// Whether they wait for a lock.
    pub(super) locks: bool,
}

/// The name of a program, for as long as we live, as the crate wants it. Each is kept once, and there are few.
pub(super) fn forever(name: String) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.get(name.as_str()) {
        return known;
    }
    let name = name.leak();
    names.insert(name);
    name
}

/// Makes the changes.
#[derive(Debug)]
pub(super) struct Calls {
    deadline: Duration,
    /// A call that was given up, by its command line. At most one, so at most one thread waits.
    unfinished: Option<(String, JoinHandle<()>)>,
}

impl Calls {
    /// Nothing is under way.
    pub(super) fn new() -> Self {
        Self { deadline: CALL_DEADLINE, unfinished: None }
    }

    /// Fails while a call that was given up still runs. Ask before looking at what changes are to be planned from.
    pub(super) fn check_finished(&mut self) -> Result<(), CommandError> {
        match self.unfinished.take_if(|(_, job)| job.is_finished()) {
            Some((command, _)) => tracing::warn!(command, "A call that hung has ended"),
            None => {
                if let Some((command, _)) = &self.unfinished {
                    return Err(CommandError::Unfinished { command: command.clone() });
                }
            }
        }
        Ok(())
    }

    /// Carries a step out.
    pub(super) async fn apply(&mut self, programs: Programs, step: &RuleStep) -> Result<(), CommandError> {
        if let RuleStep::Lift { .. } | RuleStep::Fill { .. } = step {
            return self.restore(programs, step).await;
        }
        for (table, arguments) in step.commands() {
            self.call(programs, table, arguments).await?;
        }
        Ok(())
    }

    /// One call through the crate, in a thread. `-w` bounds the wait for the lock, which the crate's own `--wait` would
    /// not.
    pub(super) async fn call(&mut self, programs: Programs, table: Table, command: String) -> Result<(), CommandError> {
        self.check_finished()?;
        let tables = IPTables { cmd: programs.change, has_check: true, has_wait: false, is_numeric: true };
        let line = format!("{} -t {} {command}", programs.change, table.as_str());
        let failed = |said: String| CommandError::Failed { command: line.clone(), said };
        let (reply, replied) = tokio::sync::oneshot::channel();
        let job = tokio::task::spawn_blocking(move || {
            let output = tables.execute(table.as_str(), &format!("-w {LOCK_WAIT_S} {command}"));
            // Nobody listens any more after the deadline.
            let _ = reply.send(output.map_err(|error| error.to_string()));
        });
        let Ok(output) = tokio::time::timeout(self.deadline, replied).await else {
            self.unfinished = Some((line.clone(), job));
            return Err(CommandError::Unfinished { command: line });
        };
        let output = output.map_err(|error| failed(error.to_string()))?.map_err(failed)?;
        if output.status.success() { Ok(()) } else { Err(failed(command::one_line(&output.stderr))) }
    }

    async fn restore(&mut self, programs: Programs, step: &RuleStep) -> Result<(), CommandError> {
        self.check_finished()?;
        restore(programs, step).await
    }

    /// All of these lines or none of them, without a moment in between. `what` names them where they fail.
    pub(super) async fn transact(
        &mut self,
        programs: Programs,
        table: Table,
        lines: &[String],
        what: &str,
    ) -> Result<(), CommandError> {
        self.check_finished()?;
        let input = format!("*{}\n{}\nCOMMIT\n", table.as_str(), lines.join("\n"));
        restore_input(programs, &input, what).await
    }
}

/// All of a step or nothing of it, without a moment in between.
pub(crate) async fn restore(programs: Programs, step: &RuleStep) -> Result<(), CommandError> {
    let commands = step.commands();
    let Some((table, _)) = commands.first() else { return Ok(()) };
    let lines: Vec<&str> = commands.iter().map(|(_, arguments)| arguments.as_str()).collect();
    let input = format!("*{}\n{}\nCOMMIT\n", table.as_str(), lines.join("\n"));
    restore_input(programs, &input, &step.to_string()).await
}

/// What `iptables-restore` takes, without touching anything else. It wants the name of the step for its error.
pub(super) async fn restore_input(programs: Programs, input: &str, step: &str) -> Result<(), CommandError> {
    let wait = format!("--wait={LOCK_WAIT_S}");
    let restore = command::start(programs.restore.as_ref(), &["--noflush", &wait], Stdio::piped())?;
    let ended = restore.finish(input.as_bytes()).await?;
    let command = format!("{}: {step}", programs.restore);
    match ended.code {
        Some(0) => Ok(()),
        // The programs over nf_tables, which know no lock, mean refusals by it too.
        Some(LOCKED) if programs.locks => Err(CommandError::Locked { command, said: ended.stderr }),
        _ => Err(CommandError::Failed { command, said: ended.stderr }),
    }
}

#[cfg(test)]
mod tests {
    use proto::time::Clock;

    use super::*;
    use crate::backend::iptables::Iptables;
    use crate::config::{ChainRef, FirewallConfig};
    use crate::plan::Family;

    /// A stand-in that notes its arguments and, the first time, goes on only once there is a file `go`.
    const HANGING: &str = "#!/bin/sh\ncd \"$(dirname \"$0\")\"\nif ! [ -e done ]; then until [ -e go ]; do sleep 0.02; done; fi\n\
                           echo \"$@\" >> done\n";

    #[test]
    fn nothing_is_changed_while_a_call_that_hung_may_still_come_into_effect() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("iptables");
        std::fs::write(&program, HANGING).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let name: &'static str = program.to_str().unwrap().to_owned().leak();
        let programs = Programs { change: name, save: name, restore: name, locks: true };
        let mut calls = Calls { deadline: Duration::from_millis(100), unfinished: None };
        let late = RuleStep::DeleteAt { table: Table::Raw, position: 2 };
        let place = ChainRef::new(Table::Raw, "PREROUTING");
        let others = [RuleStep::NewChain(Table::Raw), RuleStep::Lift { place, jumps: 1 }];
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let error = calls.apply(programs, &late).await.unwrap_err();
            assert!(error.to_string().contains("-D PORTCULLIS 2"), "{error}");
            for step in &others {
                assert!(matches!(calls.apply(programs, step).await, Err(CommandError::Unfinished { .. })));
            }
            assert!(matches!(calls.check_finished(), Err(CommandError::Unfinished { .. })));
            let mut iptables = Iptables::new(FirewallConfig::default(), false, Clock::system());
            iptables.calls = calls;
            let lifted = iptables.lift(&[Family::V4]).await;
            assert!(lifted.unfinished && lifted.failed == 1, "a teardown would not wait for it");
            calls = iptables.calls;
            assert!(!dir.path().join("done").exists(), "something was changed");

            std::fs::write(dir.path().join("go"), "").unwrap();
            while calls.check_finished().is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            calls.deadline = CALL_DEADLINE;
            calls.apply(programs, &others[0]).await.unwrap();
        });
        let done = std::fs::read_to_string(dir.path().join("done")).unwrap();
        assert_eq!(done, "-t raw -w 5 -D PORTCULLIS 2\n-t raw -w 5 -N PORTCULLIS\n");
    }
}
