//! The state on disk: one redb file, one transaction a commit.
//!
//! A commit holds bans, histories, files' decided ranges and what there is one of, all or nothing, and is durable when
//! it returns. So a process killed at any moment finds on disk a state that some event left behind, and reads the lines
//! after it again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::ban::BanRecord;
use proto::net::Target;
use proto::time::Timestamp;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition, WriteTransaction};

use crate::engine::offender::Offender;
use crate::engine::stream::{FileChange, FileKey, FileState, Mark, Position, Ranges};
use crate::engine::{Control, Snapshot};
use crate::error::StoreError;
use crate::state::{
    DecodeError, VERSION, decode_control, decode_offender, decode_record, encode_control, encode_offender,
    encode_record,
};

/// Name of the file in `state_dir`.
pub const FILE_NAME: &str = "detect.redb";
/// Tries to open a file in use.
const IN_USE_TRIES: u32 = 100;
/// Between two tries to open a file in use. Who was killed is gone at once, but a program that it was just starting has the
/// file open for some milliseconds more.
const IN_USE_PAUSE: Duration = Duration::from_millis(10);

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const BANS: TableDefinition<&str, &[u8]> = TableDefinition::new("bans");
const OFFENDERS: TableDefinition<&str, &[u8]> = TableDefinition::new("offenders");
/// (node, source, generation) -> (id, arrival of the newest line).
const FILES: TableDefinition<(&str, &str, u64), (u64, i64)> = TableDefinition::new("files");
/// (file id, start) -> end.
const DECIDED: TableDefinition<(u64, u64), u64> = TableDefinition::new("decided");
/// (file id, offset) -> (position, arrival).
const MARKS: TableDefinition<(u64, u64), (u64, i64)> = TableDefinition::new("marks");

/// Everything that changes at once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Commit {
    /// Bans to put or, where `None`, to remove.
    pub records: BTreeMap<Target, Option<BanRecord>>,
    /// Histories to put or to remove.
    pub offenders: BTreeMap<Target, Option<Offender>>,
    /// What there is one of.
    pub control: Option<Control>,
    /// Files that moved on.
    pub files: Vec<FileChange>,
    /// Files that are forgotten.
    pub forgotten: Vec<FileKey>,
}

impl Commit {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Targets and histories that change.
    pub fn len(&self) -> usize {
        self.records.len() + self.offenders.len()
    }

    /// Whether it holds more than files' progress, which can wait.
    pub fn is_urgent(&self) -> bool {
        !self.records.is_empty() || !self.offenders.is_empty() || self.control.is_some()
    }
}

/// The open state file.
#[derive(Debug)]
pub struct Store {
    /// `None` between a failed commit and the next try.
    database: Option<Database>,
    /// `None` = in memory.
    path: Option<PathBuf>,
    ids: BTreeMap<FileKey, u64>,
    next_id: u64,
}

/// What was found at start.
#[derive(Debug)]
pub struct Opened {
    /// The store, ready for commits.
    pub store: Store,
    /// What it holds.
    pub snapshot: Snapshot,
    /// Where a damaged file was moved to, in which case the snapshot is empty.
    pub set_aside: Option<PathBuf>,
}

fn access<E: Into<redb::Error>>(action: &'static str) -> impl FnOnce(E) -> StoreError {
    move |source| StoreError::Access { action, source: Box::new(source.into()) }
}

impl Store {
    /// Opens or creates the state in `dir`. A damaged file is set aside, as starting without history protects better
    /// than not starting.
    ///
    /// # Errors
    /// When the file is in use, was written by a newer version, or cannot be read or written.
    pub fn open(dir: &Path, now: Timestamp) -> Result<Opened, StoreError> {
        let path = dir.join(FILE_NAME);
        match Self::open_file(&path) {
            Ok((store, snapshot)) => Ok(Opened { store, snapshot, set_aside: None }),
            Err(error) if is_damage(&error) => {
                let aside = dir.join(format!("{FILE_NAME}.damaged-{}", now.as_millis() / 1000));
                std::fs::rename(&path, &aside).map_err(|source| StoreError::SetAside { path: path.clone(), source })?;
                tracing::error!(%error, moved_to = %aside.display(), "State file is damaged, starting without history");
                let (store, snapshot) = Self::open_file(&path)?;
                Ok(Opened { store, snapshot, set_aside: Some(aside) })
            }
            Err(error) => Err(error),
        }
    }

