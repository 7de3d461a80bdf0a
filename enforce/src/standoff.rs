//! The file `paused` in `state_dir`: while it is there, this host lifts all bans and changes nothing of its firewall.
//!
//! Who enforces holds a lock in `state_dir`, and gives it away when it has lifted what it can and nothing that it began can
//! come into effect any more. So a teardown writes the file, waits for the lock, and removes what is ours while nobody puts
//! it back. What could not be lifted is tried again from time to time, with the lock, as nobody else may be there to. The file may be made and removed by hand as well:
//! it needs no bus, no detector and no API. It is of this host alone; what is done once for a cluster goes on.
//! Without a cluster Cloudflare follows it, too.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Uid, User};
use proto::report::Problem;

use crate::error::EnforceError;

/// Name of the file in `state_dir`.
pub const FILE: &str = "paused";
/// Name of the lock beside it.
const LOCK: &str = "enforce.lock";
/// What a teardown writes into the file.
const BY_TEARDOWN: &str = "portcullis enforce --teardown\n";
/// Characters of the file's first line that are told.
const WHY_CHARS_MAX: usize = 200;
/// How long a running enforce may take to let go: it ends what it has begun, for which programs of the host get 30 s each.
const RELEASE_DEADLINE: Duration = Duration::from_secs(120);
/// How long that is waited for before each time that it is said.
const WAITING_NOTE: Duration = Duration::from_secs(5);
/// How long one that starts waits for another to let go.
const START_DEADLINE: Duration = Duration::from_secs(5);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// Why this host is paused, for people; `None` when it is not.
fn read_pause(state_dir: &Path) -> Option<String> {
    let path = state_dir.join(FILE);
    let owner = fs::metadata(&path).ok()?.uid();
    let name = User::from_uid(Uid::from_raw(owner)).ok().flatten().map_or_else(|| owner.to_string(), |user| user.name);
    let text = fs::read(&path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let why: String =
        text.lines().next().unwrap_or("").chars().filter(|c| !c.is_control()).take(WHY_CHARS_MAX).collect();
    let why = if why.trim().is_empty() { "no reason given" } else { why.trim() };
    Some(format!("by the file {} of {name} ({why})", path.display()))
}

/// Takes the lock; `None` while another process has it.
fn take_lock(state_dir: &Path) -> io::Result<Option<File>> {
    let file = File::options().create(true).truncate(false).write(true).open(state_dir.join(LOCK))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// The side of who enforces.
#[derive(Debug)]
pub(crate) struct Gate {
    /// `None` where there is no file to look for.
    state_dir: Option<PathBuf>,
    /// A dry run takes no lock.
    locks: bool,
    lock: Option<File>,
    /// Why this host is paused.
    pub(crate) paused: Option<String>,
    /// Nothing of the firewall is changed until the file is gone, or what is left is tried again.
    pub(crate) stands_off: bool,
    /// Not everything was lifted when we last stood off.
    is_partial: bool,
}

impl Gate {
    /// Looks for the file for the first time, and takes the lock.
    pub(crate) async fn open(state_dir: Option<PathBuf>, dry_run: bool) -> Self {
        let paused = state_dir.as_deref().and_then(read_pause);
        let mut gate = Self { state_dir, locks: !dry_run, lock: None, paused, stands_off: false, is_partial: false };
        let mut waited = Duration::ZERO;
        while !gate.lock() && waited < START_DEADLINE {
            tokio::time::sleep(PAUSE).await;
            waited += PAUSE;
        }
        gate
    }

    /// Whether we have the lock, or may do without.
    fn lock(&mut self) -> bool {
        let Some(state_dir) = self.state_dir.as_deref().filter(|_| self.locks && self.lock.is_none()) else {
            return true;
        };
        match take_lock(state_dir) {
            Ok(lock) => {
                self.lock = lock;
                self.lock.is_some()
            }
            // A host that cannot write must still be protected.
            Err(error) => {
                tracing::warn!(path = %state_dir.join(LOCK).display(), %error, "Enforcing without a lock");
                self.locks = false;
                true
            }
        }
    }

    /// Looks for the file again, and tries the lock again if we lack it. Whether the pause changed; one that ends waits for the lock.
    pub(crate) fn look(&mut self) -> bool {
        let paused = self.state_dir.as_deref().and_then(read_pause);
        if paused.is_some() == self.paused.is_some() {
            self.paused = paused;
            if self.paused.is_none() {
                // Who held the lock at the start may be gone.
                self.lock();
            }
            return false;
        }
        if paused.is_none() && !self.lock() {
            return false;
        }
        (self.stands_off, self.is_partial) = (false, false);
        self.paused = paused;
        true
    }

    /// All is lifted, or `is_partial` what can be: from now on others may change what is ours.
    pub(crate) fn stand_off(&mut self, is_partial: bool) {
        (self.stands_off, self.is_partial) = (true, is_partial);
        self.lock = None;
    }

    /// Ends a stand-off in which something is left to lift, unless another has the lock.
    pub(crate) fn take_back(&mut self) -> bool {
        let taken = self.stands_off && self.is_partial && self.lock();
        self.stands_off &= !taken;
        taken
    }

    /// What people should know.
    pub(crate) fn problem(&self) -> Option<Problem> {
        if let Some(paused) = self.paused.as_ref().filter(|_| self.is_partial) {
            let text = format!(
                "paused {paused}: not all of ours could be lifted on this host, which is tried again; remove the file to \
                 enforce again"
            );
            return Some(Problem::degraded(text));
        }
        if let Some(paused) = &self.paused {
            let lifted = if self.stands_off { "all bans are lifted" } else { "bans are being lifted" };
            let text = format!("paused {paused}: {lifted} on this host; remove the file to enforce again");
            return Some(Problem::warning(text));
        }
        let is_shared = self.locks && self.lock.is_none() && self.state_dir.is_some();
        is_shared.then(|| Problem::warning("another process enforces with the same state_dir: give each its own"))
    }
}

/// Where enforce may keep its state: the configured folder, and those in it that the packaged units give to each service.
pub(crate) fn state_dirs(state_dir: &Path) -> Vec<PathBuf> {
    let inner = fs::read_dir(state_dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut inner: Vec<PathBuf> = inner.filter(|dir| dir.join(LOCK).exists()).collect();
    inner.sort();
    [vec![state_dir.to_owned()], inner].concat()
}

/// The files that a teardown would pause a running enforce by. Changes nothing.
pub fn files_of_running(state_dir: &Path) -> Vec<PathBuf> {
    let is_held = |dir: &PathBuf| {
        let lock = File::open(dir.join(LOCK));
        lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
    };
    state_dirs(state_dir).into_iter().filter(is_held).map(|dir| dir.join(FILE)).collect()
}

/// The side of a teardown: while it lives, nobody who keeps state in these folders changes the firewall.
#[derive(Debug)]
pub struct StandOff {
    _locks: Vec<File>,
    /// The files that keep a running enforce paused. Where none runs there is none, and the next to start enforces.
    pub files: Vec<PathBuf>,
}

impl StandOff {
    /// Has each running enforce lift what it can, and waits until it has.
    ///
    /// # Errors
    /// When a file cannot be written, or a running enforce does not let go; the file stays then.
    pub async fn begin(state_dir: &Path) -> Result<Self, EnforceError> {
        Self::begin_within(state_dir, RELEASE_DEADLINE).await
    }

    async fn begin_within(state_dir: &Path, deadline: Duration) -> Result<Self, EnforceError> {
        let (mut locks, mut files) = (Vec::new(), Vec::new());
        for dir in state_dirs(state_dir).into_iter().filter(|dir| dir.join(LOCK).exists()) {
            let file = dir.join(FILE);
            let failed = |source: io::Error| EnforceError::StandOff { path: file.clone(), source };
            let mut lock = take_lock(&dir).map_err(failed)?;
            if lock.is_none() {
                pause(&file).map_err(failed)?;
                let (mut waited, mut noted) = (Duration::ZERO, Duration::ZERO);
                while lock.is_none() && waited < deadline {
                    tokio::time::sleep(PAUSE).await;
                    waited += PAUSE;
                    if waited >= noted + WAITING_NOTE {
                        noted = waited;
                        tracing::info!(paused_by = %file.display(), "Waiting for a running enforce to end what it began");
                    }
                    lock = take_lock(&dir).map_err(failed)?;
                }
            }
            locks.push(lock.ok_or_else(|| EnforceError::NotReleased { path: file.clone(), after: deadline })?);
            files.extend(Some(file).filter(|file| file.exists()));
        }
        Ok(Self { _locks: locks, files })
    }
}

/// Makes the file, unless somebody has.
fn pause(file: &Path) -> io::Result<()> {
    match File::options().create_new(true).write(true).open(file) {
        Ok(mut made) => made.write_all(BY_TEARDOWN.as_bytes()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_file_says_who_and_why_and_a_pause_ends_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut gate = Gate::open(Some(dir.path().to_owned()), false).await;
        assert!(!gate.look() && gate.paused.is_none() && gate.problem().is_none());
        fs::write(dir.path().join(FILE), "maintenance until \u{1b}noon\nmore").unwrap();
        assert!(gate.look() && !gate.look());
        let problem = gate.problem().unwrap().text;
        assert!(problem.contains("(maintenance until noon)") && problem.contains(" of "), "{problem}");
        fs::remove_file(dir.path().join(FILE)).unwrap();
        assert!(gate.look() && gate.paused.is_none());
        let second = Gate { lock: None, ..Gate::open(None, false).await };
        assert!(second.problem().is_none(), "without a state_dir there is nothing to share");
    }

    #[tokio::test]
    async fn who_starts_while_another_holds_the_lock_takes_it_later() {
        let dir = tempfile::tempdir().unwrap();
        let other = take_lock(dir.path()).unwrap();
        let state_dir = Some(dir.path().to_owned());
        let mut gate = Gate { state_dir, locks: true, lock: None, ..Gate::open(None, true).await };
        assert!(!gate.look() && gate.problem().is_some());
        drop(other);
        assert!(!gate.look() && gate.problem().is_none());
        assert!(take_lock(dir.path()).unwrap().is_none(), "a teardown would not wait for us");
    }

    #[tokio::test]
    async fn a_teardown_waits_until_a_running_enforce_has_lifted_and_is_not_hurried_by_another() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("enforce");
        fs::create_dir(&inner).unwrap();
        drop(Gate::open(Some(inner.clone()), false).await);
        let alone = StandOff::begin(dir.path()).await.unwrap();
        assert_eq!(alone.files, [] as [PathBuf; 0], "nothing runs, so nothing is left behind");
        assert_eq!(dir.path().read_dir().unwrap().count(), 1, "nor where nothing ever ran");
        drop(alone);

        let mut gate = Gate::open(Some(inner.clone()), false).await;
        let state_dir = dir.path().to_owned();
        let waiting = tokio::spawn(async move { StandOff::begin(&state_dir).await });
        while !gate.look() {
            tokio::task::yield_now().await;
        }
        assert!(gate.paused.as_deref().unwrap().contains("portcullis enforce --teardown"));
        gate.stand_off(false);
        let held = waiting.await.unwrap().unwrap();
        assert_eq!(held.files, [inner.join(FILE)]);
        fs::remove_file(&held.files[0]).unwrap();
        assert!(!gate.look() && gate.stands_off, "the teardown is at work");
        drop(held);
        assert!(gate.look() && !gate.stands_off);
    }

    #[tokio::test]
    async fn what_could_not_be_lifted_is_tried_again_with_the_lock_and_told_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "").unwrap();
        let mut gate = Gate::open(Some(dir.path().to_owned()), false).await;
        gate.stand_off(true);
        assert!(gate.problem().unwrap().text.contains("not all of ours could be lifted"));
        let teardown = StandOff::begin(dir.path()).await.unwrap();
        assert!(!gate.take_back() && gate.stands_off, "a teardown is at work");
        drop(teardown);
        assert!(gate.take_back() && !gate.stands_off);
        assert!(take_lock(dir.path()).unwrap().is_none(), "a teardown would not wait for us");
        gate.stand_off(false);
        assert!(!gate.take_back() && gate.stands_off, "nothing is left to lift");
        assert!(gate.problem().unwrap().text.contains("all bans are lifted"));
    }

    #[tokio::test]
    async fn a_running_enforce_that_does_not_let_go_is_paused_and_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(files_of_running(dir.path()), [] as [PathBuf; 0]);
        let _gate = Gate::open(Some(dir.path().to_owned()), false).await;
        assert_eq!(files_of_running(dir.path()), [dir.path().join(FILE)]);
        assert!(!dir.path().join(FILE).exists());
        let error = StandOff::begin_within(dir.path(), PAUSE).await.unwrap_err();
        assert!(matches!(error, EnforceError::NotReleased { .. }), "{error}");
        assert!(dir.path().join(FILE).exists(), "it would go on enforcing");
    }
}
