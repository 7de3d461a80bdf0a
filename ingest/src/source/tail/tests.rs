//! The state machine against a model of a disk on which anything happens at any time, and a few cases by name.

use proptest::prelude::*;

use super::*;

const LINE_MAX: usize = 16;
const READ_BYTES: usize = 40;
const LOG: &str = "log";

/// One content of one inode: a truncation begins the next epoch.
type Epoch = (usize, usize);

#[derive(Debug, Default)]
struct Inode {
    data: Vec<u8>,
    epoch: usize,
}

/// The disk, the process that writes the log, and the one that reads it.
struct World {
    now: Timestamp,
    inodes: Vec<Inode>,
    paths: BTreeMap<String, usize>,
    writer: usize,
    /// What is still to be written of the current line.
    pending: Vec<u8>,
    lines: usize,
    renames: usize,
    tail: Tail,
    open: BTreeMap<FileKey, usize>,
    /// Contents of ended epochs.
    past: BTreeMap<Epoch, Vec<u8>>,
    /// How far each epoch was handed out, and under which generation.
    delivered: BTreeMap<Epoch, u64>,
    positions: BTreeMap<u64, Position>,
    /// Inodes that a scan has seen under the log's name since the last restart, or whose generation it knew.
    reachable: BTreeSet<usize>,
}

#[derive(Clone, Debug)]
enum Act {
    Write { length: usize, cut: usize },
    Rename,
    Reopen,
    Truncate,
    Delete,
    Scan,
    Read(usize),
    Wait,
    Restart,
}

fn acts() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => (0..30_usize, 0..40_usize).prop_map(|(length, cut)| Act::Write { length, cut }),
        2 => Just(Act::Rename),
        3 => Just(Act::Reopen),
        1 => Just(Act::Truncate),
        1 => Just(Act::Delete),
        4 => Just(Act::Scan),
        5 => (0..6_usize).prop_map(Act::Read),
        2 => Just(Act::Wait),
        1 => Just(Act::Restart),
    ]
}

fn new_tail(positions: BTreeMap<u64, Position>) -> Tail {
    Tail::new(TailSettings { line_bytes_max: LINE_MAX, skip_existing: false }, positions)
}

