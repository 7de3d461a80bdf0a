//! x
mod call;
mod mirror;
