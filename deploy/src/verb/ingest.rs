//! `ingest --stdout`: lines in, accesses out, in any pipe.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use anyhow::Context;
use ingest::config::STDIN;
use proto::report::Role;

use super::run::{absolute, block_on};
use super::{Exit, run};
use crate::args::IngestArgs;
use crate::config::Location;
use crate::{role, telemetry};

pub(super) fn run(args: IngestArgs) -> anyhow::Result<Exit> {
    if !args.stdout {
        return run::run_role(Role::Ingest, args.config.config, false);
    }
    let mut location = Location::new(args.config.config, absolute(args.logs)?);
    let mut config = location.load()?;
    if config.ingest.sources.is_empty() {
        location = location.with_logs(vec![STDIN.into()]);
        config = location.load()?;
    }
    config.require_no_nats_source()?;
    telemetry::install(&config.telemetry)?;
    // Not the standard library's, which writes at each line end; and it may block, while the rest goes on.
    let out = io::stdout().as_fd().try_clone_to_owned().context("cannot use standard output")?;
    block_on((vec![Role::Ingest], location, config, false), |process| role::stdout::run(process, File::from(out)))
}
