use super::*;

/// Numbers from a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

const LINE: &[u8] = &[b'x'; 120];

/// What a line is a suspect for, at least for now.
fn judged(guard: &mut Guard, mark: Mark, now: Timestamp) -> Option<Suspicion> {
    match guard.judge(mark, LINE, now) {
        Verdict::Fits | Verdict::Believed => None,
        Verdict::Suspect(suspicion) | Verdict::Held(suspicion) => Some(suspicion),
    }
}

/// A Traefik whose requests take up to hours, and whose lines are written when they end.
struct Traefik {
    random: Random,
    count: u64,
    now_ms: i64,
    /// Milliseconds between two requests, on average.
    gap_ms: u64,
    /// Requests under way: end, count, begin.
    open: Vec<(i64, u64, i64)>,
}

impl Traefik {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let count = random.below(10_000_000) + 1_000_000;
        let gap_ms = 1 << random.below(12);
        Self { random, count, now_ms: 1_000_000_000, gap_ms, open: Vec::new() }
    }

    /// Another request begins. Returns the entries that end before.
    fn step(&mut self) -> Vec<(i64, u64, i64)> {
        self.now_ms += self.random.below(self.gap_ms * 2) as i64;
        self.count += 1;
        let duration = match self.random.below(100) {
            0 => self.random.below(2 * 3_600_000),
            1..=9 => self.random.below(30_000),
            _ => self.random.below(200),
        };
        self.open.push((self.now_ms + duration as i64, self.count, self.now_ms));
        let mut ended: Vec<_> = self.open.extract_if(.., |(end, ..)| *end <= self.now_ms).collect();
        ended.sort_unstable();
        ended
    }
}

/// The bracket has whole seconds.
fn mark(count: u64, began_ms: i64) -> Mark {
    Mark::Counted(count, Timestamp::from_millis(began_ms / 1000 * 1000))
}

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millis(ms)
}

#[test]
fn honest_lines_are_no_suspects_however_late_they_are_written() {
    for seed in 0..100 {
        let mut traefik = Traefik::new(seed);
        let mut guard = Guard::default();
        // Requests that are not logged (filters) leave gaps.
        let logged_of = traefik.random.below(20) + 1;
        let mut unjudged = 0;
        for _ in 0..10_000 {
            for (end, count, began) in traefik.step() {
                if count % logged_of == 0 {
                    match judged(&mut guard, mark(count, began), at(end)) {
                        None => {}
                        Some(Suspicion::TooOld) => unjudged += 1,
                        Some(suspicion) => panic!("seed {seed}: {suspicion:?} at count {count}"),
                    }
                }
            }
        }
        assert!(unjudged <= 200, "seed {seed}: {unjudged}");
    }
}

#[test]
fn after_a_restart_lines_wait_for_two_seconds() {
    for seed in 0..100 {
        let mut traefik = Traefik::new(seed);
        let mut guard = Guard::default();
        let mut since_first = None;
        for step in 0..6000 {
            if step == 3000 {
                traefik.open.clear();
                (traefik.count, traefik.now_ms) = (0, traefik.now_ms + 1000);
            }
            for (end, count, began) in traefik.step() {
                let suspicion = judged(&mut guard, mark(count, began), at(end));
                let since = if step < 3000 { end } else { *since_first.get_or_insert(end) };
                let may_be = suspicion == Some(Suspicion::TooOld)
                    || step >= 3000 && end <= since + 2000 + 4 * traefik.gap_ms as i64;
                assert!(suspicion.is_none() || may_be, "seed {seed}: {suspicion:?} {} ms after", end - since);
            }
        }
    }
}

#[test]
fn forged_lines_are_suspects_and_so_is_the_end_of_their_own_entry() {
    let (mut forged, mut hits, mut aimed) = (0, 0, 0);
    for seed in 0..100 {
        let mut traefik = Traefik::new(seed);
        let mut guard = Guard::default();
        for step in 0..4000 {
            let is_attack = step > 500 && traefik.random.below(20) == 0;
            for (end, count, began) in traefik.step() {
                if is_attack {
                    // Lines with guesses, at the true time, then the end with the genuine count.
                    for _ in 0..traefik.random.below(20) {
                        let guess = 1 + traefik.random.below(11_000_000);
                        forged += 1;
                        hits += u64::from(judged(&mut guard, mark(guess, end), at(end)).is_none());
                    }
                    guard.note_unparsed(b"192.0.2.66 - ");
                    let own_end = judged(&mut guard, mark(count, began), at(end));
                    aimed += u64::from(own_end.is_none());
                } else {
                    let _ = judged(&mut guard, mark(count, began), at(end));
                }
            }
        }
    }
    // Busy minutes bring up to 60,000 requests here, of up to eleven million in all.
    println!("{hits} of {forged} forged lines fit");
    assert!(forged > 100_000 && hits * 200 <= forged, "{hits} of {forged} forged lines fit");
    assert_eq!(aimed, 0);
}

