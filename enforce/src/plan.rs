//! The difference between the desired set and the kernel's, as steps. Pure.
//!
//! [`Kernel`] is what the kernel holds, observed or known from what was applied. Planning decides nothing about what is
//! wanted and does no I/O. Planning again after the steps were applied plans nothing.

pub mod plain;
pub mod rules;
#[cfg(test)]
mod simulation;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proto::net::Target;
use proto::time::Timestamp;

use crate::desired::{Desired, Entry};

/// Longest timeout of a kernel set's member, in seconds (24.8 days). Longer bans are renewed on the way.
pub const TIMEOUT_MAX_S: u32 = 2_147_483;
/// A longer ban is renewed once less than this is left of its timeout.
const RENEW_BELOW: Duration = Duration::from_secs(TIMEOUT_MAX_S as u64 / 2);
/// Kernel timeouts are whole seconds that we round up, and listing them takes time: ends closer than this are equal.
const END_TOLERANCE: Duration = Duration::from_secs(2);
/// A change of the clock's skew, in milliseconds, that the ends in rules and the kernel's timers must follow.
pub const SKEW_STEP_MS: u64 = 2000;
/// Networks in a guard set at most; a kernel set of that size is what `ipset` makes unasked.
pub const GUARD_NETS_MAX: u32 = 65_536;
/// Room of a set that grows as it is filled. Nothing is gained by making it anew in another size.
pub const GROWS: u32 = u32::MAX;
/// Room in a ban set beyond `bans_max`, for bans that have ended and that the kernel has not yet swept out.
const MAXELEM_SPARE: u32 = 4096;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of a target.
    pub fn of(target: &Target) -> Self {
        if target.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// For people and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }
}

/// A kernel set of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetId {
    /// Networks that are returned before bans are looked at.
    Guard(Family),
    /// Banned networks.
    Bans(Family),
    /// A ban set that is being filled to take the place of another.
    Fresh(Family),
}

impl SetId {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Guard(Family::V4),
        Self::Guard(Family::V6),
        Self::Bans(Family::V4),
        Self::Bans(Family::V6),
        Self::Fresh(Family::V4),
        Self::Fresh(Family::V6),
    ];

    /// Its name in the kernel, at most 31 bytes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Guard(Family::V4) => "portcullis-guard-v4",
            Self::Guard(Family::V6) => "portcullis-guard-v6",
            Self::Bans(Family::V4) => "portcullis-v4",
            Self::Bans(Family::V6) => "portcullis-v6",
            Self::Fresh(Family::V4) => "portcullis-new-v4",
            Self::Fresh(Family::V6) => "portcullis-new-v6",
        }
    }

    /// Its family.
    pub fn family(self) -> Family {
        match self {
            Self::Guard(family) | Self::Bans(family) | Self::Fresh(family) => family,
        }
    }

    /// Whether its members carry timeouts and comments.
    pub fn holds_bans(self) -> bool {
        !matches!(self, Self::Guard(_))
    }
}

/// One member of a kernel set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// When the kernel drops it; `None` = never.
    pub ends: Option<Timestamp>,
    /// Its comment.
    pub comment: Arc<str>,
}

/// How a set was made, its size aside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// Type, family, timeouts and comments are as we make them.
    #[default]
    Ours,
    /// Timeouts or comments are not; it can be swapped with one that has them.
    Extras,
    /// Type or family are not: the kernel does not swap it with one of ours.
    Foreign,
}

/// A set as the kernel holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelSet {
    /// Room for so many members, or [`GROWS`].
    pub maxelem: u32,
    /// How it was made.
    pub form: Form,
    /// Its members.
    pub members: BTreeMap<Target, Held>,
}

impl KernelSet {
    /// Whether it has the size that a set for so many members is made with, or grows to it.
    pub fn has_room_for(&self, maxelem: u32) -> bool {
        self.maxelem == maxelem || self.maxelem == GROWS
    }

