//! What the end-to-end tests are made of: logs made from a seed, a brute-force model of detection, the built binary,
//! network namespaces, clusters of hosts in them, and the guards of the repository itself. The tests stand in `tests/`, in one binary.
//!
//! A test waits for states, never for durations, and fails on any ERROR line that the binary logs.

pub mod access;
pub mod brute;
pub mod cloudflare;
pub mod cluster;
pub mod netns;
pub mod portcullis;
pub mod process;
pub mod random;
pub mod sample;
pub mod tidy;
pub mod tls;
