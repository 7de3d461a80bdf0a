//! Enforcement on one host: keeps the firewall equal to the ban set that detection decided.
//!
//! The ban set is desired state. [`run`] observes what the kernel holds, plans the difference, applies it and looks
//! again; it touches only what is ours and leaves bans in force when it ends. It decides no bans, and no fault of it
//! may block a client that is not banned: what cannot be done is said in the node's report, and the process goes on.

mod action;
mod backend;
mod board;
mod choose;
mod cloudflare;
mod command;
pub mod config;
pub mod desired;
mod desk;
pub mod error;
mod former;
mod forwarded;
pub mod guard;
mod host;
mod last_set;
pub mod metrics;
mod notify;
pub mod pipeline;
pub mod plan;
mod reconcile;
pub mod standoff;
pub mod teardown;
#[cfg(test)]
mod testing;

pub use command::CommandError;
pub use config::{EnforceConfig, RawEnforce};
pub use error::EnforceError;
pub use metrics::EnforceMetrics;
pub use pipeline::{Inputs, run};
pub use standoff::{StandOff, files_of_running};
pub use teardown::{CloudflareRemoval, RemovedSet, TeardownReport, teardown};
