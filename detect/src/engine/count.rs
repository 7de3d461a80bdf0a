//! Counting an event towards each rule it matched, and deciding the bans it completes.

use proto::ban::{Ban, BanChange, Evidence, Origin};
use proto::envelope::EventType;
use proto::event::Event;
use proto::net::Target;
use proto::time::Timestamp;

use super::Engine;
use super::clients::Counted;
use super::offender::Quiet;
use super::output::Output;
use super::rule::{Mode, Threshold};
use super::stream::Position;
use super::window::{Complete, Mark, Span, Window, value_hash};

/// Windows that keep sampled texts for evidence; further ones only count. About 1 KiB each.
const SAMPLED_WINDOWS_MAX: usize = 10_000;
/// An event that counts, with all that is known of it.
#[derive(Clone, Copy)]
pub(super) struct Counting<'a, 'e> {
    pub(super) event: &'a Event<'e>,
    pub(super) node: u16,
    pub(super) target: Target,
    pub(super) time: Timestamp,
    pub(super) via_proxy: bool,
    pub(super) position: Position,
    pub(super) decides: bool,
}

impl Engine {
    pub(super) fn count(&mut self, counting: &Counting<'_, '_>, matching: u64) {
        let offender = self.offenders.get(&counting.target);
        let banned_then = offender.is_some_and(|offender| counting.time < offender.quiet_until(counting.position));
        self.stats.while_banned += u64::from(banned_then);
        let mut decided = false;
        for i in 0..self.config.rules.len() {
            if matching & (1 << i) == 0 {
                continue;
            }
            let rule = &self.config.rules[i];
            let histories = if rule.mode == Mode::Shadow { &self.shadow } else { &self.offenders };
            let history = histories.get(&counting.target).and_then(|offender| offender.history(&rule.name));
            let shadowed = rule.mode == Mode::Shadow && history.is_some_and(|history| counting.time < history.last_end);
            // What a ban has used up came before it, in the stream and in time.
            let consumed = history
                .is_some_and(|history| counting.position <= history.consumed && counting.time < history.last_end);
            if banned_then || shadowed || consumed {
                continue;
            }
            if let Some(complete) = self.count_for_rule(counting, i) {
                self.decide(counting, i, &complete);
                decided |= counting.decides || self.config.rules[i].mode == Mode::Enforce;
            }
        }
        if decided {
            self.stream.advance();
        }
        self.bound_clients();
    }

