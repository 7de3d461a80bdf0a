//! The whole back end against a stand-in for Cloudflare, over HTTP.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use proto::api::{BackendHold, HoldState};
use proto::ban::{BanChange, Lists, Pause};
use proto::bus::memory::Bus;
use proto::net::Target;
use proto::report::{BackendReport, Problem};
use proto::secret::Secret;
use proto::shutdown::Shutdown;
use proto::time::{Clock, Timestamp};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::mirror::sim::record;
use super::{Runner, Tempo, left_behind, remove_all};
use crate::action::Surroundings;
use crate::board::Board;
use crate::config::{CloudflareConfig, CloudflareLogin, FirewallConfig, Mode, Scope, SecretSource};
use crate::metrics::EnforceMetrics;
use crate::teardown::CloudflareRemoval;
use crate::testing::surroundings;

const ACCOUNT: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const ZONES: [&str; 2] = ["11111111111111111111111111111111", "22222222222222222222222222222222"];
const LIST: &str = "cccccccccccccccccccccccccccccccc";

/// The stand-in. Ends when dropped.
struct Fake {
    process: Child,
    base: String,
    http: reqwest::Client,
}

impl Fake {
    async fn start(wishes: Value) -> Self {
        proto::tls::use_ring();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/cloudflare/fake.py");
        let mut command = Command::new("python3");
        let mut process =
            command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python3 starts");
        let mut port = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut port).unwrap();
        let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
        let fake = Self { process, base: format!("http://127.0.0.1:{}", port.trim()), http };
        fake.control(json!({
            "lists": [{"account": ACCOUNT, "name": "bad", "id": LIST}],
            "zones": {(ZONES[0]): ACCOUNT, (ZONES[1]): ACCOUNT},
        }))
        .await;
        fake.control(wishes).await;
        fake
    }

    async fn control(&self, wishes: Value) -> Value {
        let sent = self.http.post(format!("{}/_fake", self.base)).json(&wishes).send().await.unwrap();
        sent.json().await.unwrap()
    }

    async fn state(&self) -> Value {
        self.control(json!({})).await
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn tempo() -> Tempo {
    let ms = Duration::from_millis;
    Tempo {
        backoff_min: ms(10),
        backoff_max: ms(100),
        poll_min: ms(5),
        poll_max: ms(20),
        operation_max: ms(5000),
        unseen_max: ms(300),
        call_max: ms(250),
        window: ms(2000),
    }
}

fn config(fake: &Fake, scope: Scope) -> CloudflareConfig {
    CloudflareConfig {
        login: CloudflareLogin::Token(SecretSource::Given(Secret::new("token"))),
        scope,
        mode: Mode::ManagedChallenge,
        installation: Some("me".to_owned()),
        entries_max: 1000,
        calls_max: 250,
        reconcile_interval: Duration::from_secs(3600),
        api_url: fake.base.clone(),
    }
}

fn zones() -> Scope {
    Scope::Zones(ZONES.map(str::to_owned).to_vec())
}

fn list() -> Scope {
    Scope::List { account: ACCOUNT.to_owned(), list: "bad".to_owned() }
}

/// A host, on which the back end may live several lives.
struct Host {
    bus: Bus,
    dir: tempfile::TempDir,
    pause: watch::Sender<Option<String>>,
    metrics: EnforceMetrics,
    board: Board,
    shutdown: Shutdown,
    dry_run: bool,
    task: Option<JoinHandle<()>>,
}

impl Host {
    fn new() -> Self {
        Self {
            bus: Bus::new(),
            dir: tempfile::tempdir().unwrap(),
            pause: watch::Sender::new(None),
            metrics: EnforceMetrics::register(&mut Registry::default()),
            board: Board::default(),
            shutdown: Shutdown::new(),
            dry_run: false,
            task: None,
        }
    }

    fn start(&mut self, config: &CloudflareConfig) {
        let around = Surroundings {
            host_pause: self.pause.subscribe(),
            state_dir: Some(self.dir.path().to_owned()),
            service_dir: self.dir.path().to_owned(),
            dry_run: self.dry_run,
            board: self.board.clone(),
            metrics: self.metrics.clone(),
            shutdown: self.shutdown.clone(),
            ..surroundings(&self.bus)
        };
        let runner = Runner::new(config.clone(), &FirewallConfig::default(), around, tempo());
        self.task = Some(tokio::spawn(runner.run()));
    }

    /// Ends it in the middle of whatever it does.
    async fn kill(&mut self) {
        let task = self.task.take().unwrap();
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled(), "it had ended by itself");
    }

    async fn stop(mut self) {
        self.shutdown.begin();
        self.task.take().unwrap().await.unwrap();
    }

    fn ban(&self, targets: &[&str]) {
        self.bus.bans.publish(targets.iter().map(|target| BanChange::Put(record(target, None, 1))), None);
    }

    fn free(&self, targets: &[&str]) {
        self.bus.bans.publish(targets.iter().map(|target| BanChange::Delete(target.parse().unwrap())), None);
    }

    fn said(&self) -> (BackendReport, Vec<Problem>) {
        let (mut reports, problems) = self.board.all();
        (reports.pop().unwrap_or_default(), problems)
    }

    fn has_problem(&self, text: &str) -> bool {
        self.said().1.iter().any(|problem| problem.text.contains(text))
    }
}

