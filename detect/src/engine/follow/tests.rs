//! Hand-made cases of following and taking over.

use std::time::Duration;

use proto::ban::Ban;
use proto::envelope::EventType;
use proto::event::FileSpan;
use serde_json::json;

use super::*;
use crate::engine::command::Command;
use crate::engine::tests::{at, config, event};
use crate::engine::{Event, Output};

const CLIENT: &str = "192.0.2.1";

/// Three 404s, or three 500s, in ten minutes ban for ten seconds, then for twenty.
fn rules() -> EngineConfig {
    let rule = |status: u16, mode: &str| {
        let matches = format!("Status(`{status}`)");
        json!({"match": matches, "max_retry": 3, "find_time": "10m", "ban_time": "10s", "mode": mode})
    };
    let rules = json!({"a": rule(404, "enforce"), "b": rule(500, "enforce"), "c": rule(403, "shadow")});
    config(json!({"rules": rules, "escalation": {"jitter": 0.0}, "lateness_max": "10m"})).engine
}

fn leader() -> Engine {
    let mut engine = Engine::follow(rules(), Snapshot::default(), Position::after_batch(0), at(0));
    engine.lead(at(0));
    engine
}

/// A detector that starts from what `active` has decided up to `floor`, which arrived at `seconds`.
fn successor(active: &Engine, floor: u64, seconds: i64) -> Engine {
    Engine::follow(rules(), active.snapshot(), Position::after_batch(floor), at(seconds))
}

/// Lines of one client from line `first` of a file on, one at each of `seconds`.
fn batch(first: u64, status: u16, seconds: &[i64]) -> AccessBatch {
    let mut batch = AccessBatch::new("n".into(), "s".into(), Timestamp::EPOCH);
    for (line, &seconds) in (first..).zip(seconds) {
        batch.push(&Event { offset: line * 10, ..event(CLIENT, seconds, status) });
    }
    batch.span = Some(FileSpan { generation: 1, start: first * 10, end: (first + seconds.len() as u64) * 10 });
    batch
}

fn outputs(engine: &mut Engine) -> Vec<Output> {
    std::iter::from_fn(|| engine.poll_output()).collect()
}

/// Number of the ban that the engine has told of, if any.
fn told(engine: &mut Engine) -> Option<u32> {
    outputs(engine).into_iter().find_map(|output| match output {
        Output::Told(EventType::Ban | EventType::Extend, ban) => Some(ban.ban_count),
        _ => None,
    })
}

/// Lets `standby` follow all that `active` has decided since the last call, up to `floor`.
fn follow(standby: &mut Engine, active: &mut Engine, log: &[(AccessBatch, u64, i64)], floor: u64) {
    for output in outputs(active) {
        match output {
            Output::Record(change) => standby.follow_record(change),
            Output::Offender(target, offender) => standby.follow_offender(target, offender),
            Output::Control => standby.follow_control(&active.control()),
            _ => {}
        }
    }
    for (batch, sequence, seconds) in log {
        standby.handle_logged(batch, *sequence, at(*seconds));
    }
    standby.raise_floor(Position::after_batch(floor));
    assert!(outputs(standby).is_empty(), "a standby does nothing");
}

#[test]
fn a_replayed_span_cannot_ban_an_unbanned_client_again() {
    let mut active = leader();
    let (storm, more) = (batch(0, 404, &[0, 1, 2]), batch(3, 404, &[3, 4, 5]));
    active.handle_logged(&storm, 1, at(2));
    assert_eq!(told(&mut active), Some(1));
    active.handle_logged(&more, 2, at(5));
    let unban = Command::Unban(vec![CLIENT.parse().unwrap()]);
    active.handle_command(unban, at(6)).unwrap();
    // The floor of the first batch: the unban was stored, and what stands after that floor is read again.
    let mut next = successor(&active, 1, 2);
    next.handle_logged(&storm, 1, at(2));
    next.lead(at(7));
    next.handle_logged(&more, 2, at(5));
    next.handle_logged(&more, 3, at(7));
    assert_eq!(told(&mut next), None);
    assert_eq!(next.bans().count(), 0);
    next.handle_logged(&batch(6, 404, &[8, 9]), 4, at(9));
    assert_eq!(told(&mut next), None, "what came before the unban counts no more");
    next.handle_logged(&batch(8, 404, &[10]), 5, at(10));
    assert_eq!(told(&mut next), Some(1), "what comes after it does, as a first offence");
}

#[test]
fn a_batch_filtered_by_an_older_predicate_counts_for_the_rules_that_it_covers() {
    let mut engine = leader();
    engine.set_coverage(vec![2, 0, 0]);
    let filtered = |filter: u64, mut batch: AccessBatch| {
        batch.filter = filter;
        batch
    };
    engine.handle_logged(&filtered(1, batch(0, 404, &[0, 1, 2])), 1, at(2));
    assert_eq!(told(&mut engine), None, "some of this rule's events may have been left out");
    engine.handle_logged(&filtered(1, batch(3, 500, &[3, 4, 5])), 2, at(5));
    assert_eq!(told(&mut engine), Some(1));
    engine.handle_logged(&filtered(2, batch(6, 404, &[20, 21, 22])), 3, at(22));
    assert_eq!(told(&mut engine), Some(1));
    engine.handle_logged(&filtered(0, batch(9, 404, &[40, 41, 42])), 4, at(42));
    assert_eq!(told(&mut engine), Some(2), "nothing is left out of a batch that is not filtered");
}

