//! x
pub mod config;
pub mod engine;
pub mod error;
pub mod state;
pub mod store;
