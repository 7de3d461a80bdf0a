//! Log lines on standard error: text for people, or one JSON object a line.

use std::io::{self, IsTerminal};

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, TelemetryConfig};

/// Installs the process-wide log. Once only: the verbs that talk to a running Portcullis install none.
pub fn install(config: &TelemetryConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::builder()
        .parse(&config.log_level)
        .with_context(|| format!("cannot use the log level {:?}", config.log_level))?;
    // What its client says of the connection, the bus says better.
    let is_asked_for = config.log_level.contains("async_nats");
    let quiet = "async_nats=off".parse().context("cannot quieten the NATS client")?;
    let filter = if is_asked_for { filter } else { filter.add_directive(quiet) };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let installed = match config.log_format {
        LogFormat::Text => builder.with_ansi(io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    installed.map_err(anyhow::Error::from_boxed).context("cannot install the log")
}
