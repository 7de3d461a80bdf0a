//! Messages of syslog: datagrams on UDP or a unix socket, connections over TCP or TLS.
//!
//! TCP, TLS and the unix socket are not read while there is no room, so that their senders wait; UDP cannot wait, and what
//! finds no room or exceeds a limit is dropped and counted. A sender beyond its limits costs the others nothing.

mod datagrams;
mod frames;
mod kernel_drops;
mod nodes;
mod stream;

use super::batch::Stopped;
use super::intake::Intake;
use super::limit::Limits;
use super::listen::Listening;
use super::secrets::SecretFiles;
use crate::config::{SyslogConfig, Transport};

pub use frames::{Frame, Frames};

/// Hears senders until the shutdown.
pub(crate) async fn run(config: SyslogConfig, intake: Intake) -> Result<(), Stopped> {
    let node_from = config.node_from;
    match config.transport {
        Transport::Udp(listen) => datagrams::run_udp(&Listening::new(listen, intake), node_from).await,
        Transport::Unix { path, limits } => {
            let limits = Limits::new(&limits, &intake.shared.clock);
            datagrams::run_unix(&path, &limits, (intake, node_from)).await
        }
        Transport::Tcp(listen) => {
            let files = SecretFiles { tls: listen.tls.clone(), ..SecretFiles::default() };
            let listening = Listening::new(listen, intake);
            listening.run(files, move |connection, listening| stream::serve(connection, listening, node_from)).await
        }
    }
}
