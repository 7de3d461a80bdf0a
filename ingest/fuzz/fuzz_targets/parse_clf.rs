//! Any bytes as a line of the common log format, behind a proxy and not.

#![no_main]

use std::sync::Arc;

use ingest::parse::{Format, Parser, escape_sample};
use libfuzzer_sys::fuzz_target;
use proto::client_ip::ClientIpPolicy;

fuzz_target!(|line: &[u8]| {
    for clf_behind_proxy in [false, true] {
        let policy = Arc::new(ClientIpPolicy { clf_behind_proxy, ..ClientIpPolicy::default() });
        let mut parser = Parser::new(Format::Clf, 1 << 16, policy, Arc::default());
        parser.with_event(line, 0, |event| assert!(event.time.is_some() && event.status <= 999));
    }
    assert!(escape_sample(line).chars().count() <= 200);
});
