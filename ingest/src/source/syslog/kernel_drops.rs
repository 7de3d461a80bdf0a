//! Datagrams that the kernel had no room for, from the `drops` column of /proc/net/udp: they come before us and would be
//! lost unseen.

use std::os::fd::{AsRawFd, RawFd};

/// The column of a socket's inode.
const INODE_COLUMN: usize = 9;
/// The column of its drops.
const DROPS_COLUMN: usize = 12;

/// The drops of one socket.
#[derive(Debug)]
pub(super) struct KernelDrops {
    /// As in the column; `None` where it cannot be found out.
    inode: Option<String>,
    seen: u64,
}

impl KernelDrops {
    pub(super) fn new(socket: &impl AsRawFd) -> Self {
        Self { inode: inode_of(socket.as_raw_fd()), seen: 0 }
    }

    /// Those since the last time.
    pub(super) async fn poll(&mut self) -> u64 {
        let Some(inode) = &self.inode else { return 0 };
        for table in ["/proc/self/net/udp", "/proc/self/net/udp6"] {
            // A system without IPv6 has no table of it.
            let Ok(text) = tokio::fs::read_to_string(table).await else { continue };
            if let Some(drops) = find_drops(&text, inode) {
                let new = drops.saturating_sub(self.seen);
                self.seen = drops;
                return new;
            }
        }
        0
    }
}

fn inode_of(socket: RawFd) -> Option<String> {
    let link = std::fs::read_link(format!("/proc/self/fd/{socket}")).ok()?;
    Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
}

fn find_drops(table: &str, inode: &str) -> Option<u64> {
    let row = table.lines().find(|row| row.split_ascii_whitespace().nth(INODE_COLUMN) == Some(inode))?;
    row.split_ascii_whitespace().nth(DROPS_COLUMN)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{setsockopt, sockopt};
    use std::net::UdpSocket;

    use super::*;

    #[tokio::test]
    async fn what_the_kernel_has_no_room_for_is_counted_once() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        setsockopt(&socket, sockopt::RcvBuf, &4096).unwrap();
        let mut drops = KernelDrops::new(&socket);
        assert_eq!(drops.poll().await, 0);
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..100 {
            sender.send_to(&[b'x'; 1000], socket.local_addr().unwrap()).unwrap();
        }
        socket.set_nonblocking(true).unwrap();
        let mut buffer = [0; 2000];
        let received = std::iter::from_fn(|| socket.recv(&mut buffer).ok()).count() as u64;
        assert!(received < 100, "{received}");
        assert_eq!((drops.poll().await, drops.poll().await), (100 - received, 0));
    }
}