#[test]
fn a_backlog_is_counted_by_its_own_time() {
    let mut engine = leader();
    let hours = 5 * 3600;
    engine.lead(at(hours));
    engine.set_present(at(hours));
    engine.handle_logged(&batch(0, 404, &[0, 1, 2]), 1, at(2));
    let over = outputs(&mut engine).into_iter().find_map(|output| match output {
        Output::Over(ban) => Some(*ban),
        _ => None,
    });
    let Some(Ban { banned_at, expires_at, .. }) = over else { panic!("no ban was found") };
    assert_eq!((banned_at, expires_at), (at(2), Some(at(12))));
    assert_eq!(engine.bans().count(), 0, "a ban that is over is not put in force");
    engine.handle_logged(&batch(3, 404, &[hours - 2, hours - 1, hours]), 2, at(hours));
    assert_eq!(told(&mut engine), Some(2), "but it counts");
    assert_eq!(engine.bans().count(), 1);
}

#[test]
fn windows_of_a_standby_let_go_what_a_committed_decision_consumed() {
    let (mut active, mut standby) = (leader(), successor(&leader(), 0, 0));
    let log = [(batch(0, 404, &[0, 1]), 1, 1), (batch(2, 404, &[2]), 2, 2)];
    active.handle_logged(&log[0].0, 1, at(1));
    follow(&mut standby, &mut active, &log[..1], 1);
    active.handle_logged(&log[1].0, 2, at(2));
    follow(&mut standby, &mut active, &log[1..], 2);
    assert_eq!(standby.bans().count(), 1);
    standby.lead(at(20));
    outputs(&mut standby);
    standby.handle_logged(&batch(3, 404, &[21, 22]), 3, at(22));
    assert_eq!(told(&mut standby), None, "the first ban has used up what came before it");
    standby.handle_logged(&batch(5, 404, &[23]), 4, at(23));
    assert_eq!(told(&mut standby), Some(2));
}

#[test]
fn a_standby_decides_nothing_and_counts_a_batch_once() {
    let mut standby = successor(&leader(), 0, 0);
    let mut unnumbered = batch(0, 404, &[0, 1]);
    unnumbered.span = None;
    for _ in 0..2 {
        standby.handle_logged(&unnumbered, 1, at(1));
    }
    assert!(outputs(&mut standby).is_empty());
    standby.raise_floor(Position::after_batch(1));
    standby.lead(at(2));
    standby.handle_logged(&batch(0, 404, &[2]), 2, at(2));
    assert_eq!(told(&mut standby), Some(1));
}

#[test]
fn what_is_read_again_is_judged_by_its_own_arrival() {
    // On time when it came, although now too old to be new.
    let mut next = successor(&leader(), 2, 900);
    next.handle_logged(&batch(0, 404, &[100, 101]), 1, at(101));
    next.handle_logged(&batch(2, 200, &[900]), 2, at(900));
    next.lead(at(900));
    next.handle_logged(&batch(3, 404, &[400]), 3, at(901));
    assert_eq!(next.stats().late, 0);
    assert_eq!(told(&mut next), None, "a ban that is over is not told");
    assert_eq!(next.sizes().2, 1, "but it was found");
}

#[test]
fn an_allowance_that_is_given_anew_clears_the_windows_of_a_standby() {
    let (mut active, mut standby) = (leader(), successor(&leader(), 0, 0));
    let allow =
        |seconds| Command::Allow { target: CLIENT.parse().unwrap(), length: Some(Duration::from_secs(seconds)) };
    active.handle_command(allow(5), at(0)).unwrap();
    let log = [(batch(0, 404, &[10, 11]), 1, 11)];
    active.handle_logged(&log[0].0, 1, at(11));
    follow(&mut standby, &mut active, &log, 1);
    active.handle_command(allow(5), at(20)).unwrap();
    follow(&mut standby, &mut active, &[], 1);
    for engine in [&mut active, &mut standby] {
        engine.lead(at(30));
        outputs(engine);
        engine.handle_logged(&batch(2, 404, &[30]), 2, at(30));
        assert_eq!(told(engine), None);
    }
}

#[test]
fn an_allowance_that_has_ended_lifts_no_ban_on_a_take_over() {
    let (mut active, mut standby) = (leader(), successor(&leader(), 0, 0));
    let allow = Command::Allow { target: CLIENT.parse().unwrap(), length: Some(Duration::from_secs(5)) };
    active.handle_command(allow, at(0)).unwrap();
    follow(&mut standby, &mut active, &[], 0);
    active.handle_timeout(at(6));
    active.handle_logged(&batch(0, 404, &[6, 7, 8]), 1, at(8));
    for output in outputs(&mut active) {
        if let Output::Record(change) = output {
            standby.follow_record(change);
        }
    }
    standby.lead(at(9));
    assert_eq!(standby.bans().count(), 1);
}

#[test]
fn a_pause_ends_before_the_batch_that_came_after_it() {
    let mut engine = leader();
    engine.handle_command(Command::Pause(Some(Duration::from_secs(10))), at(0)).unwrap();
    engine.handle_logged(&batch(0, 404, &[10, 11, 12]), 1, at(12));
    assert_eq!(told(&mut engine), Some(1));
}

#[test]
fn shadow_rules_use_up_their_events_in_a_standby_too() {
    let mut standby = successor(&leader(), 0, 0);
    let seconds: Vec<i64> = (0..100).map(|n| n / 20).collect();
    standby.handle_logged(&batch(0, 403, &seconds), 1, at(5));
    assert!(outputs(&mut standby).is_empty());
    let held: usize = standby.clients.events();
    assert!(held < 3, "a flood is not kept: {held} events");
}
