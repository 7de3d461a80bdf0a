//! Duties that one host at a time has, and events that it tells.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proto::bus::config::{Login, NatsConfig};
use proto::bus::duty::{Duties, Duty};
use proto::bus::feed::{EventFeed, EventSource, Fed};
use proto::bus::nats::events::publish_event;
use proto::bus::nats::lease::{Holder, LEASE_TTL};
use proto::bus::nats::told::TellError;
use proto::bus::nats::{Connection, streams};
use proto::envelope::{CloudEvent, Data};
use proto::time::{Clock, Timestamp};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};

use crate::PATIENCE;
use crate::login::write;
use crate::server::Server;

async fn publish(connection: &Connection, text: &str) {
    let seconds = text.bytes().map(i64::from).sum();
    let event = CloudEvent::of_alarm("n", "test", text.to_owned(), Timestamp::from_secs(seconds));
    publish_event(connection, &event).await.unwrap();
}

async fn next(feed: &mut EventFeed) -> Fed {
    tokio::time::timeout(PATIENCE, feed.next()).await.expect("something comes")
}

async fn begun(feed: &mut EventFeed) -> bool {
    match next(feed).await {
        Fed::Begun { was_running } => was_running,
        other => panic!("{other:?}"),
    }
}

/// Number and text of the next event.
async fn event(feed: &mut EventFeed) -> (u64, String) {
    match next(feed).await {
        Fed::Event { at, event } => match &event.data {
            Data::Alarm(alarm) => (at, alarm.text.clone()),
            Data::Ban(_) => panic!("{event:?}"),
        },
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_teller_begins_with_now_and_each_successor_where_the_last_left_off() {
    let server = Server::start();
    let connection = server.bus().await;
    publish(&connection, "of old").await;
    let source = EventSource::shared(&connection);
    let mut first = source.follow("telegram", false);
    assert!(!begun(&mut first).await);
    for text in ["a", "b", "c"] {
        publish(&connection, text).await;
    }
    // That the service runs says nothing of events.
    first.tell(0, true).await.unwrap();
    let (a, text) = event(&mut first).await;
    assert_eq!(text, "a");
    assert_eq!(event(&mut first).await.1, "b");
    first.tell(a, true).await.unwrap();
    // A repetition of what was written already is nothing new.
    first.tell(a, true).await.unwrap();

    let mut second = source.follow("telegram", false);
    assert!(begun(&mut second).await, "it was running");
    let (b, text) = event(&mut second).await;
    assert_eq!(text, "b", "taken by the first, and not told");
    second.tell(b, true).await.unwrap();
    assert!(matches!(first.tell(b + 1, true).await, Err(TellError::Deposed)));
    first.begin_again();
    begun(&mut first).await;
    assert_eq!(event(&mut first).await.1, "c");

    let mut other = source.follow("webhook-x", false);
    begun(&mut other).await;
    publish(&connection, "d").await;
    assert_eq!(event(&mut other).await.1, "d", "each name tells for itself");
    assert_eq!(event(&mut first).await.1, "d");
    let mut watcher = source.follow("telegram", true);
    begun(&mut watcher).await;
    publish(&connection, "e").await;
    let (e, text) = event(&mut watcher).await;
    assert_eq!(text, "e");
    watcher.tell(e, true).await.unwrap();
    let mut third = source.follow("telegram", false);
    begun(&mut third).await;
    assert_eq!(event(&mut third).await.1, "c", "who only watches moves nothing");
}

/// A way to the server on which answers can get lost. Returns its address.
async fn lossy_way(port: u16, loses: Arc<AtomicBool>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let (mut near_in, mut near_out) = near.into_split();
            let far = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let (mut far_in, mut far_out) = far.into_split();
            tokio::spawn(async move { copy(&mut near_in, &mut far_out).await });
            let loses = loses.clone();
            tokio::spawn(async move {
                let mut buffer = vec![0; 64 << 10];
                while let Ok(bytes @ 1..) = far_in.read(&mut buffer).await {
                    if !loses.load(Ordering::Relaxed) && near_out.write_all(&buffer[..bytes]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_whose_answer_was_lost_deposes_nobody() {
    let server = Server::start();
    let direct = server.bus().await;
    let loses = Arc::new(AtomicBool::new(false));
    let config = NatsConfig::new(&lossy_way(server.port, loses.clone()).await);
    let connection = Connection::open(&config, "test", "lossy", Clock::steered()).await.unwrap();
    connection.ready().await.unwrap();
    let mut feed = EventSource::shared(&connection).follow("telegram", false);
    begun(&mut feed).await;
    for text in ["a", "b", "c"] {
        publish(&direct, text).await;
    }
    let (a, b) = (event(&mut feed).await.0, event(&mut feed).await.0);
    loses.store(true, Ordering::Relaxed);
    assert!(matches!(feed.tell(a, true).await, Err(TellError::Bus(_))));
    loses.store(false, Ordering::Relaxed);
    // Another message was delivered meanwhile.
    let told = async {
        while let Err(error) = feed.tell(b, true).await {
            assert!(matches!(error, TellError::Bus(_)), "{error}");
        }
    };
    tokio::time::timeout(PATIENCE, told).await.expect("the way is whole again");
    let mut successor = EventSource::shared(&direct).follow("telegram", false);
    assert!(begun(&mut successor).await);
    assert_eq!(event(&mut successor).await.1, "c");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_rights_and_values_are_wrong_is_said_once_it_lasts() {
    let dir = tempfile::tempdir().unwrap();
    let text = r#"jetstream: enabled
        no_auth_user: all
        authorization { users: [ { user: all, password: all }, { user: few, password: few, permissions: {
            publish: ["$JS.API.STREAM.MSG.GET.KV_portcullis_duty", "$JS.API.DIRECT.GET.PORTCULLIS_EVENTS"]
            subscribe: ["_INBOX.>", "portcullis.events.>"] } } ] }"#;
    let config = write(dir.path(), "nats.conf", text);
    let password = write(dir.path(), "few", "few");
    let server = Server::start_with(dir, Some(config));
    let all = server.bus().await;
    begun(&mut EventSource::shared(&all).follow("telegram", false)).await;
    let raw = async_nats::connect(format!("nats://127.0.0.1:{}", server.port)).await.unwrap();
    raw.request("$KV.portcullis_duty.told.webhook-x", "?".into()).await.unwrap();

    let clock = Clock::manual(Timestamp::from_secs(1));
    let config = NatsConfig { login: Login::Password("few".to_owned(), password), ..server.config() };
    let connection = Connection::open(&config, "test", "few", clock.clone()).await.unwrap();
    connection.ready().await.unwrap();
    let duty = Duties::shared(&connection, holder("edge-1")).take("telegram");
    let source = EventSource::shared(&connection);
    let (mut teller, mut garbled) = (source.follow("telegram", false), source.follow("webhook-x", false));
    begun(&mut teller).await;
    assert_eq!(garbled.try_next(), None);
    let problems = async {
        let mut hours = 0;
        loop {
            hours += 1;
            clock.set(Timestamp::from_secs(3600 * hours));
            // Events are looked for until it is refused to note how far is told.
            tokio::select! {
                told = teller.tell(0, true) => assert!(matches!(told, Err(TellError::Bus(_)))),
                came = garbled.next() => panic!("came although nothing can be understood: {came:?}"),
            }
            if let (Some(duty), Some(teller), Some(garbled)) = (duty.problem(), teller.problem(), garbled.problem()) {
                break [duty.text, teller.text, garbled.text];
            }
        }
    };
    let problems = tokio::time::timeout(PATIENCE, problems).await.expect("they last");
    let rights = "(does this user of NATS have the rights that deploy/nats gives enforcers?)";
    let no_answer = |key: &str| format!("no answer from NATS to $KV.portcullis_duty.{key} {rights}");
    let expected = [
        format!("it cannot be seen which host does this: {}", no_answer("enforce.telegram")),
        format!("it cannot be noted how far is told: {}", no_answer("told.telegram")),
        "events cannot be read: cannot understand the answer to how far webhook-x has told".to_owned(),
    ];
    assert_eq!(problems, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_events_come_whole_and_in_order_through_a_server_that_is_killed() {
    let mut server = Server::start();
    let connection = server.bus().await;
    let mut feed = EventSource::shared(&connection).follow("telegram", false);
    begun(&mut feed).await;
    let publishing = connection.clone();
    let texts: Vec<String> = (0..1500).map(|n| "x".repeat(n)).collect();
    let expected = texts.clone();
    let published = tokio::spawn(async move {
        for text in texts {
            let seconds = i64::try_from(text.len()).unwrap();
            let event = CloudEvent::of_alarm("n", "test", text, Timestamp::from_secs(seconds));
            while publish_event(&publishing, &event).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    let mut newest = 0;
    for (index, text) in expected.iter().enumerate() {
        if index == 500 {
            server.kill_and_restart();
        }
        let (at, found) = event(&mut feed).await;
        assert!(at > newest && found == *text, "{index}: number {at} after {newest}");
        newest = at;
    }
    published.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_events_that_was_made_anew_is_followed_from_its_beginning() {
    let server = Server::start();
    let connection = server.bus().await;
    let mut feed = EventSource::shared(&connection).follow("telegram", false);
    begun(&mut feed).await;
    let mut told = 0;
    for text in ["a", "b", "c"] {
        publish(&connection, text).await;
        told = event(&mut feed).await.0;
    }
    feed.tell(told, true).await.unwrap();
    server.api("STREAM.DELETE.PORTCULLIS_EVENTS", serde_json::json!({})).await;
    streams::ensure(&connection, &server.config()).await.unwrap();
    // What comes right after the old could be of the old stream: so close are servers' clocks.
    let mut texts = (0..).map(|n| "n".repeat(n));
    let new = loop {
        publish(&connection, &texts.next().unwrap()).await;
        let came = tokio::time::timeout(Duration::from_millis(100), feed.next()).await;
        if let Ok(Fed::Event { at, .. }) = came {
            break at;
        }
    };
    assert!(new < 100, "counted anew: {new}");
    feed.tell(new, true).await.unwrap();
    publish(&connection, "newer").await;
    let mut successor = EventSource::shared(&connection).follow("telegram", false);
    begun(&mut successor).await;
    assert_eq!(event(&mut successor).await.0, new + 1);
}

async fn wait_for(duty: &mut Duty, is_held: bool) {
    let changed = async {
        while duty.is_held() != is_held {
            duty.changed().await;
        }
    };
    tokio::time::timeout(PATIENCE, changed).await.expect("the duty changes hands");
}

fn holder(node: &str) -> Holder {
    Holder { node: node.to_owned(), instance: "1".to_owned() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_no_server_answers_leaves_its_duty_and_takes_it_again() {
    let mut server = Server::start();
    let connection = server.bus().await;
    let mut duty = Duties::shared(&connection, holder("edge-1")).take("cloudflare");
    wait_for(&mut duty, true).await;
    // It takes connections and answers nothing.
    server.freeze(true);
    wait_for(&mut duty, false).await;
    assert_eq!(duty.holder(), None, "it may be anybody's");
    server.freeze(false);
    wait_for(&mut duty, true).await;
    server.kill();
    wait_for(&mut duty, false).await;
    server.kill_and_restart();
    wait_for(&mut duty, true).await;
}

/// On one thread nothing else runs before this test waits again: as in a process that was stopped and goes on.
#[tokio::test]
async fn a_host_that_stood_still_has_left_its_duty_before_anything_of_it_goes_on() {
    let server = Server::start();
    let clock = Clock::manual(Clock::system().now());
    // Which makes the buckets.
    server.bus().await;
    let connection = Connection::open(&server.config(), "test", "edge-1", clock.clone()).await.unwrap();
    connection.ready().await.unwrap();
    let mut duty = Duties::shared(&connection, holder("edge-1")).take("cloudflare");
    let claim = duty.claim();
    assert!(!claim.is_held());
    wait_for(&mut duty, true).await;
    assert!(claim.is_held());
    let term = duty.term();
    clock.set(clock.now().saturating_add(LEASE_TTL));
    assert!(!claim.is_held() && !duty.is_held() && duty.term().is_none(), "another may have it by now");
    let renewed = async {
        while !claim.is_held() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, renewed).await.expect("nobody else wanted it");
    tokio::time::timeout(PATIENCE, duty.changed()).await.expect("who has looked meanwhile is told");
    assert!(duty.term() > term, "{:?} after {term:?}", duty.term());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_whose_duty_was_anothers_in_between_is_told_so() {
    let server = Server::start();
    let connection = server.bus().await;
    let mut duty = Duties::shared(&connection, holder("edge-1")).take("cloudflare");
    wait_for(&mut duty, true).await;
    // What another leaves behind that has taken it, and has given it back.
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("KV-Operation", "DEL");
    let raw = async_nats::connect(format!("nats://127.0.0.1:{}", server.port)).await.unwrap();
    raw.publish_with_headers("$KV.portcullis_duty.enforce.cloudflare", headers, "".into()).await.unwrap();
    raw.flush().await.unwrap();
    wait_for(&mut duty, false).await;
    wait_for(&mut duty, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_cut_from_the_lease_gives_the_duty_to_another() {
    let server = Server::start();
    let connection = server.bus().await;
    let (one, two) = (Duties::shared(&connection, holder("edge-1")), Duties::shared(&connection, holder("edge-2")));
    let mut first = one.take("telegram");
    wait_for(&mut first, true).await;
    let mut second = two.take("telegram");
    let mut elsewhere = two.take("cloudflare");
    wait_for(&mut elsewhere, true).await;
    while second.holder().is_none() {
        second.changed().await;
    }
    assert_eq!((second.is_held(), second.holder().as_deref()), (false, Some("edge-1")));
    // Cut off without a word: its lease is no longer renewed.
    drop(first);
    wait_for(&mut second, true).await;
    assert_eq!(second.holder().as_deref(), Some("edge-2"));
    let mut back = one.take("telegram");
    second.give_back().await;
    tokio::time::timeout(LEASE_TTL, wait_for(&mut back, true)).await.expect("given back, it is taken at once");
}