impl World {
    fn new() -> Self {
        Self {
            now: Timestamp::from_secs(1_000_000),
            inodes: vec![Inode::default()],
            paths: BTreeMap::from([(LOG.to_owned(), 0)]),
            writer: 0,
            pending: Vec::new(),
            lines: 0,
            renames: 0,
            tail: new_tail(BTreeMap::new()),
            open: BTreeMap::new(),
            past: BTreeMap::new(),
            delivered: BTreeMap::new(),
            positions: BTreeMap::new(),
            reachable: BTreeSet::new(),
        }
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Write { length, cut } => self.write(*length, *cut),
            Act::Rename => self.rename(),
            Act::Reopen => self.reopen(),
            Act::Truncate => self.truncate(),
            Act::Delete => drop(self.paths.remove(LOG)),
            Act::Scan => self.scan(),
            Act::Read(steps) => {
                for _ in 0..*steps {
                    self.read_step();
                }
            }
            Act::Wait => {
                self.now = self.now.saturating_add(Duration::from_secs(3));
                self.close_finished();
            }
            Act::Restart => self.restart(),
        }
    }

    /// Writes a line of some length, or goes on with the one that is begun; at most `cut` bytes of it.
    fn write(&mut self, length: usize, cut: usize) {
        if self.pending.is_empty() {
            self.lines += 1;
            self.pending = format!("L{}:{}\n", self.lines, "x".repeat(length)).into_bytes();
        }
        let rest = self.pending.split_off(cut.min(self.pending.len()));
        let now = std::mem::replace(&mut self.pending, rest);
        self.inodes[self.writer].data.extend(now);
    }

    fn rename(&mut self) {
        if let Some(inode) = self.paths.remove(LOG) {
            self.renames += 1;
            self.paths.insert(format!("{LOG}.{}", self.renames), inode);
        }
    }

    fn reopen(&mut self) {
        self.pending.clear();
        self.writer = *self.paths.entry(LOG.to_owned()).or_insert_with(|| {
            self.inodes.push(Inode::default());
            self.inodes.len() - 1
        });
    }

    fn truncate(&mut self) {
        let Some(&index) = self.paths.get(LOG) else { return };
        self.pending.clear();
        let inode = &mut self.inodes[index];
        self.past.insert((index, inode.epoch), std::mem::take(&mut inode.data));
        inode.epoch += 1;
    }

    fn scan(&mut self) {
        let seen = |path: &str, inode: usize, sibling_of: Option<PathBuf>| Seen {
            path: path.into(),
            id: FileId { dev: 1, inode: inode as u64 },
            size: self.inodes[inode].data.len() as u64,
            modified: Timestamp::from_secs(inode as i64),
            sibling_of,
        };
        let log = self.paths.get(LOG).map(|inode| seen(LOG, *inode, None));
        let mut found: Vec<Seen> = log.into_iter().collect();
        if self.tail.wants_siblings(found.iter().map(|seen| seen.path.as_path())) {
            let siblings = self.paths.iter().filter(|(path, _)| *path != LOG);
            let siblings: Vec<Seen> =
                siblings.map(|(path, inode)| seen(path, *inode, Some(PathBuf::from(LOG)))).collect();
            self.reachable.extend(siblings.iter().map(|seen| seen.id.inode as usize).filter(|inode| {
                // Known by generation: something of its present content was handed out.
                self.delivered.contains_key(&(*inode, self.inodes[*inode].epoch))
            }));
            found.extend(siblings);
        }
        self.reachable.extend(self.paths.get(LOG));
        self.tail.handle_scan(found, self.now);
        self.obey();
    }

    fn obey(&mut self) {
        while let Some(command) = self.tail.poll_command() {
            match command {
                Command::Open { file, path } => {
                    let inode = self.paths[path.to_str().unwrap()];
                    self.open.insert(file, inode);
                    self.tail.handle_opened(file, FileId { dev: 1, inode: inode as u64 });
                }
                Command::Close { file } => drop(self.open.remove(&file)),
            }
        }
    }

    /// Reads once from the first file that has more; returns whether there was one.
    fn read_step(&mut self) -> bool {
        let files: Vec<FileKey> = self.tail.files().collect();
        for key in files {
            let inode = self.open[&key];
            let data = &self.inodes[inode].data;
            let range = self.tail.next_read(key).unwrap();
            let from = data.len().min(range.offset as usize);
            let read = Read {
                data: &data[from..data.len().min(from + READ_BYTES)],
                head: &data[..data.len().min(range.head_bytes)],
                size: data.len() as u64,
            };
            let epoch = (inode, self.inodes[inode].epoch);
            let before = (self.tail.next_read(key), self.tail.lost_bytes());
            let mut pieces = Vec::new();
            let more = self.tail.handle_read(key, read, self.now, &mut |piece| pieces.push(own(&piece)));
            let data = data.clone();
            let progressed = !pieces.is_empty() || before != (self.tail.next_read(key), self.tail.lost_bytes());
            pieces.iter().for_each(|piece| self.deliver(epoch, piece, &data));
            self.obey();
            if more || progressed {
                return true;
            }
        }
        false
    }

    fn close_finished(&mut self) {
        let mut pieces = Vec::new();
        self.tail.close_finished(&mut |piece| pieces.push(own(&piece)));
        for piece in pieces {
            let inode = self.open[&piece.0];
            let data = self.inodes[inode].data.clone();
            self.deliver((inode, self.inodes[inode].epoch), &piece, &data);
        }
        self.obey();
    }

    /// Every line comes once, in order, whole, and where it stands.
    fn deliver(&mut self, epoch: Epoch, (_, generation, start, end, line): &OwnPiece, data: &[u8]) {
        let former = self.delivered.insert(epoch, *end).unwrap_or(0);
        assert_eq!(*start, former, "{epoch:?}: a gap or a repetition");
        self.positions.insert(*generation, Position { offset: *end, needed: false });
        let bytes = &data[*start as usize..*end as usize];
        let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        assert!(!bytes.contains(&b'\n'), "{epoch:?}: more than a line");
        assert_eq!(line.as_deref(), (bytes.len() <= LINE_MAX).then_some(bytes), "{epoch:?}");
    }

    fn restart(&mut self) {
        self.tail = new_tail(self.positions.clone());
        self.open.clear();
        self.reachable.clear();
    }

    /// Lets everything come to rest: all that is reachable must then be delivered.
    fn settle(&mut self) {
        self.reopen();
        self.write(3, 40);
        for _ in 0..4 {
            self.now = self.now.saturating_add(ROTATED_QUIET * 2);
            self.scan();
            while self.read_step() {}
            self.close_finished();
        }
    }

    fn check(&self) {
        for index in &self.reachable {
            let inode = &self.inodes[*index];
            let is_current = self.paths.get(LOG) == Some(index);
            let end = inode.data.len();
            let complete = inode.data.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
            let delivered = self.delivered.get(&(*index, inode.epoch)).copied().unwrap_or(0) as usize;
            let expected = if is_current { complete } else { end };
            assert_eq!(delivered, expected, "inode {index}, current: {is_current}");
        }
        for ((index, epoch), end) in &self.delivered {
            let content = self.past.get(&(*index, *epoch)).unwrap_or(&self.inodes[*index].data);
            assert!(*end as usize <= content.len());
        }
        let current = self.paths[LOG];
        assert_eq!(self.tail.files().count(), 1, "finished files are closed");
        assert_eq!(self.open.values().collect::<Vec<_>>(), [&current]);
    }
}

