//! The tail of growing, rotated and truncated files, as a state machine.
//!
//! In: what a directory scan saw, what was opened, what was read, the time. Out: files to open and close, ranges to
//! read, and lines, each with the generation of its file and its offsets. It does no I/O itself; [`super::file`] does.
//!
//! - A file is known by device and inode, whatever its name. Its *generation* is a hash of inode and first line and names
//!   the content: a truncated and refilled file is a new generation. Before the first line is whole there is none.
//! - A file that its path names no more is read on. It ends when its successor has content and it has been quiet for
//!   [`ROTATED_QUIET`]: a writer that has not reopened yet still writes to the old one. Only then is a last line
//!   without a line end handed out. Without a successor it ends after [`ORPHAN_QUIET`].
//! - Truncation shows as a size below the position or as a changed beginning. The beginning is compared after each read,
//!   so that bytes of a refilled file are never taken for a continuation. What had not been read is lost and counted.
//! - A new file that begins as another one does, or did before it was truncated or before a restart, is a copy (logrotate's
//!   `copytruncate`) and is not read. While less than [`HEAD_BYTES_MAX`] tells so, a file that grows is judged again.
//! - After a restart files begin where [`Positions`](proto::event::Positions) say, rotated ones too, by generation.
//!   A file that was both created and rotated while nobody looked is not recognised.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::event::Position;
use proto::time::Timestamp;

use crate::frame::{Frame, Framer};

/// How long a replaced file must be quiet before it is closed: a Traefik that is being replaced still finishes its requests
/// in the old file, as long as its grace period says, some ten seconds by default.
pub const ROTATED_QUIET: Duration = Duration::from_secs(60);
/// The same where no successor has any content: its writer may not know yet that the file was moved or deleted.
pub const ORPHAN_QUIET: Duration = Duration::from_secs(3600);
/// Files that one source follows at a time; more are refused and reported.
pub const FILES_MAX: usize = 512;
/// Bytes at the beginning of a file that are compared to notice that it was refilled, or is a copy of another.
const HEAD_BYTES_MAX: usize = 4096;
/// Truncated contents whose beginning is remembered, to know their copies.
const FORMER_MAX: usize = 16;

/// What the file system calls a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub inode: u64,
}

/// A file that a scan saw.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its path.
    pub path: PathBuf,
    /// What the path names, links followed.
    pub id: FileId,
    /// Size in bytes.
    pub size: u64,
    /// Time of the last change.
    pub modified: Timestamp,
    /// For a file that no pattern matches but that stands beside one that does and has a longer name: that file's path.
    pub sibling_of: Option<PathBuf>,
}

/// Names an opened (or opening) file until it is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileKey(u64);

/// What must be done outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Open the path and answer with [`Tail::handle_opened`] or [`Tail::handle_failed`].
    Open {
        /// Names the file from now on.
        file: FileKey,
        /// What to open.
        path: PathBuf,
    },
    /// Forget the file.
    Close {
        /// Which.
        file: FileKey,
    },
}

/// What to read next of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadRange {
    /// Where to begin.
    pub offset: u64,
    /// How many bytes at the beginning of the file must be read *after* that, to see whether it is still the same.
    pub head_bytes: usize,
}

/// What was read.
#[derive(Clone, Copy, Debug)]
pub struct Read<'a> {
    /// Bytes at the asked offset; at least one more than the limit on lines, unless the file ends before.
    pub data: &'a [u8],
    /// The file's beginning, as long as asked for or as the file is.
    pub head: &'a [u8],
    /// Size of the file, asked for last.
    pub size: u64,
}

/// A line, or a stretch that was skipped because it was too long for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Which file.
    pub file: FileKey,
    /// Its generation.
    pub generation: u64,
    /// The line and its offsets.
    pub frame: Frame<'a>,
}

/// How to read.
#[derive(Clone, Debug)]
pub struct TailSettings {
    /// Longest line in bytes.
    pub line_bytes_max: usize,
    /// Whether files that the first scan finds and that are not known begin at their end.
    pub skip_existing: bool,
}

/// All files of one source.
#[derive(Debug)]
pub struct Tail {
    settings: TailSettings,
    positions: BTreeMap<u64, Position>,
    /// Offsets of the generations known at the start, for good.
    known: BTreeMap<u64, u64>,
    files: Vec<File>,
    /// Newest last.
    former: VecDeque<Former>,
    copies: BTreeMap<FileId, CopiedFile>,
    repeated: u64,
    commands: VecDeque<Command>,
    paths: BTreeSet<PathBuf>,
    next_key: u64,
    scans: u64,
    refused_files: usize,
    lost_bytes: u64,
}

