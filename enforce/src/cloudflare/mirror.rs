//! What should be at Cloudflare, what is, and the next call that brings them together. Pure.
//!
//! Several places are kept equal: zones, or one user, account or list. Each has its own troubles; one that refuses holds up
//! none of the others.

mod book;
mod cover;
mod explain;
mod mark;
mod queue;
mod refusals;
mod trouble;
mod wishes;

#[cfg(test)]
pub(super) mod sim;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::bus::memory::BanUpdate;
use proto::net::Target;
use proto::time::Timestamp;

use self::book::{Book, View};
pub(super) use self::cover::Form;
pub(super) use self::mark::Mark;
use self::wishes::Wishes;
use super::call::{Answer, Call, CallError};
use crate::config::{CloudflareConfig, Mode, Scope};
use crate::guard::Guard;

/// How long what takes.
#[derive(Clone, Debug)]
pub(super) struct Tempo {
    /// After a first failure, and at most.
    pub(super) backoff_min: Duration,
    pub(super) backoff_max: Duration,
    /// Between two questions how far an operation is, at first and at most.
    pub(super) poll_min: Duration,
    pub(super) poll_max: Duration,
    /// How long an operation may take.
    pub(super) operation_max: Duration,
    /// How long one takes that we did not hear the beginning of.
    pub(super) unseen_max: Duration,
    /// How long a call may take.
    pub(super) call_max: Duration,
    /// What `calls_max` is counted over.
    pub(super) window: Duration,
}

impl Default for Tempo {
    fn default() -> Self {
        let second = Duration::from_secs(1);
        Self {
            backoff_min: second,
            backoff_max: 300 * second,
            poll_min: second / 2,
            poll_max: 5 * second,
            operation_max: 600 * second,
            unseen_max: 60 * second,
            call_max: 20 * second,
            window: 300 * second,
        }
    }
}

/// How things stand at all places together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) entries: usize,
    pub(super) additions: usize,
    pub(super) removals: usize,
    pub(super) oldest: Option<Timestamp>,
    /// Revision of the ban set up to which all is done; 0 before all places were looked at.
    pub(super) confirmed: u64,
    pub(super) left_out: usize,
    pub(super) holed: usize,
    pub(super) unsayable: usize,
    pub(super) taken: usize,
    pub(super) refused: usize,
    pub(super) repairs: u64,
    /// Entries removed since the places were first looked at.
    pub(super) removed: usize,
    pub(super) others: BTreeMap<String, usize>,
    /// What is wrong, by place.
    pub(super) troubles: Vec<(String, String)>,
}

/// What all places are kept by.
#[derive(Debug)]
struct Terms {
    wishes: Wishes,
    mark: Mark,
    mode: Option<Mode>,
    entries_max: usize,
    tempo: Tempo,
}

impl Terms {
    fn at(&self, now: Timestamp) -> View<'_> {
        let Self { wishes, mark, mode, entries_max, tempo } = self;
        View { wishes, mark, mode: *mode, entries_max: *entries_max, tempo, now }
    }
}

/// Keeps all places.
#[derive(Debug)]
pub(super) struct Mirror {
    terms: Terms,
    form: Form,
    books: Vec<Book>,
    names: Vec<String>,
    turn: usize,
    read_only: bool,
    seed: u64,
    former_repairs: u64,
}

impl Mirror {
    /// Nothing is known of any place. A mirror that is `read_only` looks and changes nothing. `seed` differs with each host.
    pub(super) fn new(config: &CloudflareConfig, mark: Mark, guard: Guard, tempo: Tempo, seed: u64) -> Self {
        let (form, names) = match &config.scope {
            Scope::User => (Form::Rules, vec!["user".to_owned()]),
            Scope::Zones(zones) => (Form::Rules, zones.iter().map(|zone| format!("zone {zone}")).collect()),
            Scope::Account(account) => (Form::Rules, vec![format!("account {account}")]),
            Scope::List { list, .. } => (Form::List, vec![format!("list {list}")]),
        };
        let entries_max = config.entries_max as usize;
        let mut this = Self {
            terms: Terms {
                wishes: Wishes::new(form, entries_max, guard),
                mark,
                mode: (form == Form::Rules).then_some(config.mode),
                entries_max,
                tempo,
            },
            form,
            books: Vec::new(),
            names,
            turn: 0,
            read_only: false,
            seed,
            former_repairs: 0,
        };
        this.forget();
        this
    }

    /// From now on it only looks.
    pub(super) fn set_read_only(&mut self) {
        self.read_only = true;
    }