type OwnPiece = (FileKey, u64, u64, u64, Option<Vec<u8>>);

fn own(piece: &Piece<'_>) -> OwnPiece {
    let Frame { start, end, line } = piece.frame;
    (piece.file, piece.generation, start, end, line.map(<[u8]>::to_vec))
}

fn play(acts: &[Act]) -> World {
    let mut world = World::new();
    for act in acts {
        world.act(act);
    }
    world.settle();
    world.check();
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_happens_every_reachable_line_comes_once(acts in proptest::collection::vec(acts(), 0..60)) {
        play(&acts);
    }
}

const LINE: Act = Act::Write { length: 5, cut: 40 };
const HALF: Act = Act::Write { length: 5, cut: 4 };

#[test]
fn a_late_line_in_a_renamed_file_is_read() {
    let world =
        play(&[LINE, Act::Scan, Act::Read(9), Act::Rename, LINE, Act::Scan, LINE, Act::Reopen, LINE, Act::Scan]);
    assert_eq!(world.delivered[&(0, 0)], world.inodes[0].data.len() as u64);
}

#[test]
fn a_renamed_file_stays_open_until_its_successor_has_content() {
    let mut world = World::new();
    for act in [LINE, Act::Scan, Act::Read(9), Act::Rename] {
        world.act(&act);
    }
    // logrotate has created the new file, but the writer does not know yet.
    world.inodes.push(Inode::default());
    world.paths.insert(LOG.to_owned(), 1);
    world.scan();
    for seconds in [600, 600] {
        world.now = world.now.saturating_add(Duration::from_secs(seconds));
        while world.read_step() {}
        world.close_finished();
    }
    world.write(5, 40);
    while world.read_step() {}
    assert_eq!(world.delivered[&(0, 0)], world.inodes[0].data.len() as u64);
    world.now = world.now.saturating_add(ORPHAN_QUIET);
    while world.read_step() {}
    world.close_finished();
    assert!(!world.open.values().any(|inode| *inode == 0));
}

