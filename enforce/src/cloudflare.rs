//! Bans at Cloudflare: access rules of a user, zones or an account, or the items of an account's list.
//!
//! [`mirror`] knows what should be there and what is, and names the next call; [`client`] carries it out; the task here
//! joins the two, one call at a time. Only entries that begin with our mark are ever changed. Entries have no end of their
//! own, so they stay when we stop, and who starts looks at all of them first. On a cluster one host does this.

mod call;
mod client;
mod explain;
mod former;
mod installation;
mod metrics;
mod mirror;
mod pace;
mod places;
mod removal;
mod status;
mod usage;
mod wire;

#[cfg(test)]
mod tests;

use std::future::{Future, pending};
use std::net::Ipv6Addr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use proto::api::BackendHold;
use proto::ban::Lists;
use proto::bus::duty::Duty;
use proto::net::Target;
use proto::settings::Mistakes;
use proto::time::Timestamp;
use tokio::time::{MissedTickBehavior, interval, sleep};

use self::call::{Answer, Ask, Call, CallError};
use self::client::{Client, Login, LoginError};
use self::former::{Emptied, Former};
use self::installation::InstallationError;
pub(crate) use self::metrics::CloudflareMetrics;
use self::mirror::{Form, Mark, Mirror, Tempo};
use self::pace::Pace;
use self::places::Place;
pub(crate) use self::removal::{left_behind, remove_all, report_left_behind};
use self::usage::Usage;
use crate::action::Surroundings;
use crate::config::{CloudflareConfig, EnforceConfig, FirewallConfig, Scope};
use crate::guard::{Guard, GuardFacts};
use crate::host;
use crate::reconcile::{is_paused, read_host};

/// The name of the back end, and of its lease.
const NAME: &str = BackendHold::CLOUDFLARE;
/// How often ended bans are forgotten and the report is renewed.
const TICK: Duration = Duration::from_secs(1);
/// How often the host's addresses, the login's file and the use of the list are looked at.
const CARE_INTERVAL: Duration = Duration::from_secs(60);

/// A call under way.
type Job = Pin<Box<dyn Future<Output = (Call, Result<Answer, CallError>)> + Send>>;
/// The end of what stands at a place that is not configured any more.
type FormerJob = Pin<Box<dyn Future<Output = (Place, Emptied)> + Send>>;
/// A look for rules that use the list.
type UsageJob = Pin<Box<dyn Future<Output = Result<Usage, CallError>> + Send>>;

/// Keeps Cloudflare as the ban set is, until the shutdown begins. What is wrong is said on the board.
pub(crate) async fn run(config: EnforceConfig, around: Surroundings) {
    if let Some(cloudflare) = config.cloudflare {
        Runner::new(cloudflare, &config.firewall, around, Tempo::default()).run().await;
    }
}

/// Reads the login as the back end will, and notes what is wrong with it.
pub(crate) fn check_login(cloudflare: &CloudflareConfig, mistakes: &mut Mistakes) {
    if let Err(LoginError::Secret(error)) = Login::read(&cloudflare.login) {
        error.note(mistakes);
    }
}

impl Scope {
    /// Entries that a ban of `ipv6_prefix` bits takes; `None` where it cannot be said there.
    pub fn entries_of_client(&self, ipv6_prefix: u8) -> Option<u32> {
        let form = if matches!(self, Self::List { .. }) { Form::List } else { Form::Rules };
        let pieces = form.piece_prefix(&Target::new(Ipv6Addr::UNSPECIFIED.into(), ipv6_prefix))?;
        Some(1 << (pieces - ipv6_prefix))
    }
}

struct Runner {
    config: CloudflareConfig,
    around: Surroundings,
    tempo: Tempo,
    facts: GuardFacts,
    pace: Arc<Pace>,
    /// `None` while there is no name, and so nothing is ours.
    mirror: Option<Mirror>,
    /// `None` where a dry run finds that none was made yet.
    installation: Result<Option<String>, InstallationError>,
    client: Result<Arc<Client>, LoginError>,
    /// `None` in a dry run, which takes the work from nobody.
    duty: Option<Duty>,
    /// In which taking of it we have it, if we do: in between it was another's.
    term: Option<u64>,
    /// `None` until it was looked for.
    usage: Option<Usage>,
    /// When it is looked for next.
    usage_due: Timestamp,
    former: Former,
    /// Before this only what frees somebody is called for.
    paced_until: Timestamp,
    reconciled_at: Timestamp,
    cared_at: Timestamp,
}

