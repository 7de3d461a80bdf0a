//! Messages into inlets, one for each sender and each node that its lines are shown under.

use std::net::IpAddr;

use proto::subject::name_from_host;

use crate::config::NodeFrom;
use crate::parse::syslog::parse_message;
use crate::source::batch::Stopped;
use crate::source::intake::{Inlet, Intake, name_of_sender};

/// Inlets for which lines are collected at a time. With one more, all are sent and begin anew.
const INLETS_MAX: usize = 64;

/// The lines of one connection or socket.
pub(super) struct Nodes {
    intake: Intake,
    node_from: NodeFrom,
    /// By sender and node. They are few, mostly one, so that they are looked through.
    inlets: Vec<(Option<IpAddr>, Inlet)>,
}

impl Nodes {
    pub(super) fn new(intake: Intake, node_from: NodeFrom) -> Self {
        Self { intake, node_from, inlets: Vec::new() }
    }

    /// Takes a message without its framing; `None` when it was too long to be kept. `bytes` is what it took on its way.
    /// Whoever calls this sends as soon as it [is full](Self::is_full).
    pub(super) fn push(&mut self, message: Option<&[u8]>, bytes: usize, sender: Option<IpAddr>) -> &mut Inlet {
        let message = message.map(parse_message);
        let line = message.map(|message| message.payload).filter(|line| line.len() <= self.intake.line_bytes_max);
        let host = message.and_then(|message| message.hostname);
        let origin = match self.node_from {
            NodeFrom::Own => None,
            NodeFrom::Header => host.and_then(|host| self.intake.origin(name_from_host(host))),
            NodeFrom::Sender => sender.and_then(|sender| self.intake.origin(name_of_sender(sender))),
        };
        let is_known = |(known, inlet): &(Option<IpAddr>, Inlet)| *known == sender && inlet.origin() == origin.as_ref();
        let index = self.inlets.iter().position(is_known).unwrap_or(self.inlets.len());
        if index == self.inlets.len() {
            self.inlets.push((sender, self.intake.open(origin)));
        }
        let (_, inlet) = &mut self.inlets[index];
        inlet.push(line, bytes);
        inlet
    }

    /// Whether it is time to send.
    pub(super) fn is_full(&self) -> bool {
        self.inlets.len() >= INLETS_MAX || self.inlets.iter().any(|(_, inlet)| inlet.is_full())
    }

    /// Sends what was pushed, and waits for room as long as it takes.
    pub(super) async fn send(&mut self) -> Result<(), Stopped> {
        for (_, inlet) in &mut self.inlets {
            inlet.send(None).await?;
        }
        self.make_room();
        Ok(())
    }

    /// Sends what was pushed, or drops and counts it.
    pub(super) fn try_send(&mut self) -> Result<(), Stopped> {
        for (_, inlet) in &mut self.inlets {
            inlet.try_send()?;
        }
        self.make_room();
        Ok(())
    }

    /// Forgets inlets when there are too many, after all was sent; those that wait for the end of a line only if need be.
    fn make_room(&mut self) {
        if self.inlets.len() >= INLETS_MAX {
            self.inlets.retain(|(_, inlet)| inlet.is_joining());
        }
        if self.inlets.len() >= INLETS_MAX {
            self.inlets.clear();
        }
    }
}
