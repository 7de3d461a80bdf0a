//! What listens where. Two listeners at one address are a mistake that is told before the second of them fails to start.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ingest::config::{IngestConfig, SourceConfig, SourceKind, Transport};
use proto::settings::Mistakes;

use super::{ApiConfig, TelemetryConfig};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Tcp(SocketAddr),
    Udp(SocketAddr),
    Unix(PathBuf),
}

impl Place {
    /// Whether only one of them can be listened at.
    fn is_in_the_way_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tcp(one), Self::Tcp(other)) | (Self::Udp(one), Self::Udp(other)) => {
                // The kernel chooses a port for 0.
                one.port() == other.port() && one.port() != 0 && overlap(one.ip(), other.ip())
            }
            (Self::Unix(one), Self::Unix(other)) => one == other,
            _ => false,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => write!(f, "{addr}"),
            Self::Udp(addr) => write!(f, "{addr} (UDP)"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Listeners on all IPv6 addresses take those of IPv4 as well.
fn overlap(one: IpAddr, other: IpAddr) -> bool {
    let (one, other) = (one.to_canonical(), other.to_canonical());
    let covers = |wide: IpAddr, narrow: IpAddr| wide.is_unspecified() && (wide.is_ipv6() || narrow.is_ipv4());
    one == other || covers(one, other) || covers(other, one)
}

fn place_of(source: &SourceConfig) -> Option<(&'static str, Place)> {
    match &source.kind {
        SourceKind::Syslog(syslog) => Some(match &syslog.transport {
            Transport::Udp(listen) => ("listen", Place::Udp(listen.addr)),
            Transport::Tcp(listen) => ("listen", Place::Tcp(listen.addr)),
            Transport::Unix { path, .. } => ("path", Place::Unix(path.clone())),
        }),
        SourceKind::Http(requests) | SourceKind::Otlp(requests) => Some(("listen", Place::Tcp(requests.listen.addr))),
        SourceKind::File(_) | SourceKind::Stdin | SourceKind::Nats(_) => None,
    }
}

/// Notes each listener that is in the way of another, with the keys of both.
pub(super) fn check((api, telemetry): (&ApiConfig, &TelemetryConfig), ingest: &IngestConfig, mistakes: &mut Mistakes) {
    let mut known = vec![("api.socket".to_owned(), Place::Unix(api.socket.clone()))];
    let api = api.tcp.iter().map(|tcp| ("api.listen".to_owned(), Place::Tcp(tcp.listen)));
    let telemetry = telemetry.listen.iter().map(|addr| ("telemetry.listen".to_owned(), Place::Tcp(*addr)));
    let sources = ingest.sources.iter().filter_map(|source| {
        let (key, place) = place_of(source)?;
        Some((format!("ingest.sources.{}.{key}", source.name), place))
    });
    for (key, place) in api.chain(telemetry).chain(sources) {
        if let Some((first, taken)) = known.iter().find(|(_, other)| place.is_in_the_way_of(other)) {
            let text = format!("{place} is taken by {first} = {:?}: give one of them another", taken.to_string());
            mistakes.add(&key, text);
        }
        known.push((key, place));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_in_each_others_way_where_the_kernel_says_so() {
        let tcp = |addr: &str| Place::Tcp(addr.parse().unwrap());
        for (one, other, is_taken) in [
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("127.0.0.1:0", "127.0.0.1:0", false),
            ("0.0.0.0:80", "192.0.2.1:80", true),
            ("0.0.0.0:80", "[::1]:80", false),
            ("[::]:80", "192.0.2.1:80", true),
            ("[::]:80", "0.0.0.0:80", true),
            ("[::ffff:192.0.2.1]:80", "192.0.2.1:80", true),
            ("192.0.2.1:80", "192.0.2.2:80", false),
        ] {
            assert_eq!(tcp(one).is_in_the_way_of(&tcp(other)), is_taken, "{one} {other}");
            assert_eq!(tcp(other).is_in_the_way_of(&tcp(one)), is_taken, "{other} {one}");
        }
        let udp = Place::Udp("127.0.0.1:80".parse().unwrap());
        assert!(udp.is_in_the_way_of(&udp) && !udp.is_in_the_way_of(&tcp("127.0.0.1:80")));
    }
}
