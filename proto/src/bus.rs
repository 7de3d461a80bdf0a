//! What connects the roles. In one process these are bounded in-process channels and shared maps ([`memory`]); what a role
//! needs of a bus that reaches over hosts is [`publish`] and [`banned`].

pub mod banned;
pub mod memory;
pub mod publish;
