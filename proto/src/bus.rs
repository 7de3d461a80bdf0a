//! What connects the roles. In one process these are bounded in-process channels and shared maps ([`memory`]).

pub mod memory;
