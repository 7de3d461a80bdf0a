//! The one binary `portcullis`: arguments, configuration, telemetry, the wiring of the roles, and the operator verbs.
//!
//! This crate decides no ban, reads no log line and touches no firewall: it puts the crates that do so together and
//! shows people what they say. Standard output carries data only; everything else goes to standard error.

#![forbid(unsafe_code)]

pub mod args;
pub mod client;
pub mod config;
pub mod health;
pub mod output;
pub mod role;
pub mod signals;
pub mod socket;
pub mod telemetry;
pub mod text;
pub mod verb;
