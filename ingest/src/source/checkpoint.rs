//! Up to where each file has been delivered, kept on disk: where the next start goes on.
//!
//! A position moves on only over what is acknowledged without a gap, so that what was under way at a crash is read and sent
//! again; detection drops repeats. The file is a small versioned JSON, replaced as a whole: a crash leaves the old one or
//! the new one. One that cannot be read is set aside and all logs begin anew, which loses nothing either.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use proto::event::{FileSpan, Position, Positions};
use serde::{Deserialize, Serialize};

/// Name of the file in the state directory.
pub const FILE: &str = "ingest.json";
/// The version that is written. Every version ever written can be read.
const VERSION: u32 = 1;
/// Generations that are remembered, twice as many as can be open. Whoever was not delivered from for longest is forgotten
/// first, and would be read from its beginning.
pub const GENERATIONS_MAX: usize = 1024;

/// One generation of one source's file.
type Key = (String, u64);

/// The positions could not be read, set aside or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the positions in the logs at {}", .path.display())]
pub struct CheckpointError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What was found at the start, and where to write.
#[derive(Debug)]
pub struct Checkpoint {
    pub(crate) state_dir: PathBuf,
    pub(crate) progress: Progress,
    pub(crate) set_aside: Option<PathBuf>,
}

impl Checkpoint {
    /// Reads the positions in `state_dir`; there are none where there is no file, or one that nobody can read, which is
    /// renamed.
    ///
    /// # Errors
    /// When the file is there and cannot be read from the disk, or not be renamed.
    pub fn open(state_dir: &Path) -> Result<Self, CheckpointError> {
        let path = state_dir.join(FILE);
        let error = |action, source| CheckpointError { action, path: path.clone(), source };
        let (progress, set_aside) = match fs::read(&path) {
            Ok(bytes) => match decode(&bytes) {
                Some(progress) => (progress, None),
                None => {
                    let aside = state_dir.join(format!("{FILE}.damaged"));
                    fs::rename(&path, &aside).map_err(|source| error("set aside", source))?;
                    (Progress::default(), Some(aside))
                }
            },
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => Default::default(),
            Err(source) => return Err(error("read", source)),
        };
        Ok(Self { state_dir: state_dir.to_owned(), progress, set_aside })
    }

    /// Where the sources begin to read.
    pub fn positions(&self) -> Positions {
        self.progress.positions()
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    /// Longest without a delivery first.
    files: Vec<StoredFile>,
}

#[derive(Serialize, Deserialize)]
struct StoredFile {
    source: String,
    generation: u64,
    /// Bytes from the beginning of the file that need not be read again.
    offset: u64,
}

pub(crate) fn decode(bytes: &[u8]) -> Option<Progress> {
    let stored: Stored = serde_json::from_slice(bytes).ok()?;
    let mut progress = Progress::default();
    for StoredFile { source, generation, offset } in stored.files {
        progress.begin((source, generation), offset);
    }
    (stored.version == VERSION).then_some(progress)
}

/// The content of the file.
pub(crate) fn encode(progress: &Progress) -> Vec<u8> {
    let mut known: Vec<_> = progress.known.iter().collect();
    known.sort_by_key(|(_, known)| known.touched);
    let files = known.into_iter().map(|((source, generation), known)| StoredFile {
        source: source.clone(),
        generation: *generation,
        offset: known.offset,
    });
    let stored = Stored { version: VERSION, files: files.collect() };
    serde_json::to_vec(&stored).expect("names and numbers are JSON")
}

/// Replaces the file by `content`. Durable when it returns.
pub(crate) fn store(state_dir: &Path, content: &[u8]) -> Result<(), CheckpointError> {
    let path = state_dir.join(FILE);
    let fresh = state_dir.join(format!("{FILE}.new"));
    let write = || {
        let mut file = File::create(&fresh)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        File::open(state_dir)?.sync_all()
    };
    write().map_err(|source| CheckpointError { action: "write", path: path.clone(), source })
}

/// What is delivered of each generation. Pure.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    known: BTreeMap<Key, Known>,
    /// What is sent of each generation and stands at or after its position, in the order of the file.
    sent: BTreeMap<Key, VecDeque<Stretch>>,
    changes: u64,
}

#[derive(Debug)]
struct Known {
    offset: u64,
    /// Of [`Progress::changes`].
    touched: u64,
}

#[derive(Debug)]
struct Stretch {
    number: u64,
    /// Where it ends; `None` when a restart must not begin there.
    end: Option<u64>,
    acknowledged: bool,
}

impl Progress {
    /// How often a position has changed: what is stored is up to date when this is what it was.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// Where each generation goes on. Only the newest of a source is worth a word when its file is gone: the others have
    /// been rotated away.
    pub(crate) fn positions(&self) -> Positions {
        let mut newest: BTreeMap<&str, u64> = BTreeMap::new();
        for ((source, _), known) in &self.known {
            let touched = newest.entry(source).or_default();
            *touched = known.touched.max(*touched);
        }
        let position = |source: &str, known: &Known| {
            let needed = newest.get(source) == Some(&known.touched);
            Position { offset: known.offset, needed }
        };
        self.known.iter().map(|(key, known)| (key.clone(), position(&key.0, known))).collect()
    }

    /// A stretch of a file is to be delivered. From now on its generation is known, so that a restart begins there, not at
    /// the end of the file.
    pub(crate) fn handle_begun(&mut self, source: &str, span: FileSpan) {
        self.begin((source.to_owned(), span.generation), span.start);
    }

