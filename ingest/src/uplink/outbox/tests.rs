use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proto::event::{Event, Text};
use proto::wire::decode_batch;

use super::*;
use crate::source::checkpoint;

/// Bytes of a line.
const LINE: u64 = 10;
/// Sources and generations of the model.
const LANES: [(&str, u64); 3] = [("a", 1), ("a", 2), ("b", 1)];
/// Lines of each of them.
const LINES: u64 = 120;

fn ms(millis: i64) -> Timestamp {
    Timestamp::from_millis(1_000_000 + millis)
}

fn outbox() -> Outbox {
    Outbox::new("edge-1-0", 100_000, Progress::default())
}

/// Lines of a lane; `text` makes the path of those that are events.
fn batch_of(lane: (&str, u64), lines: std::ops::Range<u64>, text: impl Fn(u64) -> Option<String>) -> AccessBatch {
    let mut batch = AccessBatch::new("edge-1".into(), lane.0.into(), ms(0));
    batch.span = Some(FileSpan { generation: lane.1, start: lines.start * LINE, end: lines.end * LINE });
    batch.counts.lines = lines.end - lines.start;
    for line in lines {
        if let Some(path) = text(line) {
            let text = Text { path: &path, ..Text::default() };
            batch.push(&Event { text, offset: line * LINE, ..Event::default() });
        }
    }
    batch
}

fn short(line: u64) -> Option<String> {
    Some(format!("/{line}"))
}

fn quiet(_: u64) -> Option<String> {
    None
}

fn poll_all(outbox: &mut Outbox, now: Timestamp) -> Vec<Sending> {
    std::iter::from_fn(|| outbox.poll_sending(now)).collect()
}

/// The lines whose events are in a payload.
fn lines_of(payload: &[u8]) -> Vec<u64> {
    decode_batch(payload).unwrap().events().map(|event| event.offset / LINE).collect()
}

#[test]
fn the_first_is_sent_at_once_and_what_comes_meanwhile_together() {
    let mut outbox = outbox();
    outbox.push(batch_of(LANES[0], 0..1, short), ms(0));
    let first = poll_all(&mut outbox, ms(0));
    assert_eq!(lines_of(&first[0].payload), [0]);
    outbox.push(batch_of(LANES[0], 1..2, short), ms(1));
    outbox.push(batch_of(LANES[0], 2..4, short), ms(2));
    assert!(poll_all(&mut outbox, ms(3)).is_empty());
    assert_eq!(outbox.poll_timeout(ms(3)), Some(Duration::from_millis(1)));
    outbox.handle_answer(first[0].number, Ok(()), ms(3)).unwrap();
    let second = poll_all(&mut outbox, ms(3));
    assert_eq!((second.len(), lines_of(&second[0].payload)), (1, vec![1, 2, 3]));
    assert_eq!((&*first[0].id, &*second[0].id), ("edge-1-0-1", "edge-1-0-2"));
}

#[test]
fn what_waits_is_sent_after_some_milliseconds_or_when_it_is_large() {
    let mut outbox = outbox();
    outbox.push(batch_of(LANES[0], 0..1, short), ms(0));
    assert_eq!(poll_all(&mut outbox, ms(0)).len(), 1);
    outbox.push(batch_of(LANES[0], 1..2, short), ms(1));
    assert_eq!(poll_all(&mut outbox, ms(4)).len(), 1);
    let long = |line| short(line).map(|text| text.repeat(60_000));
    outbox.push(batch_of(LANES[0], 2..3, long), ms(4));
    outbox.push(batch_of(LANES[0], 3..4, long), ms(5));
    outbox.push(batch_of(LANES[0], 4..5, long), ms(5));
    let sent: Vec<_> = poll_all(&mut outbox, ms(5)).iter().map(|sending| lines_of(&sending.payload)).collect();
    assert_eq!(sent, [vec![2, 3], vec![4]]);
}

