//! Places for connections, in all and by peer: what a listener can be made to hold.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Peers as limits see them: who has one IPv6 address has all of its network of 64 bits.
pub fn peer_key(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Whether a failure to accept is of that one connection, and the next may go well.
pub fn is_of_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// All places of a listener.
#[derive(Debug)]
pub struct Places {
    free: Arc<Semaphore>,
    peer_max: usize,
    /// Open connections by peer; as many entries as connections at most.
    peers: Mutex<BTreeMap<IpAddr, usize>>,
}

impl Places {
    /// For `all_max` connections at once, of which one peer has `peer_max`.
    pub fn new(all_max: usize, peer_max: usize) -> Arc<Self> {
        Arc::new(Self { free: Arc::new(Semaphore::new(all_max)), peer_max, peers: Mutex::default() })
    }

    /// Waits for a free place. The semaphore is never closed; without a permit the peer's share still holds.
    pub async fn wait(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.free).acquire_owned().await.ok()
    }

    /// Gives the place to `peer`, unless it has its share.
    pub fn take(self: &Arc<Self>, permit: Option<OwnedSemaphorePermit>, peer: SocketAddr) -> Option<Place> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let open = peers.entry(peer_key(peer.ip())).or_default();
        if *open >= self.peer_max {
            return None;
        }
        *open += 1;
        Some(Place { peer, places: Arc::clone(self), _permit: permit })
    }

    /// Places that are taken.
    pub fn taken(&self) -> usize {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }
}

/// The place of one connection, given back when dropped.
#[derive(Debug)]
pub struct Place {
    peer: SocketAddr,
    places: Arc<Places>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Place {
    /// Whose it is.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut peers = self.places.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = peer_key(self.peer.ip());
        if let Some(open) = peers.get_mut(&key) {
            *open -= 1;
            if *open == 0 {
                peers.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_its_share_and_gives_it_back() {
        let places = Places::new(10, 2);
        let peer = |text: &str| SocketAddr::new(text.parse().unwrap(), 1);
        let first = places.take(None, peer("2001:db8::1"));
        let second = places.take(None, peer("2001:db8::2"));
        assert!(first.is_some() && second.is_some());
        assert!(places.take(None, peer("2001:db8::3")).is_none(), "one network is one peer");
        assert!(places.take(None, peer("2001:db8:0:1::3")).is_some());
        assert_eq!(places.taken(), 2);
        drop(first);
        assert!(places.take(None, peer("2001:db8::3")).is_some());
        assert_eq!(peer_key("::ffff:192.0.2.1".parse().unwrap()), IpAddr::from([192, 0, 2, 1]));
    }
}
