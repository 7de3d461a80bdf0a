//! One place at Cloudflare: what is known to be there, what has to change, and the next call for that.
//!
//! What is not known whole is looked at first. After any doubt it is looked at again: nothing is taken for done that was
//! not confirmed, and a call that may have been done is safe to repeat.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::net::Target;
use proto::time::Timestamp;

use super::cover::Form;
use super::queue::Queue;
use super::refusals::Refusals;
use super::trouble::Trouble;
use super::wishes::Wishes;
use crate::cloudflare::call::{Answer, Ask, CallError, Cursor, Progress, Seen};
use crate::cloudflare::mirror::Tempo;
use crate::cloudflare::mirror::mark::{self, Mark};
use crate::config::Mode;

/// Items that one call adds or removes at most.
const BATCH_MAX: usize = 500;
/// Items without a known ID that are looked up one by one; more are found by looking at the whole list.
const FIND_MAX: usize = 20;
/// New items that are asked for one by one before they are added; for more, the whole list is read.
const ASK_MAX: usize = 10;
/// How old a look at a list may be at least when items are added: with a high `calls_max` and few items it is soon done.
const LOOK_AGE_MIN: Duration = Duration::from_secs(60);
/// So many times as old as it took, a look may be: at a slow pace, or of a long list, none would ever be young enough.
const LOOK_AGE_SHARE: u32 = 3;
/// More entries than any place has.
const ENTRIES_MAX: usize = 2_000_000;
/// Other installations that are named.
const OTHERS_MAX: usize = 8;

/// How a target stands at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// An entry of ours is there.
    Held,
    /// An entry of ours that does something else than is configured.
    OtherMode,
    /// None is there.
    Absent,
    /// It was not looked yet.
    Unknown,
    /// An entry is there that is not ours.
    Taken,
    /// Cloudflare did not take it; it is tried again later.
    Refused,
}

/// What every place has in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    pub(super) wishes: &'a Wishes,
    pub(super) mark: &'a Mark,
    /// Of access rules.
    pub(super) mode: Option<Mode>,
    pub(super) entries_max: usize,
    pub(super) tempo: &'a Tempo,
    pub(super) now: Timestamp,
}

/// An entry of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    /// `None` of an item that was added since the last look.
    id: Option<String>,
    mode: Option<Mode>,
}

/// What one entry needs.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Create(String),
    SetMode,
    Delete,
}

#[derive(Debug)]
enum Look {
    Needed,
    Under(Reading),
    Done,
}

/// A look under way.
#[derive(Debug)]
struct Reading {
    began: Timestamp,
    cursor: Cursor,
    /// Also entries of other installations.
    is_wide: bool,
    /// By ID.
    seen: BTreeMap<String, Seen>,
    /// Entries read, repeated ones each time.
    read: usize,
    /// How many there are, as the last page said.
    total: Option<usize>,
    /// An entry came twice, or their number changed: another may have been missed.
    is_shifted: bool,
}

/// A change of many items that Cloudflare works on.
#[derive(Debug)]
struct Operation {
    id: String,
    ask: Ask,
    began: Timestamp,
    polls: u32,
}

/// One place.
#[derive(Debug)]
pub(super) struct Book {
    form: Form,
    look: Look,
    /// Whether it was ever looked at whole since this host has had the duty.
    known: bool,
    held: BTreeMap<Target, Held>,
    /// Entries of ours beside others of ours for the same target.
    strays: BTreeMap<String, Target>,
    /// Targets that somebody else has an entry for.
    taken: BTreeSet<Target>,
    /// Targets that Cloudflare did not take.
    refusals: Refusals,
    others: BTreeMap<String, usize>,
    /// The next look is at the entries of other installations too.
    is_wide_next: bool,
    queue: Queue,
    /// A target to ask for before anything else, and whether Cloudflare called its entry a duplicate.
    find: Option<(Target, bool)>,
    /// When the last whole look began, and how long it took. Time in which Cloudflare worked on an operation of ours does
    /// not count: it takes no change of anybody's then.
    looked_at: Timestamp,
    look_took: Duration,
    /// Targets that were asked for since, and are not there.
    absent: BTreeSet<Target>,
    /// ID of the list.
    list: Option<String>,
    /// The account's lists were read, and it is not among them.
    lacks_list: bool,
    operation: Option<Operation>,
    /// When an addition that may have begun unseen should have ended, and shows.
    second_look: Option<Timestamp>,
    batch_max: usize,
    pub(super) trouble: Trouble,
    pub(super) repairs: u64,
    pub(super) removed: usize,
}

