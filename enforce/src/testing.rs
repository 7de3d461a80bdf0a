//! What unit tests of several modules share.

use std::path::PathBuf;

use prometheus_client::registry::Registry;
use proto::ban::{Ban, BanRecord, Evidence, Origin};
use proto::bus::duty::Duties;
use proto::bus::feed::EventSource;
use proto::bus::memory::Bus;
use proto::net::{NetSet, Target};
use proto::settings::Mistakes;
use proto::shutdown::Shutdown;
use proto::time::{Clock, Timestamp};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::watch;

use crate::action::{LetGo, Surroundings};
use crate::board::Board;
use crate::metrics::EnforceMetrics;

/// A first ban by rule `r`, which ends then; `None` = never.
pub(crate) fn ban(target: Target, ends: Option<Timestamp>) -> Ban {
    Ban {
        target,
        rule: "r".to_owned(),
        origin: Origin::Detect,
        ban_count: 1,
        ban_seconds: None,
        banned_at: Timestamp::EPOCH,
        expires_at: ends,
        reason: String::new(),
        evidence: Evidence::default(),
    }
}

/// A record with one [`ban`].
pub(crate) fn record(target: Target, ends: Option<Timestamp>) -> BanRecord {
    BanRecord { target, bans: vec![ban(target, ends)] }
}

/// What `check` makes of a raw section, or the texts of its mistakes; it must be one or the other.
pub(crate) fn checked<R: DeserializeOwned, T>(
    value: Value,
    check: impl FnOnce(R, &mut Mistakes) -> Option<T>,
) -> Result<T, Vec<String>> {
    let raw: R = serde_json::from_value(value).unwrap();
    let mut mistakes = Mistakes::new();
    let checked = check(raw, &mut mistakes);
    let texts: Vec<String> = mistakes.into_sorted().iter().map(ToString::to_string).collect();
    assert_eq!(checked.is_some(), texts.is_empty(), "a refusal names its mistakes: {texts:?}");
    checked.ok_or(texts)
}

/// A host without a cluster, a directory or anything else of its own on `bus`.
pub(crate) fn surroundings(bus: &Bus) -> Surroundings {
    Surroundings {
        node: "n".into(),
        bans: bus.bans.clone(),
        lists: bus.lists.subscribe(),
        trusted_proxies: NetSet::default(),
        bus_servers: watch::channel(Vec::new()).1,
        host_pause: watch::channel(None).1,
        let_go: LetGo::default(),
        duties: Duties::alone(),
        events: EventSource::local(&bus.events, 0),
        state_dir: None,
        service_dir: PathBuf::new(),
        dry_run: false,
        clock: Clock::system(),
        board: Board::default(),
        metrics: EnforceMetrics::register(&mut Registry::default()),
        shutdown: Shutdown::new(),
    }
}