#[derive(Debug)]
struct File {
    key: FileKey,
    id: FileId,
    /// Path by which a pattern matched it last; of a sibling, the path of its successor.
    path: PathBuf,
    origin: FileOrigin,
    state: State,
    size: u64,
    grown_at: Timestamp,
    /// When it was read last.
    read_at: Timestamp,
    /// Since when no matching path names it.
    gone_at: Option<Timestamp>,
    /// Whether its path names another file that has content.
    replaced: bool,
}

/// Where an unknown generation begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileOrigin {
    /// Found by the first scan.
    Existing,
    /// Appeared later.
    New,
    /// Not matched: read only if its generation is known.
    Sibling,
    /// Truncated under our eyes: whatever it holds now is new.
    Truncated,
}

/// A content that was truncated.
#[derive(Debug)]
struct Former {
    id: FileId,
    generation: u64,
    head: Vec<u8>,
    /// Offset after the last line that was read.
    end: u64,
}

/// A file that is not read, because its lines were or will be read elsewhere.
#[derive(Debug)]
struct CopiedFile {
    path: PathBuf,
    /// Its size when it was judged; `None` when its whole head was compared, so that growing changes nothing.
    size: Option<u64>,
}

#[derive(Debug)]
enum State {
    Opening,
    /// The first line is not whole; these are its bytes.
    FirstLine(Vec<u8>),
    Following(Following),
}

#[derive(Debug)]
struct Following {
    generation: u64,
    framer: Framer,
    head: Vec<u8>,
    /// Whether reading began inside a line, which then is nobody's.
    skip_line: bool,
}

/// Hash of a file's inode and first line: 64-bit FNV-1a over the inode's eight little-endian bytes and the line without
/// its line feed (of a longer line, its first `line_bytes_max` bytes). Positions in state files depend on it for ever.
pub fn generation_of(inode: u64, first_line: &[u8]) -> u64 {
    let bytes = inode.to_le_bytes();
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    first_line.iter().fold(bytes.iter().fold(0xcbf2_9ce4_8422_2325, fold), fold)
}

impl Tail {
    /// Follows nothing yet. `positions` are where known generations begin.
    pub fn new(settings: TailSettings, positions: BTreeMap<u64, Position>) -> Self {
        Self {
            settings,
            known: positions.iter().map(|(generation, position)| (*generation, position.offset)).collect(),
            positions,
            files: Vec::new(),
            former: VecDeque::new(),
            copies: BTreeMap::new(),
            repeated: 0,
            commands: VecDeque::new(),
            paths: BTreeSet::new(),
            next_key: 0,
            scans: 0,
            refused_files: 0,
            lost_bytes: 0,
        }
    }