fn counted(guard: &mut Guard, counts: impl IntoIterator<Item = u64>, ms: i64) -> Vec<Option<Suspicion>> {
    counts.into_iter().map(|count| judged(guard, mark(count, ms), at(ms))).collect()
}

#[test]
fn a_repeat_a_wild_jump_and_a_count_of_another_time_are_suspects() {
    let start = 1_000_000_000;
    let count = Some(Suspicion::Count);
    for (forged, ms) in [(100_050, start), (200_000, start), (100_002, start + 600_000), (100_500, start)] {
        let mut guard = Guard::default();
        assert!(counted(&mut guard, 100_000..100_100, start).iter().all(Option::is_none));
        assert!(counted(&mut guard, 100_300..100_400, start + 600_000).iter().all(Option::is_none));
        assert_eq!(counted(&mut guard, [forged], ms), [count], "{forged}");
        assert_eq!(counted(&mut guard, [100_401, 100_402], start + 600_000), [Some(Suspicion::AfterBroken), None]);
    }
}

#[test]
fn a_restart_is_believed_after_two_seconds() {
    let mut guard = Guard::default();
    counted(&mut guard, 5000..5100, 1_000_000_000 - 180_000);
    let after = counted(&mut guard, [1, 2, 3], 1_000_000_100);
    assert_eq!(after, [Some(Suspicion::Count); 3]);
    assert_eq!(guard.take_released().iter().count(), 0);
    assert_eq!(counted(&mut guard, [4], 1_000_002_100), [None]);
    assert_eq!(guard.take_released().iter().collect::<Vec<_>>(), [LINE; 3], "those that have waited come with it");
    assert_eq!(counted(&mut guard, [5, 6, 8, 7], 1_000_002_200), [None; 4]);
    assert_eq!(guard.take_condemned(), 0);
}

#[test]
fn a_restart_in_a_backlog_is_believed_after_more_than_one_request_can_write() {
    let mut guard = Guard::default();
    counted(&mut guard, 50_000..50_100, 1_000_000_000 - 180_000);
    let after = counted(&mut guard, 1..20_000, 1_000_000_000);
    let suspects = after.iter().flatten().count() as u64;
    assert_eq!(suspects, RIVAL_BYTES.div_ceil(LINE.len() as u64) - 1);
    assert_eq!(guard.take_released().iter().count() as u64, suspects);
    assert!(after[suspects as usize..].iter().all(Option::is_none));
}

#[test]
fn a_forger_does_not_become_the_writer() {
    let mut guard = Guard::default();
    counted(&mut guard, 50_000..50_100, 1_000_000_000);
    for round in 0..100 {
        let ms = 1_000_000_000 + i64::from(round) * 1000;
        let lump = counted(&mut guard, (1..50).map(|i| u64::from(round as u32) * 50 + i), ms);
        assert!(lump.iter().all(Option::is_some));
        let own_end = counted(&mut guard, [50_100 + u64::from(round as u32)], ms);
        assert!(own_end[0].is_some());
    }
    // What seems older than all that is known is not reported.
    assert_eq!((guard.take_condemned(), guard.take_released().iter().count()), (90 * 49, 0));
}

#[test]
fn forged_json_is_a_suspect_in_a_log_of_the_common_format_and_a_new_format_is_believed() {
    let mut guard = Guard::default();
    counted(&mut guard, 50_000..50_100, 1_000_000_000);
    let json = |guard: &mut Guard, ms| judged(guard, Mark::Json, at(ms));
    assert_eq!(json(&mut guard, 1_000_000_000), Some(Suspicion::OtherFormat));
    assert_eq!(counted(&mut guard, [50_100, 50_101], 1_000_000_000), [Some(Suspicion::AfterBroken), None]);
    assert_eq!(guard.take_condemned(), 1, "it has waited in vain");
    assert_eq!(json(&mut guard, 1_000_001_000), Some(Suspicion::OtherFormat));
    assert_eq!(json(&mut guard, 1_000_003_000), None);
    assert_eq!(guard.take_released().iter().count(), 1);
}

#[test]
fn a_guess_that_fits_far_ahead_makes_no_suspects_of_the_true_ones() {
    let mut guard = Guard::default();
    let minute = |number: i64| 1_000_000_000 + number * 60_000;
    for number in 0..4 {
        let first = 50_000 + 10_000 * number as u64;
        assert!(counted(&mut guard, (first..first + 10_000).step_by(50), minute(number)).iter().all(Option::is_none));
    }
    assert_eq!(counted(&mut guard, [100_000], minute(3)), [None], "a lucky guess");
    let later: Vec<_> =
        (4..9).flat_map(|number| counted(&mut guard, [50_000 + 10_000 * number as u64], minute(number))).collect();
    assert_eq!(later, [None; 5]);
}

