//! What all parts of Portcullis agree on: time, addresses, events, bans, the operator API's types, and the bus.
//!
//! This crate decides nothing and knows no log format, rule or firewall. Every module but [`bus`], [`limit`], [`places`],
//! [`reload`], [`secret`], [`shutdown`], [`tls`] and the system clock in [`time`] is pure: no I/O, no clock, no hash order.

pub mod access;
pub mod api;
pub mod ban;
pub mod bus;
pub mod client_ip;
pub mod envelope;
pub mod event;
pub mod head;
pub mod limit;
pub mod net;
pub mod places;
pub mod reload;
pub mod report;
pub mod schema;
pub mod secret;
pub mod settings;
pub mod shutdown;
pub mod subject;
pub mod time;
pub mod tls;
pub mod wire;
