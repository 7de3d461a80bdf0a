//! Steps about members, carried out a batch at a time, without what the kernel refuses.

use std::collections::BTreeSet;
use std::io;

use nix::errno::Errno;

use crate::backend::nftables::core::{Core, is_missing};
use crate::backend::nftables::dump_members;
use crate::backend::nftables::element;
use crate::backend::nftables::netlink::Batch;
use crate::backend::nftables::table::{self, Found, Length};
use crate::backend::{Applied, Refused};
use crate::command::CommandError;
use crate::plan::{Family, SetId, Step};

/// Steps of one transaction at most: so many keep others from changing rules for about 50 ms.
const STEPS_MAX: usize = 16_384;
/// Bytes that a step takes in a transaction at most.
const STEP_BYTES_MAX: usize = 512;
/// Transactions of one batch at most. Each leaves out what was refused before.
const ROUNDS_MAX: usize = 16;

/// What has become of one step of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Attempt {
    /// To be sent.
    Plain,
    /// The ban stands already: it makes way for the new one in the same transaction.
    Replace,
    /// Nothing is left to do.
    Done,
    Refused(String),
}

impl Core {
    /// Carries the steps out, in order.
    pub(super) fn apply(&mut self, steps: &[Step]) -> Applied {
        let mut applied = Applied::default();
        let mut start = 0;
        while start < steps.len() {
            let room = self.socket().map_or(STEPS_MAX, |socket| socket.batch_bytes_max() / STEP_BYTES_MAX);
            let mut end = steps.len().min(start + room.clamp(1, STEPS_MAX));
            // Guarded networks that are split or joined change together.
            while steps
                .get(end)
                .is_some_and(|step| Family::ALL.iter().any(|family| concerns(step, SetId::Guard(*family))))
            {
                end += 1;
            }
            match self.apply_batch(&steps[start..end]) {
                Ok(attempts) => {
                    let refused = attempts.into_iter().zip(start..).filter_map(|(attempt, step)| match attempt {
                        Attempt::Refused(why) => Some(Refused { step, why }),
                        _ => None,
                    });
                    applied.refused.extend(refused);
                }
                Err(source) => {
                    self.close();
                    let error = CommandError::Kernel { what: "change our table", source };
                    applied.stopped = Some((start, error));
                    break;
                }
            }
            start = end;
        }
        applied
    }

    /// Sends the steps until what is left of them is done.
    fn apply_batch(&mut self, steps: &[Step]) -> io::Result<Vec<Attempt>> {
        let mut attempts: Vec<Attempt> = steps.iter().map(first_attempt).collect();
        for _ in 0..ROUNDS_MAX {
            let mut batch = Batch::new();
            let mut wanted = sets_after(&self.sets, steps);
            let builds = wanted != self.sets;
            if builds {
                let found = self.find_all()?;
                wanted = sets_after(&found.sets, steps);
                table::push_structure(&mut batch, &found, &wanted, (&self.ports, &self.spare_ports));
            }
            self.push_guards(&mut batch, steps)?;
            let sent = push_bans(&mut batch, steps, &mut attempts, &wanted);
            let refused = self.transact(batch)?;
            if refused.is_empty() {
                self.take_sets(wanted, steps);
                if builds {
                    self.placed = Some(self.read_rules()?);
                }
                return Ok(attempts);
            }
            self.judge_all(steps, &mut attempts, (&sent, &refused))?;
        }
        let unsent = attempts.iter_mut().filter(|attempt| matches!(attempt, Attempt::Plain | Attempt::Replace));
        unsent.for_each(|attempt| *attempt = Attempt::Refused("not tried".to_owned()));
        Ok(attempts)
    }

    fn judge_all(
        &mut self,
        steps: &[Step],
        attempts: &mut [Attempt],
        (sent, refused): (&[Sent], &[(u32, Errno)]),
    ) -> io::Result<()> {
        if refused.iter().any(|(_, errno)| *errno == Errno::ENOENT) {
            self.find_all()?;
        }
        for (number, errno) in refused {
            let Ok(at) = sent.binary_search_by_key(number, |sent| sent.number) else {
                // No member but the structure itself.
                return Err((*errno).into());
            };
            let Sent { step, removes, .. } = sent[at];
            attempts[step] = judge(matches!(steps[step], Step::Add { .. }), removes, *errno);
        }
        Ok(())
    }

    /// Fails where sets that we knew are gone, guards maybe among them: then everything is to be observed and planned anew.
    fn find_all(&mut self) -> io::Result<Found> {
        let known = self.sets.clone();
        let found = self.find()?;
        if found.sets.lacks(&known) {
            return Err(io::Error::other("somebody removed sets of ours"));
        }
        Ok(found)
    }

    /// Guarded networks are few and disjoint: all of a family's are put in anew when one changes.
    fn push_guards(&mut self, batch: &mut Batch, steps: &[Step]) -> io::Result<()> {
        for family in Family::ALL {
            let set = SetId::Guard(family);
            let changes = steps.iter().filter(|step| concerns(step, set));
            if changes.clone().next().is_none() {
                continue;
            }
            let name = table::guard_name(family);
            let mut nets = match dump_members(self.socket()?, &name) {
                Ok(items) => element::parse_guard(&items, family),
                Err(error) if is_missing(&error) => BTreeSet::new(),
                Err(error) => return Err(error),
            };
            for step in changes {
                match step {
                    Step::Add { target, .. } => drop(nets.insert(*target)),
                    Step::Delete { target, .. } => drop(nets.remove(target)),
                    _ => nets.clear(),
                }
            }
            if !steps.contains(&Step::Destroy(set)) {
                element::push_guard(batch, family, &element::disjoint(&nets));
            }
        }
        Ok(())
    }

