//! From a whole body to lines that are safe: checked, counted against the limits, handed over, and waited for.

use std::net::IpAddr;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use proto::event::Receipt;
use proto::subject::name_from_host;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::answer::Refusal;
use super::coding::Body;
use super::{Caller, NodeFrom, RETRY_AFTER, ROOM_WAIT_MAX, SAFE_WAIT_MAX, Server, Written, body, chain};
use crate::parse::Format;
use crate::source::batch::Stopped;
use crate::source::intake::{Inlet, Intake, name_of_sender};
use crate::source::otlp::{self, Part, render_line};

/// What became of a request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Taken {
    pub(super) lines: u64,
    /// Records that were no lines.
    pub(super) rejected: u64,
}

/// Why a body, or the rest of it, was not handed over.
enum Failed {
    Refused(Refusal),
    Stopped(Stopped),
}

/// Returns once the lines are safe.
pub(super) async fn hand_over(
    server: &Server,
    (written, body): (Written, Body),
    caller: &Caller,
) -> Result<Taken, Refusal> {
    let unavailable = |text: &str| Refusal::later(StatusCode::SERVICE_UNAVAILABLE, text, RETRY_AFTER);
    let Ok(Ok(worker)) = timeout(ROOM_WAIT_MAX, server.workers.clone().acquire_owned()).await else {
        return Err(unavailable("too many bodies are under way"));
    };
    let (tell, told) = oneshot::channel();
    // Whoever is not listening any more has been answered.
    let receipt = Receipt::new(move |is_safe| {
        let _unheard = tell.send(is_safe);
    });
    let limits = server.listening.limits.clone();
    let work = Work {
        intake: server.intake().clone(),
        node_from: server.config.node_from,
        written,
        body,
        sender: caller.sender,
        handle: Handle::current(),
        receipt,
    };
    let worked = tokio::task::spawn_blocking(move || {
        let _worker = worker;
        work.run(|sender, lines, bytes| limits.check(Some(sender), lines, bytes))
    });
    let taken = match worked.await {
        Ok(Ok(taken)) => taken,
        Ok(Err(Failed::Refused(refusal))) => return Err(refusal),
        Ok(Err(Failed::Stopped(why))) => {
            let _first = caller.stopped.set(why);
            return Err(unavailable("shutting down").closing());
        }
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    };
    match timeout(SAFE_WAIT_MAX, told).await {
        Ok(Ok(true)) => Ok(taken),
        Ok(Ok(false) | Err(_)) => Err(unavailable("the lines could not be stored")),
        Err(_) => Err(unavailable("the lines are not stored yet")),
    }
}

/// One body to be worked on, on a thread that may wait.
struct Work {
    intake: Intake,
    node_from: NodeFrom,
    written: Written,
    body: Body,
    sender: IpAddr,
    handle: Handle,
    receipt: Receipt,
}

impl Work {
    fn run(self, limit: impl FnOnce(IpAddr, u32, u32) -> Result<(), Duration>) -> Result<Taken, Failed> {
        let lines = self.check().map_err(|text| Failed::Refused(Refusal::new(StatusCode::BAD_REQUEST, text)))?;
        let within = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let bytes = within(self.body.bytes().len());
        if let Err(wait) = limit(self.sender, within(lines as usize), bytes) {
            self.intake.note_limited(lines);
            let text = "more than this source takes from you in that time";
            return Err(Failed::Refused(Refusal::later(StatusCode::TOO_MANY_REQUESTS, text, wait)));
        }
        let taken = self.push()?;
        self.receipt.deliver();
        Ok(taken)
    }

    /// How many lines there are, or what is wrong with the body.
    fn check(&self) -> Result<u64, String> {
        let (bytes, line_bytes_max) = (self.body.bytes(), self.intake.line_bytes_max);
        match self.written {
            Written::Lines(kind) => body::split(kind, bytes, line_bytes_max, &mut |_, _| ControlFlow::Continue(()))
                .map_err(|error| chain(&error)),
            Written::Otlp(kind) => otlp::read(kind, bytes, line_bytes_max, &mut |_| ControlFlow::Continue(()))
                .map_err(|error| chain(&error)),
        }
    }