    /// A store that keeps everything in memory, for runs that may not write.
    ///
    /// # Errors
    /// None in practice.
    pub fn in_memory() -> Result<Self, StoreError> {
        let database = Database::builder()
            .create_with_backend(redb::backends::InMemoryBackend::new())
            .map_err(access("create"))?;
        Self::from_database(database, None).map(|(store, _)| store)
    }

    fn open_file(path: &Path) -> Result<(Self, Snapshot), StoreError> {
        Self::from_database(create(path)?, Some(path.to_owned()))
    }

    fn from_database(database: Database, path: Option<PathBuf>) -> Result<(Self, Snapshot), StoreError> {
        create_tables(&database)?;
        let mut store = Self { database: None, path, ids: BTreeMap::new(), next_id: 1 };
        let snapshot = store.read(&database)?;
        store.database = Some(database);
        Ok((store, snapshot))
    }

    fn read(&mut self, database: &Database) -> Result<Snapshot, StoreError> {
        let begun = database.begin_read().map_err(access("read"))?;
        let mut snapshot = Snapshot::default();
        if let Some(control) = begun.open_table(META).map_err(access("read"))?.get("control").map_err(access("read"))? {
            snapshot.control = decode_control(control.value())?;
        }
        for row in begun.open_table(BANS).map_err(access("read"))?.iter().map_err(access("read"))? {
            let (key, value) = row.map_err(access("read"))?;
            if let Ok(target) = key.value().parse() {
                snapshot.bans.push(decode_record(target, value.value())?);
            }
        }
        for row in begun.open_table(OFFENDERS).map_err(access("read"))?.iter().map_err(access("read"))? {
            let (key, value) = row.map_err(access("read"))?;
            if let Ok(target) = key.value().parse() {
                snapshot.offenders.push((target, decode_offender(value.value())?));
            }
        }
        let decided = begun.open_table(DECIDED).map_err(access("read"))?;
        let marks = begun.open_table(MARKS).map_err(access("read"))?;
        for row in begun.open_table(FILES).map_err(access("read"))?.iter().map_err(access("read"))? {
            let (key, value) = row.map_err(access("read"))?;
            let (node, source, generation) = key.value();
            let (id, arrival) = value.value();
            let mut state = FileState { last_arrival: Timestamp::from_nanos(arrival), ..FileState::default() };
            for row in decided.range((id, 0)..=(id, u64::MAX)).map_err(access("read"))? {
                let (start, end) = row.map_err(access("read"))?;
                state.decided.0.push((start.value().1, end.value()));
            }
            for row in marks.range((id, 0)..=(id, u64::MAX)).map_err(access("read"))? {
                let (key, value) = row.map_err(access("read"))?;
                let (position, arrival) = value.value();
                let (position, arrival) = (Position(position), Timestamp::from_nanos(arrival));
                state.marks.push(Mark { offset: key.value().1, position, arrival });
            }
            let key = FileKey { node: node.into(), source: source.into(), generation };
            self.ids.insert(key.clone(), id);
            self.next_id = self.next_id.max(id + 1);
            snapshot.files.push((key, state));
        }
        Ok(snapshot)
    }