/// Ours, as Cloudflare has them: by place and target, with how often each is there.
fn ours(state: &Value) -> BTreeMap<String, BTreeMap<Target, usize>> {
    let mut ours: BTreeMap<String, BTreeMap<Target, usize>> = BTreeMap::new();
    for (kind, note, value) in [("rules", "notes", "/configuration/value"), ("items", "comment", "/ip")] {
        for (place, entries) in state[kind].as_object().unwrap() {
            for entry in entries.as_array().unwrap() {
                if entry[note].as_str().unwrap().starts_with("portcullis:me:") {
                    // Ours can only be what we make: addresses and networks.
                    let Ok(target) = entry.pointer(value).unwrap().as_str().unwrap().parse() else { continue };
                    *ours.entry(place.clone()).or_default().entry(target).or_default() += 1;
                }
            }
        }
    }
    ours
}

fn foreign(state: &Value) -> Vec<String> {
    let places = ["rules", "items"].into_iter().flat_map(|kind| state[kind].as_object().unwrap().values());
    let entries = places.flat_map(|entries| entries.as_array().unwrap());
    let is_foreign = |entry: &&Value| {
        let note = entry["notes"].as_str().or(entry["comment"].as_str()).unwrap();
        !note.starts_with("portcullis:me:")
    };
    entries.filter(is_foreign).map(ToString::to_string).collect()
}