    /// Nothing is known of any place any more: another host has been at it.
    pub(super) fn forget(&mut self) {
        self.former_repairs += self.books.iter().map(|book| book.repairs).sum::<u64>();
        let seeds = (1..).map(|n: u64| self.seed ^ n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        self.books = self.names.iter().zip(seeds).map(|(_, seed)| Book::new(self.form, seed)).collect();
    }

    /// Looks at all places again.
    pub(super) fn doubt(&mut self) {
        self.books.iter_mut().for_each(Book::begin_anew);
    }

    /// Takes changes of the ban set, or a whole one.
    pub(super) fn handle_update(&mut self, update: &BanUpdate, now: Timestamp) {
        let touched = self.terms.wishes.handle_update(update, now);
        self.touch(&touched, now);
        if update.snapshot {
            self.reconsider(now);
        }
    }

    /// Judges every ban anew.
    pub(super) fn handle_guard(&mut self, guard: Guard, now: Timestamp) {
        let touched = self.terms.wishes.handle_guard(guard);
        self.touch(&touched, now);
    }

    /// While paused nobody is banned.
    pub(super) fn handle_pause(&mut self, paused: bool, now: Timestamp) {
        let touched = self.terms.wishes.handle_pause(paused);
        self.touch(&touched, now);
        if paused && !touched.is_empty() {
            self.reconsider(now);
        }
    }

    /// Forgets what is over.
    pub(super) fn handle_time(&mut self, now: Timestamp) {
        let touched = self.terms.wishes.handle_time(now);
        self.touch(&touched, now);
    }

    /// The next call, if there is one to make now. Once it is made, what it comes to must be handled before the next.
    pub(super) fn next(&mut self, now: Timestamp) -> Option<Call> {
        let count = self.books.len();
        let turns = || (0..count).map(|n| (self.turn + n) % count);
        let freeing: Vec<usize> = turns().filter(|place| self.books[*place].has_removals()).collect();
        let order: Vec<usize> = freeing.into_iter().chain(turns()).collect();
        for place in order {
            if let Some(ask) = self.books[place].next(&self.terms.at(now), self.read_only) {
                self.turn = (place + 1) % count;
                let book = &self.books[place];
                // Removals come first: what is read meanwhile is read for them.
                let frees = ask.frees() || (!ask.is_write() && book.has_removals());
                return Some(Call { place, list: book.list().map(str::to_owned), ask, frees });
            }
        }
        None
    }

    /// Takes what came of a call.
    pub(super) fn handle(&mut self, call: Call, answer: Result<Answer, CallError>, now: Timestamp) {
        self.books[call.place].handle(call.ask, answer, &self.terms.at(now));
    }

    /// How long nothing is to be tried; `None` when nothing waits for time to pass.
    pub(super) fn pause(&self, now: Timestamp) -> Option<Duration> {
        let later = self.books.iter().map(|book| book.trouble.until()).filter(|until| *until > now);
        later.min().map(|until| until.since(now))
    }

    /// Whether the whole ban set is known, and nothing waits to be added anywhere.
    pub(super) fn stands(&self) -> bool {
        let is_done = |book: &Book| book.confirmed(0).is_some() && book.waiting().0 == 0;
        self.terms.wishes.desired().is_whole() && self.books.iter().all(is_done)
    }

    /// ID of the list, once it is known.
    pub(super) fn list(&self) -> Option<&str> {
        self.books.iter().find_map(Book::list)
    }

    /// Whether Cloudflare says that the account has no list of addresses of that name.
    pub(super) fn lacks_list(&self) -> bool {
        self.books.iter().any(Book::lacks_list)
    }

    /// The ban set and what is made of it.
    pub(super) fn wishes(&self) -> &Wishes {
        &self.terms.wishes
    }

    /// Whether all places are known and nothing is left to do.
    #[cfg(test)]
    pub(super) fn is_settled(&self) -> bool {
        self.books.iter().all(Book::is_settled)
    }

    /// How things stand.
    pub(super) fn summary(&self) -> Summary {
        let revision = self.terms.wishes.desired().revision();
        let confirmed = self.books.iter().map(|book| book.confirmed(revision)).min().flatten();
        let mut summary = Summary {
            confirmed: confirmed.unwrap_or_default(),
            left_out: self.terms.wishes.left_out(),
            holed: self.terms.wishes.holed(),
            unsayable: self.terms.wishes.unsayable(),
            oldest: self.books.iter().filter_map(Book::oldest).min(),
            repairs: self.former_repairs,
            ..Summary::default()
        };
        for (book, name) in self.books.iter().zip(&self.names) {
            let (additions, removals) = book.waiting();
            summary.entries += book.entries();
            summary.additions += additions;
            summary.removals += removals;
            summary.taken += book.taken(&self.terms.wishes);
            summary.refused += book.refused();
            summary.repairs += book.repairs;
            summary.removed += book.removed;
            for (other, count) in book.others() {
                *summary.others.entry(other.clone()).or_default() += count;
            }
            if let Some(text) = book.trouble.text() {
                summary.troubles.push((name.clone(), text.to_owned()));
            }
        }
        summary
    }

    /// Also what is there and no ban that we know of explains may have to go now.
    fn reconsider(&mut self, now: Timestamp) {
        let held: BTreeSet<Target> = self.books.iter().flat_map(Book::targets).copied().collect();
        self.touch(&held, now);
    }

    fn touch(&mut self, touched: &BTreeSet<Target>, now: Timestamp) {
        let view = self.terms.at(now);
        let revision = self.terms.wishes.desired().revision();
        for book in &mut self.books {
            for target in touched {
                book.touch(*target, revision, &view);
            }
        }
    }
}
