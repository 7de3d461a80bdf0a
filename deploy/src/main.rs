//! The program. Everything is in the library; here errors end and become an exit code.

#![forbid(unsafe_code)]

use std::io::{self, BufWriter, IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use deploy::args::Cli;
use deploy::config::Invalid;
use deploy::output::{Output, OutputClosed};
use deploy::text::escape;
use deploy::verb::{self, Exit, Misuse};
use proto::time::Clock;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let stdout = io::stdout();
    let terminal = stdout.is_terminal();
    // A terminal gets each line at once, a program gets blocks; `tail` flushes.
    let capacity = if terminal { 0 } else { 64 * 1024 };
    let mut stdout = BufWriter::with_capacity(capacity, stdout.lock());
    let mut output = Output::new(&mut stdout, terminal, Clock::system());
    let result = verb::execute(cli.verb, &mut output).and_then(|exit| output.flush().map(|()| exit));
    let exit = result.unwrap_or_else(|error| report(&error));
    ExitCode::from(exit.code())
}

/// Says once what went wrong, and tells the exit code.
fn report(error: &anyhow::Error) -> Exit {
    if error.is::<OutputClosed>() {
        // Whoever read our output has seen enough (`portcullis bans | head`).
        return Exit::Done;
    }
    let mut stderr = io::stderr().lock();
    // When standard error is gone too, nobody is left to be told.
    if let Some(invalid) = error.downcast_ref::<Invalid>() {
        for mistake in invalid.mistakes() {
            // A rule's syntax error points at its place with lines of its own.
            for line in mistake.to_string().lines() {
                let _ = writeln!(stderr, "{}", escape(line));
            }
        }
        return Exit::BadConfiguration;
    }
    let _ = writeln!(stderr, "error: {}", escape(&format!("{error:#}")));
    if error.is::<Misuse>() { Exit::Misused } else { Exit::Failed }
}