    /// The payload `number` is sent. Payloads of one generation are sent in the order of the file.
    pub(crate) fn handle_sent(&mut self, number: u64, source: &str, generation: u64, end: Option<u64>) {
        let sent = self.sent.entry((source.to_owned(), generation)).or_default();
        sent.push_back(Stretch { number, end, acknowledged: false });
    }

    /// The payload `number` is kept for good.
    pub(crate) fn handle_acknowledged(&mut self, number: u64, source: &str, generation: u64) {
        let key = (source.to_owned(), generation);
        let Some(sent) = self.sent.get_mut(&key) else { return };
        if let Some(stretch) = sent.iter_mut().find(|stretch| stretch.number == number) {
            stretch.acknowledged = true;
        }
        let mut end = None;
        while let Some(stretch) = sent.pop_front_if(|stretch| stretch.acknowledged) {
            end = end.max(stretch.end);
        }
        if sent.is_empty() {
            self.sent.remove(&key);
        }
        let Some(end) = end else { return };
        self.begin(key.clone(), 0);
        self.changes += 1;
        if let Some(known) = self.known.get_mut(&key) {
            *known = Known { offset: known.offset.max(end), touched: self.changes };
        }
    }

    fn begin(&mut self, key: Key, offset: u64) {
        if self.known.contains_key(&key) {
            return;
        }
        if self.known.len() >= GENERATIONS_MAX {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.touched).map(|(key, _)| key.clone());
            oldest.and_then(|oldest| self.known.remove(&oldest));
        }
        self.changes += 1;
        self.known.insert(key, Known { offset, touched: self.changes });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(generation: u64, start: u64, end: u64) -> FileSpan {
        FileSpan { generation, start, end }
    }

    fn offsets(positions: &Positions) -> Vec<(u64, u64)> {
        positions.iter().map(|((_, generation), position)| (*generation, position.offset)).collect()
    }

    #[test]
    fn a_position_waits_for_what_is_before_it() {
        let mut progress = Progress::default();
        progress.handle_begun("a", span(1, 100, 400));
        for (number, end) in [(1, 200), (2, 300), (3, 400)] {
            progress.handle_sent(number, "a", 1, Some(end));
        }
        progress.handle_acknowledged(3, "a", 1);
        progress.handle_acknowledged(2, "a", 1);
        assert_eq!(offsets(&progress.positions()), [(1, 100)]);
        progress.handle_acknowledged(1, "a", 1);
        assert_eq!(offsets(&progress.positions()), [(1, 400)]);
        assert!(progress.sent.is_empty());
    }

    #[test]
    fn a_restart_does_not_begin_between_the_parts_of_a_batch() {
        let mut progress = Progress::default();
        progress.handle_begun("a", span(1, 0, 200));
        progress.handle_sent(1, "a", 1, None);
        progress.handle_sent(2, "a", 1, Some(200));
        progress.handle_acknowledged(1, "a", 1);
        assert_eq!(offsets(&progress.positions()), [(1, 0)]);
        progress.handle_acknowledged(2, "a", 1);
        assert_eq!(offsets(&progress.positions()), [(1, 200)]);
    }

    #[test]
    fn the_generation_without_deliveries_for_longest_is_forgotten_first() {
        let mut progress = Progress::default();
        for generation in 0..GENERATIONS_MAX as u64 {
            progress.handle_begun("a", span(generation, 0, 10));
        }
        progress.handle_sent(0, "a", 0, Some(10));
        progress.handle_acknowledged(0, "a", 0);
        progress.handle_begun("b", span(7, 0, 10));
        let positions = progress.positions();
        assert_eq!(positions.len(), GENERATIONS_MAX);
        assert!(positions.contains_key(&("a".to_owned(), 0)) && !positions.contains_key(&("a".to_owned(), 1)));
        let needed: Vec<_> =
            positions.iter().filter(|(_, position)| position.needed).map(|(key, _)| key.clone()).collect();
        assert_eq!(needed, [("a".to_owned(), 0), ("b".to_owned(), 7)]);
    }

    #[test]
    fn version_1_is_readable_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), include_bytes!("../../testdata/checkpoint-v1.json")).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let expected = [("api", 7, 0, true), ("traefik", 1, 400, false), ("traefik", u64::MAX, 1 << 40, true)]
            .map(|(source, generation, offset, needed)| ((source.to_owned(), generation), Position { offset, needed }));
        assert_eq!(checkpoint.positions(), Positions::from(expected));
        assert_eq!(
            encode(&checkpoint.progress),
            include_str!("../../testdata/checkpoint-v1.json").trim_end().as_bytes()
        );
    }

    #[test]
    fn what_is_stored_is_found_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(checkpoint.positions().is_empty() && checkpoint.set_aside.is_none());
        checkpoint.progress.handle_begun("a", span(1, 5, 9));
        store(dir.path(), b"[]").unwrap();
        store(dir.path(), &encode(&checkpoint.progress)).unwrap();
        assert_eq!(Checkpoint::open(dir.path()).unwrap().positions(), checkpoint.positions());
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [FILE]);
    }

    #[test]
    fn a_file_that_nobody_can_read_is_set_aside() {
        for content in ["{\"version\":1,\"files\":[{", "", "{\"version\":2,\"files\":[]}"] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(FILE), content).unwrap();
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            assert!(checkpoint.positions().is_empty());
            assert_eq!(fs::read_to_string(checkpoint.set_aside.unwrap()).unwrap(), content);
            assert!(Checkpoint::open(dir.path()).unwrap().set_aside.is_none());
        }
    }
}
