//! Detection: counts every client exactly, decides bans that grow with each offence, and answers operators.
//!
//! [`engine`] and [`state`] are pure; [`worker`] owns the engine and its [`store`]; [`api`] serves operators. This crate
//! knows no log format and no firewall.

pub mod api;
pub mod cluster;
pub mod config;
mod decider;
pub mod engine;
pub mod error;
mod leaks;
pub mod metrics;
mod peers;
pub mod resolve;
pub mod state;
pub mod store;
pub mod worker;