    fn take_sets(&mut self, sets: table::Sets, steps: &[Step]) {
        self.sets = sets;
        for step in steps {
            if let Step::Add { set: SetId::Bans(_), target, .. } = step {
                self.idle.remove(&element::length_of(target));
            }
        }
    }
}

/// A message about a member.
#[derive(Clone, Copy, Debug)]
struct Sent {
    /// Of the message in its batch.
    number: u32,
    /// Index of the step that it is for.
    step: usize,
    /// Whether it removes.
    removes: bool,
}

fn first_attempt(step: &Step) -> Attempt {
    match step {
        Step::Swap(_) => Attempt::Refused("these sets are never swapped".to_owned()),
        _ => Attempt::Plain,
    }
}

/// What the kernel's refusal of a member means.
fn judge(add: bool, removes: bool, errno: Errno) -> Attempt {
    match (add, removes, errno) {
        (true, false, Errno::EEXIST) => Attempt::Replace,
        // It ended while we were about to replace it.
        (true, true, Errno::ENOENT) => Attempt::Plain,
        // It ended before we removed it.
        (false, true, Errno::ENOENT) => Attempt::Done,
        _ => Attempt::Refused(errno.desc().to_owned()),
    }
}

fn concerns(step: &Step, wanted: SetId) -> bool {
    match step {
        Step::Create { set, .. }
        | Step::Destroy(set)
        | Step::Flush(set)
        | Step::Add { set, .. }
        | Step::Delete { set, .. } => *set == wanted,
        Step::Swap(_) => false,
    }
}

/// The sets that steps need, given those that are there.
fn sets_after(sets: &table::Sets, steps: &[Step]) -> table::Sets {
    let mut sets = sets.clone();
    for step in steps {
        match step {
            Step::Create { set: SetId::Guard(family), .. } => drop(sets.guards.insert(*family)),
            Step::Create { set: SetId::Bans(family), .. } => drop(sets.bans.insert(Length::of_hosts(*family))),
            Step::Add { set: SetId::Bans(_), target, .. } => drop(sets.bans.insert(element::length_of(target))),
            Step::Destroy(SetId::Guard(family)) => drop(sets.guards.remove(family)),
            Step::Destroy(SetId::Bans(family)) => sets.bans.retain(|length| length.family != *family),
            _ => {}
        }
    }
    sets
}

fn push_bans(batch: &mut Batch, steps: &[Step], attempts: &mut [Attempt], wanted: &table::Sets) -> Vec<Sent> {
    let mut sent = Vec::new();
    for (step, attempt) in attempts.iter_mut().enumerate() {
        let mut note = |number, removes| sent.push(Sent { number, step, removes });
        match (&steps[step], &*attempt) {
            (Step::Add { set: SetId::Bans(_), target, timeout_s, comment }, Attempt::Plain | Attempt::Replace) => {
                if *attempt == Attempt::Replace {
                    note(element::push_unban(batch, target), true);
                }
                note(element::push_ban(batch, target, *timeout_s, comment), false);
            }
            (Step::Delete { set: SetId::Bans(_), target }, Attempt::Plain) => {
                if wanted.bans.contains(&element::length_of(target)) {
                    note(element::push_unban(batch, target), true);
                } else {
                    *attempt = Attempt::Done;
                }
            }
            (Step::Flush(SetId::Bans(family)), Attempt::Plain) => {
                for length in wanted.bans.iter().filter(|length| length.family == *family) {
                    note(element::push_flush(batch, &length.set_name()), true);
                }
            }
            _ => {}
        }
    }
    sent
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(target: &str) -> Step {
        let set = SetId::Bans(Family::V4);
        Step::Add { set, target: target.parse().unwrap(), timeout_s: Some(9), comment: "r".into() }
    }

    #[test]
    fn what_stands_is_replaced_and_what_is_gone_is_done() {
        let (add, remove, put) = (true, true, false);
        assert_eq!(judge(add, put, Errno::EEXIST), Attempt::Replace);
        assert_eq!(judge(add, remove, Errno::ENOENT), Attempt::Plain, "it ended between two transactions");
        assert_eq!(judge(!add, remove, Errno::ENOENT), Attempt::Done);
        assert!(matches!(judge(add, put, Errno::ENFILE), Attempt::Refused(_)));
        assert!(matches!(judge(!add, remove, Errno::EPERM), Attempt::Refused(_)));
    }

    #[test]
    fn every_message_is_traced_to_its_step() {
        let delete = Step::Delete { set: SetId::Bans(Family::V4), target: "192.0.2.3".parse().unwrap() };
        let elsewhere = Step::Delete { set: SetId::Bans(Family::V4), target: "192.0.2.0/25".parse().unwrap() };
        let steps = [add("192.0.2.1"), add("192.0.2.2"), delete, elsewhere, add("198.51.100.0/24")];
        let sets = sets_after(&table::Sets::default(), &steps);
        let lengths: Vec<u8> = sets.bans.iter().map(|length| length.prefix).collect();
        assert_eq!(lengths, [24, 32], "each length has its set, and an unban makes none");
        let mut attempts = vec![Attempt::Plain; steps.len()];
        attempts[1] = Attempt::Replace;
        let sent = push_bans(&mut Batch::new(), &steps, &mut attempts, &sets);
        let traced: Vec<(u32, usize, bool)> = sent.iter().map(|sent| (sent.number, sent.step, sent.removes)).collect();
        assert_eq!(traced, [(0, 0, false), (1, 1, true), (2, 1, false), (3, 2, true), (4, 4, false)]);
        assert_eq!(attempts[3], Attempt::Done, "nobody can be banned by a length that has no set");
        attempts = vec![Attempt::Done; steps.len()];
        assert!(push_bans(&mut Batch::new(), &steps, &mut attempts, &sets).is_empty());
    }
}