impl Book {
    pub(super) fn new(form: Form, seed: u64) -> Self {
        Self {
            form,
            look: Look::Needed,
            known: false,
            held: BTreeMap::new(),
            strays: BTreeMap::new(),
            taken: BTreeSet::new(),
            refusals: Refusals::default(),
            others: BTreeMap::new(),
            is_wide_next: true,
            queue: Queue::default(),
            find: None,
            looked_at: Timestamp::EPOCH,
            look_took: Duration::ZERO,
            absent: BTreeSet::new(),
            list: None,
            lacks_list: false,
            operation: None,
            second_look: None,
            batch_max: BATCH_MAX,
            trouble: Trouble::new(seed),
            repairs: 0,
            removed: 0,
        }
    }

    /// Looks at everything again before anything else is done, and tries again what was refused or
    /// somebody else's.
    pub(super) fn begin_anew(&mut self) {
        self.refusals = Refusals::default();
        self.taken.clear();
        self.is_wide_next = true;
        self.doubt();
    }

    fn doubt(&mut self) {
        self.look = Look::Needed;
    }

    /// The entry of `target` may need something else now.
    pub(super) fn touch(&mut self, target: Target, revision: u64, view: &View<'_>) {
        if !self.known {
            return;
        }
        match self.step(&target, view) {
            None => self.queue.remove(&target),
            Some(step) => self.queue.put(target, step != Step::Delete, revision, view.now),
        }
    }

    /// Whether somebody waits to be freed.
    pub(super) fn has_removals(&self) -> bool {
        self.queue.removals().next().is_some() || !self.strays.is_empty()
    }

    /// The next call, if it is time for one.
    pub(super) fn next(&mut self, view: &View<'_>, read_only: bool) -> Option<Ask> {
        if view.now < self.trouble.until() {
            return None;
        }
        if let Some(operation) = &self.operation {
            return Some(Ask::Poll(operation.id.clone()));
        }
        if self.form == Form::List && self.list.is_none() {
            return Some(Ask::FindList);
        }
        if self.second_look.is_some_and(|at| at <= view.now) {
            self.second_look = None;
            self.doubt();
        }
        if matches!(self.look, Look::Needed) {
            self.look = Look::Under(self.begin_reading(view));
        }
        if let Look::Under(Reading { cursor, .. }) = &self.look {
            return Some(Ask::Look(cursor.clone()));
        }
        if read_only {
            return None;
        }
        if let Some((target, _)) = self.find {
            return Some(Ask::Find(target));
        }
        for target in self.refusals.retry(view.now) {
            self.retouch(&target, view);
        }
        match self.form {
            Form::Rules => self.next_rule(view),
            Form::List => self.next_items(view),
        }
    }

    /// Takes what came of a call.
    pub(super) fn handle(&mut self, ask: Ask, answer: Result<Answer, CallError>, view: &View<'_>) {
        match answer {
            Ok(answer) => self.handle_answer(ask, answer, view),
            Err(error) => self.handle_error(&ask, &error, view),
        }
    }

    fn step(&self, target: &Target, view: &View<'_>) -> Option<Step> {
        match (view.wishes.wanted(target), self.held.get(target)) {
            (Some(rule), None) => {
                let possible = !self.taken.contains(target) && !self.refusals.holds(target);
                possible.then(|| Step::Create(view.mark.note(rule)))
            }
            (Some(_), Some(held)) => (held.mode != view.mode).then_some(Step::SetMode),
            (None, Some(_)) => view.wishes.may_remove().then_some(Step::Delete),
            (None, None) => None,
        }
    }

    fn has_room(&self, view: &View<'_>) -> bool {
        self.held.len() + self.strays.len() < view.entries_max
    }

