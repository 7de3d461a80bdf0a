//! The addresses of the NATS servers: a host that banned them would hear of nothing any more.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use async_nats::ServerAddr;
use tokio::sync::watch;

use super::Connection;
use crate::bus::config::NatsConfig;
use crate::net::canonical;
use crate::shutdown::Shutdown;

/// How often names are looked up again.
const INTERVAL: Duration = Duration::from_secs(60);

/// Looks up the configured servers and those that they name, again at intervals and with each connection, until the
/// shutdown. Servers that cannot be looked up keep the addresses they had.
///
/// # Errors
/// None.
pub async fn resolve(
    connection: Connection,
    config: NatsConfig,
    addresses: watch::Sender<Vec<IpAddr>>,
    shutdown: Shutdown,
) -> Result<(), std::convert::Infallible> {
    let mut connects = connection.connects();
    let mut known: std::collections::BTreeMap<String, BTreeSet<IpAddr>> = Default::default();
    loop {
        let named = connection.client.server_info().connect_urls;
        if connection.is_up() {
            known.retain(|server, _| config.urls.contains(server) || named.contains(server));
        }
        for server in config.urls.iter().chain(&named) {
            let Ok(parsed) = server.parse::<ServerAddr>() else { continue };
            let looked_up = tokio::select! {
                looked_up = tokio::net::lookup_host((parsed.host(), parsed.port())) => looked_up,
                () = shutdown.draining() => return Ok(()),
            };
            if let Ok(found) = looked_up {
                known.insert(server.clone(), found.map(|addr| canonical(addr.ip())).collect());
            }
        }
        let all: BTreeSet<IpAddr> = known.values().flatten().copied().collect();
        addresses.send_if_modified(|former| {
            let fresh: Vec<IpAddr> = all.into_iter().collect();
            std::mem::replace(former, fresh.clone()) != fresh
        });
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            // The sender lives as long as the connection.
            _ = connects.changed() => {}
            () = shutdown.draining() => return Ok(()),
        }
    }
}