/// Looks until it is so; fails with what was there when it never is.
async fn until(fake: &Fake, what: &str, mut is_so: impl FnMut(&Value) -> bool) -> Value {
    let clock = Clock::system();
    let end = clock.now().saturating_add(Duration::from_secs(30));
    loop {
        let state = fake.state().await;
        if is_so(&state) {
            return state;
        }
        assert!(clock.now() < end, "waited in vain: {what}: {:?}, {}", ours(&state), state["stats"]);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn has(state: &Value, place: &str, targets: &[&str]) -> bool {
    let wanted = targets.iter().map(|target| (target.parse().unwrap(), 1)).collect();
    ours(state).remove(place).unwrap_or_default() == wanted
}

fn zone(n: usize) -> String {
    format!("zones/{}", ZONES[n])
}

/// Entries that are not ours; those of 203.0.113.3 and 2001:db8:3::/64 meet bans.
fn strangers() -> Value {
    let notes = ["", "portcullis:you:r", "Portcullis:me:r", "portcullis:me2:r", "portcullis:ME:r"];
    let rule = |n: usize, target: &str, value: String| {
        json!({"whose": zone(0), "target": target, "value": value,
        "notes": notes[n], "mode": "whitelist"})
    };
    let mut rules: Vec<Value> = (0..notes.len()).map(|n| rule(n, "ip", format!("203.0.113.{n}"))).collect();
    rules.push(rule(0, "ip_range", "2001:db8:3::/64".to_owned()));
    rules.push(rule(0, "country", "XX".to_owned()));
    rules.push(json!({"whose": zone(1), "target": "country", "value": "XX", "notes": "portcullis:me:r"}));
    let item = |n: usize| json!({"list": LIST, "ip": format!("203.0.113.{n}"), "comment": notes[n]});
    json!({"rules": rules, "items": (0..notes.len()).map(item).collect::<Vec<_>>()})
}

/// Bans and frees at random while everything fails at random and the back end is killed; then all must be as it should.
async fn random_run(scope: Scope, places: &[(String, &[&str])], seed: u64) {
    let fake = Fake::start(strangers()).await;
    let chaos = json!({"unavailable": 0.05, "limited": 0.01, "refused": 0.04, "late": 0.05, "broken": 0.05, "cut": 0.05,
        "slow": 0.02, "operation": 0.1});
    let before =
        foreign(&fake.control(json!({"seed": seed, "settings": {"chaos": chaos, "limit": 300, "window": 2.0}})).await);
    let config = config(&fake, scope);
    let mut host = Host::new();
    host.start(&config);
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    let mut dice = seed;
    let mut roll = |sides: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) % sides
    };
    for step in 0..60 {
        let n = roll(25);
        let target = if n % 5 == 4 { format!("2001:db8:{n}::/64") } else { format!("203.0.113.{n}") };
        if roll(3) == 0 {
            host.free(&[&target]);
            wanted.remove(&target);
        } else {
            host.ban(&[&target]);
            wanted.insert(target);
        }
        // So that steps fall between calls.
        fake.state().await;
        if step % 20 == 19 {
            host.kill().await;
            host.start(&config);
        }
    }
    host.ban(&["198.51.100.0/23"]);
    fake.control(json!({"settings": {"chaos": {}}})).await;
    for (place, extra) in places {
        let is_free = |target: &str| !matches!(target, "203.0.113.0" | "203.0.113.1" | "203.0.113.2" | "203.0.113.3");
        let is_taken = |target: &str| place == &zone(0) || place == LIST && !is_free(target);
        let mut expected: Vec<&str> = wanted.iter().map(String::as_str).collect();
        expected.retain(|target| !is_taken(target) || is_free(target) && *target != "2001:db8:3::/64");
        expected.retain(|target| place == &zone(1) || *target != "203.0.113.4");
        expected.extend(*extra);
        until(&fake, place, |state| has(state, place, &expected)).await;
    }
    let state = until(&fake, "all operations end", |state| state["running"] == json!([])).await;
    let stats = &state["stats"];
    assert_eq!(stats.get("over"), None, "{stats}");
    let touched = state["touched"].as_array().unwrap();
    assert!(touched.iter().all(|note| note.as_str().unwrap().starts_with("portcullis:me:")), "{touched:?}");
    let after = foreign(&state);
    assert_eq!(after, before);
    host.stop().await;
}

#[tokio::test]
async fn rules_of_the_account_that_a_zone_lists_are_not_taken_for_the_zones_own() {
    let rule = |n: usize, notes: &str| {
        let whose = if n == 3 { zone(0) } else { format!("accounts/{ACCOUNT}") };
        json!({"whose": whose, "target": "ip", "value": format!("203.0.113.{}", n.min(2)), "notes": notes})
    };
    // Of the second, an inherited rule of somebody else is listed before our own.
    let rules = json!([rule(1, "portcullis:me:r"), rule(2, ""), rule(3, "portcullis:me:r")]);
    let fake = Fake::start(json!({"rules": rules})).await;
    let mut host = Host::new();
    host.ban(&["203.0.113.1", "203.0.113.2", "203.0.113.3"]);
    host.start(&config(&fake, Scope::Zones(vec![ZONES[0].to_owned()])));
    let all = ["203.0.113.1", "203.0.113.2", "203.0.113.3"];
    until(&fake, "the zone has all", |state| has(state, &zone(0), &all)).await;
    until(&fake, "all is well", |_| host.said().1.is_empty() && host.said().0.waiting == 0).await;
    host.free(&all);
    let state = until(&fake, "the zone has none", |state| has(state, &zone(0), &[])).await;
    assert_eq!(state["rules"][format!("accounts/{ACCOUNT}")].as_array().unwrap().len(), 2);
    host.stop().await;
}

