//! nfnetlink: messages with their attributes, transactions that name what the kernel refuses, and dumps. It blocks.
//!
//! The kernel works on a message while it is being sent, so what it has to say waits when sending returns. A transaction is
//! done whole or not at all; every message that the kernel refuses is answered by its sequence number.
//! Format: `linux/netlink.h`, `linux/netfilter/nfnetlink.h`; attributes are aligned to four bytes, numbers in network
//! order.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockopt, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;

/// Bytes of one transaction at most, where the kernel lets us have such a buffer.
const SEND_BYTES: usize = 16 << 20;
/// Room for refusals: one takes about a kilobyte of it.
const RECEIVE_BYTES: usize = 8 << 20;
/// The kernel's longest single answer.
const ANSWER_BYTES: usize = 64 << 10;
/// Seconds that an answer may take. The kernel answers at once or not at all.
const ANSWER_WAIT_S: i64 = 10;

const SUBSYSTEM: u16 = 10 << 8;
/// `IPSET_CMD_PROTOCOL`, which each version of ipset answers, and its attribute: the version that is spoken.
const IPSET_PROTOCOL: u16 = (6 << 8) | 1;
const IPSET_ATTR_PROTOCOL: u16 = 1;
const IPSET_VERSION: u8 = 6;
const HEADER: usize = 16;
/// `nlmsghdr` and `nfgenmsg`.
const HEADERS: usize = 20;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const DUMP_INTERRUPTED: u16 = 0x10;
/// For new things: fail where it exists.
pub(super) const EXCLUSIVE: u16 = 0x200;
/// For new things: make it.
pub(super) const CREATE: u16 = 0x400;
/// For rules: at the end of the chain.
pub(super) const APPEND: u16 = 0x800;

const TYPE_ERROR: u16 = 2;
const TYPE_DONE: u16 = 3;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// What a message asks for; the numbers of `nf_tables_msg_types`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Kind {
    NewTable = 0,
    GetTable = 1,
    DelTable = 2,
    NewChain = 3,
    GetChain = 4,
    NewRule = 6,
    GetRule = 7,
    DelRule = 8,
    NewSet = 9,
    GetSet = 10,
    DelSet = 11,
    NewElement = 12,
    GetElement = 13,
    DelElement = 14,
    GetGeneration = 16,
    NewObject = 18,
    GetObject = 19,
}

/// `NFPROTO_INET`, the family of our table.
const INET: u8 = 1;

/// Writes attributes.
#[derive(Debug)]
pub(super) struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.0.extend_from_slice(&((value.len() + 4) as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// A text that ends with a zero.
    pub(super) fn text(&mut self, kind: u16, value: &str) {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat());
    }

    pub(super) fn u32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(super) fn u64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(super) fn nest(&mut self, kind: u16, write: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0, 0]);
        self.0.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        write(&mut Attributes(self.0));
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }
}

/// Messages that are done together.
#[derive(Debug)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    count: u32,
    last: usize,
}

impl Batch {
    pub(super) fn new() -> Self {
        let mut batch = Self { bytes: Vec::new(), count: 0, last: 0 };
        begin(&mut batch.bytes, BATCH_BEGIN, REQUEST, 0);
        batch.finish_bounds(0);
        batch
    }