    /// Adds the event to the rule's window or bucket; what it completes, if anything, is taken out.
    fn count_for_rule(&mut self, counting: &Counting<'_, '_>, rule: usize) -> Option<Complete> {
        let may_sample = self.clients.sampled() < SAMPLED_WINDOWS_MAX;
        let Self { config, clients, bucket, stats, .. } = self;
        let now = self.stream.window_time(self.now);
        let oldest = now.saturating_sub(config.lateness_max);
        let rule_number = rule as u16;
        // Nobody else decides for a shadow rule, so what is read again is used up here, in silence.
        let decides = counting.decides || config.rules[rule].mode == Mode::Shadow;
        let mark = Mark {
            time: counting.time,
            value: 0,
            status: counting.event.status,
            node: counting.node,
            via_proxy: counting.via_proxy,
            fresh: decides,
        };
        match config.rules[rule].threshold {
            Threshold::Rate { period, burst } => clients.update(counting.target, rule_number, now, |counted| {
                let held =
                    if let Some(Counted::Bucket { level, newest }) = counted { Some((*level, *newest)) } else { None };
                let newest = held.map_or(counting.time, |(_, newest)| newest.max(counting.time));
                let (level, fits) = bucket.pour(period, burst, newest, held.map(|(level, _)| level));
                if fits || !decides {
                    *counted = level.map(|level| Counted::Bucket { level, newest });
                    return None;
                }
                *counted = None;
                let mut full = Window::new(mark);
                full.sample(
                    mark.time,
                    counting.event.text.path,
                    counting.event.text.host,
                    counting.event.text.user_agent,
                );
                full.complete(&mark, &Span { max_retry: 1, find_nanos: 0, distinct: false })
            }),
            Threshold::Window { max_retry, find_time, distinct } => {
                let mark = Mark { value: distinct.map_or(0, |which| value_hash(which.of(counting.event))), ..mark };
                let find_nanos = i64::try_from(find_time.as_nanos()).unwrap_or(i64::MAX);
                let span = Span { max_retry, find_nanos, distinct: distinct.is_some() };
                let oldest = oldest.saturating_sub(find_time);
                clients.update(counting.target, rule_number, now, |counted| {
                    let held = counted.take();
                    let mut window = match held {
                        Some(Counted::Window(mut window)) => {
                            window.insert(mark, oldest, &span);
                            window
                        }
                        Some(Counted::Bucket { .. }) | None => Window::new(mark),
                    };
                    // The first event's text is kept only where it is the last as well.
                    if window.len() > 1 || max_retry == 1 {
                        if may_sample || window.has_samples() {
                            let text = &counting.event.text;
                            window.sample(mark.time, text.path, text.host, text.user_agent);
                        } else {
                            stats.unsampled += 1;
                        }
                    }
                    // What was decided is not decided again. But where a new line overtook this one, which is read
                    // again from another file, they may be complete together.
                    let complete = window.complete(&mark, &span).filter(|run| run.marks.iter().any(|mark| mark.fresh));
                    if complete.is_none() {
                        *counted = Some(Counted::Window(window));
                    }
                    complete
                })
            }
        }
    }

    fn decide(&mut self, counting: &Counting<'_, '_>, rule: usize, complete: &Complete) {
        let target = counting.target;
        let position = self.stream.position();
        let rule_ref = &self.config.rules[rule];
        let (escalation, name) = (rule_ref.escalation.clone(), rule_ref.name.clone());
        let (first, last) = match (complete.marks.first(), complete.marks.last()) {
            (Some(first), Some(last)) => (first.time, last.time),
            _ => (counting.time, counting.time),
        };
        let shadow = rule_ref.mode == Mode::Shadow;
        let histories = if shadow { &mut self.shadow } else { &mut self.offenders };
        let former = histories
            .get(&target)
            .map_or(0, |offender| offender.count(&name, escalation.across_rules, escalation.forget_after, last));
        let ban_count = former.saturating_add(1);
        let length = escalation.jittered_length(rule_ref.ban_time, ban_count, &target, &name);
        let end = last.saturating_add(length);
        histories.update(target, |offender| {
            let own = offender.count(&name, false, escalation.forget_after, last);
            let history = offender.history_mut(&name);
            history.count = own.saturating_add(1);
            history.last_end = end;
            history.consumed = position;
            let until = offender.quiet_now().max(end);
            offender.set_quiet(Quiet { after: position, until });
        });
        self.stats.rules[rule].1 += u64::from(counting.decides || !shadow);
        let rest = complete.rest.iter().filter(|mark| mark.time >= end).copied().collect();
        if let Some(rest) = Window::of_rest(rest) {
            let now = self.stream.window_time(self.now);
            self.clients.update(target, rule as u16, now, |counted| *counted = Some(Counted::Window(rest)));
        }
        let ban = Ban {
            target,
            rule: name.to_string(),
            origin: Origin::Detect,
            ban_count,
            ban_seconds: Some(length.as_millis().div_ceil(1000) as u64),
            banned_at: last,
            expires_at: Some(end),
            reason: reason(&self.config.rules[rule].threshold, complete),
            evidence: self.evidence(complete, first, last),
        };
        if shadow {
            if counting.decides {
                self.outputs.push_back(Output::Shadow(Box::new(ban)));
            }
            self.bound_offenders();
            return;
        }
        self.push_offender(target);
        if ban.is_in_force(self.now.max(self.present)) {
            self.put_ban(ban);
        } else {
            self.outputs.push_back(Output::Over(Box::new(ban)));
        }
        self.bound_offenders();
    }

