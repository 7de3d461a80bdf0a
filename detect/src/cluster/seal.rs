//! From what a detector has decided to the changes of the shared state that say so. Pure.
//!
//! A commit that is too large for one atomic batch is cut into pieces, of which only the last moves the floor. What is
//! said of one target stays together, so that whoever finds only the first pieces decides the rest and nothing twice.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::bus::nats::commit::{Change, ENTRIES_MAX, Value};
use proto::envelope::{CloudEvent, Data};
use proto::head::{Head, Mark};
use proto::net::Target;
use proto::subject::{KEY_BAN, KEY_OFFENDER, KEY_OUT, target_key};
use proto::time::Timestamp;

use crate::state::encode_offender;
use crate::store::Commit;

/// One atomic batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) head: Head,
    pub(crate) changes: Vec<Change>,
}

/// Targets that the state holds bans of, and the end of each; `None` = permanent.
pub(crate) type Banned = BTreeMap<Target, Option<Timestamp>>;

/// Writes `commit`, `told` and the changes of `singles` (keys that there is one of) into pieces that follow `last`, the
/// head as it stands, and end in `next`, whose marks and counts are filled in here. Events are numbered as they come. `banned`
/// is what the state holds, kept up to date.
pub(crate) fn seal(
    commit: &Commit,
    told: &[CloudEvent],
    singles: Vec<Change>,
    (last, next): (&Head, Head),
    (banned, now): (&mut Banned, Timestamp),
) -> Vec<Piece> {
    let mut groups: Vec<(Option<Target>, Vec<Change>)> =
        singles.into_iter().map(|single| (None, vec![single])).collect();
    groups.extend(by_target(commit, told, (banned, now), last.next_out));
    // No number is given twice, whoever finds which pieces.
    let next_out = last.next_out + told.len() as u64;
    let mut pieces: Vec<Piece> = Vec::new();
    let mut changes: Vec<Change> = Vec::new();
    let close = |changes: &mut Vec<Change>, bans: usize, pieces: &mut Vec<Piece>| {
        let mut head = Head { next_out, node: next.node.clone(), bans: bans as u64, ..last.clone() };
        // Whoever is active is so from its first piece on.
        head.mark = Mark { epoch: next.mark.epoch, commit: last.mark.commit + 1 + pieces.len() as u64 };
        head.changes = changes.len() as u64;
        pieces.push(Piece { head, changes: std::mem::take(changes) });
    };
    for (target, group) in groups {
        if changes.len() + group.len() >= ENTRIES_MAX {
            close(&mut changes, banned.len(), &mut pieces);
        }
        changes.extend(group);
        if let Some(target) = target
            && let Some(record) = commit.records.get(&target)
        {
            match record {
                Some(record) => drop(banned.insert(target, record.expires_at())),
                None => drop(banned.remove(&target)),
            }
        }
    }
    close(&mut changes, banned.len(), &mut pieces);
    if let Some(piece) = pieces.last_mut() {
        let Head { mark, bans, changes, .. } = piece.head;
        piece.head = Head { mark, bans, changes, next_out, ..next };
    }
    pieces
}

fn by_target(
    commit: &Commit,
    told: &[CloudEvent],
    (banned, now): (&Banned, Timestamp),
    first: u64,
) -> Vec<(Option<Target>, Vec<Change>)> {
    let mut groups: BTreeMap<Target, Vec<Change>> = BTreeMap::new();
    let mut loose = Vec::new();
    for (target, record) in &commit.records {
        // A ban that is lifted must not come back while it would still last.
        let left = || banned.get(target).map_or(Some(Duration::ZERO), |end| end.map(|end| end.since(now)));
        let value = record.as_ref().map_or_else(|| Value::Delete(left()), put);
        let key = format!("{KEY_BAN}{}", target_key(target));
        groups.entry(*target).or_default().push(Change { key, value });
    }
    for (target, offender) in &commit.offenders {
        // A history that is forgotten counts for nothing, should it come back.
        let forgotten = Value::Delete(Some(Duration::ZERO));
        let value = offender.as_ref().map_or(forgotten, |offender| Value::Put(encode_offender(offender)));
        let key = format!("{KEY_OFFENDER}{}", target_key(target));
        groups.entry(*target).or_default().push(Change { key, value });
    }
    for (number, event) in (first..).zip(told) {
        let change = Change { key: format!("{KEY_OUT}{number}"), value: put(event) };
        match &event.data {
            Data::Ban(ban) => groups.entry(ban.target).or_default().push(change),
            Data::Alarm(_) => loose.push((None, vec![change])),
        }
    }
    loose.into_iter().chain(groups.into_iter().map(|(target, group)| (Some(target), group))).collect()
}

