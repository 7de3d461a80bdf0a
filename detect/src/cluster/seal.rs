//! From what a detector has decided to the changes of the shared state that say so. Pure.
//!
//! A commit that is too large for one atomic batch is cut into pieces, of which only the last moves the floor. What is
//! said of one target stays together, so that whoever finds only the first pieces decides the rest and nothing twice.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::bus::nats::commit::{Change, ENTRIES_MAX, Value, put_out};
use proto::envelope::{CloudEvent, Data};
use proto::head::{Head, Mark};
use proto::net::Target;
use proto::subject::{KEY_BAN, KEY_OFFENDER, target_key};
use proto::time::Timestamp;

use crate::state::encode_offender;
use crate::store::Commit;

/// Bytes of events that share a message: a quarter of what a server takes unless told otherwise.
const OUT_BYTES_MAX: usize = 256 * 1024;

/// One atomic batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) head: Head,
    pub(crate) changes: Vec<Change>,
}

/// Targets that the state holds bans of, and the end of each; `None` = permanent.
pub(crate) type Banned = BTreeMap<Target, Option<Timestamp>>;

/// What belongs together.
#[derive(Default)]
struct Group {
    target: Option<Target>,
    changes: Vec<Change>,
    events: Vec<Told>,
}

/// An event that was told, as JSON.
struct Told {
    /// When, among all of the commit.
    turn: usize,
    json: Vec<u8>,
    event: CloudEvent,
}

/// Writes `commit`, `told` and the changes of `singles` (keys that there is one of) into pieces that follow `last`, the
/// head as it stands, and end in `next`, whose marks and counts are filled in here. `banned` is what the state holds, kept up
/// to date. Returned as well are the events as they share numbers in the outbox, from `last.next_out` on.
pub(crate) fn seal(
    commit: &Commit,
    told: Vec<CloudEvent>,
    singles: Vec<Change>,
    (last, next): (&Head, Head),
    (banned, now): (&mut Banned, Timestamp),
) -> (Vec<Piece>, Vec<Vec<CloudEvent>>) {
    let single = |change| Group { changes: vec![change], ..Group::default() };
    let mut groups: Vec<Group> = singles.into_iter().map(single).collect();
    groups.extend(by_target(commit, told, (banned, now)));
    let mut sealing = Sealing::new(last, &next);
    for group in groups {
        if !sealing.has_room(&group) {
            sealing.close(banned.len());
        }
        if let Some(target) = group.target
            && let Some(record) = commit.records.get(&target)
        {
            match record {
                Some(record) => drop(banned.insert(target, record.expires_at())),
                None => drop(banned.remove(&target)),
            }
        }
        sealing.add(group);
    }
    sealing.close(banned.len());
    let Sealing { mut pieces, outs, .. } = sealing;
    if let Some(piece) = pieces.last_mut() {
        let Head { mark, bans, changes, .. } = piece.head;
        piece.head = Head { mark, bans, changes, ..next };
    }
    // No number is given twice, whoever finds which pieces.
    let next_out = last.next_out + outs.len() as u64;
    pieces.iter_mut().for_each(|piece| piece.head.next_out = next_out);
    (pieces, outs)
}

/// Pieces in the making.
struct Sealing<'a> {
    last: &'a Head,
    next: &'a Head,
    /// Of the piece that is open.
    changes: Vec<Change>,
    events: Vec<Told>,
    event_bytes: usize,
    pieces: Vec<Piece>,
    outs: Vec<Vec<CloudEvent>>,
}

impl<'a> Sealing<'a> {
    fn new(last: &'a Head, next: &'a Head) -> Self {
        Self {
            last,
            next,
            changes: Vec::new(),
            events: Vec::new(),
            event_bytes: 0,
            pieces: Vec::new(),
            outs: Vec::new(),
        }
    }

    /// Whether the open piece can take `group` as well.
    fn has_room(&self, group: &Group) -> bool {
        let bytes = self.event_bytes + group.events.iter().map(|told| told.json.len()).sum::<usize>();
        // Of two messages that follow each other, both are not half empty.
        let outs = 2 * bytes / OUT_BYTES_MAX + 1;
        self.changes.len() + group.changes.len() + outs < ENTRIES_MAX
    }