#[test]
fn a_batch_without_events_waits_for_company() {
    let mut outbox = outbox();
    outbox.push(batch_of(LANES[0], 0..5, quiet), ms(0));
    assert!(poll_all(&mut outbox, ms(1)).is_empty());
    assert_eq!(outbox.poll_timeout(ms(0)), Some(QUIET_WAIT));
    outbox.push(batch_of(LANES[0], 5..6, short), ms(1));
    let sent = poll_all(&mut outbox, ms(1));
    assert_eq!(decode_batch(&sent[0].payload).unwrap().span.unwrap().start, 0);
    outbox.handle_answer(1, Ok(()), ms(2)).unwrap();
    outbox.push(batch_of(LANES[0], 6..7, quiet), ms(2));
    assert!(poll_all(&mut outbox, ms(1001)).is_empty());
    assert_eq!(poll_all(&mut outbox, ms(1002)).len(), 1);
}

#[test]
fn tries_are_spaced_wider_and_wider_while_nothing_new_begins() {
    let mut outbox = outbox();
    outbox.push(batch_of(LANES[0], 0..1, short), ms(0));
    let (mut now, mut pauses) = (0, Vec::new());
    let first = poll_all(&mut outbox, ms(0)).remove(0);
    outbox.push(batch_of(LANES[1], 0..1, short), ms(0));
    for _ in 0..9 {
        outbox.handle_answer(1, Err(PublishError::Full), ms(now));
        let pause = outbox.poll_timeout(ms(now)).unwrap().as_millis() as i64;
        assert!(poll_all(&mut outbox, ms(now + pause - 1)).is_empty());
        now += pause;
        pauses.push(pause);
        let again = poll_all(&mut outbox, ms(now));
        assert_eq!((again.len(), &again[0].id, &again[0].payload), (1, &first.id, &first.payload));
    }
    assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    assert_eq!(outbox.trouble().unwrap().since, ms(0));
    outbox.handle_answer(1, Ok(()), ms(now)).unwrap();
    assert!(outbox.trouble().is_none());
    assert_eq!(poll_all(&mut outbox, ms(now))[0].number, 2);
}

#[test]
fn where_one_got_through_the_others_need_not_wait() {
    let mut outbox = outbox();
    for lane in LANES {
        outbox.push(batch_of(lane, 0..1, short), ms(0));
        poll_all(&mut outbox, ms(3));
    }
    for number in 1..=3 {
        outbox.handle_answer(number, Err(PublishError::Unavailable("no answer".to_owned())), ms(4));
    }
    assert_eq!(poll_all(&mut outbox, ms(53)).len(), 0);
    assert_eq!(poll_all(&mut outbox, ms(54)).len(), 3);
    outbox.handle_answer(3, Err(PublishError::Full), ms(60));
    outbox.handle_answer(1, Ok(()), ms(61)).unwrap();
    assert_eq!(poll_all(&mut outbox, ms(61))[0].number, 3);
}

#[test]
fn a_clock_that_is_set_back_stops_nothing() {
    let mut outbox = outbox();
    outbox.push(batch_of(LANES[0], 0..1, short), ms(0));
    assert_eq!(poll_all(&mut outbox, ms(0)).len(), 1);
    outbox.handle_answer(1, Err(PublishError::Full), ms(0));
    assert_eq!(poll_all(&mut outbox, ms(-3_600_000)).len(), 1);
}

#[test]
fn only_so_much_is_under_way_at_a_time() {
    let mut outbox = Outbox::new("edge-1-0", 8 << 20, Progress::default());
    for number in 0..40 {
        outbox.push(batch_of((&format!("s{number}"), 1), 0..1, short), ms(0));
    }
    assert_eq!(poll_all(&mut outbox, ms(5000)).len(), IN_FLIGHT_MAX);
    assert_eq!(outbox.poll_timeout(ms(5000)), None);

    let mut outbox = Outbox::new("edge-1-0", 8 << 20, Progress::default());
    for number in 0..6 {
        outbox.push(batch_of((&format!("s{number}"), 1), 0..1, |_| Some(noise(number, 3 << 20))), ms(0));
    }
    assert_eq!(poll_all(&mut outbox, ms(0)).len(), 3);
    assert!(outbox.under_way_bytes <= IN_FLIGHT_BYTES_MAX, "{}", outbox.under_way_bytes);
    assert!(!outbox.has_room(), "sources wait");
}