fn put(value: &impl serde::Serialize) -> Value {
    Value::Put(serde_json::to_vec(value).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use proto::ban::{Ban, BanRecord, Evidence, Origin};
    use proto::envelope::EventType;

    use super::*;
    use crate::engine::offender::Offender;

    fn target(n: u32) -> Target {
        Target::host(std::net::Ipv4Addr::from(0x0a00_0000 + n).into())
    }

    fn ban(n: u32) -> Ban {
        Ban {
            target: target(n),
            rule: "r".into(),
            origin: Origin::Detect,
            ban_count: 1,
            ban_seconds: Some(60),
            banned_at: Timestamp::EPOCH,
            expires_at: Some(Timestamp::from_secs(60)),
            reason: String::new(),
            evidence: Evidence::default(),
        }
    }

    fn bans(count: u32) -> (Commit, Vec<CloudEvent>) {
        let mut commit = Commit::default();
        let mut told = Vec::new();
        for n in 0..count {
            commit.records.insert(target(n), Some(BanRecord { target: target(n), bans: vec![ban(n)] }));
            commit.offenders.insert(target(n), Some(Offender::default()));
            told.push(CloudEvent::of_ban("n", EventType::Ban, &ban(n), Timestamp::EPOCH));
        }
        (commit, told)
    }

    fn heads() -> (Head, Head) {
        let last = Head { mark: Mark { epoch: 1, commit: 7 }, floor: 10, next_out: 5, ..Head::default() };
        let next = Head { mark: Mark { epoch: 2, commit: 0 }, floor: 20, ..last.clone() };
        (last, next)
    }

    #[test]
    fn a_small_commit_is_one_piece() {
        let (commit, told) = bans(2);
        let (last, next) = heads();
        let mut banned = Banned::from([(target(9), None)]);
        let pieces = seal(&commit, &told, Vec::new(), (&last, next), (&mut banned, Timestamp::from_secs(10)));
        assert_eq!(pieces.len(), 1);
        let head = &pieces[0].head;
        assert_eq!(head.mark, Mark { epoch: 2, commit: 8 });
        assert_eq!((head.floor, head.bans, head.next_out, head.changes), (20, 3, 7, 6));
        let keys: Vec<&str> = pieces[0].changes.iter().map(|change| change.key.as_str()).collect();
        assert_eq!(keys, ["ban.10.0.0.0", "offender.10.0.0.0", "out.5", "ban.10.0.0.1", "offender.10.0.0.1", "out.6"]);
    }

    #[test]
    fn of_a_large_commit_only_the_last_piece_moves_the_floor_and_no_target_is_torn() {
        let (commit, told) = bans(1000);
        let (last, next) = heads();
        let mut banned = Banned::new();
        let pieces = seal(&commit, &told, Vec::new(), (&last, next), (&mut banned, Timestamp::from_secs(10)));
        assert_eq!(pieces.len(), 4);
        let mut counted = 0;
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.changes.len() < ENTRIES_MAX);
            assert_eq!(piece.changes.len() % 3, 0, "record, history and event of a target stay together");
            counted += piece.changes.len() as u64 / 3;
            let head = &piece.head;
            assert_eq!(head.floor, if i == 3 { 20 } else { 10 });
            assert_eq!(head.mark, Mark { epoch: 2, commit: 8 + i as u64 });
            assert_eq!((head.bans, head.next_out, head.changes), (counted, 1005, piece.changes.len() as u64));
        }
        assert_eq!(banned.len(), 1000);
    }

    #[test]
    fn any_number_of_alarms_fits_into_pieces() {
        let alarm = |n: i64| CloudEvent::of_alarm("n", "kind", n.to_string(), Timestamp::from_secs(n));
        let told: Vec<CloudEvent> = (0..2500).map(alarm).collect();
        let (last, next) = heads();
        let at = (&mut Banned::new(), Timestamp::EPOCH);
        let pieces = seal(&Commit::default(), &told, Vec::new(), (&last, next), at);
        assert!(pieces.iter().all(|piece| piece.changes.len() < ENTRIES_MAX));
        assert_eq!(pieces.iter().map(|piece| piece.changes.len()).sum::<usize>(), 2500);
    }

    #[test]
    fn lifted_bans_are_counted_out() {
        let commit = Commit { records: BTreeMap::from([(target(1), None)]), ..Commit::default() };
        let (last, next) = heads();
        let mut banned = Banned::from([(target(1), Some(Timestamp::from_secs(70))), (target(2), None)]);
        let pieces = seal(&commit, &[], Vec::new(), (&last, next), (&mut banned, Timestamp::from_secs(10)));
        assert_eq!(pieces[0].head.bans, 1);
        let left = Value::Delete(Some(Duration::from_secs(60)));
        assert_eq!(pieces[0].changes, [Change { key: "ban.10.0.0.1".into(), value: left }]);
    }
}
