//! `completions`: a script for the user's shell.

use clap::CommandFactory;

use super::Exit;
use crate::args::{Cli, CompletionsArgs};
use crate::output::Output;

pub(super) fn run(args: &CompletionsArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "portcullis", &mut script);
    out.raw(&script)?;
    Ok(Exit::Done)
}