    fn push(&self) -> Result<Taken, Failed> {
        let mut outlet = Outlet { work: self, inlet: self.intake.open_mixed(self.origin()), failed: None };
        let mut taken = Taken::default();
        let (bytes, line_bytes_max) = (self.body.bytes(), self.intake.line_bytes_max);
        let pushed = match self.written {
            Written::Lines(kind) => body::split(kind, bytes, line_bytes_max, &mut |line, bytes| {
                taken.lines += 1;
                outlet.push(line, bytes)
            })
            .map_err(|error| chain(&error)),
            Written::Otlp(kind) => self.push_records((kind, bytes), &mut outlet, &mut taken),
        };
        outlet.end();
        match (outlet.failed, pushed) {
            (Some(failed), _) => Err(failed),
            (None, Ok(_)) => Ok(taken),
            // It was read before.
            (None, Err(text)) => Err(Failed::Refused(Refusal::new(StatusCode::BAD_REQUEST, text))),
        }
    }

    fn push_records(
        &self,
        (kind, bytes): (otlp::OtlpKind, &[u8]),
        outlet: &mut Outlet<'_>,
        taken: &mut Taken,
    ) -> Result<u64, String> {
        let (line_bytes_max, format): (usize, Format) = (self.intake.line_bytes_max, self.intake.format);
        let mut line = Vec::new();
        let read = otlp::read(kind, bytes, line_bytes_max, &mut |part| match part {
            Part::Host(host) if self.node_from == NodeFrom::Host => outlet.turn_to(host),
            Part::Host(_) => ControlFlow::Continue(()),
            Part::Record(None, bytes) => {
                taken.lines += 1;
                outlet.push(None, bytes)
            }
            Part::Record(Some(record), bytes) => {
                taken.lines += 1;
                let is_line = render_line(record, format, &mut line);
                taken.rejected += u64::from(!is_line);
                // What is no line is counted as one that is no access entry.
                let line = if is_line { &line[..] } else { b"{}" };
                outlet.push((line.len() <= line_bytes_max).then_some(line), bytes)
            }
        });
        read.map_err(|error| chain(&error))
    }

    fn origin(&self) -> Option<Arc<str>> {
        match self.node_from {
            NodeFrom::Here | NodeFrom::Host => None,
            NodeFrom::Sender => self.intake.origin(name_of_sender(self.sender)),
        }
    }
}

/// Where the lines of a body go.
struct Outlet<'w> {
    work: &'w Work,
    inlet: Inlet,
    failed: Option<Failed>,
}

impl Outlet<'_> {
    fn push(&mut self, line: Option<&[u8]>, bytes: usize) -> ControlFlow<()> {
        self.inlet.push(line, bytes);
        if self.inlet.is_full() { self.send() } else { ControlFlow::Continue(()) }
    }

    /// What follows is of another host.
    fn turn_to(&mut self, host: Option<&str>) -> ControlFlow<()> {
        let origin = host.and_then(|host| self.work.intake.origin(name_from_host(host)));
        if self.inlet.origin() == origin.as_ref() {
            return ControlFlow::Continue(());
        }
        self.end();
        self.inlet = self.work.intake.open_mixed(origin);
        if self.failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// No further line of this host comes.
    fn end(&mut self) {
        self.inlet.abandon();
        if self.failed.is_none() {
            let _flow = self.send();
        }
    }

    fn send(&mut self) -> ControlFlow<()> {
        let sending = timeout(ROOM_WAIT_MAX, self.inlet.send(Some(&self.work.receipt)));
        self.failed = match self.work.handle.block_on(sending) {
            Ok(Ok(())) => return ControlFlow::Continue(()),
            Ok(Err(stopped)) => Some(Failed::Stopped(stopped)),
            Err(_) => {
                let text = "the queue is full";
                Some(Failed::Refused(Refusal::later(StatusCode::SERVICE_UNAVAILABLE, text, RETRY_AFTER)))
            }
        };
        ControlFlow::Break(())
    }
}