    /// Whether the next scan should list siblings too: known generations are missing and a path is new.
    pub fn wants_siblings<'p>(&self, mut matched: impl Iterator<Item = &'p Path>) -> bool {
        !self.positions.is_empty() && matched.any(|path| !self.paths.contains(path))
    }

    /// Takes everything that matches now.
    pub fn handle_scan(&mut self, mut seen: Vec<Seen>, now: Timestamp) {
        seen.sort_by(|a, b| {
            let order = |seen: &Seen| (seen.modified, seen.sibling_of.is_none());
            order(a).cmp(&order(b)).then_with(|| a.path.cmp(&b.path))
        });
        for file in &mut self.files {
            file.look_up(&seen, now);
        }
        self.copies.retain(|id, copy| {
            let found = seen.iter().find(|seen| seen.id == *id);
            found.is_some_and(|found| found.path == copy.path && copy.size.is_none_or(|size| found.size <= size))
        });
        self.refused_files = 0;
        for found in &seen {
            let is_matched = || seen.iter().any(|other| other.sibling_of.is_none() && other.id == found.id);
            let is_known = self.files.iter().any(|file| file.id == found.id) || self.copies.contains_key(&found.id);
            if is_known || (found.sibling_of.is_some() && is_matched()) {
                continue;
            }
            if self.files.len() >= FILES_MAX {
                self.refused_files += 1;
                continue;
            }
            self.add(found, now);
        }
        self.paths.extend(seen.into_iter().filter(|seen| seen.sibling_of.is_none()).map(|seen| seen.path));
        self.scans += 1;
    }

    fn add(&mut self, found: &Seen, now: Timestamp) {
        let key = FileKey(self.next_key);
        self.next_key += 1;
        let origin = match (&found.sibling_of, self.scans) {
            (Some(_), _) => FileOrigin::Sibling,
            (None, 0) => FileOrigin::Existing,
            (None, _) => FileOrigin::New,
        };
        self.files.push(File {
            key,
            id: found.id,
            path: found.sibling_of.clone().unwrap_or_else(|| found.path.clone()),
            origin,
            state: State::Opening,
            size: found.size,
            grown_at: now,
            read_at: now,
            gone_at: found.sibling_of.is_some().then_some(now),
            replaced: false,
        });
        self.commands.push_back(Command::Open { file: key, path: found.path.clone() });
    }

    /// The next thing to do, until `None`.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// The file is open and is in fact `id`: its path may have moved since the scan. Returns whether it is kept; one that
    /// is open already is not.
    pub fn handle_opened(&mut self, file: FileKey, id: FileId) -> bool {
        let is_twin = self.files.iter().any(|other| other.key != file && other.id == id);
        if is_twin {
            self.close(file);
        } else if let Some(file) = self.file_mut(file) {
            file.id = id;
            file.state = State::FirstLine(Vec::new());
        }
        !is_twin
    }

    /// The file could not be opened or read and is forgotten. The next scan tries again, from where reading ended.
    pub fn handle_failed(&mut self, file: FileKey) {
        let Some(index) = self.files.iter().position(|other| other.key == file) else { return };
        if let State::Following(following) = self.files.remove(index).state {
            let position = Position { offset: following.framer.complete(), needed: false };
            self.positions.insert(following.generation, position);
        }
    }

    /// The newest file that had the path of `file` before it, was moved away, and is still followed.
    pub fn predecessor(&self, file: FileKey) -> Option<FileKey> {
        let index = self.files.iter().position(|other| other.key == file)?;
        let (older, path) = (&self.files[..index], &self.files[index].path);
        older.iter().rev().find(|other| other.path == *path && other.gone_at.is_some()).map(|other| other.key)
    }

    /// Open files, in the order in which they are to be read: those that are older come first.
    pub fn files(&self) -> impl Iterator<Item = FileKey> {
        self.files.iter().filter(|file| !matches!(file.state, State::Opening)).map(|file| file.key)
    }

    /// What to read next of `file`; `None` when it is not open.
    pub fn next_read(&self, file: FileKey) -> Option<ReadRange> {
        match &self.file(file)?.state {
            State::Opening => None,
            State::FirstLine(_) => Some(ReadRange { offset: 0, head_bytes: 0 }),
            State::Following(following) => {
                let offset = following.framer.position();
                Some(ReadRange { offset, head_bytes: following.head.len() })
            }
        }
    }

    /// Takes what was read of [`Tail::next_read`] and hands out the lines that it completes. Returns whether the file
    /// has more to read.
    pub fn handle_read(
        &mut self,
        key: FileKey,
        read: Read<'_>,
        now: Timestamp,
        each: &mut impl FnMut(Piece<'_>),
    ) -> bool {
        let Some(index) = self.files.iter().position(|file| file.key == key) else { return false };
        let file = &mut self.files[index];
        let before = file.size;
        file.size = read.size;
        file.read_at = now;
        match &mut file.state {
            State::Opening => false,
            State::FirstLine(held) => {
                if held.len() != read.data.len() {
                    file.grown_at = now;
                }
                self.read_first_line(index, read, each)
            }
            State::Following(following) => {
                let is_same = read.head == following.head;
                if is_same && !read.data.is_empty() {
                    file.grown_at = now;
                    following.extend_head(read.data);
                    following.feed(key, read.data, each);
                }
                let position = following.framer.position();
                if is_same && read.size >= position {
                    return position < read.size;
                }
                let end = following.framer.complete();
                self.lost_bytes += before.max(position) - end;
                let (generation, head) = (following.generation, std::mem::take(&mut following.head));
                self.former.push_back(Former { id: file.id, generation, head, end });
                if self.former.len() > FORMER_MAX {
                    self.former.pop_front();
                }
                file.state = State::FirstLine(Vec::new());
                file.origin = FileOrigin::Truncated;
                read.size > 0
            }
        }
    }

    fn read_first_line(&mut self, index: usize, read: Read<'_>, each: &mut impl FnMut(Piece<'_>)) -> bool {
        let max = self.settings.line_bytes_max;
        let file = &mut self.files[index];
        let searched = &read.data[..read.data.len().min(max + 1)];
        let end = memchr::memchr(b'\n', searched).or((searched.len() > max).then_some(max));
        let Some(end) = end else {
            file.state = State::FirstLine(read.data.to_vec());
            if file.origin == FileOrigin::Sibling {
                self.close_at(index);
            }
            return false;
        };
        let generation = generation_of(file.id.inode, &read.data[..end]);
        let (id, origin) = (file.id, file.origin);
        // A position serves once: the same beginning after a truncation is new content.
        let position = self.positions.remove(&generation);
        let was_before = || self.former.iter().any(|former| former.id == id && former.generation == generation);
        if position.is_some_and(|position| position.offset > read.size) || was_before() {
            self.repeated += 1;
        }
        let copied = if position.is_none() && matches!(origin, FileOrigin::Existing | FileOrigin::New) {
            self.copied(index, read, &read.data[..end])
        } else {
            None
        };
        let file = &mut self.files[index];
        let (offset, skip_line) = match (position, origin) {
            _ if copied == Some(Copied::Wholly { certain: true }) => return self.skip_copy(index, None),
            _ if copied == Some(Copied::Wholly { certain: false }) => return self.skip_copy(index, Some(read.size)),
            (Some(position), _) => (position.offset.min(read.size), false),
            (None, FileOrigin::Sibling) => {
                self.close_at(index);
                return false;
            }
            // From the last byte on, so that a line that ends there is told from one that goes on.
            (None, FileOrigin::Existing) if self.settings.skip_existing => (read.size.saturating_sub(1), true),
            (None, _) => (if let Some(Copied::UpTo(offset)) = copied { offset } else { 0 }, false),
        };
        let head = read.data[..read.data.len().min(HEAD_BYTES_MAX)].to_vec();
        let mut following = Following { generation, framer: Framer::new(offset, max), head, skip_line };
        if offset == 0 {
            following.feed(file.key, read.data, each);
        }
        let more = following.framer.position() < read.size;
        file.state = State::Following(following);
        more
    }

    /// Whether the file at `index`, which is unknown and begins with `first_line`, is a copy.
    fn copied(&self, index: usize, read: Read<'_>, first_line: &[u8]) -> Option<Copied> {
        let id = self.files[index].id;
        let begins_as = |head: &[u8]| {
            let length = head.len().min(read.data.len());
            (head[..length] == read.data[..length]).then_some(length >= HEAD_BYTES_MAX)
        };
        // A file that no path names any more was replaced by its copy, which is then the log.
        for other in self.files.iter().filter(|other| other.id != id && other.gone_at.is_none()) {
            let known = self.known.get(&generation_of(other.id.inode, first_line));
            if known.is_some_and(|offset| *offset <= read.size) {
                return Some(Copied::Wholly { certain: false });
            }
            if let State::Following(following) = &other.state
                && let Some(certain) = begins_as(&following.head)
                && (certain || read.size <= other.size)
            {
                return Some(Copied::Wholly { certain });
            }
        }
        let former = self.former.iter().rev().filter(|former| former.id != id);
        let (former, certain) = former.filter_map(|former| Some((former, begins_as(&former.head)?))).next()?;
        let is_whole = certain || read.size <= former.end;
        Some(if is_whole { Copied::Wholly { certain } } else { Copied::UpTo(former.end) })
    }

    /// Closes a copy; `size` is given where its growth would tell that it is none. Nothing more is to be read.
    fn skip_copy(&mut self, index: usize, size: Option<u64>) -> bool {
        let File { id, path, .. } = &self.files[index];
        self.copies.insert(*id, CopiedFile { path: path.clone(), size });
        self.close_at(index);
        false
    }

    /// Paths of files that are copies of others and are not read.
    pub fn copies(&self) -> impl Iterator<Item = &Path> {
        self.copies.values().map(|copy| copy.path.as_path())
    }

    /// Contents that began with the same line as one that the same file held before: they have its generation, so that
    /// their lines count only from where that one ended.
    pub fn repeated(&self) -> u64 {
        self.repeated
    }

    /// Notes the present size of a file, which keeps it open if there is more to read.
    pub fn handle_size(&mut self, key: FileKey, size: u64) {
        if let Some(file) = self.file_mut(key) {
            file.size = file.size.max(size);
        }
    }

    /// Ends files that are finished, as their newest reads tell: hands out a last line without a line end, and closes.
    pub fn close_finished(&mut self, each: &mut impl FnMut(Piece<'_>)) {
        let finished: Vec<usize> = (0..self.files.len()).rev().filter(|i| self.files[*i].is_finished()).collect();
        for index in finished {
            let max = self.settings.line_bytes_max;
            self.files[index].finish(max, each);
            self.close_at(index);
        }
    }

    fn close(&mut self, key: FileKey) {
        if let Some(index) = self.files.iter().position(|file| file.key == key) {
            self.close_at(index);
        }
    }

    fn close_at(&mut self, index: usize) {
        let file = self.files.remove(index);
        self.commands.push_back(Command::Close { file: file.key });
    }

    fn file(&self, key: FileKey) -> Option<&File> {
        self.files.iter().find(|file| file.key == key)
    }

    fn file_mut(&mut self, key: FileKey) -> Option<&mut File> {
        self.files.iter_mut().find(|file| file.key == key)
    }

    /// Number of known generations whose windows are needed and whose files were not found.
    pub fn needed_missing(&self) -> usize {
        self.positions.values().filter(|position| position.needed).count()
    }

    /// Files that the newest scan found beyond [`FILES_MAX`].
    pub fn refused_files(&self) -> usize {
        self.refused_files
    }

    /// Bytes known to be there and not read.
    pub fn behind_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size.saturating_sub(file.position())).sum()
    }

    /// Bytes that were known to be there and are gone unread, unfinished lines of truncated files included.
    pub fn lost_bytes(&self) -> u64 {
        self.lost_bytes
    }
}

