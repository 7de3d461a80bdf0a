//! What connects the roles. In one process these are bounded in-process channels and shared maps ([`memory`]); between
//! hosts a NATS bus ([`nats`]) keeps the same maps in step.

pub mod banned;
pub mod config;
pub mod memory;
pub mod nats;
pub mod publish;
