//! Any bytes as a JSON line: no panic, and an event is self-consistent.

#![no_main]

use std::sync::Arc;

use ingest::parse::{Format, Outcome, Parser};
use libfuzzer_sys::fuzz_target;
use proto::client_ip::ClientIpPolicy;
use proto::event::Interest;
use proto::net::{NamedSet, NetSet};

fuzz_target!(|line: &[u8]| {
    let trusted_proxies = NetSet::new(NamedSet::Private.nets());
    let policy = Arc::new(ClientIpPolicy { trusted_proxies, ..ClientIpPolicy::default() });
    let interest = Arc::new(Interest { headers: vec!["referer".to_owned()], ..Interest::default() });
    let mut parser = Parser::new(Format::Json, 1 << 16, policy.clone(), interest);
    let first = parser.with_event(line, 0, |event| {
        assert!(event.status <= 999 && event.origin_status <= 999);
        assert!(event.client.is_err() || !event.client.is_ok_and(|client| policy.is_trusted(client.addr)));
        format!("{event:?}")
    });
    // A parser keeps nothing of a line but its buffers.
    if !matches!(first, Outcome::Partial) {
        assert_eq!(first, parser.with_event(line, 0, |event| format!("{event:?}")));
    }
});