    /// Whether it, as the set `id`, is not what we make, and no step would make it so. Rules use it, so it cannot be
    /// destroyed. It is reported and left alone.
    pub fn is_beyond_repair(&self, id: SetId) -> bool {
        match id {
            // It has no other that it could be swapped with.
            SetId::Guard(_) => self.form != Form::Ours || !self.has_room_for(GUARD_NETS_MAX),
            SetId::Bans(_) => self.form == Form::Foreign,
            SetId::Fresh(_) => false,
        }
    }
}

/// One change to the kernel's sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make a set.
    Create {
        /// Which.
        set: SetId,
        /// Room for so many members.
        maxelem: u32,
    },
    /// Give `Fresh` the name of `Bans`, and the reverse.
    Swap(Family),
    /// Remove a set that nothing refers to.
    Destroy(SetId),
    /// Remove every member.
    Flush(SetId),
    /// Add a member, or give it this timeout and comment.
    Add {
        /// To which set.
        set: SetId,
        /// The member.
        target: Target,
        /// Seconds until the kernel drops it, at least 1; `None` = never.
        timeout_s: Option<u32>,
        /// Its comment.
        comment: Arc<str>,
    },
    /// Remove a member.
    Delete {
        /// From which set.
        set: SetId,
        /// The member.
        target: Target,
    },
}

impl Step {
    /// For metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Create { .. } => "create",
            Self::Swap(_) => "swap",
            Self::Destroy(_) => "destroy",
            Self::Flush(_) => "flush",
            Self::Add { .. } => "add",
            Self::Delete { .. } => "delete",
        }
    }
}

/// Our sets as the kernel holds them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// The sets that exist.
    pub sets: BTreeMap<SetId, KernelSet>,
}

impl Kernel {
    /// The member of the family's ban set that is exactly `target`.
    pub fn held(&self, target: &Target) -> Option<&Held> {
        self.sets.get(&SetId::Bans(Family::of(target)))?.members.get(target)
    }

    /// What the family's ban set says, if it is one of ours.
    pub fn entries(&self, family: Family) -> impl Iterator<Item = (&Target, Entry)> {
        let set = self.sets.get(&SetId::Bans(family)).filter(|set| set.form == Form::Ours);
        let members = set.into_iter().flat_map(|set| &set.members);
        members.map(|(target, held)| (target, Entry { ends: held.ends, rule: held.comment.clone() }))
    }

    /// Bans in the kernel at `now`.
    pub fn bans(&self, family: Family, now: Timestamp) -> usize {
        let set = self.sets.get(&SetId::Bans(family));
        set.map_or(0, |set| set.members.values().filter(|held| held.ends.is_none_or(|end| now < end)).count())
    }

    /// Takes a step as done.
    pub fn note(&mut self, step: &Step, now: Timestamp) {
        match step {
            Step::Create { set, maxelem } => {
                self.sets.insert(*set, KernelSet { maxelem: *maxelem, form: Form::Ours, members: BTreeMap::new() });
            }
            Step::Swap(family) => {
                let (fresh, bans) = (SetId::Fresh(*family), SetId::Bans(*family));
                if let (Some(new), Some(old)) = (self.sets.remove(&fresh), self.sets.remove(&bans)) {
                    self.sets.insert(bans, new);
                    self.sets.insert(fresh, old);
                }
            }
            Step::Destroy(set) => drop(self.sets.remove(set)),
            Step::Flush(set) => {
                if let Some(set) = self.sets.get_mut(set) {
                    set.members.clear();
                }
            }
            Step::Add { set, target, timeout_s, comment } => {
                let ends = timeout_s.map(|seconds| now.saturating_add(Duration::from_secs(seconds.into())));
                if let Some(set) = self.sets.get_mut(set) {
                    set.members.insert(*target, Held { ends, comment: comment.clone() });
                }
            }
            Step::Delete { set, target } => {
                if let Some(set) = self.sets.get_mut(set) {
                    set.members.remove(target);
                }
            }
        }
    }
}