#[tokio::test]
async fn rules_of_zones_end_as_desired_whatever_fails() {
    let split: &[&str] = &["198.51.100.0/24", "198.51.101.0/24"];
    random_run(zones(), &[(zone(0), split), (zone(1), split)], 7).await;
}

#[tokio::test]
async fn items_of_a_list_end_as_desired_whatever_fails() {
    random_run(list(), &[(LIST.to_owned(), &["198.51.100.0/23"])], 11).await;
}

#[tokio::test]
async fn what_cloudflare_says_of_its_limit_keeps_calls_under_it() {
    // Far fewer calls than the configuration allows, as others use the same login.
    let fake = Fake::start(json!({"settings": {"limit": 40, "window": 1.0}})).await;
    let mut host = Host::new();
    let targets: Vec<String> = (0..60).map(|n| format!("203.0.113.{n}")).collect();
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    host.ban(&targets);
    host.start(&CloudflareConfig { calls_max: 1000, ..config(&fake, Scope::User) });
    let state = until(&fake, "all are banned", |state| has(state, "user", &targets)).await;
    assert_eq!(state["stats"].get("over"), None, "{}", state["stats"]);
    host.stop().await;
}

#[tokio::test]
async fn a_pause_lifts_everything_and_no_ban_ends_before_the_set_is_whole() {
    let fake = Fake::start(json!({"rules": [
        {"whose": "user", "target": "ip", "value": "203.0.113.1", "notes": "portcullis:me:r", "mode": "block"},
        {"whose": "user", "target": "ip", "value": "203.0.113.2", "notes": "portcullis:me:r"},
    ]}))
    .await;
    let mut host = Host::new();
    host.bus.bans.publish_partial([BanChange::Put(record("203.0.113.9", None, 1))]);
    host.start(&config(&fake, Scope::User));
    until(&fake, "one more", |state| has(state, "user", &["203.0.113.1", "203.0.113.2", "203.0.113.9"])).await;
    host.ban(&["203.0.113.1"]);
    host.bus.bans.replace([record("203.0.113.1", None, 1)]);
    let is_as_configured = |state: &Value| state["rules"]["user"][0]["mode"] == "managed_challenge";
    until(&fake, "the others are freed, and its mode is as configured now", |state| {
        has(state, "user", &["203.0.113.1"]) && is_as_configured(state)
    })
    .await;
    let paused = Some(Pause { since: Timestamp::EPOCH, until: None });
    host.bus.lists.send_replace(Arc::new(Lists { paused, ..Lists::default() }));
    until(&fake, "nobody is banned", |state| has(state, "user", &[])).await;
    host.bus.lists.send_replace(Arc::default());
    until(&fake, "he is again", |state| has(state, "user", &["203.0.113.1"])).await;
    let guarded = Lists { never_ban: vec!["203.0.113.1/32".parse().unwrap()], ..Lists::default() };
    host.bus.lists.send_replace(Arc::new(guarded));
    until(&fake, "whom the guard names is freed", |state| has(state, "user", &[])).await;
    host.stop().await;
}

