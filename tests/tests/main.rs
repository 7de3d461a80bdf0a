//! End to end: the built binary, real packets, the repository itself. One binary, so that it links once.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is how a test fails")]

mod api;
mod cli;
mod cloudflare;
mod cluster;
mod netns;
mod pipe;
mod replay;
mod schema;
mod tidy;