/// What the sets should be, besides the bans in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Families that the host has.
    pub families: Vec<Family>,
    /// Networks returned before anything is dropped; [`crate::guard::Guard::nets`].
    pub guard_nets: Vec<Target>,
    /// Bans held at most.
    pub bans_max: u32,
}

impl Frame {
    /// Room in each ban set.
    pub fn maxelem(&self) -> u32 {
        self.bans_max.saturating_add(MAXELEM_SPARE)
    }

    /// Guarded networks that do not fit into the family's set.
    pub fn guard_overflow(&self, family: Family) -> usize {
        let count = self.guard_nets.iter().filter(|net| Family::of(net) == family).count();
        count.saturating_sub(GUARD_NETS_MAX as usize)
    }
}

/// Everything that differs. Guarded networks come first, so that no ban is in force without them.
pub fn plan(frame: &Frame, desired: &Desired, kernel: &Kernel, now: Timestamp) -> Vec<Step> {
    let mut steps = Vec::new();
    for &family in &frame.families {
        plan_guard(frame, family, kernel, &mut steps);
    }
    for &family in &frame.families {
        plan_bans(frame, family, (desired, kernel, now), &mut steps);
    }
    steps
}

/// What differs for these targets, where the sets themselves are as they should be. Additions come first, so that a ban
/// that takes the place of a wider one leaves no gap, unless there is no room for that.
pub fn plan_targets<'a>(
    targets: impl IntoIterator<Item = &'a Target>,
    desired: &Desired,
    kernel: &Kernel,
    now: Timestamp,
) -> Vec<Step> {
    let (mut removals, mut additions) = (Vec::new(), Vec::new());
    for target in targets {
        let set = SetId::Bans(Family::of(target));
        let usable = kernel.sets.get(&set).filter(|kernel_set| !kernel_set.is_beyond_repair(set));
        let Some(members) = usable.map(|set| &set.members) else { continue };
        match (desired.wanted(target), members.get(target)) {
            (Some(entry), Some(held)) if is_same(entry, held, now) => {}
            (Some(entry), _) => additions.extend(add(set, target, entry, now)),
            // The kernel has dropped it by itself.
            (None, Some(held)) if held.ends.is_some_and(|end| end <= now) => {}
            (None, Some(_)) if may_remove(target, desired) => removals.push(Step::Delete { set, target: *target }),
            (None, _) => {}
        }
    }
    let fits = |set: &KernelSet| set.members.len() + additions.len() <= set.maxelem as usize;
    if kernel.sets.iter().all(|(id, set)| !id.holds_bans() || fits(set)) {
        additions.extend(removals);
        return additions;
    }
    removals.extend(additions);
    removals
}

/// Until the whole set is known, only what we know to be unwanted may go.
fn may_remove(target: &Target, desired: &Desired) -> bool {
    desired.is_whole() || desired.is_paused() || desired.contains(target)
}

fn plan_guard(frame: &Frame, family: Family, kernel: &Kernel, steps: &mut Vec<Step>) {
    let set = SetId::Guard(family);
    let nets = frame.guard_nets.iter().filter(|net| Family::of(net) == family).take(GUARD_NETS_MAX as usize);
    let wanted: BTreeSet<Target> = nets.copied().collect();
    let none = BTreeMap::new();
    if kernel.sets.get(&set).is_some_and(|held| held.is_beyond_repair(set)) {
        return;
    }
    let held = kernel.sets.get(&set).map(|set| &set.members);
    if held.is_none() {
        steps.push(Step::Create { set, maxelem: GUARD_NETS_MAX });
    }
    let held = held.unwrap_or(&none);
    let comment: Arc<str> = "".into();
    let missing = wanted.iter().filter(|net| !held.contains_key(net));
    let missing: Vec<Step> =
        missing.map(|net| Step::Add { set, target: *net, timeout_s: None, comment: comment.clone() }).collect();
    let stale = held.keys().filter(|net| !wanted.contains(net));
    let stale: Vec<Step> = stale.map(|net| Step::Delete { set, target: *net }).collect();
    // Additions first, so that no address is unguarded while networks are split or joined, unless there is no room.
    if held.len() + missing.len() <= GUARD_NETS_MAX as usize {
        steps.extend(missing.into_iter().chain(stale));
    } else {
        steps.extend(stale.into_iter().chain(missing));
    }
}