    /// Adds a message; returns its number, from 0.
    pub(super) fn push(&mut self, kind: Kind, flags: u16, write: impl FnOnce(&mut Attributes<'_>)) -> u32 {
        let number = self.count;
        self.count += 1;
        self.last = self.bytes.len();
        write_message(&mut self.bytes, SUBSYSTEM | kind as u16, REQUEST | flags, number + 1, write);
        number
    }

    /// The attributes of its messages, with what each asks for.
    #[cfg(test)]
    pub(super) fn sent(&self) -> Vec<(u16, Vec<u8>)> {
        let inner = messages(&self.bytes).filter(|message| message.kind >= SUBSYSTEM);
        inner.map(|message| (message.kind & 0xff, message.attributes().to_vec())).collect()
    }

    /// The bounds carry the subsystem where others carry the family and version.
    fn finish_bounds(&mut self, start: usize) {
        self.bytes.extend_from_slice(&[0, 0, 0, (SUBSYSTEM >> 8) as u8]);
        end(&mut self.bytes, start);
    }

    fn close(mut self) -> (Vec<u8>, u32) {
        // One acknowledgement, of the last message: without it nothing was done.
        let flags = self.last + 6;
        let with_ack = u16::from_ne_bytes([self.bytes[flags], self.bytes[flags + 1]]) | ACK;
        self.bytes[flags..flags + 2].copy_from_slice(&with_ack.to_ne_bytes());
        let start = self.bytes.len();
        begin(&mut self.bytes, BATCH_END, REQUEST, self.count + 1);
        self.finish_bounds(start);
        (self.bytes, self.count)
    }
}

fn begin(bytes: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32) {
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
}

fn end(bytes: &mut [u8], start: usize) {
    let length = (bytes.len() - start) as u32;
    bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
}

fn write_message(bytes: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, write: impl FnOnce(&mut Attributes<'_>)) {
    let start = bytes.len();
    begin(bytes, kind, flags, sequence);
    bytes.extend_from_slice(&[INET, 0, 0, 0]);
    write(&mut Attributes(bytes));
    end(bytes, start);
}

/// What became of a transaction.
#[derive(Debug, Default)]
pub(super) struct Answers {
    /// Messages that the kernel refused, by number: the others were not done either.
    pub(super) refused: Vec<(u32, Errno)>,
}

/// What a dump showed.
#[derive(Debug, Default)]
pub(super) struct Dump {
    /// The attributes of each item.
    pub(super) items: Vec<Vec<u8>>,
    /// Something changed meanwhile: items may be missing or come twice.
    pub(super) interrupted: bool,
}

/// A connection to the kernel's nf_tables in this network namespace.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    /// Of the newest question.
    sequence: u32,
    send_bytes: usize,
}

impl Socket {
    pub(super) fn open() -> io::Result<Self> {
        let protocol = SockProtocol::NetlinkNetFilter;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        // Without the right to force it, a transaction is what the host's limit allows.
        if setsockopt(&fd, sockopt::SndBufForce, &SEND_BYTES).is_err() {
            setsockopt(&fd, sockopt::SndBuf, &SEND_BYTES)?;
        }
        if setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BYTES).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BYTES)?;
        }
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_WAIT_S, 0))?;
        let send_bytes = getsockopt(&fd, sockopt::SndBuf)?.min(SEND_BYTES);
        Ok(Self { fd, sequence: 0, send_bytes })
    }

    /// Bytes of one transaction at most.
    pub(super) fn batch_bytes_max(&self) -> usize {
        self.send_bytes.saturating_sub(4096)
    }

    /// Carries a batch out, whole or not at all.
    pub(super) fn transact(&mut self, batch: Batch) -> io::Result<Answers> {
        let (bytes, count) = batch.close();
        if count == 0 {
            return Ok(Answers::default());
        }
        self.drain()?;
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let (mut refused, mut done, mut overrun) = (Vec::new(), false, false);
        loop {
            let answer = match self.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(Some(answer)) => answer,
                Ok(None) => break,
                // More refusals than there is room for. Those that came are enough to go on with.
                Err(error) if is_overrun(&error) => {
                    overrun = true;
                    continue;
                }
                Err(error) => return Err(error),
            };
            for message in messages(&answer) {
                match message.error() {
                    Some(0) if message.sequence == count => done = true,
                    Some(0) | None => {}
                    // The batch as a whole: no right to it, or no such subsystem.
                    Some(code) if !(1..=count).contains(&message.sequence) => {
                        return Err(io::Error::from_raw_os_error(code));
                    }
                    Some(code) => refused.push((message.sequence - 1, Errno::from_raw(code))),
                }
            }
        }
        refused.sort_unstable_by_key(|(number, _)| *number);
        refused.dedup_by_key(|(number, _)| *number);
        match (refused.is_empty(), done, overrun) {
            (true, true, false) | (false, ..) => Ok(Answers { refused }),
            _ => Err(io::Error::other("the kernel did not answer")),
        }
    }

    /// Forgets what still waits.
    fn drain(&self) -> io::Result<()> {
        loop {
            match self.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(None) => return Ok(()),
                Ok(Some(_)) => {}
                Err(error) if is_overrun(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Everything that a question matches.
    pub(super) fn dump(&mut self, kind: Kind, write: impl FnOnce(&mut Attributes<'_>)) -> io::Result<Dump> {
        let mut dump = Dump::default();
        self.ask(SUBSYSTEM | kind as u16, DUMP, write, |message| {
            dump.interrupted |= message.flags & DUMP_INTERRUPTED != 0;
            dump.items.push(message.attributes().to_vec());
        })?;
        Ok(dump)
    }

    /// The one thing that a question names.
    pub(super) fn get(&mut self, kind: Kind, write: impl FnOnce(&mut Attributes<'_>)) -> io::Result<Vec<u8>> {
        let mut found = Vec::new();
        self.ask(SUBSYSTEM | kind as u16, ACK, write, |message| found = message.attributes().to_vec())?;
        Ok(found)
    }

    /// Fails where the kernel has no ipset.
    pub(super) fn greet_ipset(&mut self) -> io::Result<()> {
        self.ask(IPSET_PROTOCOL, ACK, |ask| ask.bytes(IPSET_ATTR_PROTOCOL, &[IPSET_VERSION]), |_| {})
    }

    fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        write: impl FnOnce(&mut Attributes<'_>),
        mut take: impl FnMut(&Message<'_>),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        write_message(&mut bytes, kind, REQUEST | flags, self.sequence, write);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        loop {
            let answer = self.receive(MsgFlags::empty())?;
            let answer = answer.ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut))?;
            for message in messages(&answer).filter(|message| message.sequence == self.sequence) {
                match (message.error(), message.kind) {
                    (Some(0), _) | (None, TYPE_DONE) => return Ok(()),
                    (Some(code), _) => return Err(io::Error::from_raw_os_error(code)),
                    (None, _) => take(&message),
                }
            }
        }
    }

    fn receive(&self, flags: MsgFlags) -> io::Result<Option<Vec<u8>>> {
        let mut answer = vec![0; ANSWER_BYTES];
        match recv(self.fd.as_raw_fd(), &mut answer, flags) {
            Ok(length) => {
                answer.truncate(length);
                Ok(Some(answer))
            }
            Err(Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn is_overrun(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ENOBUFS as i32)
}

/// One message of an answer.
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    /// What follows the header.
    body: &'a [u8],
}

impl Message<'_> {
    /// Of an acknowledgement 0, of a refusal the error's number. A dump that failed says so at its end.
    fn error(&self) -> Option<i32> {
        let code = || self.body.first_chunk().map_or(0, |code| -i32::from_ne_bytes(*code));
        match self.kind {
            TYPE_ERROR => Some(code()),
            TYPE_DONE if code() > 0 => Some(code()),
            _ => None,
        }
    }

    fn attributes(&self) -> &[u8] {
        self.body.get(HEADERS - HEADER..).unwrap_or_default()
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.get(..HEADER)?;
        let u32_at = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let u16_at = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let length = u32_at(0) as usize;
        let body = bytes.get(HEADER..length)?;
        let message = Message { kind: u16_at(4), flags: u16_at(6), sequence: u32_at(8), body };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes`, by type. What is cut off is left out.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The attribute of that type.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

pub(super) fn as_u32(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

pub(super) fn as_u64(value: &[u8]) -> Option<u64> {
    value.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

pub(super) fn as_text(value: &[u8]) -> Option<&str> {
    std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_attributes_are_read_as_they_are_written() {
        let mut batch = Batch::new();
        let number = batch.push(Kind::NewElement, CREATE, |attributes| {
            attributes.text(1, "portcullis");
            attributes.nest(3, |list| list.nest(1, |element| element.u64(4, 20_000)));
        });
        assert_eq!(number, 0);
        let (bytes, count) = batch.close();
        assert_eq!(count, 1);
        let all: Vec<Message<'_>> = messages(&bytes).collect();
        let kinds: Vec<u16> = all.iter().map(|message| message.kind).collect();
        assert_eq!(kinds, [BATCH_BEGIN, 0xa0c, BATCH_END]);
        assert_eq!((all[1].sequence, all[1].flags), (1, REQUEST | CREATE | ACK));
        let table = attribute(all[1].attributes(), 1).and_then(as_text);
        assert_eq!(table, Some("portcullis"));
        let list = attribute(all[1].attributes(), 3).and_then(|list| attribute(list, 1)).unwrap();
        assert_eq!(attribute(list, 4).and_then(as_u64), Some(20_000));
    }

    #[test]
    fn what_is_cut_off_is_not_read() {
        let mut batch = Batch::new();
        batch.push(Kind::NewTable, 0, |attributes| attributes.text(1, "x"));
        let (bytes, _) = batch.close();
        for length in 0..bytes.len() {
            let seen: Vec<usize> = messages(&bytes[..length])
                .map(|message| attributes(message.attributes()).map(|(_, value)| value.len()).sum())
                .collect();
            assert!(seen.len() < 3);
        }
        assert_eq!(attributes(&[9, 0, 1, 0, 1]).count(), 0, "longer than what is there");
        assert_eq!(attributes(&[0, 0, 1, 0]).count(), 0, "shorter than itself");
    }
}