    /// Writes a commit; it is on disk when this returns.
    ///
    /// # Errors
    /// When the disk is full or fails; nothing of the commit is stored then.
    pub fn commit(&mut self, commit: &Commit) -> Result<(), StoreError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => self.reopen()?,
        };
        // After a failure redb refuses everything until the file is opened anew.
        let written = self.commit_to(&database, commit);
        if written.is_ok() || self.path.is_none() {
            self.database = Some(database);
        }
        written
    }

    fn commit_to(&mut self, database: &Database, commit: &Commit) -> Result<(), StoreError> {
        let begun = database.begin_write().map_err(access("write"))?;
        self.write(&begun, commit)
            .map_err(|source| StoreError::Access { action: "write", source: Box::new(source) })?;
        begun.commit().map_err(access("write"))
    }

    fn reopen(&mut self) -> Result<Database, StoreError> {
        let path = self.path.clone().unwrap_or_default();
        let database = create(&path)?;
        // What the file holds is known; only the numbers of files may have been given for nothing.
        self.ids.clear();
        self.read(&database)?;
        Ok(database)
    }

    fn write(&mut self, begun: &WriteTransaction, commit: &Commit) -> Result<(), redb::Error> {
        if let Some(control) = &commit.control {
            begun.open_table(META)?.insert("control", encode_control(control).as_slice())?;
        }
        let mut bans = begun.open_table(BANS)?;
        for (target, record) in &commit.records {
            let key = target.to_string();
            match record {
                Some(record) => drop(bans.insert(key.as_str(), encode_record(record).as_slice())?),
                None => drop(bans.remove(key.as_str())?),
            }
        }
        let mut offenders = begun.open_table(OFFENDERS)?;
        for (target, offender) in &commit.offenders {
            let key = target.to_string();
            match offender {
                Some(offender) => drop(offenders.insert(key.as_str(), encode_offender(offender).as_slice())?),
                None => drop(offenders.remove(key.as_str())?),
            }
        }
        for change in &commit.files {
            let id = *self.ids.entry(change.key.clone()).or_insert_with(|| {
                self.next_id += 1;
                self.next_id - 1
            });
            write_file(begun, id, change)?;
        }
        for key in &commit.forgotten {
            if let Some(id) = self.ids.remove(key) {
                begun.open_table(FILES)?.remove((&*key.node, &*key.source, key.generation))?;
                begun.open_table(DECIDED)?.retain_in((id, 0)..=(id, u64::MAX), |_, _| false)?;
                begun.open_table(MARKS)?.retain_in((id, 0)..=(id, u64::MAX), |_, _| false)?;
            }
        }
        Ok(())
    }
}

fn create(path: &Path) -> Result<Database, StoreError> {
    for _ in 0..IN_USE_TRIES {
        match Database::create(path) {
            Err(DatabaseError::DatabaseAlreadyOpen) => std::thread::sleep(IN_USE_PAUSE),
            done => {
                return done.map_err(|source| StoreError::Open { path: path.to_owned(), source: Box::new(source) });
            }
        }
    }
    Err(StoreError::InUse(path.to_owned()))
}

fn create_tables(database: &Database) -> Result<(), StoreError> {
    let begun = database.begin_write().map_err(access("open"))?;
    {
        let mut meta = begun.open_table(META).map_err(access("open"))?;
        let known = meta.get("version").map_err(access("read"))?.map(|v| v.value().to_vec());
        match known {
            None => {
                meta.insert("version", VERSION.to_string().as_bytes()).map_err(access("write"))?;
            }
            Some(text) => {
                let version = std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok()).unwrap_or(u32::MAX);
                if version > VERSION {
                    return Err(DecodeError::Newer(version).into());
                }
            }
        }
        begun.open_table(BANS).map_err(access("open"))?;
        begun.open_table(OFFENDERS).map_err(access("open"))?;
        begun.open_table(FILES).map_err(access("open"))?;
        begun.open_table(DECIDED).map_err(access("open"))?;
        begun.open_table(MARKS).map_err(access("open"))?;
    }
    begun.commit().map_err(access("write"))
}

fn write_file(begun: &WriteTransaction, id: u64, change: &FileChange) -> Result<(), redb::Error> {
    let key = &change.key;
    let arrival = change.last_arrival.as_nanos();
    begun.open_table(FILES)?.insert((&*key.node, &*key.source, key.generation), (id, arrival))?;
    let mut decided = begun.open_table(DECIDED)?;
    let Ranges(ranges) = &change.decided;
    decided.retain_in((id, 0)..=(id, u64::MAX), |(_, start), _| ranges.iter().any(|range| range.0 == start))?;
    for &(start, end) in ranges {
        decided.insert((id, start), end)?;
    }
    let mut marks = begun.open_table(MARKS)?;
    marks.retain_in((id, 0)..(id, change.marks_from), |_, _| false)?;
    marks.retain_in((id, change.unsaved_from)..=(id, u64::MAX), |_, _| false)?;
    for mark in &change.marks {
        marks.insert((id, mark.offset), (mark.position.0, mark.arrival.as_nanos()))?;
    }
    Ok(())
}

fn is_damage(error: &StoreError) -> bool {
    match error {
        StoreError::Open { source, .. } => {
            matches!(
                **source,
                DatabaseError::Storage(StorageError::Corrupted(_))
                    | DatabaseError::RepairAborted
                    | DatabaseError::UpgradeRequired(_)
            ) || is_not_a_database(source)
        }
        StoreError::Access { source, .. } => matches!(**source, redb::Error::Corrupted(_)),
        StoreError::Decode(DecodeError::Malformed { .. }) => true,
        _ => false,
    }
}