    fn next_rule(&mut self, view: &View<'_>) -> Option<Ask> {
        if let Some((id, target)) = self.strays.first_key_value() {
            return Some(Ask::Delete(id.clone(), *target));
        }
        while let Some(target) = self.queue.first() {
            let id = self.held.get(&target).and_then(|held| held.id.clone());
            match (self.step(&target, view), id) {
                (Some(Step::Create(note)), _) => return self.has_room(view).then_some(Ask::Create(target, note)),
                (Some(Step::SetMode), Some(id)) => return Some(Ask::SetMode(id, target)),
                (Some(Step::Delete), Some(id)) => return Some(Ask::Delete(id, target)),
                // It was changed meanwhile; or it has no ID, which of rules are all known.
                (None, _) | (Some(_), None) => self.queue.remove(&target),
            }
        }
        None
    }

    fn next_items(&mut self, view: &View<'_>) -> Option<Ask> {
        let removals: Vec<Target> = self.queue.removals().copied().collect();
        let id_of = |target: &Target| self.held.get(target).and_then(|held| held.id.clone());
        let nameless: Vec<Target> = removals.iter().filter(|target| id_of(target).is_none()).copied().collect();
        let mut ids: Vec<(String, Target)> = self.strays.iter().map(|(id, target)| (id.clone(), *target)).collect();
        ids.extend(removals.iter().filter_map(|target| id_of(target).map(|id| (id, *target))));
        if !ids.is_empty() {
            ids.truncate(BATCH_MAX);
            return Some(Ask::Remove(ids));
        }
        if nameless.len() > FIND_MAX {
            return Some(self.look_again(view));
        }
        if let Some(target) = nameless.first() {
            return Some(Ask::Find(*target));
        }
        let room = view.entries_max.saturating_sub(self.held.len()).min(self.batch_max);
        let additions = self.queue.additions().filter_map(|target| match self.step(target, view) {
            Some(Step::Create(note)) => Some((*target, note)),
            Some(Step::SetMode | Step::Delete) | None => None,
        });
        let batch: Vec<(Target, String)> = additions.take(room).collect();
        (!batch.is_empty()).then(|| self.append(batch, view))
    }

    /// Cloudflare puts an item in the place of one that is there, and does not tell. So first it is asked for each, or for
    /// all, unless that was done just now.
    fn append(&mut self, batch: Vec<(Target, String)>, view: &View<'_>) -> Ask {
        let age_max = self.look_took.saturating_mul(LOOK_AGE_SHARE).max(LOOK_AGE_MIN);
        if view.now.since(self.looked_at) <= age_max {
            return Ask::Append(batch);
        }
        if batch.len() > ASK_MAX {
            return self.look_again(view);
        }
        let unknown = batch.iter().find(|(target, _)| !self.absent.contains(target));
        unknown.map(|(target, _)| Ask::Find(*target)).unwrap_or(Ask::Append(batch))
    }

    fn handle_answer(&mut self, ask: Ask, answer: Answer, view: &View<'_>) {
        match (ask, answer) {
            (Ask::Look(_), Answer::Page { entries, next, total }) => self.take_page(entries, next, total, view),
            (Ask::FindList, Answer::List(found)) => self.take_list(found, view),
            (Ask::Find(target), Answer::Found(seen)) => self.take_found(target, seen, view),
            (Ask::Create(target, _), Answer::Made(id)) => {
                self.trouble.clear();
                self.refusals.take([target].iter(), view.now);
                self.held.insert(target, Held { id: Some(id), mode: view.mode });
                self.retouch(&target, view);
            }
            (Ask::SetMode(_, target), Answer::Done) => {
                self.trouble.clear();
                if let Some(held) = self.held.get_mut(&target) {
                    held.mode = view.mode;
                }
                self.retouch(&target, view);
            }
            (Ask::Delete(id, target), Answer::Done) => {
                self.trouble.clear();
                self.remove(&id, &target, view);
            }
            (ask @ (Ask::Append(_) | Ask::Remove(_)), Answer::Begun(id)) => {
                self.absent.clear();
                self.operation = Some(Operation { id, ask, began: view.now, polls: 0 });
                self.trouble.rest(view.now, view.tempo.poll_min);
            }
            (Ask::Poll(_), Answer::Operation(progress)) => self.take_progress(progress, view),
            _ => self.trouble.fail("Cloudflare's answer is not one to what was asked", view),
        }
    }

