//! Any bytes as lines of the common log format, behind a proxy and not, as they come.

#![no_main]

use std::sync::Arc;

use ingest::parse::{Format, Parser, escape_sample};
use libfuzzer_sys::fuzz_target;
use proto::client_ip::ClientIpPolicy;
use proto::time::Timestamp;

fuzz_target!(|text: &[u8]| {
    for clf_behind_proxy in [false, true] {
        let policy = Arc::new(ClientIpPolicy { clf_behind_proxy, ..ClientIpPolicy::default() });
        let mut parser = Parser::new(Format::Clf, 1 << 16, policy, Arc::default());
        parser.set_now(Timestamp::from_secs(1_700_000_000));
        for line in text.split(|byte| *byte == b'\n') {
            parser.with_event(line, 0, |event| assert!(event.time.is_some() && event.status <= 999));
        }
    }
    assert!(escape_sample(text).chars().count() <= 200);
});