    fn add(&mut self, group: Group) {
        self.event_bytes += group.events.iter().map(|told| told.json.len()).sum::<usize>();
        self.changes.extend(group.changes);
        self.events.extend(group.events);
    }

    /// Ends a piece, after which there are `bans` in the state.
    fn close(&mut self, bans: usize) {
        let mut events = std::mem::take(&mut self.events);
        events.sort_by_key(|told| told.turn);
        self.event_bytes = 0;
        let mut changes = std::mem::take(&mut self.changes);
        let mut rest = events.as_slice();
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |told: &&Told| {
                bytes += told.json.len();
                bytes <= OUT_BYTES_MAX
            };
            // One that is larger goes alone.
            let (some, others) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            let number = self.last.next_out + self.outs.len() as u64;
            changes.push(put_out(number, some.iter().map(|told| told.json.as_slice())));
            self.outs.push(some.iter().map(|told| told.event.clone()).collect());
            rest = others;
        }
        // Whoever is active is so from its first piece on.
        let commit = self.last.mark.commit + 1 + self.pieces.len() as u64;
        let mark = Mark { epoch: self.next.mark.epoch, commit };
        let (node, counted) = (self.next.node.clone(), changes.len() as u64);
        let head = Head { node, mark, bans: bans as u64, changes: counted, ..self.last.clone() };
        self.pieces.push(Piece { head, changes });
    }
}