impl Runner {
    fn new(config: CloudflareConfig, firewall: &FirewallConfig, around: Surroundings, tempo: Tempo) -> Self {
        let facts = GuardFacts {
            trusted_proxies: around.trusted_proxies.clone(),
            prefix_min_v4: firewall.prefix_min_v4,
            prefix_min_v6: firewall.prefix_min_v6,
            ..GuardFacts::default()
        };
        let pace = Arc::new(Pace::new(config.calls_max, tempo.window, around.clock.clone()));
        let duty = (!around.dry_run).then(|| around.duties.take(NAME));
        Self {
            term: duty.as_ref().map_or(Some(0), Duty::term),
            duty,
            pace,
            mirror: None,
            installation: Err(InstallationError::NoPlace),
            client: Err(LoginError::NotMade),
            usage: None,
            usage_due: Timestamp::EPOCH,
            former: Former::default(),
            paced_until: Timestamp::EPOCH,
            reconciled_at: around.clock.raw(),
            cared_at: Timestamp::EPOCH,
            facts,
            tempo,
            config,
            around,
        }
    }

    async fn run(mut self) {
        let shutdown = self.around.shutdown.clone();
        let mut revision = self.around.bans.watch();
        let mut inquiries = self.around.board.desk.open(NAME);
        let (mut lists_open, mut host_open) = (true, self.around.duties.are_alone());
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut job, mut usage_job): (Option<Job>, Option<UsageJob>) = (None, None);
        let mut former_job: Option<FormerJob> = None;
        self.care();
        // What was published before we followed.
        revision.mark_changed();
        self.take_lists();
        loop {
            if job.is_none() {
                job = self.next_job();
            }
            if usage_job.is_none() {
                usage_job = self.next_usage_job();
            }
            if former_job.is_none() {
                former_job = self.next_former_job();
            }
            let pause = self.pause(job.is_some());
            tokio::select! {
                biased;
                () = shutdown.draining() => break,
                () = changed(&mut self.duty) => {
                    if self.take_duty() {
                        (job, usage_job, former_job) = (None, None, None);
                    }
                }
                changed = revision.changed() => if changed.is_ok() { self.take_bans() },
                changed = self.around.lists.changed(), if lists_open => match changed {
                    Ok(()) => self.take_lists(),
                    Err(_) => lists_open = false,
                },
                changed = self.around.host_pause.changed(), if host_open => match changed {
                    Ok(()) => self.take_lists(),
                    Err(_) => host_open = false,
                },
                Some(inquiry) = inquiries.recv() => {
                    let hold = self.explain(inquiry.address);
                    inquiry.answer(hold);
                }
                (call, answer) = finish(&mut job) => self.take_answer(call, answer),
                usage = finish(&mut usage_job) => self.take_usage(usage),
                (place, emptied) = finish(&mut former_job) => self.take_former(&place, &emptied),
                _ = tick.tick() => self.handle_tick(),
                () = sleep(pause) => {}
            }
        }
        if let Some(duty) = self.duty.take() {
            duty.give_back().await;
        }
    }

    fn now(&self) -> Timestamp {
        self.around.clock.now()
    }

    /// Sees to what the work needs: a name, a login, and whom this host must not ban.
    fn care(&mut self) {
        self.cared_at = self.around.clock.raw();
        // What cannot be read stays as it was, and is logged.
        let _blind = read_host(&mut self.facts, host::own_addresses(), host::gateways());
        self.facts.bus_servers = self.around.bus_servers.borrow().clone();
        self.take_login();
        if self.mirror.is_none() {
            self.make_mirror();
        }
        let guard = Guard::new(&self.facts);
        let now = self.now();
        if let Some(mirror) = &mut self.mirror {
            mirror.handle_guard(guard, now);
        }
    }

    fn make_mirror(&mut self) {
        let (configured, dry_run) = (self.config.installation.as_deref(), self.around.dry_run);
        self.installation = match dry_run {
            true => installation::known(configured, std::slice::from_ref(&self.around.service_dir))
                .map(|mut known| known.pop()),
            false => installation::name(configured, self.around.state_dir.as_deref()).map(Some),
        };
        match &self.installation {
            Err(error) => tracing::error!(error = status::chain(error), "Nobody is banned at Cloudflare"),
            Ok(name) => {
                // Where none was made, nothing there is ours.
                let mark = name.as_deref().map_or_else(Mark::of_nobody, Mark::new);
                let start = self.around.clock.raw().as_nanos().unsigned_abs();
                let seed = self.around.node.bytes().fold(start, |seed, byte| seed.rotate_left(8) ^ u64::from(byte));
                let guard = Guard::new(&self.facts);
                let mut mirror = Mirror::new(&self.config, mark, guard, self.tempo.clone(), seed);
                if dry_run {
                    mirror.set_read_only();
                }
                self.mirror = Some(mirror);
                if let (Some(dir), Some(name), false) = (self.around.state_dir.as_deref(), name, dry_run) {
                    self.former = Former::begin(dir, Place::all(name, &self.config.scope));
                }
                tracing::info!(installation = name, dry_run, "Cloudflare is kept as the ban set is");
                self.take_bans();
            }
        }
    }

    /// Reads the login again: its file may hold another by now.
    fn take_login(&mut self) {
        let login = Login::read(&self.config.login);
        if let (Ok(login), Ok(client)) = (&login, &self.client)
            && client.is_as(login)
        {
            return;
        }
        let metrics = self.around.metrics.cloudflare.clone();
        let made =
            login.and_then(|login| Client::new(&self.config, login, self.pace.clone(), self.tempo.call_max, metrics));
        if let Err(error) = &made {
            tracing::error!(error = status::chain(error), "Cloudflare cannot be called");
        }
        let claim = self.duty.as_ref().map(Duty::claim).unwrap_or_default();
        self.client = made.map(|client| Arc::new(client.under(claim)));
    }

    fn take_bans(&mut self) {
        let now = self.now();
        let Some(mirror) = &mut self.mirror else { return };
        if let Some(update) = self.around.bans.since(mirror.wishes().desired().revision()) {
            mirror.handle_update(&update, now);
        }
    }

    fn take_lists(&mut self) {
        let now = self.now();
        let lists = self.around.lists.borrow_and_update().clone();
        self.facts.never_ban.clone_from(&lists.never_ban);
        let guard = Guard::new(&self.facts);
        let paused = self.is_paused(&lists, now);
        if let Some(mirror) = &mut self.mirror {
            mirror.handle_guard(guard, now);
            mirror.handle_pause(paused, now);
        }
    }

    /// On one host alone its own pause is meant for this as well.
    fn is_paused(&self, lists: &Lists, now: Timestamp) -> bool {
        let is_alone = self.around.duties.are_alone();
        is_paused(lists, now) || (is_alone && self.around.host_pause.borrow().is_some())
    }

    /// Takes whose duty it is now. Returns whether that is new.
    fn take_duty(&mut self) -> bool {
        let term = self.duty.as_ref().map_or(Some(0), Duty::term);
        let is_new = std::mem::replace(&mut self.term, term) != term;
        if is_new {
            tracing::info!(held = term.is_some(), "Cloudflare is this host's duty");
            self.reconciled_at = self.around.clock.raw();
            (self.usage, self.usage_due) = (None, Timestamp::EPOCH);
            if let Some(mirror) = &mut self.mirror {
                mirror.forget();
            }
        }
        is_new
    }

    fn is_held(&self) -> bool {
        self.term.is_some()
    }

    fn next_job(&mut self) -> Option<Job> {
        if !self.is_held() {
            return None;
        }
        let now = self.now();
        let call = self.mirror.as_mut().filter(|_| self.client.is_ok())?.next(now)?;
        if !self.admit(call.frees) {
            return None;
        }
        let client = self.client.as_ref().ok()?.clone();
        Some(Box::pin(async move {
            let answer = client.carry_out_now(&call).await;
            (call, answer)
        }))
    }

    /// Whether the pace lets a call pass now, which is counted then. What waits for that has not begun: what frees somebody
    /// may come before it.
    fn admit(&mut self, frees: bool) -> bool {
        let now = self.around.clock.raw();
        if !frees && now < self.paced_until {
            return false;
        }
        let checked = self.pace.check(frees);
        self.paced_until = checked.err().map_or(now, |wait| now.saturating_add(wait));
        checked.is_ok()
    }

    fn next_usage_job(&mut self) -> Option<UsageJob> {
        let Scope::List { account, list } = &self.config.scope else { return None };
        let list_id = self.mirror.as_ref()?.list().map(str::to_owned);
        let (account, list, list_id) = (account.clone(), list.clone(), list_id?);
        if !self.is_held() || self.around.clock.raw() < self.usage_due {
            return None;
        }
        let client = self.client.as_ref().ok()?.clone();
        Some(Box::pin(async move { usage::look(&client, &account, &list_id, &list).await }))
    }

    fn next_former_job(&self) -> Option<FormerJob> {
        let now = self.around.clock.raw();
        let place =
            self.former.due(now).filter(|_| self.is_held() && self.mirror.as_ref().is_some_and(Mirror::stands))?;
        let (client, place) = (self.client.as_ref().ok()?.clone(), place.clone());
        let (config, tempo, clock) = (self.config.clone(), self.tempo.clone(), self.around.clock.clone());
        Some(Box::pin(async move {
            let way = former::Way { config: &config, tempo: &tempo, clock: &clock, dry_run: false, is_awaited: false };
            let emptied = former::clear(&client, &place, way).await;
            (place, emptied)
        }))
    }

    fn take_former(&mut self, place: &Place, emptied: &Emptied) {
        self.former.take(place, emptied, self.around.clock.raw());
        if let Some(mirror) = self.mirror.as_mut().filter(|_| emptied.failure.is_none()) {
            // What was there may have been in the way of what should be.
            mirror.doubt();
        }
    }

    fn take_usage(&mut self, usage: Result<Usage, CallError>) {
        let now = self.around.clock.raw();
        // A rule that is missing is soon made, and then the alarm should end.
        let is_settled = matches!(usage, Ok(Usage::Used | Usage::Unseen(_)));
        let rest = if is_settled { self.config.reconcile_interval } else { CARE_INTERVAL };
        self.usage_due = now.saturating_add(rest);
        match usage {
            Ok(usage) => self.usage = Some(usage),
            Err(error) => tracing::debug!(error = status::chain(&error), "Use of the list not seen"),
        }
    }

    fn take_answer(&mut self, call: Call, answer: Result<Answer, CallError>) {
        let now = self.now();
        if let Err(error) = &answer {
            tracing::debug!(error = status::chain(error), "Call of Cloudflare failed");
            if error.is_about_login() {
                self.take_login();
            }
        }
        if let (true, Ok(_), Some(update)) = (call.ask.is_write(), &answer, told(&call.ask)) {
            tracing::debug!(change = update, "Changed at Cloudflare");
        }
        if let Some(mirror) = &mut self.mirror {
            mirror.handle(call, answer, now);
        }
    }

    fn handle_tick(&mut self) {
        let (now, raw) = (self.now(), self.around.clock.raw());
        if raw.since(self.cared_at) >= CARE_INTERVAL {
            self.care();
        }
        let paused = self.is_paused(&self.around.lists.borrow(), now);
        if let Some(mirror) = &mut self.mirror {
            mirror.handle_time(now);
            mirror.handle_pause(paused, now);
            if raw.since(self.reconciled_at) >= self.config.reconcile_interval {
                self.reconciled_at = raw;
                mirror.doubt();
            }
        }
        self.report();
    }

    /// How long there is nothing to do.
    fn pause(&self, is_busy: bool) -> Duration {
        if is_busy || !self.is_held() {
            return TICK;
        }
        let pause = self.mirror.as_ref().and_then(|mirror| mirror.pause(self.now())).unwrap_or(TICK);
        let paced = self.paced_until.since(self.around.clock.raw());
        if paced.is_zero() { pause } else { pause.min(paced) }
    }

    fn report(&self) {
        let (report, problems) = status::Status {
            config: &self.config,
            installation: &self.installation,
            login_error: self.client.as_ref().err(),
            mirror: self.mirror.as_ref(),
            holder: self.duty.as_ref().filter(|_| !self.is_held()).map(Duty::holder),
            duty_problem: self.duty.as_ref().and_then(Duty::problem),
            usage: self.usage,
            former: &self.former,
            dry_run: self.around.dry_run,
        }
        .report(&self.around.metrics.cloudflare, self.now());
        self.around.board.put(report, problems);
    }
}

fn told(ask: &Ask) -> Option<&'static str> {
    match ask {
        Ask::Create(..) | Ask::Append(_) => Some("added"),
        Ask::SetMode(..) => Some("mode"),
        Ask::Delete(..) | Ask::Remove(_) => Some("removed"),
        Ask::Look(_) | Ask::FindList | Ask::Find(_) | Ask::Poll(_) => None,
    }
}

async fn changed(duty: &mut Option<Duty>) {
    match duty {
        Some(duty) => duty.changed().await,
        None => pending().await,
    }
}

/// Waits for a job and forgets it; without a job for ever. Dropping the wait leaves the job where it is.
async fn finish<T>(job: &mut Option<Pin<Box<dyn Future<Output = T> + Send>>>) -> T {
    match job {
        None => pending().await,
        Some(running) => {
            let done = running.as_mut().await;
            *job = None;
            done
        }
    }
}
