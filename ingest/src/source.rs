//! Where lines come from. One file a kind of source.

pub(crate) mod batch;
pub mod checkpoint;
mod discover;
pub mod file;
pub mod http;
pub(crate) mod intake;
pub(crate) mod lane;
pub mod limit;
mod listen;
pub(crate) mod nats;
pub mod otlp;
pub(crate) mod secrets;
pub(crate) mod skew;
pub(crate) mod stdin;
pub mod syslog;
pub mod tail;
mod watch;
