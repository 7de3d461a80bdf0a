//! From log files to batches of accesses.
//!
//! The only crate that knows log formats. [`pipeline::run`] is the role: it follows files through every kind of rotation
//! ([`source`]), parses their lines ([`parse`]), and hands batches to detection, each with the stretch of file that it
//! covers, so that every line counts exactly once. [`replay`] reads finished files instead, in order of event time.
//!
//! On a cluster [`uplink::run`] stands between: it sends the batches and keeps how far they are delivered.
//!
//! It decides nothing: which requests are bad is for the rules in `detect`, and a line that is no access entry is counted
//! and shown, never fatal. Everything it holds is bounded: lines, pieces, batches and the queue. A full queue stops
//! the reading of files, which loses nothing.

#![forbid(unsafe_code)]

pub mod config;
pub mod error;
pub mod frame;
pub mod metrics;
pub mod parse;
pub mod pipeline;
pub mod replay;
pub mod source;
pub mod spool;
pub mod uplink;