#[tokio::test]
async fn a_wrong_login_is_said_without_showing_it_and_a_new_file_is_read() {
    let fake = Fake::start(json!({})).await;
    let mut host = Host::new();
    let path = host.dir.path().join("token");
    write_secret(&path, "hush-hush\n");
    let login = CloudflareLogin::Token(SecretSource::File(path.clone()));
    host.ban(&["203.0.113.1"]);
    host.start(&CloudflareConfig { login, ..config(&fake, Scope::Account(ACCOUNT.to_owned())) });
    until(&fake, "the refusal is said", |_| host.has_problem("code 9109")).await;
    let (report, problems) = host.said();
    assert!(host.has_problem("[hidden]") && !format!("{report:?} {problems:?}").contains("hush"), "{problems:?}");
    assert_eq!((report.revision, report.members), (0, 0));
    write_secret(&path, "token");
    let place = format!("accounts/{ACCOUNT}");
    until(&fake, "the ban", |state| has(state, &place, &["203.0.113.1"])).await;
    until(&fake, "all is well", |_| host.said().1.is_empty() && host.said().0.revision > 0).await;
    host.stop().await;
}

fn write_secret(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

#[tokio::test]
async fn who_is_freed_does_not_wait_behind_a_ban_that_the_pace_holds_back() {
    // With fewer than twenty calls left, for minutes only those are made that free somebody.
    let fake = Fake::start(json!({"settings": {"limit": 40}})).await;
    let mut host = Host::new();
    let place = format!("accounts/{ACCOUNT}");
    host.ban(&["203.0.113.1"]);
    host.start(&config(&fake, Scope::Account(ACCOUNT.to_owned())));
    until(&fake, "the first ban", |state| has(state, &place, &["203.0.113.1"])).await;
    let many: Vec<String> = (2..42).map(|n| format!("203.0.113.{n}")).collect();
    host.ban(&many.iter().map(String::as_str).collect::<Vec<_>>());
    let is_held_back = |state: &Value| {
        let done = ours(state).remove(&place).unwrap_or_default().len() as u64;
        let is_scarce = state["stats"]["calls"].as_u64() > Some(20);
        is_scarce && host.said().0.members == done && host.said().0.waiting == 41 - done
    };
    until(&fake, "the pace holds bans back", is_held_back).await;
    host.free(&["203.0.113.1"]);
    let is_there = |state: &Value| ours(state)[&place].contains_key(&"203.0.113.1".parse().unwrap());
    until(&fake, "who was freed", |state| !is_there(state)).await;
    host.stop().await;
}

#[tokio::test]
async fn a_list_that_no_rule_uses_raises_an_alarm() {
    let rule = json!({"action": "block", "expression": "ip.src in $bad", "enabled": true});
    let name = format!("zones/{}", ZONES[1]);
    for (wishes, problem) in [
        (json!({}), Some("no custom rule uses the list")),
        (json!({"entry_points": {name: [rule]}}), None),
        (json!({"settings": {"hides_rulesets": ["accounts"]}}), Some("no custom rule uses the list")),
        (
            json!({"settings": {"hides_rulesets": ["accounts"], "plan": "enterprise"}}),
            Some("uses the list, because the token may not read the custom rules of the account"),
        ),
        (
            json!({"settings": {"hides_rulesets": ["accounts", "zones"]}}),
            Some("uses the list, because the token may not read all zones' firewall"),
        ),
    ] {
        let fake = Fake::start(wishes).await;
        let mut host = Host::new();
        host.ban(&["203.0.113.1"]);
        host.start(&config(&fake, list()));
        let is_said =
            || problem.map_or(host.said().0.members == 1 && host.said().1.is_empty(), |p| host.has_problem(p));
        until(&fake, "it is said", |_| is_said()).await;
        host.stop().await;
    }
}

/// What it says of 203.0.113.1, once that is so.
async fn explained(host: &Host, state: HoldState) -> BackendHold {
    let clock = Clock::system();
    let end = clock.now().saturating_add(Duration::from_secs(30));
    loop {
        let hold = host.board.desk.ask("203.0.113.1".parse().unwrap()).await.pop();
        if let Some(hold) = hold.clone().filter(|hold| hold.state == state) {
            return hold;
        }
        assert!(clock.now() < end, "waited in vain for {state:?}: {hold:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn it_is_explained_what_stands_at_cloudflare_and_what_that_is_worth() {
    for (scope, dry_run, state, said) in [
        (zones(), false, HoldState::Held, "; mode managed_challenge lets pass whoever solves it"),
        (list(), false, HoldState::Idle, "it is on the list, which no custom rule uses"),
        (zones(), true, HoldState::Idle, "dry run: nothing is changed"),
    ] {
        let fake = Fake::start(json!({})).await;
        let mut host = Host::new();
        host.dry_run = dry_run;
        host.ban(&["203.0.113.1"]);
        host.start(&config(&fake, scope));
        let hold = explained(&host, state).await;
        assert_eq!((hold.backend.as_str(), hold.entry.is_some()), ("cloudflare", !dry_run), "{hold:?}");
        assert!(hold.detail.ends_with(said), "{hold:?}");
        host.stop().await;
    }
    let fake = Fake::start(json!({})).await;
    let bus = Bus::new();
    let mut runner = Runner::new(config(&fake, zones()), &FirewallConfig::default(), surroundings(&bus), tempo());
    runner.term = None;
    let hold = runner.explain("203.0.113.1".parse().unwrap());
    assert_eq!((hold.state, hold.detail.as_str()), (HoldState::Standby, "done by no host yet"));
}

#[tokio::test]
async fn a_full_quota_is_said_and_a_bad_item_takes_no_batch_along() {
    let fake = Fake::start(json!({"settings": {"bad": ["203.0.113.7"]}})).await;
    let mut host = Host::new();
    let targets: Vec<String> = (0..12).map(|n| format!("203.0.113.{n}")).collect();
    host.ban(&targets.iter().map(String::as_str).collect::<Vec<_>>());
    host.start(&CloudflareConfig { entries_max: 10, ..config(&fake, list()) });
    until(&fake, "all that fit", |state| ours(state).get(LIST).map_or(0, BTreeMap::len) == 9).await;
    until(&fake, "both are said", |_| {
        host.has_problem("entries_max is reached") && host.has_problem("Cloudflare refuses some entries")
    })
    .await;
    host.stop().await;
}

#[tokio::test]
async fn what_cloudflare_says_of_a_failed_operation_is_cut_and_shows_no_secret() {
    let why = format!("token \u{1b}[2J{}", "x".repeat(5000));
    let fake = Fake::start(json!({"settings": {"chaos": {"operation": 1}, "why": why}})).await;
    let mut host = Host::new();
    let targets: Vec<String> = (0..8).map(|n| format!("203.0.113.{n}")).collect();
    host.ban(&targets.iter().map(String::as_str).collect::<Vec<_>>());
    host.start(&config(&fake, list()));
    until(&fake, "it is said", |_| host.has_problem("could not change the list: [hidden]")).await;
    let problems = host.said().1;
    assert!(problems.iter().all(|p| p.text.len() < 300 && !p.text.contains(char::is_control)), "{problems:?}");
    host.stop().await;
}

#[tokio::test]
async fn a_place_that_is_not_configured_any_more_is_emptied_once_the_new_one_stands() {
    let fake = Fake::start(strangers()).await;
    let mut host = Host::new();
    host.ban(&["203.0.113.9", "203.0.113.10"]);
    let all = ["203.0.113.9", "203.0.113.10"];
    let account = Scope::Account(ACCOUNT.to_owned());
    let places = [zone(0), zone(1), format!("accounts/{ACCOUNT}"), LIST.to_owned()];
    let one_zone = Scope::Zones(vec![ZONES[0].to_owned()]);
    let before = foreign(&fake.state().await);
    for (scope, full) in
        [(zones(), &places[..2]), (one_zone, &places[..1]), (account, &places[2..3]), (list(), &places[3..])]
    {
        host.start(&config(&fake, scope));
        for place in &places {
            let expected: &[&str] = if full.contains(place) { &all } else { &[] };
            until(&fake, place, |state| has(state, place, expected)).await;
        }
        until(&fake, "nothing more is to be emptied", |_| {
            host.said().0.waiting == 0 && !host.said().0.detail.iter().any(|detail| detail.starts_with("emptied"))
        })
        .await;
        host.kill().await;
    }
    // Another name: what carries the old one is in the way of the new.
    host.start(&CloudflareConfig { installation: Some("you2".to_owned()), ..config(&fake, list()) });
    let is_renamed = |state: &Value| {
        let items = state["items"][LIST].as_array().unwrap();
        items.iter().filter(|item| item["comment"] == "portcullis:you2:r").count() == 2 && has(state, LIST, &[])
    };
    let state = until(&fake, "the new name", is_renamed).await;
    let after: Vec<String> = foreign(&state).into_iter().filter(|entry| !entry.contains("you2")).collect();
    assert_eq!(after, before);
    host.kill().await;

    // Without the section nothing is forgotten; a teardown removes it.
    let dirs = [host.dir.path().to_owned()];
    let told = left_behind(&dirs).unwrap();
    assert!(told.contains("list bad (installation you2)") && told.contains("--teardown"), "{told}");
    let config = config(&fake, Scope::Account(ACCOUNT.to_owned()));
    let list = CloudflareRemoval { place: "list bad (installation you2)".to_owned(), entries: 2, is_gone: false };
    for dry_run in [true, false] {
        let (removed, done) = remove_all(&config, &dirs, dry_run).await;
        done.unwrap();
        assert_eq!(removed, std::slice::from_ref(&list));
    }
    assert_eq!(foreign(&fake.state().await), before);
    assert_eq!(left_behind(&dirs), None);
}

#[tokio::test]
async fn a_former_place_that_refuses_is_said_and_its_entries_are_not_forgotten() {
    let fake = Fake::start(json!({})).await;
    let mut host = Host::new();
    host.ban(&["203.0.113.9"]);
    host.start(&config(&fake, list()));
    until(&fake, "the list", |state| has(state, LIST, &["203.0.113.9"])).await;
    host.kill().await;
    fake.control(json!({"settings": {"sealed": [LIST]}})).await;
    host.start(&config(&fake, Scope::User));
    until(&fake, "it is said", |_| host.has_problem("list bad (installation me)")).await;
    assert!(has(&fake.state().await, "user", &["203.0.113.9"]));
    host.kill().await;
    fake.control(json!({"settings": {"sealed": []}})).await;
    host.start(&config(&fake, Scope::User));
    until(&fake, "the list is empty", |state| has(state, LIST, &[])).await;
    host.stop().await;
}

#[tokio::test]
async fn a_former_list_that_its_account_has_no_more_is_forgotten_and_one_that_may_not_be_seen_is_not() {
    let elsewhere = Scope::List { account: "e".repeat(32), list: "bad".to_owned() };
    let fake = Fake::start(json!({})).await;
    let mut host = Host::new();
    let places = |scope: &Scope| super::places::Place::all("me", scope);
    super::places::write(host.dir.path(), &places(&elsewhere).union(&places(&list())).cloned().collect()).unwrap();
    fake.control(json!({"remove_lists": [LIST]})).await;
    host.ban(&["203.0.113.9"]);
    host.start(&config(&fake, Scope::User));
    let kept = || super::places::read(host.dir.path()).unwrap();
    until(&fake, "the list is forgotten", |_| !kept().iter().any(|place| places(&list()).contains(place))).await;
    until(&fake, "the other is said", |_| host.has_problem("cannot be removed: list bad (installation me): ")).await;
    assert!(places(&elsewhere).is_subset(&kept()));
    host.kill().await;

    let dirs = [host.dir.path().to_owned()];
    super::places::write(host.dir.path(), &places(&list())).unwrap();
    let stranger = CloudflareLogin::Token(SecretSource::Given(Secret::new("wrong")));
    let stranger = CloudflareConfig { login: stranger, ..config(&fake, list()) };
    let (removed, done) = remove_all(&stranger, &dirs, false).await;
    assert!(removed.is_empty() && done.unwrap_err().to_string().contains("code 9109"));
    assert!(left_behind(&dirs).is_some(), "a login that may not look says nothing of the list");
    let (removed, done) = remove_all(&config(&fake, list()), &dirs, false).await;
    done.unwrap();
    let gone = CloudflareRemoval { place: "list bad (installation me)".to_owned(), entries: 0, is_gone: true };
    assert_eq!((removed, left_behind(&dirs)), (vec![gone], None));
}

#[tokio::test]
async fn a_place_that_refuses_hides_nothing_of_what_was_removed_elsewhere() {
    let rule = |n: usize| {
        json!({"whose": zone(n), "target": "ip", "value": "203.0.113.9", "mode": "block",
        "notes": "portcullis:me:r"})
    };
    let fake = Fake::start(json!({"rules": [rule(0), rule(1)], "items": [
        {"list": LIST, "ip": "203.0.113.9", "comment": "portcullis:me:r"},
    ], "settings": {"sealed": [LIST]}}))
    .await;
    let dir = tempfile::tempdir().unwrap();
    let dirs = [dir.path().to_owned()];
    super::places::write(dir.path(), &super::places::Place::all("me", &list())).unwrap();
    let (removed, done) = remove_all(&config(&fake, zones()), &dirs, false).await;
    let expected = ZONES.map(|zone| CloudflareRemoval {
        place: format!("zone {zone} (installation me)"),
        entries: 1,
        is_gone: false,
    });
    assert_eq!(removed, expected);
    let error = done.unwrap_err().to_string();
    assert!(error.starts_with("list bad (installation me): Cloudflare refuses (HTTP 403"), "{error}");
    assert!(error.contains("if it is gone there, stop this host's service and take {"), "{error}");
    assert!(left_behind(&dirs).is_some(), "what is left is not forgotten");
}

#[tokio::test]
async fn without_a_name_nothing_is_said_to_be_removed() {
    let fake = Fake::start(json!({})).await;
    let dir = tempfile::tempdir().unwrap();
    let config = CloudflareConfig { installation: None, ..config(&fake, Scope::User) };
    let error = remove_all(&config, &[dir.path().to_owned()], false).await.1.unwrap_err();
    assert!(error.to_string().contains("set enforce.cloudflare.installation"), "{error}");
}

#[tokio::test]
async fn on_one_host_alone_its_own_pause_lifts_everything() {
    let fake = Fake::start(json!({})).await;
    let mut host = Host::new();
    host.ban(&["203.0.113.9"]);
    host.start(&config(&fake, Scope::User));
    until(&fake, "the ban", |state| has(state, "user", &["203.0.113.9"])).await;
    host.pause.send_replace(Some("by a file".to_owned()));
    until(&fake, "the pause", |state| has(state, "user", &[])).await;
    host.pause.send_replace(None);
    until(&fake, "the ban again", |state| has(state, "user", &["203.0.113.9"])).await;
    host.stop().await;
}

#[tokio::test]
async fn a_dry_run_changes_nothing_and_says_what_it_would_do() {
    let fake = Fake::start(strangers()).await;
    let mut host = Host::new();
    host.dry_run = true;
    host.ban(&["203.0.113.9", "203.0.113.10"]);
    let config = CloudflareConfig { installation: None, ..config(&fake, Scope::Zones(vec![ZONES[0].to_owned()])) };
    host.start(&config);
    let says = |host: &Host, text: &str| host.said().0.detail.iter().any(|detail| detail.contains(text));
    let would = "dry run: nothing is changed; 2 to add, 0 to remove";
    until(&fake, "it is said", |_| says(&host, would)).await;
    assert!(says(&host, "no installation yet"), "none is made up: {:?}", host.said());
    assert_eq!(std::fs::read_dir(host.dir.path()).unwrap().count(), 0);
    host.kill().await;
    // That of the service is known by what the service keeps.
    std::fs::write(host.dir.path().join("installation"), "you\n").unwrap();
    host.start(&config);
    let would = "dry run: nothing is changed; 2 to add, 1 to remove";
    until(&fake, "it is said", |_| says(&host, would) && says(&host, "installation you")).await;
    assert_eq!(ours(&fake.state().await).get(&zone(0)), None);
    host.stop().await;
}