    fn evidence(&self, complete: &Complete, first: Timestamp, last: Timestamp) -> Evidence {
        let mut nodes: Vec<String> = Vec::new();
        for mark in &complete.marks {
            let name = self.nodes.get(usize::from(mark.node)).map_or("", |node| node);
            if !nodes.iter().any(|known| known == name) {
                nodes.push(name.to_owned());
            }
        }
        Evidence {
            failures: u32::try_from(complete.marks.len()).unwrap_or(u32::MAX),
            first_seen: Some(first),
            last_seen: Some(last),
            nodes,
            hosts: complete.hosts.clone(),
            statuses: complete.statuses(),
            paths: complete.paths.clone(),
            user_agents: complete.user_agents.clone(),
            via_proxy: complete.marks.iter().any(|mark| mark.via_proxy),
        }
    }

    pub(super) fn put_ban(&mut self, ban: Ban) {
        let now = self.now.max(self.present);
        // What has ended is lifted everywhere, though perhaps not here yet.
        let goes_on = self.bans.get(&ban.target).is_some_and(|record| record.end() > now);
        if !goes_on {
            self.leaks.begin(ban.target);
        }
        let was_banned = self.bans.put(ban.clone());
        let kind = if was_banned { EventType::Extend } else { EventType::Ban };
        if let Some(record) = self.bans.get(&ban.target) {
            self.outputs.push_back(Output::Record(BanChange::Put(record.clone())));
        }
        self.outputs.push_back(Output::Told(kind, Box::new(ban)));
    }

    pub(super) fn push_offender(&mut self, target: Target) {
        self.outputs.push_back(Output::Offender(target, self.offenders.get(&target).cloned()));
    }

    pub(super) fn bound_clients(&mut self) {
        let (clients_max, events_max) = (self.config.tracked_clients_max, self.config.window_events_max);
        while self.clients.len() > clients_max || self.clients.events() > events_max {
            if self.clients.evict_oldest().is_none() {
                return;
            }
            self.stats.evicted_clients += 1;
            if self.stats.evicted_clients == 1 {
                let text = format!(
                    "more clients with open windows than {clients_max}, or more events than {events_max}: the oldest \
                     are dropped and may go unbanned; raise detect.tracked_clients_max or detect.window_events_max"
                );
                self.outputs.push_back(Output::Alarm { kind: "tracked-clients-max", text });
            }
        }
    }

    pub(super) fn bound_offenders(&mut self) {
        while self.shadow.len() > self.config.offenders_max {
            self.shadow.evict_oldest();
        }
        while self.offenders.len() > self.config.offenders_max {
            let Some(target) = self.offenders.evict_oldest() else { return };
            // Nobody is banned without a history, or the ban would not be seen by what follows.
            self.lift(&target, "dropped because detect.offenders_max was reached");
            self.outputs.push_back(Output::Offender(target, None));
            self.stats.evicted_offenders += 1;
            if self.stats.evicted_offenders == 1 {
                let text = format!(
                    "more than {} targets with a ban history: the oldest start again at their first ban; raise \
                     detect.offenders_max",
                    self.config.offenders_max
                );
                self.outputs.push_back(Output::Alarm { kind: "offenders-max", text });
            }
        }
    }
}

fn reason(threshold: &Threshold, complete: &Complete) -> String {
    let statuses: Vec<String> =
        complete.statuses().iter().map(|(status, count)| format!("{count} x status {status}")).collect();
    let statuses = statuses.join(", ");
    match threshold {
        Threshold::Window { find_time, distinct, .. } => {
            let what = if distinct.is_some() { "different requests" } else { "requests" };
            let time = proto::time::render_duration(*find_time);
            format!("{} {what} within {time} ({statuses})", complete.marks.len())
        }
        Threshold::Rate { period, burst } => {
            let period = proto::time::render_duration(*period);
            format!("more than {burst} requests faster than one each {period} ({statuses})")
        }
    }
}