/// Text that does not compress well.
fn noise(seed: u64, bytes: usize) -> String {
    let mut random = Random(seed);
    (0..bytes).map(|_| char::from(b'!' + random.below(90) as u8)).collect()
}

#[test]
fn what_is_too_large_is_split_and_an_event_that_alone_is_too_large_is_cut() {
    let mut outbox = Outbox::new("edge-1-0", 4000, Progress::default());
    let text = |line| Some(noise(line, if line == 2 { 20_000 } else { 1500 }));
    outbox.push(batch_of(LANES[0], 0..6, text), ms(0));
    let sent = poll_all(&mut outbox, ms(0));
    assert!(sent.len() > 2 && sent.iter().all(|sending| sending.payload.len() <= 4000));
    assert_eq!(sent.iter().flat_map(|sending| lines_of(&sending.payload)).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    assert_eq!((outbox.take_cut_events(), outbox.take_cut_events()), (1, 0));
    let numbers: Vec<u64> = sent.iter().map(|sending| sending.number).collect();
    let (last, others) = numbers.split_last().unwrap();
    let offset = |outbox: &Outbox| outbox.progress().positions()[&("a".to_owned(), 1)].offset;
    for number in others {
        outbox.handle_answer(*number, Ok(()), ms(1)).unwrap();
        assert_eq!(offset(&outbox), 0, "a restart begins with the whole batch");
    }
    outbox.handle_answer(*last, Ok(()), ms(1)).unwrap();
    assert_eq!(offset(&outbox), 60);
}

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// Logs, a bus that answers as it likes, and a node that is killed and started again.
struct World {
    random: Random,
    now: Timestamp,
    /// Lines whose events the bus keeps, by source and generation.
    kept: BTreeMap<(String, u64), BTreeSet<u64>>,
    /// What was ever tried.
    tried: BTreeMap<String, Vec<u8>>,
    /// The checkpoint on disk.
    stored: Vec<u8>,
    outbox: Outbox,
    /// Next line of each lane to read.
    read: [u64; LANES.len()],
    /// Where the newest first try of each lane in this life began.
    begun: BTreeMap<(String, u64), u64>,
    in_flight: Vec<Sending>,
}

/// Most lines are no events, and a few are long.
fn model_text(line: u64) -> Option<String> {
    let long = if line.is_multiple_of(35) { 3000 } else { 40 };
    is_event(line).then(|| noise(line, long))
}

fn is_event(line: u64) -> bool {
    line.is_multiple_of(5)
}

impl World {
    fn new(seed: u64) -> Self {
        let (kept, tried, read, begun, in_flight) = Default::default();
        let stored = checkpoint::encode(&Progress::default());
        World { random: Random(seed), now: ms(0), kept, tried, stored, outbox: outbox(), read, begun, in_flight }
    }

    fn restart(&mut self) {
        self.now = self.now.saturating_add(Duration::from_millis(1));
        let progress = checkpoint::decode(&self.stored).unwrap();
        let positions = progress.positions();
        let offset =
            |lane: (&str, u64)| positions.get(&(lane.0.to_owned(), lane.1)).map_or(0, |position| position.offset);
        self.read = LANES.map(|lane| offset(lane) / LINE);
        self.outbox = Outbox::new(&format!("edge-1-{:x}", self.now.as_nanos()), 2000, progress);
        self.begun.clear();
        self.in_flight.clear();
    }

    fn step(&mut self) {
        match self.random.below(12) {
            0..=3 => self.read_some(),
            4 => self.now = self.now.saturating_add(Duration::from_millis(self.random.below(4))),
            5 => self.now = self.now.saturating_add(Duration::from_millis(self.random.below(6000))),
            6..=9 => self.answer_one(false),
            10 => self.store(),
            _ => {}
        }
        self.send();
    }

    fn read_some(&mut self) {
        let lane = self.random.below(LANES.len() as u64) as usize;
        let lines = self.read[lane]..(self.read[lane] + 1 + self.random.below(9)).min(LINES);
        if lines.is_empty() || !self.outbox.has_room() {
            return;
        }
        self.read[lane] = lines.end;
        let mut batch = batch_of(LANES[lane], lines, model_text);
        batch.filter = self.read[lane] / 50;
        self.outbox.push(batch, self.now);
    }

    fn send(&mut self) {
        for sending in poll_all(&mut self.outbox, self.now) {
            let batch = decode_batch(&sending.payload).unwrap();
            let span = batch.span.unwrap();
            match self.tried.insert(sending.id.clone(), sending.payload.clone()) {
                Some(before) => assert_eq!(before, sending.payload, "an id names one payload"),
                None => {
                    let before = self.begun.insert((batch.source.to_string(), span.generation), span.start);
                    assert!(
                        before.is_none_or(|before| before < span.start),
                        "first tries are in the order of the file"
                    );
                }
            }
            assert!(self.in_flight.iter().all(|other| other.number != sending.number), "one try at a time");
            self.in_flight.push(sending);
        }
        assert!(self.in_flight.len() <= IN_FLIGHT_MAX && self.outbox.under_way_bytes <= IN_FLIGHT_BYTES_MAX);
        assert!(self.outbox.waiting.len() <= WAITING_MAX);
    }

    fn answer_one(&mut self, always_well: bool) {
        if self.in_flight.is_empty() {
            return;
        }
        let index = self.random.below(self.in_flight.len() as u64) as usize;
        let sending = self.in_flight.swap_remove(index);
        let luck = if always_well { 0 } else { self.random.below(10) };
        if luck <= 6 {
            let batch = decode_batch(&sending.payload).unwrap();
            let lane = (batch.source.to_string(), batch.span.unwrap().generation);
            self.kept.entry(lane).or_default().extend(lines_of(&sending.payload));
        }
        let answer = match luck {
            0..=5 => Ok(()),
            6 | 7 => Err(PublishError::Unavailable("no answer".to_owned())),
            8 => Err(PublishError::Full),
            _ => Err(PublishError::Refused("no permission".to_owned())),
        };
        self.outbox.handle_answer(sending.number, answer, self.now);
    }

    fn store(&mut self) {
        self.stored = checkpoint::encode(self.outbox.progress());
        for (lane, position) in self.outbox.progress().positions() {
            let kept = |line: &u64| self.kept.get(&lane).is_some_and(|lines| lines.contains(line));
            let skipped = (0..position.offset / LINE).find(|line| is_event(*line) && !kept(line));
            assert_eq!(skipped, None, "a position is beyond a line of {lane:?} that the bus does not have");
        }
    }

    /// A life without mishaps, to its end.
    fn finish(&mut self) {
        while self.read != [LINES; LANES.len()] {
            self.read_some();
            self.send();
            self.answer_one(true);
        }
        self.outbox.close();
        while !self.outbox.is_empty() {
            self.send();
            self.answer_one(true);
            if self.in_flight.is_empty() {
                self.now = self.now.saturating_add(self.outbox.poll_timeout(self.now).unwrap_or_default());
            }
        }
        self.store();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn however_often_a_node_is_killed_every_line_is_sent_and_none_skipped(seed: u64) {
        let mut world = World::new(seed);
        for _ in 0..3 {
            world.restart();
            for _ in 0..=world.random.below(150) {
                world.step();
            }
        }
        world.restart();
        world.finish();
        let all: BTreeSet<u64> = (0..LINES).filter(|line| is_event(*line)).collect();
        let positions = checkpoint::decode(&world.stored).unwrap().positions();
        for lane in LANES.map(|(source, generation)| (source.to_owned(), generation)) {
            prop_assert_eq!(&world.kept[&lane], &all);
            prop_assert_eq!(positions[&lane].offset, LINES * LINE);
        }
    }
}