    /// Only the first look is at what others write, too: their changes shift the pages, and there is no end of them.
    fn begin_reading(&self, view: &View<'_>) -> Reading {
        let is_wide = self.is_wide_next;
        let notes = if is_wide { mark::ALL } else { view.mark.as_str() }.to_owned();
        let cursor = if self.form == Form::List { Cursor::After(None) } else { Cursor::Page { notes, page: 1 } };
        Reading { began: view.now, cursor, is_wide, seen: BTreeMap::new(), read: 0, total: None, is_shifted: false }
    }

    fn look_again(&mut self, view: &View<'_>) -> Ask {
        let reading = self.begin_reading(view);
        let ask = Ask::Look(reading.cursor.clone());
        self.look = Look::Under(reading);
        ask
    }

    fn take_page(&mut self, entries: Vec<Seen>, next: Option<Cursor>, total: Option<usize>, view: &View<'_>) {
        let Look::Under(reading) = &mut self.look else { return };
        reading.read += entries.len();
        reading.is_shifted |= reading.total.is_some() && reading.total != total;
        reading.total = total;
        for entry in entries {
            reading.is_shifted |= reading.seen.insert(entry.id.clone(), entry).is_some();
        }
        // Pages cannot go on for ever: nobody has more entries than that.
        let is_endless = reading.read > ENTRIES_MAX;
        if let Some(next) = next.filter(|next| *next != reading.cursor && !is_endless) {
            reading.cursor = next;
            return;
        }
        let Look::Under(reading) = std::mem::replace(&mut self.look, Look::Needed) else { return };
        self.is_wide_next = false;
        if is_endless || reading.is_shifted || total.is_some_and(|total| total != reading.read) {
            if reading.is_wide && self.form == Form::Rules {
                self.trouble.rest(view.now, view.tempo.backoff_min);
            } else {
                self.trouble.fail("what Cloudflare lists changes while it is read", view);
            }
            return;
        }
        self.trouble.clear_unless_operation();
        self.install(reading, view);
    }

    /// From now on this is what is there.
    fn install(&mut self, reading: Reading, view: &View<'_>) {
        let expected = std::mem::take(&mut self.held);
        let drifts = self.known && self.operation.is_none();
        self.strays.clear();
        if reading.is_wide || self.form == Form::List {
            self.others.clear();
        }
        (self.looked_at, self.look_took) = (reading.began, view.now.since(reading.began));
        for entry in reading.seen.into_values() {
            self.note(entry, view);
        }
        self.refusals.retain(|target| view.wishes.wanted(target).is_some() && !self.held.contains_key(target));
        self.look = Look::Done;
        self.known = true;
        let waiting: BTreeSet<Target> = self.queue.targets().copied().collect();
        let mut targets: BTreeSet<Target> = view.wishes.all_wanted().chain(self.held.keys()).copied().collect();
        targets.extend(&waiting);
        let revision = view.wishes.desired().revision();
        for target in &targets {
            self.touch(*target, revision, view);
        }
        let changed = |target: &&Target| expected.contains_key(target) != self.held.contains_key(target);
        let repaired = self.queue.targets().filter(|target| !waiting.contains(target)).filter(changed).count();
        if drifts {
            self.repairs += repaired as u64;
        }
    }

    /// Takes an entry that is there.
    fn note(&mut self, entry: Seen, view: &View<'_>) {
        let Seen { id, target, mode, note, is_elsewhere } = entry;
        if is_elsewhere {
            // Ours may stand beside it, and it cannot be changed from here.
            return;
        }
        if !view.mark.is_on(&note) {
            if let Some(other) = Mark::of_other(&note)
                && (self.others.len() < OTHERS_MAX || self.others.contains_key(other))
            {
                *self.others.entry(other.to_owned()).or_default() += 1;
            }
            self.taken.extend(target.filter(|target| !self.held.contains_key(target)));
            return;
        }
        // With our mark on what is no address, somebody else has made it.
        let Some(target) = target else { return };
        self.taken.remove(&target);
        match self.held.entry(target) {
            Entry::Occupied(_) => drop(self.strays.insert(id, target)),
            Entry::Vacant(free) => {
                free.insert(Held { id: Some(id), mode });
            }
        }
    }

