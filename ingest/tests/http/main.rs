//! Sources of requests, served by the role on a local port.
//!
//! A batch that arrives here counts as safe once the test says so, as with detect and the bus.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "../inputs/certificates.rs"]
mod certificates;
mod grpc;
#[path = "../inputs/mod.rs"]
mod inputs;
mod requests;
mod role;
mod tls;
