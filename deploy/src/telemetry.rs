//! Log lines on standard error: text for people, or one JSON object a line.

use std::io::{self, IsTerminal};

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, TelemetryConfig};

/// Libraries whose own words are not shown unless asked for. What NATS's client says of the connection, the bus says better;
/// what HTTP/2 says is about what strangers send, as often as they like.
const QUIET: [&str; 2] = ["async_nats", "h2"];

/// Installs the process-wide log. Once only: the verbs that talk to a running Portcullis install none.
pub fn install(config: &TelemetryConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::builder()
        .parse(&config.log_level)
        .with_context(|| format!("cannot use the log level {:?}", config.log_level))?;
    let filter =
        QUIET.iter().filter(|library| !config.log_level.contains(**library)).try_fold(filter, |filter, library| {
            let directive = format!("{library}=off").parse().with_context(|| format!("cannot quieten {library}"))?;
            anyhow::Ok(filter.add_directive(directive))
        })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let installed = match config.log_format {
        LogFormat::Text => builder.with_ansi(io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    installed.map_err(anyhow::Error::from_boxed).context("cannot install the log")
}