    fn take_list(&mut self, found: Option<(String, bool)>, view: &View<'_>) {
        // The kind of a list never changes: one of another kind is another list.
        self.lacks_list = !matches!(found, Some((_, true)));
        match found {
            Some((id, true)) => {
                self.list = Some(id);
                self.trouble.clear_unless_operation();
            }
            Some((_, false)) => self.trouble.fail("the list is not of kind \"ip\": name one that is", view),
            None => self.trouble.fail("the account has no list of this name: create it, of kind \"ip\"", view),
        }
    }

    fn take_found(&mut self, target: Target, seen: Vec<Seen>, view: &View<'_>) {
        let was_duplicate = self.find.take().is_some_and(|(_, was_duplicate)| was_duplicate);
        let is_wider = seen.iter().any(|entry| entry.target == Some(target) && entry.is_elsewhere);
        let mut here = seen.into_iter().filter(|entry| entry.target == Some(target) && !entry.is_elsewhere).peekable();
        if here.peek().is_none() && self.form == Form::List {
            if self.held.contains_key(&target) {
                self.doubt();
            } else {
                self.absent.insert(target);
            }
        } else {
            self.held.remove(&target);
            self.strays.retain(|_, of| *of != target);
            if here.peek().is_none() && was_duplicate {
                self.taken.insert(target);
                if !is_wider {
                    // Perhaps it is written otherwise. If it is ours, a look at all of ours finds it.
                    self.doubt();
                }
            }
            for entry in here {
                self.note(entry, view);
            }
        }
        self.retouch(&target, view);
    }

    fn take_progress(&mut self, progress: Progress, view: &View<'_>) {
        let Some(operation) = &mut self.operation else { return };
        match progress {
            Progress::Running => {
                operation.polls += 1;
                let pause = view.tempo.poll_min * operation.polls;
                self.trouble.rest(view.now, pause.min(view.tempo.poll_max));
                if view.now.since(operation.began) > view.tempo.operation_max {
                    self.operation = None;
                    self.doubt();
                    self.trouble.fail_operation("a change of many items takes Cloudflare too long", view);
                }
            }
            Progress::Completed => {
                self.looked_at = self.looked_at.saturating_add(view.now.since(operation.began));
                let done = self.operation.take().map(|operation| operation.ask);
                self.trouble.clear();
                self.batch_max = (self.batch_max * 2).min(BATCH_MAX);
                match done {
                    Some(Ask::Append(items)) => {
                        self.refusals.take(items.iter().map(|(target, _)| target), view.now);
                        for (target, _) in items {
                            self.held.insert(target, Held { id: None, mode: None });
                            self.retouch(&target, view);
                        }
                    }
                    Some(Ask::Remove(items)) => {
                        for (id, target) in items {
                            self.remove(&id, &target, view);
                        }
                    }
                    _ => {}
                }
            }
            Progress::Failed(text) => {
                let failed = self.operation.take().map(|operation| operation.ask);
                self.doubt();
                let can_be_less = matches!(&failed, Some(Ask::Append(items)) if self.halve(items, view));
                if !can_be_less {
                    self.trouble.fail_operation(&format!("Cloudflare could not change the list: {text}"), view);
                }
            }
        }
    }

    fn handle_error(&mut self, ask: &Ask, error: &CallError, view: &View<'_>) {
        self.absent.clear();
        match ask {
            Ask::Create(target, _) if error.is_duplicate() => {
                self.find = Some((*target, true));
                return;
            }
            Ask::Create(target, _) if error.is_about_entry() => {
                self.queue.remove(target);
                if self.refusals.put(*target, view.now) {
                    return;
                }
            }
            Ask::Delete(id, target) if error.is_gone() => {
                self.remove(id, target, view);
                return;
            }
            Ask::SetMode(_, target) if error.is_gone() => {
                self.held.remove(target);
                self.retouch(target, view);
                return;
            }
            Ask::Append(items) if error.is_about_entry() && self.halve(items, view) => return,
            // It may have been done, and must not be forgotten if it is not wanted any more.
            Ask::Create(target, _) | Ask::SetMode(_, target) | Ask::Delete(_, target) if error.is_unclear() => {
                self.find = Some((*target, false));
            }
            Ask::Append(_) if error.is_unclear() => {
                self.second_look = Some(view.now.saturating_add(view.tempo.unseen_max));
                self.doubt();
            }
            Ask::Remove(_) if !matches!(error, CallError::Limited { .. }) => self.doubt(),
            // It is forgotten after a time; what it did is seen by looking.
            Ask::Poll(_) if error.is_gone() => {
                self.operation = None;
                self.doubt();
            }
            // A page that is not there any more: from the start.
            Ask::Look(_) if matches!(error, CallError::Refused { .. }) => self.doubt(),
            _ => {}
        }
        if error.is_gone() {
            self.list = None;
        }
        self.trouble.fail_with(error, view);
    }

