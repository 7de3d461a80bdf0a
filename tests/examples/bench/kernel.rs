//! How many clients a host's kernel bans, asked often: over netlink, as `ipset` itself asks, without a process each time.
//!
//! The protocol is that of Linux' `linux/netlink.h`, `linux/netfilter/nfnetlink.h` and `linux/netfilter/ipset/ip_set.h`.

use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use tests::netns::Namespace;

/// The set of IPv4 bans, with the zero that ends it.
const SET: &[u8] = b"portcullis-v4\0";
/// `NFNL_SUBSYS_IPSET` and `IPSET_CMD_LIST`.
const LIST: u16 = 6 << 8 | 7;
/// `NLM_F_REQUEST | NLM_F_ACK | NLM_F_DUMP`.
const DUMP: u16 = 0x1 | 0x4 | 0x300;
/// `NLMSG_ERROR` and `NLMSG_DONE`.
const ENDS: [u16; 2] = [2, 3];
/// `IPSET_ATTR_PROTOCOL`, and its value since Linux 5.0.
const PROTOCOL: (u16, u8) = (1, 7);
const SETNAME: u16 = 2;
/// `IPSET_ATTR_FLAGS`, in network order, and `IPSET_FLAG_LIST_HEADER`.
const FLAGS: (u16, u32) = (6 | 0x4000, 1 << 2);
/// `IPSET_ATTR_DATA`, and `IPSET_ATTR_ELEMENTS` within it.
const DATA: u16 = 7;
const ELEMENTS: u16 = 24;
/// Bits of an attribute's type that say how it is written.
const TYPE_MASK: u16 = 0x3fff;
/// `nlmsghdr` and `nfgenmsg`.
const HEAD_BYTES: usize = 20;
/// The kernel answers before `sendto` returns.
const ANSWER_SECONDS: i64 = 5;

/// A line to one kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    socket: OwnedFd,
    request: Vec<u8>,
}

impl Kernel {
    /// Asks the kernel of `namespace`.
    pub(crate) fn open(namespace: &Namespace) -> Result<Self> {
        let open = || {
            let flags = SockFlag::SOCK_CLOEXEC;
            Ok(socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?)
        };
        let socket = namespace.within(open).context("could not open a netlink socket")?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_SECONDS))?;
        Ok(Self { socket, request: request() })
    }

    /// How many IPv4 targets are banned; 0 while there is no set for them.
    pub(crate) fn banned(&self) -> Result<u64> {
        let fd = self.socket.as_raw_fd();
        sendto(fd, &self.request, &NetlinkAddr::new(0, 0), MsgFlags::empty()).context("could not ask for a set")?;
        let (mut count, mut ended) = (0, false);
        while !ended {
            let mut answer = [0; 8_192];
            let bytes = recv(fd, &mut answer, MsgFlags::empty()).context("no answer about a set")?;
            let mut rest = &answer[..bytes];
            while rest.len() >= HEAD_BYTES - 4 {
                let length = usize::try_from(u32::from_ne_bytes(word(rest, 0)))?;
                ensure!((HEAD_BYTES - 4..=rest.len()).contains(&length), "a netlink message of {length} bytes");
                let kind = u16::from_ne_bytes(word(rest, 4));
                if ENDS.contains(&kind) {
                    ended = true;
                } else if let Some(elements) = rest.get(HEAD_BYTES..length).and_then(elements) {
                    count = elements;
                }
                rest = &rest[length.next_multiple_of(4).min(rest.len())..];
            }
        }
        Ok(count.into())
    }
}

/// Asks for the set's header.
fn request() -> Vec<u8> {
    let mut attributes = Vec::new();
    push(&mut attributes, PROTOCOL.0, &[PROTOCOL.1]);
    push(&mut attributes, SETNAME, SET);
    push(&mut attributes, FLAGS.0, &FLAGS.1.to_be_bytes());
    let length = u32::try_from(HEAD_BYTES + attributes.len()).unwrap_or(0);
    let mut request = length.to_ne_bytes().to_vec();
    request.extend(LIST.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    // Number and sender: nobody else uses the socket. Then `AF_INET`, and twice nothing.
    request.extend([0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    request.extend(attributes);
    request
}

fn push(attributes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    attributes.extend(u16::try_from(4 + value.len()).unwrap_or(0).to_ne_bytes());
    attributes.extend(kind.to_ne_bytes());
    attributes.extend(value);
    attributes.resize(attributes.len().next_multiple_of(4), 0);
}

fn elements(attributes: &[u8]) -> Option<u32> {
    let elements = find(find(attributes, DATA)?, ELEMENTS)?;
    (elements.len() == 4).then(|| u32::from_be_bytes(word(elements, 0)))
}

fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = attributes;
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes(word(rest, 0)));
        let value = rest.get(4..length)?;
        if u16::from_ne_bytes(word(rest, 2)) & TYPE_MASK == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

/// `N` bytes at `at`, which are there.
fn word<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}
