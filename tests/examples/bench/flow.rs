//! Packets from addresses that are about to be banned, and which of them arrived.
//!
//! A packet says which it is, and when it was sent is kept. A ban took effect at the latest when the first packet was
//! sent that did not arrive any more: a bound from above, and free of how late the receiver was woken.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use proto::time::Clock;

use crate::host::Host;

/// Port of the receiver.
const PORT: u16 = 9_000;
/// Number of the flow, number of the packet.
const PACKET_BYTES: usize = 12;
/// The shortest sleep there is: with the kernel's timer slack about 55 us.
const PAUSE: Duration = Duration::from_micros(1);
/// Packets between two pauses: fewer than the receiver's socket holds.
const PACKETS_AT_ONCE: usize = 16;
/// How often the receiver looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// What arrived of the current flow.
#[derive(Debug, Default)]
struct Arrivals {
    flow: u32,
    /// By address: number of its newest packet.
    last: Vec<Option<usize>>,
    count: u64,
}

/// Receives on the server, until it is dropped.
#[derive(Debug)]
pub(crate) struct Receiver {
    arrivals: Arc<Mutex<Arrivals>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    /// Listens on the server.
    pub(crate) fn start(host: &Host) -> Result<Self> {
        let socket = host.server.within(|| Ok(UdpSocket::bind(("0.0.0.0", PORT))?)).context("could not listen")?;
        socket.set_read_timeout(Some(LOOK)).context("could not set a timeout")?;
        let (arrivals, stop) = (Arc::<Mutex<Arrivals>>::default(), Arc::<AtomicBool>::default());
        let (shared, ends) = (arrivals.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut packet = [0; PACKET_BYTES];
            while !ends.load(Ordering::Relaxed) {
                if socket.recv(&mut packet).is_ok_and(|bytes| bytes == PACKET_BYTES) {
                    lock(&shared).note(&packet);
                }
            }
        });
        Ok(Self { arrivals, stop, thread: Some(thread) })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

impl Arrivals {
    fn note(&mut self, packet: &[u8; PACKET_BYTES]) {
        let [a, b, c, d, number @ ..] = *packet;
        let number = usize::try_from(u64::from_be_bytes(number)).unwrap_or(0);
        let addresses = self.last.len();
        if u32::from_be_bytes([a, b, c, d]) == self.flow && addresses > 0 {
            let last = &mut self.last[number % addresses];
            *last = (*last).max(Some(number));
            self.count += 1;
        }
    }
}

/// Sends from some addresses in turn, until it is dropped.
#[derive(Debug)]
pub(crate) struct Flow<'a> {
    receiver: &'a Receiver,
    addresses: usize,
    /// When each packet was sent, in nanoseconds.
    sent: Arc<Mutex<Vec<i64>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl<'a> Flow<'a> {
    /// Begins to send from `addresses`, which the client has.
    pub(crate) fn start(host: &Host, receiver: &'a Receiver, addresses: &[IpAddr]) -> Result<Self> {
        let bind = || addresses.iter().map(|address| Ok(UdpSocket::bind((*address, 0))?)).collect::<Result<Vec<_>>>();
        let sockets = host.client.within(bind).context("could not bind the addresses of clients")?;
        let to = SocketAddr::new(host.address(), PORT);
        let flow = {
            let mut arrivals = lock(&receiver.arrivals);
            *arrivals = Arrivals { flow: arrivals.flow + 1, last: vec![None; addresses.len()], count: 0 };
            arrivals.flow
        };
        let (sent, stop) = (Arc::<Mutex<Vec<i64>>>::default(), Arc::<AtomicBool>::default());
        let (stamps, ends) = (sent.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let clock = Clock::system();
            let mut packet = [0; PACKET_BYTES];
            packet[..4].copy_from_slice(&flow.to_be_bytes());
            for (number, socket) in sockets.iter().cycle().enumerate() {
                if ends.load(Ordering::Relaxed) {
                    break;
                }
                packet[4..].copy_from_slice(&u64::try_from(number).unwrap_or(0).to_be_bytes());
                lock(&stamps).push(clock.now().as_nanos());
                // What cannot be sent does not arrive: a sample without arrivals fails.
                let _ = socket.send_to(&packet, to);
                if number.is_multiple_of(PACKETS_AT_ONCE.min(sockets.len())) {
                    std::thread::sleep(PAUSE);
                }
            }
        });
        Ok(Self { receiver, addresses: addresses.len(), sent, stop, thread: Some(thread) })
    }

    /// Packets that arrived so far.
    pub(crate) fn arrived(&self) -> u64 {
        lock(&self.receiver.arrivals).count
    }

    /// Whether something arrived from every address.
    pub(crate) fn all_arrive(&self) -> bool {
        lock(&self.receiver.arrivals).last.iter().all(Option::is_some)
    }

    /// Ends it: for each address, when the first packet was sent that did not arrive any more, in nanoseconds.
    pub(crate) fn finish(mut self) -> Result<Cut> {
        self.end();
        let sent = lock(&self.sent);
        let arrivals = lock(&self.receiver.arrivals);
        let mut cut = Cut { at: Vec::new(), gap: 0 };
        for last in &arrivals.last {
            let Some(last) = *last else { bail!("nothing ever arrived from an address") };
            let Some(first_lost) = sent.get(last + self.addresses) else { bail!("packets arrive to the end") };
            cut.at.push(*first_lost);
            cut.gap = cut.gap.max(first_lost - sent[last]);
        }
        Ok(cut)
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

impl Drop for Flow<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// When addresses were cut off.
#[derive(Clone, Debug)]
pub(crate) struct Cut {
    /// For each address, in nanoseconds since the epoch.
    pub(crate) at: Vec<i64>,
    /// The longest time between an address's last packet that arrived and the next: how much too late that may be.
    pub(crate) gap: i64,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