#[test]
fn every_late_line_keeps_a_renamed_file_open() {
    let mut world = World::new();
    for act in [LINE, Act::Scan, Act::Read(9), Act::Rename] {
        world.act(&act);
    }
    world.inodes.push(Inode { data: b"of another writer\n".to_vec(), epoch: 0 });
    world.paths.insert(LOG.to_owned(), 1);
    for _ in 0..10 {
        world.write(5, 40);
        world.now = world.now.saturating_add(ROTATED_QUIET - Duration::from_secs(1));
        world.scan();
        while world.read_step() {}
        world.close_finished();
        assert_eq!(world.delivered[&(0, 0)], world.inodes[0].data.len() as u64);
    }
}

#[test]
fn unknown_rotated_files_are_history() {
    let mut world = World::new();
    for act in [LINE, Act::Scan, Act::Read(9), LINE, Act::Rename, Act::Reopen, LINE, Act::Rename, Act::Reopen, LINE] {
        world.act(&act);
    }
    world.restart();
    world.settle();
    world.check();
    assert_eq!(world.delivered.keys().collect::<Vec<_>>(), [&(0, 0), &(2, 0)]);
}

#[test]
fn a_file_that_failed_is_read_on_from_where_it_ended() {
    let mut world = World::new();
    for act in [LINE, LINE, Act::Scan, Act::Read(9)] {
        world.act(&act);
    }
    let key = world.tail.files().next().unwrap();
    world.tail.handle_failed(key);
    world.open.clear();
    world.act(&LINE);
    world.settle();
    world.check();
}

#[test]
fn a_half_line_waits_for_its_end_and_comes_when_its_file_is_finished() {
    let mut world = World::new();
    for act in [LINE, HALF, Act::Scan, Act::Read(9), Act::Wait, Act::Wait, Act::Scan, Act::Read(9)] {
        world.act(&act);
    }
    let complete = world.delivered[&(0, 0)];
    assert!(complete < world.inodes[0].data.len() as u64);
    world.act(&Act::Rename);
    world.settle();
    world.check();
    assert_eq!(world.delivered[&(0, 0)], world.inodes[0].data.len() as u64);
}

#[test]
fn a_truncated_and_refilled_file_is_a_new_generation() {
    let mut world = World::new();
    for act in [LINE, LINE, Act::Scan, Act::Read(9), LINE, Act::Truncate, LINE, LINE, LINE, LINE] {
        world.act(&act);
    }
    assert!(world.inodes[0].data.len() as u64 > world.delivered[&(0, 0)]);
    world.settle();
    world.check();
    assert_eq!(world.positions.len(), 2);
    // What was written between the last look and the truncation was never seen to be there.
    assert_eq!(world.tail.lost_bytes(), 0);
}

#[test]
fn what_a_truncation_destroys_is_counted() {
    let mut world = World::new();
    for act in [LINE, HALF, Act::Scan, Act::Read(9), Act::Truncate, Act::Read(9)] {
        world.act(&act);
    }
    assert_eq!(world.tail.lost_bytes(), 4);
}

#[test]
fn a_rotated_file_is_found_again_after_a_restart() {
    let mut acts = vec![LINE, Act::Scan, Act::Read(9), LINE, Act::Rename, Act::Reopen, LINE, Act::Restart];
    let world = play(&acts);
    assert_eq!(world.delivered[&(0, 0)], world.inodes[0].data.len() as u64);
    acts.extend([Act::Scan, Act::Read(1)]);
    let world = play(&acts);
    assert_eq!(world.delivered[&(0, 0)], world.inodes[0].data.len() as u64);
}

#[test]
fn a_needed_position_without_its_file_is_reported() {
    let positions =
        BTreeMap::from([(1, Position { offset: 5, needed: true }), (2, Position { offset: 5, needed: false })]);
    let mut world = World::new();
    world.tail = new_tail(positions);
    world.act(&LINE);
    world.settle();
    assert_eq!(world.tail.needed_missing(), 1);
}