impl File {
    fn look_up(&mut self, seen: &[Seen], now: Timestamp) {
        let matched = || seen.iter().filter(|seen| seen.sibling_of.is_none());
        if let Some(found) = matched().find(|seen| seen.id == self.id) {
            self.path.clone_from(&found.path);
            (self.gone_at, self.replaced) = (None, false);
            return;
        }
        self.gone_at.get_or_insert(now);
        if !self.replaced && matched().any(|seen| seen.path == self.path && seen.size > 0) {
            self.replaced = true;
            self.gone_at = Some(now);
        }
    }

    fn position(&self) -> u64 {
        match &self.state {
            State::Opening => 0,
            State::FirstLine(held) => held.len() as u64,
            State::Following(following) => following.framer.position(),
        }
    }

    /// Whether its newest read, long enough after it was left and after it grew, found nothing more.
    fn is_finished(&self) -> bool {
        let quiet = if self.replaced { ROTATED_QUIET } else { ORPHAN_QUIET };
        let at_end = !matches!(self.state, State::Opening) && self.position() == self.size;
        at_end && self.gone_at.is_some_and(|gone_at| self.read_at.since(gone_at.max(self.grown_at)) >= quiet)
    }

    fn finish(&mut self, line_bytes_max: usize, each: &mut impl FnMut(Piece<'_>)) {
        let file = self.key;
        match &mut self.state {
            State::Opening => {}
            State::FirstLine(held) => {
                let generation = generation_of(self.id.inode, held);
                let mut framer = Framer::new(0, line_bytes_max);
                framer.feed(held, |_| {});
                framer.finish(|frame| each(Piece { file, generation, frame }));
            }
            State::Following(following) => {
                let (generation, is_cut) = (following.generation, following.skip_line);
                following.framer.finish(|frame| {
                    if !is_cut {
                        each(Piece { file, generation, frame });
                    }
                });
            }
        }
    }
}

/// What a copy holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copied {
    /// Nothing else; `certain` when the whole head was compared.
    Wholly { certain: bool },
    /// Lines of a truncated file up to this offset, and then others.
    UpTo(u64),
}

impl Following {
    /// Adds what `data`, which stands at the position, tells of the head.
    fn extend_head(&mut self, data: &[u8]) {
        let known = usize::try_from(self.framer.position()).ok().and_then(|at| self.head.len().checked_sub(at));
        if let Some(new) = known.and_then(|known| data.get(known..)) {
            self.head.extend(&new[..new.len().min(HEAD_BYTES_MAX.saturating_sub(self.head.len()))]);
        }
    }

    fn feed(&mut self, file: FileKey, data: &[u8], each: &mut impl FnMut(Piece<'_>)) {
        let generation = self.generation;
        let skip_line = &mut self.skip_line;
        self.framer.feed(data, |frame| {
            if !std::mem::take(skip_line) {
                each(Piece { file, generation, frame });
            }
        });
    }
}

#[cfg(test)]
mod tests;