fn is_not_a_database(error: &DatabaseError) -> bool {
    matches!(error, DatabaseError::Storage(StorageError::Io(io)) if io.kind() == std::io::ErrorKind::InvalidData)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(generation: u64) -> FileKey {
        FileKey { node: "n".into(), source: "s".into(), generation }
    }

    fn mark(offset: u64, position: u64) -> Mark {
        Mark { offset, position: Position(position), arrival: Timestamp::from_secs(position as i64) }
    }

    fn change(ranges: &[(u64, u64)], marks_from: u64, unsaved_from: u64, marks: &[Mark]) -> FileChange {
        let decided = Ranges(ranges.to_vec());
        let last_arrival = Timestamp::from_secs(9);
        FileChange { key: key(1), decided, last_arrival, marks_from, unsaved_from, marks: marks.to_vec() }
    }

    fn reopen(dir: &Path) -> Opened {
        Store::open(dir, Timestamp::EPOCH).unwrap()
    }

    #[test]
    fn what_is_committed_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let target: Target = "192.0.2.1".parse().unwrap();
        let record = BanRecord { target, bans: Vec::new() };
        let control = Control { position: Position(5), ..Control::default() };
        let mut store = reopen(dir.path()).store;
        store
            .commit(&Commit {
                records: BTreeMap::from([(target, Some(record.clone()))]),
                offenders: BTreeMap::from([(target, Some(Offender::default()))]),
                control: Some(control.clone()),
                files: vec![change(&[(0, 10), (20, 30)], 0, 0, &[mark(0, 1), mark(5, 2)])],
                forgotten: Vec::new(),
            })
            .unwrap();
        store.commit(&Commit { files: vec![change(&[(0, 40)], 5, 20, &[mark(20, 3)])], ..Commit::default() }).unwrap();
        assert!(matches!(Store::open(dir.path(), Timestamp::EPOCH), Err(StoreError::InUse(_))));
        drop(store);

        let opened = reopen(dir.path());
        assert_eq!(opened.snapshot.bans, [record]);
        assert_eq!(opened.snapshot.offenders, [(target, Offender::default())]);
        assert_eq!(opened.snapshot.control, control);
        let (found, state) = &opened.snapshot.files[0];
        assert_eq!((found, &state.decided.0, &state.marks), (&key(1), &vec![(0, 40)], &vec![mark(5, 2), mark(20, 3)]));

        let mut store = opened.store;
        let gone = Commit { records: BTreeMap::from([(target, None)]), forgotten: vec![key(1)], ..Commit::default() };
        store.commit(&gone).unwrap();
        drop(store);
        let snapshot = reopen(dir.path()).snapshot;
        assert!(snapshot.bans.is_empty() && snapshot.files.is_empty());
    }

    #[test]
    fn a_failed_commit_is_made_up_for_once_the_disk_works_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = reopen(dir.path()).store;
        // redb refuses everything after a failure, until the file is opened anew: as if the disk had been full.
        store.database = None;
        store.ids.insert(key(9), 77);
        let path = store.path.replace(dir.path().join("no/such/directory"));
        let commit = Commit { files: vec![change(&[(0, 10)], 0, 0, &[])], ..Commit::default() };
        assert!(store.commit(&commit).is_err() && store.commit(&commit).is_err());
        store.path = path;
        store.commit(&commit).unwrap();
        assert!(!store.ids.contains_key(&key(9)));
        drop(store);
        assert_eq!(reopen(dir.path()).snapshot.files[0].1.decided.0, [(0, 10)]);
    }

    #[test]
    fn a_damaged_file_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE_NAME), vec![7; 8192]).unwrap();
        let opened = reopen(dir.path());
        assert!(opened.set_aside.unwrap().exists());
        assert_eq!(opened.snapshot, Snapshot::default());
    }

    #[test]
    fn a_newer_state_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = reopen(dir.path()).store;
        let begun = store.database.as_ref().unwrap().begin_write().unwrap();
        begun.open_table(META).unwrap().insert("version", b"2".as_slice()).unwrap();
        begun.commit().unwrap();
        drop(store);
        let error = Store::open(dir.path(), Timestamp::EPOCH).unwrap_err();
        assert!(matches!(error, StoreError::Decode(DecodeError::Newer(2))));
    }
}