#[test]
fn existing_files_can_be_skipped_but_not_what_comes_then() {
    for (before, expected) in [(LINE, 0), (HALF, 0)] {
        let mut world = World::new();
        world.tail = Tail::new(TailSettings { line_bytes_max: LINE_MAX, skip_existing: true }, BTreeMap::new());
        let mut pieces = 0;
        world.act(&LINE);
        world.act(&before);
        let skipped = world.inodes[0].data.len() as u64;
        world.scan();
        let key = world.tail.files().next().unwrap();
        for round in 0..8 {
            if round == 4 {
                assert_eq!(pieces, expected);
                world.act(&LINE);
                world.act(&LINE);
            }
            let data = &world.inodes[0].data;
            let range = world.tail.next_read(key).unwrap();
            let read =
                Read { data: &data[range.offset as usize..], head: &data[..range.head_bytes], size: data.len() as u64 };
            world.tail.handle_read(key, read, world.now, &mut |piece| {
                assert!(piece.frame.start >= skipped);
                pieces += 1;
            });
        }
        // Of a half line its end is skipped too.
        assert_eq!(pieces, 2 - usize::from(matches!(before, Act::Write { cut: 4, .. })));
    }
}

#[test]
fn a_truncated_file_that_begins_with_the_same_line_again_is_counted() {
    let mut world = World::new();
    for act in [LINE, LINE, Act::Scan, Act::Read(9), Act::Truncate, Act::Read(9)] {
        world.act(&act);
    }
    world.lines = 0;
    for act in [LINE, Act::Scan, Act::Read(9)] {
        world.act(&act);
    }
    assert_eq!(world.tail.repeated(), 1);
    // The same while nobody looked: the position is beyond the end.
    let key = world.tail.files().next().unwrap();
    let generation = *world.positions.keys().next().unwrap();
    assert!(world.tail.next_read(key).is_some());
    world.positions.insert(generation, Position { offset: 1000, needed: false });
    world.restart();
    world.act(&Act::Scan);
    world.act(&Act::Read(9));
    assert_eq!(world.tail.repeated(), 1);
}

#[test]
fn what_came_after_the_last_read_keeps_a_file_open() {
    let mut world = World::new();
    for act in [LINE, Act::Scan, Act::Read(9), Act::Rename, Act::Reopen, LINE, Act::Scan, Act::Read(9)] {
        world.act(&act);
    }
    world.now = world.now.saturating_add(ROTATED_QUIET);
    while world.read_step() {}
    let old = *world.open.iter().find(|(_, inode)| **inode == 0).unwrap().0;
    world.inodes[0].data.extend(b"L9:late\n");
    world.tail.handle_size(old, world.inodes[0].data.len() as u64);
    world.close_finished();
    while world.read_step() {}
    assert_eq!(world.delivered[&(0, 0)], world.inodes[0].data.len() as u64);
}

#[test]
fn a_file_that_is_open_already_is_not_kept_twice() {
    let mut tail = new_tail(BTreeMap::new());
    let seen = |path: &str, inode| Seen {
        path: path.into(),
        id: FileId { dev: 1, inode },
        size: 0,
        modified: Timestamp::EPOCH,
        sibling_of: None,
    };
    tail.handle_scan(vec![seen("a", 1), seen("b", 2)], Timestamp::EPOCH);
    let opened: Vec<bool> = std::iter::from_fn(|| match tail.poll_command()? {
        Command::Open { file, .. } => Some(tail.handle_opened(file, FileId { dev: 1, inode: 1 })),
        Command::Close { .. } => None,
    })
    .collect();
    assert_eq!(opened, [true, false]);
}

#[test]
fn files_beyond_the_limit_are_refused_and_counted() {
    let mut tail = new_tail(BTreeMap::new());
    let seen = (0..FILES_MAX + 3).map(|i| Seen {
        path: format!("log-{i}").into(),
        id: FileId { dev: 1, inode: i as u64 },
        size: 0,
        modified: Timestamp::EPOCH,
        sibling_of: None,
    });
    tail.handle_scan(seen.collect(), Timestamp::EPOCH);
    assert_eq!(tail.refused_files(), 3);
}

#[test]
fn generations_never_change() {
    // State files hold these numbers.
    assert_eq!(generation_of(0, b""), 0xa8c7_f832_281a_39c5);
    assert_eq!(generation_of(1, b"a"), 5_952_155_467_226_901_439);
}
