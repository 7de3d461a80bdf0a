//! Word of what became of a batch, for senders that wait for it.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A share in the word about what somebody has sent. Once all shares are gone, the sender is told whether everything is
/// safe: it is when each share was [delivered](Receipt::deliver), and not when one was just dropped.
#[derive(Debug)]
pub struct Receipt {
    told: Arc<Told>,
    delivered: bool,
}

struct Told {
    lost: AtomicBool,
    tell: Mutex<Option<Tell>>,
}

type Tell = Box<dyn FnOnce(bool) + Send>;

impl Receipt {
    /// The first share. `tell` is called once, with whether everything is safe.
    pub fn new(tell: impl FnOnce(bool) + Send + 'static) -> Self {
        let tell: Tell = Box::new(tell);
        Self { told: Arc::new(Told { lost: AtomicBool::new(false), tell: Mutex::new(Some(tell)) }), delivered: false }
    }

    /// What this is a share of is safe.
    pub fn deliver(mut self) {
        self.delivered = true;
    }
}

/// Another share of the same.
impl Clone for Receipt {
    fn clone(&self) -> Self {
        Self { told: self.told.clone(), delivered: false }
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if !self.delivered {
            self.told.lost.store(true, Ordering::Release);
        }
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(tell) = self.tell.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            tell(!self.lost.load(Ordering::Acquire));
        }
    }
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Told").field("lost", &self.lost).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, TryRecvError, channel};

    use super::*;

    fn receipt() -> (Receipt, Receiver<bool>) {
        let (sender, told) = channel();
        (Receipt::new(move |safe| sender.send(safe).unwrap()), told)
    }

    #[test]
    fn the_sender_is_told_once_every_share_is_delivered() {
        let (first, told) = receipt();
        let second = first.clone();
        first.deliver();
        assert_eq!(told.try_recv(), Err(TryRecvError::Empty));
        second.deliver();
        assert_eq!(told.try_recv(), Ok(true));
    }

    #[test]
    fn one_share_that_is_dropped_makes_all_unsafe() {
        let (first, told) = receipt();
        let second = first.clone();
        drop(first);
        assert_eq!(told.try_recv(), Err(TryRecvError::Empty));
        second.deliver();
        assert_eq!(told.try_recv(), Ok(false));
    }
}