fn plan_bans(
    frame: &Frame,
    family: Family,
    (desired, kernel, now): (&Desired, &Kernel, Timestamp),
    steps: &mut Vec<Step>,
) {
    let (bans, fresh) = (SetId::Bans(family), SetId::Fresh(family));
    if kernel.sets.contains_key(&fresh) {
        steps.push(Step::Destroy(fresh));
    }
    let wanted = desired.all_wanted().filter(|(target, _)| Family::of(target) == family);
    let Some(set) = kernel.sets.get(&bans) else {
        steps.push(Step::Create { set: bans, maxelem: frame.maxelem() });
        steps.extend(wanted.filter_map(|(target, entry)| add(bans, target, entry, now)));
        return;
    };
    // Paused, and nothing that may stay: one step instead of one a member, whatever becomes of the set.
    let flushed = desired.is_paused() && !set.members.is_empty();
    if flushed {
        steps.push(Step::Flush(bans));
    }
    if set.is_beyond_repair(bans) {
        return;
    }
    if set.form == Form::Ours && set.has_room_for(frame.maxelem()) {
        if flushed {
            return;
        }
        let targets: BTreeSet<&Target> = wanted.map(|(target, _)| target).chain(set.members.keys()).collect();
        steps.extend(plan_targets(targets, desired, kernel, now));
        return;
    }
    steps.push(Step::Create { set: fresh, maxelem: frame.maxelem() });
    steps.extend(wanted.filter_map(|(target, entry)| add(fresh, target, entry, now)));
    let kept = set.members.iter().filter(|(target, _)| !may_remove(target, desired));
    steps.extend(kept.filter_map(|(target, held)| {
        let entry = Entry { ends: held.ends, rule: held.comment.clone() };
        add(fresh, target, &entry, now)
    }));
    steps.extend([Step::Swap(family), Step::Destroy(fresh)]);
}

fn add(set: SetId, target: &Target, entry: &Entry, now: Timestamp) -> Option<Step> {
    let timeout_s = match entry.ends {
        None => TIMEOUT_MAX_S,
        Some(end) if end <= now => return None,
        Some(end) => {
            let seconds = end.since(now).as_nanos().div_ceil(1_000_000_000);
            u32::try_from(seconds).unwrap_or(TIMEOUT_MAX_S).min(TIMEOUT_MAX_S)
        }
    };
    Some(Step::Add { set, target: *target, timeout_s: Some(timeout_s), comment: comment(&entry.rule) })
}

/// The rule's name, as a kernel set's comment can hold it: printable ASCII without quotes, at most 63 bytes.
fn comment(rule: &Arc<str>) -> Arc<str> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if rule.len() <= 63 && rule.chars().all(fits) {
        return rule.clone();
    }
    rule.chars().take(63).map(|c| if fits(c) { c } else { '-' }).collect::<String>().into()
}

/// A moment of our clock, as another shows it that is `skew_ms` milliseconds ahead.
pub fn shift(time: Timestamp, skew_ms: i64) -> Timestamp {
    let by = Duration::from_millis(skew_ms.unsigned_abs());
    if skew_ms < 0 { time.saturating_sub(by) } else { time.saturating_add(by) }
}

fn is_same(entry: &Entry, held: &Held, now: Timestamp) -> bool {
    let beyond = now.saturating_add(Duration::from_secs(TIMEOUT_MAX_S.into()));
    let end_ok = match (held.ends, entry.ends.unwrap_or(Timestamp::MAX)) {
        (None, _) => false,
        (Some(held), wanted) if wanted > beyond => held.since(now) >= RENEW_BELOW,
        (Some(held), wanted) => held.since(wanted).max(wanted.since(held)) <= END_TOLERANCE,
    };
    end_ok && held.comment == comment(&entry.rule)
}
