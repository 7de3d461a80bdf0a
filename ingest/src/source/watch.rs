//! The kernel's notifications: which files grew, and whether a directory changed.
//!
//! Only a hint that saves waiting. Everything is looked at again at every poll interval anyway, because notifications
//! may be missing (network file systems), overflow, or meet a limit; then this says so once and does without.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::future;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::unix::AsyncFd;

use super::tail::FileKey;

/// Room for some hundred events at a time.
const EVENT_BYTES: usize = 16 << 10;

/// What the notifications say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Files with new content.
    pub(super) files: BTreeSet<FileKey>,
    /// Whether names in a directory changed.
    pub(super) names: bool,
    /// Whether notifications were lost, so that everything may have changed.
    pub(super) all: bool,
}

/// Watches of one source.
pub(super) struct Watch {
    inotify: Option<AsyncFd<Inotify>>,
    directories: BTreeMap<PathBuf, WatchDescriptor>,
    files: BTreeMap<FileKey, WatchDescriptor>,
    by_descriptor: HashMap<WatchDescriptor, FileKey>,
    /// Why it is polled only.
    failure: Option<String>,
    buffer: Vec<u8>,
}

impl Watch {
    /// Starts watching nothing. Must run inside a tokio runtime.
    pub(super) fn new(wanted: bool) -> Self {
        let mut watch = Self {
            inotify: None,
            directories: BTreeMap::new(),
            files: BTreeMap::new(),
            by_descriptor: HashMap::new(),
            failure: None,
            buffer: vec![0; EVENT_BYTES],
        };
        if wanted {
            #[expect(deprecated, reason = "its successor is unsafe; an Inotify keeps its one descriptor for life")]
            let started = Inotify::init().and_then(AsyncFd::new);
            match started {
                Ok(inotify) => watch.inotify = Some(inotify),
                Err(error) => watch.failure = Some(format!("inotify cannot be started: {error}")),
            }
        }
        watch
    }

    /// Why notifications are missing, although they are wanted.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// From now on these directories are watched, and no others. Whether any is new: what was put into it before the
    /// watch was there has told nobody.
    pub(super) fn set_directories(&mut self, wanted: &BTreeSet<PathBuf>) -> bool {
        let mut any_new = false;
        let gone: Vec<PathBuf> = self.directories.keys().filter(|path| !wanted.contains(*path)).cloned().collect();
        for path in gone {
            if let Some(descriptor) = self.directories.remove(&path) {
                self.remove(descriptor);
            }
        }
        let names = WatchMask::CREATE | WatchMask::MOVED_FROM | WatchMask::MOVED_TO | WatchMask::DELETE;
        let names = names | WatchMask::MOVE_SELF;
        for path in wanted {
            // Asked for each time: a directory that was deleted while a file in it is open is not told of, and another
            // may have taken its path. For the same directory the kernel gives the same descriptor.
            let found = self.add(path, names | WatchMask::ONLYDIR);
            if self.directories.get(path) == found.as_ref() {
                continue;
            }
            any_new |= found.is_some();
            let former = match found {
                Some(descriptor) => self.directories.insert(path.clone(), descriptor),
                None => self.directories.remove(path),
            };
            if let Some(former) = former {
                self.remove(former);
            }
        }
        any_new
    }

    /// Watches an open file, whatever its name is now.
    pub(super) fn add_file(&mut self, key: FileKey, file: &File) {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        if let Some(descriptor) = self.add(Path::new(&path), WatchMask::MODIFY) {
            self.by_descriptor.insert(descriptor.clone(), key);
            self.files.insert(key, descriptor);
        }
    }

    /// Ends the watch of a file.
    pub(super) fn remove_file(&mut self, key: FileKey) {
        if let Some(descriptor) = self.files.remove(&key) {
            self.by_descriptor.remove(&descriptor);
            self.remove(descriptor);
        }
    }

    fn add(&mut self, path: &Path, mask: WatchMask) -> Option<WatchDescriptor> {
        match self.inotify.as_ref()?.get_ref().watches().add(path, mask) {
            Ok(descriptor) => Some(descriptor),
            // A directory or file that has just gone is no failure.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                self.failure.get_or_insert_with(|| {
                    format!("inotify cannot watch everything ({error}); raise fs.inotify.max_user_watches")
                });
                None
            }
        }
    }

    fn remove(&self, descriptor: WatchDescriptor) {
        if let Some(inotify) = &self.inotify {
            // The kernel has removed the watch already when its file is gone.
            let _ = inotify.get_ref().watches().remove(descriptor);
        }
    }

    /// Waits for the next notification and takes all that are there. Never returns without inotify.
    pub(super) async fn changed(&mut self) -> Changes {
        let Some(inotify) = &mut self.inotify else { return future::pending().await };
        loop {
            let Ok(mut guard) = inotify.readable_mut().await else {
                // Only at the end of the runtime.
                return future::pending().await;
            };
            let read = guard.try_io(|inotify| {
                let events = inotify.get_mut().read_events(&mut self.buffer)?;
                let mut changes = Changes::default();
                let mut gone = Vec::new();
                for event in events {
                    if event.mask.contains(EventMask::Q_OVERFLOW) {
                        changes.all = true;
                    } else if let Some(key) = self.by_descriptor.get(&event.wd) {
                        changes.files.insert(*key);
                    } else {
                        let is_gone = event.mask.intersects(EventMask::IGNORED | EventMask::MOVE_SELF);
                        gone.extend(is_gone.then_some(event.wd));
                        let is_own = event.mask.contains(EventMask::IGNORED)
                            && !self.directories.values().any(|descriptor| gone.last() == Some(descriptor));
                        changes.names |= !is_own;
                    }
                }
                // Another directory may take its path: the next scan watches that one.
                self.directories.retain(|_, descriptor| {
                    let is_gone = gone.contains(descriptor);
                    if is_gone {
                        // The kernel has removed the watch of a directory that was deleted.
                        let _ = inotify.get_ref().watches().remove(descriptor.clone());
                    }
                    !is_gone
                });
                Ok(changes)
            });
            match read {
                Ok(Ok(changes)) => return changes,
                Ok(Err(error)) => {
                    self.failure = Some(format!("inotify cannot be read: {error}"));
                    self.inotify = None;
                    return Changes { all: true, ..Changes::default() };
                }
                Err(_would_block) => {}
            }
        }
    }
}
