//! What files hold, and hold after a reload: certificates and tokens.
//!
//! Whoever uses them asks for the value each time, or follows it. Files that are wrong change nothing.

use std::sync::Arc;

use tokio::sync::watch;

/// A value and the way to read it again.
pub struct Reloaded<T, E> {
    load: Arc<dyn Fn() -> Result<T, E> + Send + Sync>,
    value: watch::Sender<T>,
}

impl<T: Send + Sync + 'static, E: Send + 'static> Reloaded<T, E> {
    /// Reads for the first time. Blocks.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn new(load: impl Fn() -> Result<T, E> + Send + Sync + 'static) -> Result<Self, E> {
        let value = watch::Sender::new(load()?);
        Ok(Self { load: Arc::new(load), value })
    }

    /// The value as it is from now on.
    pub fn follow(&self) -> watch::Receiver<T> {
        self.value.subscribe()
    }

    /// Reads again, on a thread that may block.
    ///
    /// # Errors
    /// Those of `load`; the value stays as it was.
    pub async fn reload(&self) -> Result<(), E> {
        let load = Arc::clone(&self.load);
        let loaded = match tokio::task::spawn_blocking(move || load()).await {
            Ok(loaded) => loaded?,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        self.value.send_replace(loaded);
        Ok(())
    }
}

impl<T: std::fmt::Debug, E> std::fmt::Debug for Reloaded<T, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Reloaded").field(&*self.value.borrow()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_that_is_wrong_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("number");
        std::fs::write(&path, "1").unwrap();
        let read = path.clone();
        let load = move || std::fs::read_to_string(&read).unwrap_or_default().parse::<u32>();
        let number = Reloaded::new(load).unwrap();
        let mut followed = number.follow();
        for (text, is_right, after) in [("2", true, 2), ("two", false, 2), ("3", true, 3)] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(number.reload().await.is_ok(), is_right, "{text}");
            assert_eq!((*followed.borrow_and_update(), *number.follow().borrow()), (after, after));
        }
    }
}