    /// One of these is not taken: tries with fewer, and in the end without the one. Returns whether fewer can be tried.
    fn halve(&mut self, items: &[(Target, String)], view: &View<'_>) -> bool {
        self.batch_max = (items.len() / 2).max(1);
        if let [(target, _)] = items {
            let _is_noted_anyway = self.refusals.put(*target, view.now);
            self.queue.remove(target);
            return false;
        }
        self.trouble.rest(view.now, view.tempo.backoff_min);
        true
    }

    fn remove(&mut self, id: &str, target: &Target, view: &View<'_>) {
        if self.strays.remove(id).is_some() {
            self.removed += 1;
        }
        if self.held.get(target).is_some_and(|held| held.id.as_deref() == Some(id)) {
            self.held.remove(target);
            self.removed += 1;
        }
        self.retouch(target, view);
    }

    fn retouch(&mut self, target: &Target, view: &View<'_>) {
        self.touch(*target, view.wishes.desired().revision(), view);
    }

    /// ID of the list, once it is known.
    pub(super) fn list(&self) -> Option<&str> {
        self.list.as_deref()
    }

    /// Whether the account has no such list.
    pub(super) fn lacks_list(&self) -> bool {
        self.lacks_list
    }

    /// What we have entries for.
    pub(super) fn targets(&self) -> impl Iterator<Item = &Target> {
        self.held.keys()
    }

    /// Entries of ours that are there.
    pub(super) fn entries(&self) -> usize {
        self.held.len() + self.strays.len()
    }

    /// Changes that wait: additions and removals.
    pub(super) fn waiting(&self) -> (usize, usize) {
        (self.queue.additions().count(), self.queue.removals().count())
    }

    /// When the one that waits longest came.
    pub(super) fn oldest(&self) -> Option<Timestamp> {
        self.queue.oldest()
    }

    /// Revision of the ban set up to which all is done here; `None` before it was looked at.
    pub(super) fn confirmed(&self, revision: u64) -> Option<u64> {
        let first = self.queue.first_revision();
        self.known.then(|| first.map_or(revision, |first| first.saturating_sub(1)))
    }

    /// How `target` stands here.
    pub(super) fn standing(&self, target: &Target, mode: Option<Mode>) -> Standing {
        match self.held.get(target) {
            Some(held) if held.mode == mode => Standing::Held,
            Some(_) => Standing::OtherMode,
            None if self.taken.contains(target) => Standing::Taken,
            None if self.refusals.holds(target) => Standing::Refused,
            None if !self.known => Standing::Unknown,
            None => Standing::Absent,
        }
    }

    /// Targets wanted that somebody else has an entry for.
    pub(super) fn taken(&self, wishes: &Wishes) -> usize {
        self.taken.iter().filter(|target| wishes.wanted(target).is_some()).count()
    }

    /// Targets that Cloudflare did not take.
    pub(super) fn refused(&self) -> usize {
        self.refusals.count()
    }

    /// Entries of other installations, by their names.
    pub(super) fn others(&self) -> &BTreeMap<String, usize> {
        &self.others
    }

    /// Whether nothing is left to do.
    #[cfg(test)]
    pub(super) fn is_settled(&self) -> bool {
        let is_idle = self.operation.is_none() && self.find.is_none() && self.strays.is_empty();
        is_idle && self.known && matches!(self.look, Look::Done) && self.queue.is_empty()
    }
}