#[test]
fn what_follows_the_beginning_of_a_line_is_a_suspect() {
    for head in
        ["192.0.2.66 - ", "192.0.2.66 -", "2001:db8::1 - a b", "x - y, 192.0.2.66 - a", "10.0.0.1, 192.0.2.66 - -"]
    {
        let mut guard = Guard::default();
        counted(&mut guard, 50_000..50_100, 1_000_000_000);
        guard.note_unparsed(head.as_bytes());
        assert_eq!(
            counted(&mut guard, [50_100, 50_101], 1_000_000_000),
            [Some(Suspicion::AfterBroken), None],
            "{head}"
        );
    }
    for other in ["time=\"2026-01-01\" level=info", "2026-01-01T00:00:00Z INF Starting - now", "", "-", " - "] {
        let mut guard = Guard::default();
        counted(&mut guard, 50_000..50_100, 1_000_000_000);
        guard.note_unparsed(other.as_bytes());
        assert_eq!(counted(&mut guard, [50_100], 1_000_000_000), [None], "{other}");
    }
    let mut guard = Guard::default();
    counted(&mut guard, [50_000], 1_000_000_000);
    guard.note_oversized();
    assert_eq!(counted(&mut guard, [50_001], 1_000_000_000), [Some(Suspicion::AfterBroken)]);
}

#[test]
fn what_claims_to_be_older_than_all_that_is_known_aims_nothing() {
    let start = 1_000_000_000;
    let too_old = Some(Suspicion::TooOld);
    for (forged, ms) in [(1, start - 3_600_000), (1, start), (1, start - 60_000)] {
        let mut guard = Guard::default();
        counted(&mut guard, 50_000..50_100, start);
        assert_eq!(counted(&mut guard, [forged], ms), [too_old]);
        assert_eq!(counted(&mut guard, [50_100, 50_101], start), [too_old, None]);
    }
}

#[test]
fn in_json_nothing_is_a_suspect() {
    let mut guard = Guard::default();
    for line in [&b"192.0.2.66 - "[..], b"x"] {
        assert_eq!(judged(&mut guard, Mark::Json, at(0)), None);
        guard.note_unparsed(line);
        guard.note_oversized();
    }
    assert_eq!(judged(&mut guard, Mark::Json, at(0)), None);
}

/// A Traefik that is killed over and over, with requests under way, whose counts then come again.
#[test]
fn restarts_one_after_the_other_make_no_suspects() {
    for seed in 0..20 {
        let mut traefik = Traefik::new(seed);
        (traefik.gap_ms, traefik.count) = (traefik.gap_ms.clamp(2, 64), 0);
        let mut guard = Guard::default();
        let (mut written, mut arrived, mut too_old) = (0, 0, 0);
        for _ in 0..6 {
            let end = traefik.now_ms + 3000 + traefik.random.below(10_000) as i64;
            while traefik.now_ms < end {
                for (end, count, began) in traefik.step() {
                    written += 1;
                    match guard.judge(mark(count, began), LINE, at(end)) {
                        Verdict::Fits | Verdict::Believed => arrived += 1 + guard.take_released().iter().count(),
                        Verdict::Held(_) => {}
                        Verdict::Suspect(Suspicion::TooOld) => too_old += 1,
                        Verdict::Suspect(suspicion) => panic!("seed {seed}: {suspicion:?} at count {count}"),
                    }
                }
            }
            (traefik.count, traefik.open) = (0, Vec::new());
        }
        let waiting = guard.rival.map_or(0, |rival| rival.held.lines.len());
        assert_eq!(guard.condemned, 0, "seed {seed}");
        assert_eq!(arrived + waiting + too_old, written, "seed {seed}");
        assert!(too_old * 100 <= written, "seed {seed}: {too_old} of {written}");
    }
}

#[test]
fn lines_of_all_senders_wait_in_one_room() {
    let room = WaitingRoom::default();
    let line = vec![b'x'; 512 << 10];
    let waits = |guard: &mut Guard| {
        guard.set_room(room.clone());
        assert_eq!(guard.judge(mark(1_000_000, 0), &line, at(0)), Verdict::Fits);
        guard.judge(mark(1, 60_000), &line, at(60_000))
    };
    let mut guards: Vec<Guard> = (0..40).map(|_| Guard::default()).collect();
    let verdicts: Vec<Verdict> = guards.iter_mut().map(waits).collect();
    let fit = WAITING_BYTES_MAX / line.len();
    assert!(verdicts[..fit].iter().all(|verdict| matches!(verdict, Verdict::Held(_))), "{verdicts:?}");
    assert!(verdicts[fit..].iter().all(|verdict| matches!(verdict, Verdict::Suspect(_))), "{verdicts:?}");
    let condemned = guards.iter_mut().map(|guard| {
        guard.give_up();
        guard.take_condemned()
    });
    assert_eq!(condemned.sum::<u64>(), fit as u64, "each that waited is told");
    assert!(matches!(waits(&mut Guard::default()), Verdict::Held(_)), "there is room again");
    assert_eq!(room.0.load(Ordering::Relaxed), 0);
}
