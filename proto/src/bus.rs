//! What connects the roles. In one process these are bounded in-process channels and shared maps ([`memory`]); between
//! hosts a NATS bus ([`nats`]) keeps the same maps in step. Who sends access batches to it does so through [`publish`],
//! and learns from [`banned`] whose lines are always wanted.

pub mod banned;
pub mod config;
pub mod duty;
pub mod feed;
pub mod memory;
pub mod nats;
pub mod publish;