fn by_target(commit: &Commit, told: Vec<CloudEvent>, (banned, now): (&Banned, Timestamp)) -> Vec<Group> {
    let mut groups: BTreeMap<Target, Group> = BTreeMap::new();
    let mut loose = Vec::new();
    for (target, record) in &commit.records {
        // A ban that is lifted must not come back while it would still last.
        let left = || banned.get(target).map_or(Some(Duration::ZERO), |end| end.map(|end| end.since(now)));
        let value = record.as_ref().map_or_else(|| Value::Delete(left()), put);
        let key = format!("{KEY_BAN}{}", target_key(target));
        groups.entry(*target).or_default().changes.push(Change { key, value });
    }
    for (target, offender) in &commit.offenders {
        // A history that is forgotten counts for nothing, should it come back.
        let forgotten = Value::Delete(Some(Duration::ZERO));
        let value = offender.as_ref().map_or(forgotten, |offender| Value::Put(encode_offender(offender)));
        let key = format!("{KEY_OFFENDER}{}", target_key(target));
        groups.entry(*target).or_default().changes.push(Change { key, value });
    }
    for (turn, event) in told.into_iter().enumerate() {
        let told = Told { turn, json: serde_json::to_vec(&event).unwrap_or_default(), event };
        match &told.event.data {
            Data::Ban(ban) => groups.entry(ban.target).or_default().events.push(told),
            Data::Alarm(_) => loose.push(Group { events: vec![told], ..Group::default() }),
        }
    }
    loose.into_iter().chain(groups.into_iter().map(|(target, group)| Group { target: Some(target), ..group })).collect()
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
        let (pieces, outs) =
            seal(&commit, told.clone(), Vec::new(), (&last, next), (&mut banned, Timestamp::from_secs(10)));
        assert_eq!((pieces.len(), outs), (1, vec![told]));
        let head = &pieces[0].head;
        assert_eq!(head.mark, Mark { epoch: 2, commit: 8 });
        assert_eq!((head.floor, head.bans, head.next_out, head.changes), (20, 3, 6, 5));
        let keys: Vec<&str> = pieces[0].changes.iter().map(|change| change.key.as_str()).collect();
        assert_eq!(keys, ["ban.10.0.0.0", "offender.10.0.0.0", "ban.10.0.0.1", "offender.10.0.0.1", "out.5"]);
    }

    fn outs(pieces: &[Piece]) -> Vec<&str> {
        let keys = pieces.iter().flat_map(|piece| &piece.changes).map(|change| change.key.as_str());
        keys.filter(|key| key.starts_with("out.")).collect()
    }

    #[test]
    fn of_a_large_commit_only_the_last_piece_moves_the_floor_and_no_target_is_torn() {
        let (commit, told) = bans(1000);
        let (last, next) = heads();
        let mut banned = Banned::new();
        let (pieces, sent) =
            seal(&commit, told.clone(), Vec::new(), (&last, next), (&mut banned, Timestamp::from_secs(10)));
        assert_eq!(pieces.len(), 3);
        let mut counted = 0;
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.changes.len() < ENTRIES_MAX);
            let of = |prefix: &str| piece.changes.iter().filter(|change| change.key.starts_with(prefix)).count();
            assert_eq!(of("ban."), of("offender."), "record and history of a target stay together");
            counted += of("ban.") as u64;
            let events: usize = sent.iter().skip(i).take(1).map(Vec::len).sum();
            assert_eq!((of("out."), events), (1, of("ban.")), "and their events stand beside them");
            let head = &piece.head;
            assert_eq!(head.floor, if i == 2 { 20 } else { 10 });
            assert_eq!(head.mark, Mark { epoch: 2, commit: 8 + i as u64 });
            assert_eq!((head.bans, head.next_out, head.changes), (counted, 8, piece.changes.len() as u64));
        }
        assert_eq!(banned.len(), 1000);
        assert_eq!(outs(&pieces), ["out.5", "out.6", "out.7"]);
        assert_eq!(sent.concat(), told);
    }

    #[test]
    fn events_share_messages_that_a_server_takes() {
        let alarm = |n: i64| CloudEvent::of_alarm("n", "kind", "x".repeat(1000), Timestamp::from_secs(n));
        let told: Vec<CloudEvent> = (0..2500).map(alarm).collect();
        let (last, next) = heads();
        let at = (&mut Banned::new(), Timestamp::EPOCH);
        let (pieces, sent) = seal(&Commit::default(), told.clone(), Vec::new(), (&last, next), at);
        assert_eq!(outs(&pieces).len(), sent.len());
        assert_eq!(pieces[0].head.next_out, 5 + sent.len() as u64);
        assert_eq!(sent.concat(), told, "in the order in which they were told");
        let sizes = pieces.iter().flat_map(|piece| &piece.changes).map(|change| match &change.value {
            Value::Put(json) => json.len(),
            Value::Delete(_) => 0,
        });
        assert!(sizes.clone().all(|size| size < 2 * OUT_BYTES_MAX));
        assert!(sizes.sum::<usize>() > 2_500_000);
    }

    #[test]
    fn a_piece_is_never_too_large_for_a_batch_whatever_its_events_weigh() {
        let (commit, told) = bans(600);
        let heavy = |mut event: CloudEvent| {
            if let Data::Ban(ban) = &mut event.data {
                ban.reason = "x".repeat(200_000);
            }
            event
        };
        let told: Vec<CloudEvent> = told.into_iter().map(heavy).collect();
        let (last, next) = heads();
        let at = (&mut Banned::new(), Timestamp::EPOCH);
        let (pieces, sent) = seal(&commit, told, Vec::new(), (&last, next), at);
        assert!(pieces.iter().all(|piece| piece.changes.len() < ENTRIES_MAX));
        assert_eq!(sent.len(), 600);
    }

    #[test]
    fn lifted_bans_are_counted_out() {
        let commit = Commit { records: BTreeMap::from([(target(1), None)]), ..Commit::default() };
        let (last, next) = heads();
        let mut banned = Banned::from([(target(1), Some(Timestamp::from_secs(70))), (target(2), None)]);
        let (pieces, _) = seal(&commit, Vec::new(), Vec::new(), (&last, next), (&mut banned, Timestamp::from_secs(10)));
        assert_eq!(pieces[0].head.bans, 1);
        let left = Value::Delete(Some(Duration::from_secs(60)));
        assert_eq!(pieces[0].changes, [Change { key: "ban.10.0.0.1".into(), value: left }]);
    }
}
