//! The bus against a real nats-server: `NATS_SERVER` names it, else it is looked for in the PATH.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is how a test fails")]

mod feed;
mod login;
mod nodes;
mod raw;
mod server;

use std::path::Path;
use std::time::Duration;

use proto::ban::{Ban, BanRecord, Evidence, Origin};
use proto::bus::config::NatsConfig;
use proto::bus::memory::BanBucket;
use proto::bus::nats::commit::{Change, CommitError, Value, commit, put_out, read_head, read_out};
use proto::bus::nats::events::{clear_out, clear_outbox, publish_event};
use proto::bus::nats::follow::{Feed, Followed, Start, fetch};
use proto::bus::nats::lease::{Holder, LEASE_INTERVAL, Lease};
use proto::bus::nats::replica::{Copies, ReplicaState};
use proto::bus::nats::state::follow_state;
use proto::bus::nats::{BusError, Connection, access, replica, streams};
use proto::bus::publish::{Publish, PublishError};
use proto::envelope::CloudEvent;
use proto::head::{Head, Mark, VERSION};
use proto::net::Target;
use proto::shutdown::Shutdown;
use proto::time::{Clock, Timestamp};

use server::Server;

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(30);

fn head(epoch: u64, commit: u64, bans: u64, changes: u64) -> Head {
    let mark = Mark { epoch, commit };
    Head { version: VERSION, bucket: "b".to_owned(), mark, bans, changes, ..Head::default() }
}

fn target(n: u8) -> Target {
    Target::host([192, 0, 2, n].into())
}

/// A ban of an hour.
fn ban(n: u8) -> Change {
    ban_for(n, Duration::from_secs(3600))
}

fn ban_for(n: u8, length: Duration) -> Change {
    let ban = Ban {
        target: target(n),
        rule: "r".to_owned(),
        origin: Origin::Detect,
        ban_count: 1,
        ban_seconds: Some(length.as_secs()),
        banned_at: Clock::system().now(),
        expires_at: Some(Clock::system().now().saturating_add(length)),
        reason: String::new(),
        evidence: Evidence::default(),
    };
    let record = BanRecord { target: target(n), bans: vec![ban] };
    Change { key: format!("ban.192.0.2.{n}"), value: Value::Put(serde_json::to_vec(&record).unwrap()) }
}

fn unban(n: u8) -> Change {
    Change { key: format!("ban.192.0.2.{n}"), value: Value::Delete(Some(Duration::from_secs(60))) }
}

async fn write(connection: &Connection, head: &Head, changes: &[Change], expected: u64) -> Result<u64, CommitError> {
    let id = format!("{}-{}-{expected}", head.mark.epoch, head.mark.commit);
    commit(connection, &id, serde_json::to_vec(head).unwrap(), changes, expected).await
}

async fn next(feed: &mut Feed) -> Result<Followed, BusError> {
    tokio::time::timeout(PATIENCE, feed.next()).await.expect("something comes")
}

async fn next_entry(feed: &mut Feed) -> (String, u64) {
    loop {
        if let Followed::Entry(entry) = next(feed).await.unwrap() {
            return (entry.subject.rsplit_once("bans.").unwrap().1.to_owned(), entry.sequence);
        }
    }
}

