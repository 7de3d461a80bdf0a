//! Where lines come from. One file a kind of source; this version has `file`.

pub(crate) mod batch;
pub mod checkpoint;
mod discover;
pub mod file;
pub mod tail;
mod watch;