async fn wait_until(what: &str, mut look: impl FnMut() -> bool) {
    for _ in 0..PATIENCE.as_millis() / 10 {
        if look() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what}: not within {PATIENCE:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_made_once_and_foreign_ones_are_refused() {
    let server = Server::start();
    let connection = server.bus().await;
    streams::ensure(&connection, &server.config()).await.unwrap();
    let resized = NatsConfig { access_max_bytes: 5 << 20, ..server.config() };
    streams::ensure(&connection, &resized).await.unwrap();
    let info = server.api("STREAM.INFO.PORTCULLIS_ACCESS", serde_json::json!({})).await;
    assert_eq!(info["config"]["max_bytes"], 5 << 20, "limits follow the configuration");

    server.api("STREAM.DELETE.KV_portcullis_bans", serde_json::json!({})).await;
    let foreign = serde_json::json!({"name": "KV_portcullis_bans", "subjects": ["$KV.portcullis_bans.>"]});
    server.api("STREAM.CREATE.KV_portcullis_bans", foreign).await;
    let error = streams::ensure(&connection, &server.config()).await.unwrap_err().to_string();
    for part in ["KV_portcullis_bans", "allow_atomic is false", "republish is none", "max_msgs_per_subject is -1"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_little_room_is_told_what_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("nats.conf");
    std::fs::write(&file, "jetstream { max_file: 64MB }").unwrap();
    let server = Server::start_with(dir, Some(file));
    let connection = server.connect().await;
    let error = streams::ensure(&connection, &server.config()).await.unwrap_err();
    let text = error.to_string();
    for part in ["PORTCULLIS_ACCESS", "1024 MiB", "bus.access_max_bytes"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let smaller = NatsConfig { access_max_bytes: 16 << 20, ..server.config() };
    streams::ensure(&connection, &smaller).await.unwrap();
    let larger = NatsConfig { access_max_bytes: 128 << 20, ..server.config() };
    let text = streams::ensure(&connection, &larger).await.unwrap_err().to_string();
    assert!(text.contains("bus.access_max_bytes"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deposed_detectors_commit_is_refused_whole() {
    let server = Server::start();
    let connection = server.bus().await;
    let first = write(&connection, &head(1, 1, 1, 1), &[ban(1)], 0).await.unwrap();
    // A successor takes over; the former has not noticed and bans somebody whom its successor never touched.
    let second = write(&connection, &head(2, 2, 1, 0), &[], first).await.unwrap();
    let deposed = write(&connection, &head(1, 2, 2, 1), &[ban(2)], first).await;
    assert_eq!(deposed, Err(CommitError::Fenced));
    let (at, found) = read_head(&connection).await.unwrap().unwrap();
    assert_eq!((at, found), (second, head(2, 2, 1, 0)));
    let keys = fetch(&connection, "KV_portcullis_bans", "$KV.portcullis_bans.>", Start::Sequence(1)).await.unwrap();
    let keys: Vec<&str> = keys.0.iter().map(|entry| entry.subject.rsplit_once("bans.").unwrap().1).collect();
    assert_eq!(keys, ["ban.192.0.2.1", "detect"], "nothing of a refused commit is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_of_a_thousand_messages_is_stored_and_a_larger_one_is_not() {
    let server = Server::start();
    let connection = server.bus().await;
    let out = |n: u64| Change { key: format!("out.{n}"), value: Value::Put(b"{}".to_vec()) };
    let changes: Vec<Change> = (0..999).map(out).collect();
    let at = write(&connection, &head(1, 1, 0, 999), &changes, 0).await.unwrap();
    assert_eq!(at, 1, "the head comes first");
    let more: Vec<Change> = (0..1000).map(out).collect();
    let error = write(&connection, &head(1, 2, 0, 1000), &more, at).await.unwrap_err();
    assert!(matches!(error, CommitError::Refused(_)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_has_expired_can_be_taken_and_expires_again() {
    let server = Server::start();
    let connection = server.bus().await;
    let holder = |node: &str| Holder { node: node.to_owned(), instance: "1".to_owned() };
    let lease = |node: &str| Lease::new(&connection, connection.subjects().lease_bucket(), "detect", holder(node));
    let mut first = lease("a");
    assert!(first.keep().await.unwrap());
    assert!(first.keep().await.unwrap(), "renewed");
    let mut waits = lease("b");
    assert!(!waits.keep().await.unwrap());
    assert_eq!(waits.holder(), Some(&holder("a")));
    for taker in ["b", "c", "d"] {
        // Whoever held it says nothing any more.
        let mut next = lease(taker);
        let taken = async {
            while !next.keep().await.unwrap() {
                tokio::time::sleep(LEASE_INTERVAL).await;
            }
        };
        tokio::time::timeout(PATIENCE, taken).await.expect("an expired lease can be taken");
        assert!(!lease("e").keep().await.unwrap(), "it is held by {taker}");
        // The server itself ends it, whoever looks: the key of an ended lease is gone.
        let gone = async {
            let get = serde_json::json!({"last_by_subj": "$KV.portcullis_lease.detect"});
            while server.api("STREAM.MSG.GET.KV_portcullis_lease", get.clone()).await["error"].is_null() {
                tokio::time::sleep(LEASE_INTERVAL).await;
            }
        };
        tokio::time::timeout(PATIENCE, gone).await.expect("a lease ends by itself");
    }
    let mut back = lease("f");
    assert!(back.keep().await.unwrap());
    back.give_back().await.unwrap();
    assert!(lease("g").keep().await.unwrap(), "one that was given back is taken at once");
    assert!(!first.keep().await.unwrap(), "the first holder does not get it back by renewing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_misses_and_repeats_nothing_through_a_killed_server() {
    let mut server = Server::start();
    let connection = server.bus().await;
    let mut at = write(&connection, &head(1, 1, 1, 1), &[ban(1)], 0).await.unwrap();
    let mut feed = follow_state(&connection).await.unwrap();
    assert_eq!(next_entry(&mut feed).await, ("detect".to_owned(), 1));
    assert_eq!(next_entry(&mut feed).await, ("ban.192.0.2.1".to_owned(), 2));
    assert_eq!(next(&mut feed).await, Ok(Followed::CaughtUp));
    let mut sequence = 2;
    for n in 2..12 {
        if n % 3 == 0 {
            server.kill_and_restart();
        }
        // Another's writes, so that the follower's connection is not needed.
        let other = server.connect().await;
        at = loop {
            match write(&other, &head(1, n.into(), n.into(), 1), &[ban(n)], at).await {
                Ok(at) => break at,
                Err(CommitError::Fenced) => panic!("nobody else writes"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        for key in ["detect".to_owned(), format!("ban.192.0.2.{n}")] {
            sequence += 1;
            assert_eq!(next_entry(&mut feed).await, (key, sequence));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_notices_that_its_stream_was_made_anew() {
    let server = Server::start();
    let connection = server.bus().await;
    let mut at = 0;
    for n in 1..6 {
        at = write(&connection, &head(1, n, 0, 0), &[], at).await.unwrap();
    }
    let mut feed = follow_state(&connection).await.unwrap();
    while next(&mut feed).await != Ok(Followed::CaughtUp) {}
    server.api("STREAM.DELETE.KV_portcullis_bans", serde_json::json!({})).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    streams::ensure(&connection, &server.config()).await.unwrap();
    write(&connection, &head(1, 1, 0, 0), &[], 0).await.unwrap();
    let error = loop {
        match next(&mut feed).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, BusError::Recreated { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_lost_on_its_way_is_fetched_although_nothing_follows() {
    let server = Server::start();
    let connection = server.bus().await;
    let dir = tempfile::tempdir().unwrap();
    let host = Host::start(&connection, dir.path());
    let at = write(&connection, &head(1, 1, 1, 1), &[ban(1)], 0).await.unwrap();
    host.wait_for(&[target(1)]).await;
    // From now on only heads are published again, as if all else were lost.
    let info = server.api("STREAM.INFO.KV_portcullis_bans", serde_json::json!({})).await;
    let mut config = info["config"].clone();
    config["republish"]["src"] = "$KV.portcullis_bans.detect".into();
    config["republish"]["dest"] =
        config["republish"]["dest"].as_str().unwrap().replace('>', "$KV.portcullis_bans.detect").into();
    let updated = server.api("STREAM.UPDATE.KV_portcullis_bans", config).await;
    assert!(updated["error"].is_null(), "{updated}");
    let at = write(&connection, &head(1, 2, 2, 1), &[ban(2)], at).await.unwrap();
    host.wait_for(&[target(1), target(2)]).await;
    write(&connection, &head(1, 3, 1, 1), &[unban(1)], at).await.unwrap();
    host.wait_for(&[target(2)]).await;
    host.stop().await;
}

/// A host that follows the ban set.
struct Host {
    bans: BanBucket,
    state: ReplicaState,
    /// How many bans of a former run it keeps that no set shows.
    kept: tokio::sync::watch::Sender<u64>,
    shutdown: Shutdown,
    task: tokio::task::JoinHandle<Result<(), std::convert::Infallible>>,
}

impl Host {
    fn start(connection: &Connection, dir: &Path) -> Self {
        Self::start_with(connection, dir, 0)
    }

    fn start_with(connection: &Connection, dir: &Path, kept: u64) -> Self {
        let bans = proto::bus::memory::Bus::new().bans;
        let (state, shutdown) = (ReplicaState::default(), Shutdown::new());
        let kept = tokio::sync::watch::Sender::new(kept);
        let copies = Copies { bans: Some(bans.clone()), kept: Some(kept.subscribe()), ..Copies::default() };
        let running = replica::run(connection.clone(), copies, Some(dir.to_owned()), state.clone(), shutdown.clone());
        Self { bans, state, kept, shutdown, task: tokio::spawn(running) }
    }

    async fn stop(self) {
        self.shutdown.begin();
        self.task.await.unwrap().unwrap();
    }

    fn targets(&self) -> Vec<Target> {
        self.bans.all().iter().map(|record| record.target).collect()
    }

    async fn wait_for(&self, targets: &[Target]) {
        wait_until(&format!("{targets:?} are banned"), || self.targets() == targets).await;
    }

    async fn wait_for_problem(&self, part: &str) {
        let has = || self.state.get().0.is_some_and(|problem| problem.text.contains(part));
        wait_until(&format!("{part:?} is said, not {:?}", self.state.get().0), has).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_that_is_not_whole_frees_nobody() {
    let server = Server::start();
    let connection = server.bus().await;
    let dir = tempfile::tempdir().unwrap();
    let host = Host::start(&connection, dir.path());
    host.wait_for_problem("no detector has written").await;
    let at = write(&connection, &head(1, 1, 2, 2), &[ban(1), ban(2)], 0).await.unwrap();
    host.wait_for(&[target(1), target(2)]).await;
    let update = host.bans.since(0).unwrap();
    assert!(update.snapshot, "a whole set may free who is not in it");
    let at = write(&connection, &head(1, 2, 1, 1), &[unban(1)], at).await.unwrap();
    host.wait_for(&[target(2)]).await;
    host.stop().await;

    // Somebody purges a key: the set is smaller than its head counts.
    streams::purge(&connection, "KV_portcullis_bans", Some("$KV.portcullis_bans.ban.>"), at + 100).await.unwrap();
    let host = Host::start(&connection, dir.path());
    host.wait_for_problem("holds 0 targets where detect counts 1").await;
    assert_eq!(host.bans.since(0), None, "nothing is published that could free anybody");
    write(&connection, &head(1, 3, 2, 1), &[ban(3)], at).await.unwrap();
    host.wait_for(&[target(3)]).await;
    assert!(!host.bans.since(0).unwrap().snapshot, "new bans are added, nobody is freed");
    host.stop().await;

    // The bucket is lost, and a detector begins with an empty one.
    server.api("STREAM.DELETE.KV_portcullis_bans", serde_json::json!({})).await;
    streams::ensure(&connection, &server.config()).await.unwrap();
    let fresh = Head { bucket: "another".to_owned(), ..head(1, 1, 1, 1) };
    write(&connection, &fresh, &[ban(4)], 0).await.unwrap();
    let host = Host::start_with(&connection, dir.path(), 1);
    host.wait_for_problem("deleted and made anew").await;
    host.wait_for(&[target(4)]).await;
    assert!(!host.bans.since(0).unwrap().snapshot);
    // The last of the bans that it kept has ended: there is nothing to lose any more.
    host.kept.send_replace(0);
    wait_until("the new set is taken", || host.bans.since(0).is_some_and(|update| update.snapshot)).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_made_anew_under_a_running_host_frees_nobody_now_or_after_a_restart() {
    let server = Server::start();
    let connection = server.bus().await;
    let dir = tempfile::tempdir().unwrap();
    let host = Host::start(&connection, dir.path());
    let mut at = write(&connection, &head(5, 1, 1, 1), &[ban(1)], 0).await.unwrap();
    for n in 2..5 {
        at = write(&connection, &head(5, n, 1, 0), &[], at).await.unwrap();
    }
    host.wait_for(&[target(1)]).await;
    server.api("STREAM.DELETE.KV_portcullis_bans", serde_json::json!({})).await;
    streams::ensure(&connection, &server.config()).await.unwrap();
    // It has as many messages as the former, so that numbers alone show nothing.
    let mut at = 0;
    let another = |commit, bans, changes| Head { bucket: "another".to_owned(), ..head(1, commit, bans, changes) };
    for n in 1..9 {
        at = write(&connection, &another(n, 0, 0), &[], at).await.unwrap();
    }
    host.wait_for_problem("deleted and made anew").await;
    assert_eq!(host.targets(), [target(1)]);
    // Its bans are put in force, and free nobody sooner, neither by what they say nor by their end.
    let brief = ban_for(1, Duration::from_millis(500));
    at = write(&connection, &another(9, 3, 3), &[brief, ban(2), ban(3)], at).await.unwrap();
    host.wait_for(&[target(1), target(2), target(3)]).await;
    at = write(&connection, &another(10, 2, 2), &[unban(1), ban(3)], at).await.unwrap();
    // Unless somebody lifts them.
    write(&connection, &another(11, 1, 1), &[unban(2)], at).await.unwrap();
    host.wait_for(&[target(1), target(3)]).await;
    let left = host.bans.all()[0].end().since(Clock::system().now());
    assert!(left > Duration::from_secs(3000), "{left:?}");
    host.stop().await;
    let host = Host::start_with(&connection, dir.path(), 1);
    host.wait_for_problem("deleted and made anew").await;
    assert!(host.bans.since(0).is_none_or(|update| !update.snapshot));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_made_anew_is_taken_once_all_it_lacks_have_ended() {
    let server = Server::start();
    let connection = server.bus().await;
    let dir = tempfile::tempdir().unwrap();
    let host = Host::start(&connection, dir.path());
    write(&connection, &head(5, 1, 1, 1), &[ban_for(1, Duration::from_secs(5))], 0).await.unwrap();
    host.wait_for(&[target(1)]).await;
    server.api("STREAM.DELETE.KV_portcullis_bans", serde_json::json!({})).await;
    streams::ensure(&connection, &server.config()).await.unwrap();
    let another = |commit, changes| Head { bucket: "another".to_owned(), ..head(1, commit, 1, changes) };
    let at = write(&connection, &another(1, 1), &[ban(2)], 0).await.unwrap();
    write(&connection, &another(2, 0), &[], at).await.unwrap();
    host.wait_for(&[target(1), target(2)]).await;
    host.wait_for(&[target(2)]).await;
    wait_until("nothing is wrong any more", || host.state.get().0.is_none()).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_set_than_was_applied_frees_nobody() {
    let server = Server::start();
    let connection = server.bus().await;
    let dir = tempfile::tempdir().unwrap();
    let host = Host::start(&connection, dir.path());
    let at = write(&connection, &head(5, 7, 1, 1), &[ban(1)], 0).await.unwrap();
    host.wait_for(&[target(1)]).await;
    host.stop().await;
    // As if the bucket had been restored from a backup.
    write(&connection, &head(4, 9, 0, 1), &[Change { key: "ban.192.0.2.1".into(), value: Value::Delete(None) }], at)
        .await
        .unwrap();
    let host = Host::start_with(&connection, dir.path(), 1);
    host.wait_for_problem("older than what this host has applied").await;
    assert!(host.bans.since(0).is_none_or(|update| !update.snapshot));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_stored_once_however_often_it_is_sent_and_a_full_stream_says_so() {
    let server = Server::start();
    let connection = server.connect().await;
    let small = NatsConfig { access_max_bytes: 1 << 20, ..server.config() };
    streams::ensure(&connection, &small).await.unwrap();
    let publisher = access::AccessPublisher::new(&connection, "edge-1");
    for _ in 0..3 {
        publisher.publish("edge-1-x-1", b"batch".to_vec()).await.unwrap();
    }
    let (stored, pending) =
        fetch(&connection, "PORTCULLIS_ACCESS", "portcullis.access.v1.*", Start::Sequence(1)).await.unwrap();
    assert_eq!((stored.len(), pending), (1, 0));
    let mut full = Ok(());
    for n in 0..20 {
        full = publisher.publish(&format!("edge-1-y-{n}"), vec![7; 100_000]).await;
        if full.is_err() {
            break;
        }
    }
    assert_eq!(full, Err(PublishError::Full));
    streams::purge(&connection, "PORTCULLIS_ACCESS", None, 100).await.unwrap();
    publisher.publish("edge-1-z", vec![7; 100_000]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_publisher_writes_into_the_servers_headers_is_not_believed() {
    let server = Server::start();
    let connection = server.bus().await;
    let mut feed = access::batches(&connection, Start::Sequence(1)).await.unwrap();
    assert_eq!(next(&mut feed).await, Ok(Followed::CaughtUp));
    let forger = async_nats::connect(format!("nats://127.0.0.1:{}", server.port)).await.unwrap();
    let forged = [
        ("Nats-Sequence", "1099511627776"),
        ("Nats-Subject", "portcullis.access.v1.edge-2"),
        ("Nats-Time-Stamp", "2099-01-01T00:00:00Z"),
    ];
    let mut headers = async_nats::HeaderMap::new();
    forged.into_iter().for_each(|(name, value)| headers.insert(name, value));
    forger.publish_with_headers("portcullis.access.v1.edge-1", headers, "x".into()).await.unwrap();
    forger.flush().await.unwrap();
    // As it comes, and as it is fetched.
    let fetched = access::batches(&connection, Start::Sequence(1)).await.unwrap();
    for mut feed in [feed, fetched] {
        let entry = loop {
            if let Followed::Entry(entry) = next(&mut feed).await.unwrap() {
                break entry;
            }
        };
        assert_eq!((entry.sequence, entry.subject.as_str()), (1, "portcullis.access.v1.edge-1"));
        assert!(entry.time < Timestamp::parse("2090-01-01T00:00:00Z").unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_leave_the_outbox_once_they_are_published() {
    let server = Server::start();
    let connection = server.bus().await;
    let event = |n: u64| CloudEvent::of_alarm("n", "test", format!("{n}"), Timestamp::from_secs(n as i64));
    let out = |n: u64| {
        let events = [10 * n, 10 * n + 1].map(|n| serde_json::to_vec(&event(n)).unwrap());
        put_out(n, events.iter().map(Vec::as_slice))
    };
    let at = write(&connection, &head(1, 1, 0, 2), &[out(1), out(0)], 0).await.unwrap();
    let last = write(&connection, &head(1, 2, 0, 2), &[out(2), out(3)], at).await.unwrap();
    let read = async |number: u64| read_out(&connection, number).await.unwrap();
    for number in 0..3 {
        let found = read(number).await.unwrap().events;
        assert_eq!(found, [Some(event(10 * number)), Some(event(10 * number + 1))]);
        for event in found.into_iter().flatten() {
            publish_event(&connection, &event).await.unwrap();
            publish_event(&connection, &event).await.unwrap();
        }
    }
    clear_out(&connection, 0, at + 2).await.unwrap();
    assert!(read(0).await.is_none());
    assert_eq!(read(1).await.unwrap().at, at + 1, "what stands before it stays");
    clear_outbox(&connection, last + 1).await.unwrap();
    assert!(read(1).await.is_none() && read(2).await.is_none());
    assert_eq!(read(3).await.unwrap().at, last + 2, "what came later stays");
    let filter = "portcullis.events.v1.>";
    let (published, _) = fetch(&connection, "PORTCULLIS_EVENTS", filter, Start::Sequence(1)).await.unwrap();
    assert_eq!(published.len(), 6, "a repetition is stored once");
    let unreadable = put_out(4, [b"{}".as_slice(), &serde_json::to_vec(&event(5)).unwrap()].into_iter());
    let no_list = Change { key: "out.5".into(), value: Value::Put(b"x".into()) };
    write(&connection, &head(1, 3, 0, 2), &[unreadable, no_list], last).await.unwrap();
    assert_eq!(read(4).await.unwrap().events, [None, Some(event(5))], "one that is unreadable hides no other");
    assert_eq!(read(5).await.unwrap().events, [None]);
}
