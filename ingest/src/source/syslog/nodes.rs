//! Messages into inlets, one for each node that they are shown under.

use std::net::IpAddr;

use proto::subject::{OPERATOR, SYSTEM, name_from_host};

use crate::config::NodeFrom;
use crate::parse::syslog::parse_message;
use crate::source::batch::Stopped;
use crate::source::intake::{Inlet, Intake};

/// Nodes of one sender for which lines are collected at a time. With one more, all are sent and begin anew.
const NODES_MAX: usize = 64;

/// The lines of one connection or socket.
pub(super) struct Nodes {
    intake: Intake,
    node_from: NodeFrom,
    here: Inlet,
    /// Those of other nodes. They are few, mostly one, so that they are looked through.
    others: Vec<Inlet>,
}

impl Nodes {
    pub(super) fn new(intake: Intake, node_from: NodeFrom) -> Self {
        Self { here: intake.open(None), intake, node_from, others: Vec::new() }
    }

    /// Takes a message without its framing; `None` when it was too long to be kept. `bytes` is what it took on its way.
    /// Whoever calls this sends as soon as it [is full](Self::is_full).
    pub(super) fn push(&mut self, message: Option<&[u8]>, bytes: usize, sender: Option<IpAddr>) -> &mut Inlet {
        let message = message.map(parse_message);
        let line = message.map(|message| message.payload).filter(|line| line.len() <= self.intake.line_bytes_max);
        let name = match self.node_from {
            NodeFrom::Own => None,
            NodeFrom::Header => message.and_then(|message| message.hostname).map(name_from_host),
            NodeFrom::Sender => sender.map(render_name),
        };
        let name = name.filter(|name| **name != *self.intake.shared.node && name != OPERATOR && name != SYSTEM);
        let inlet = match name {
            None => &mut self.here,
            Some(name) => {
                let is_known = |inlet: &Inlet| inlet.origin().is_some_and(|origin| **origin == *name);
                let index = self.others.iter().position(is_known).unwrap_or(self.others.len());
                if index == self.others.len() {
                    self.others.push(self.intake.open(Some(name.into())));
                }
                &mut self.others[index]
            }
        };
        inlet.push(line, bytes);
        inlet
    }

    /// Whether it is time to send.
    pub(super) fn is_full(&self) -> bool {
        self.others.len() >= NODES_MAX || self.here.is_full() || self.others.iter().any(Inlet::is_full)
    }

    /// Sends what was pushed, and waits for room as long as it takes.
    pub(super) async fn send(&mut self) -> Result<(), Stopped> {
        for inlet in std::iter::once(&mut self.here).chain(&mut self.others) {
            inlet.send(None).await?;
        }
        self.make_room();
        Ok(())
    }

    /// Sends what was pushed, or drops and counts it.
    pub(super) fn try_send(&mut self) -> Result<(), Stopped> {
        for inlet in std::iter::once(&mut self.here).chain(&mut self.others) {
            inlet.try_send(None)?;
        }
        self.make_room();
        Ok(())
    }

    /// Forgets nodes when there are too many, after all was sent; those that wait for the end of a line only if need be.
    fn make_room(&mut self) {
        if self.others.len() >= NODES_MAX {
            self.others.retain(Inlet::is_joining);
        }
        if self.others.len() >= NODES_MAX {
            self.others.clear();
        }
    }
}

/// An address as a name: `10-0-0-7`, `2001-db8-0-0-0-0-0-1`.
fn render_name(sender: IpAddr) -> String {
    match sender.to_canonical() {
        IpAddr::V4(addr) => addr.octets().map(|part| part.to_string()).join("-"),
        // Written out, so that no two addresses have one name.
        IpAddr::V6(addr) => addr.segments().map(|part| format!("{part:x}")).join("-"),
    }
}

#[cfg(test)]
mod tests {
    use proto::subject::is_name;

    use super::*;

    #[test]
    fn addresses_are_names_and_no_two_share_one() {
        for (addr, name) in [
            ("10.0.0.7", "10-0-0-7"),
            ("::ffff:10.0.0.7", "10-0-0-7"),
            ("::1", "0-0-0-0-0-0-0-1"),
            ("2001:db8::ffff", "2001-db8-0-0-0-0-0-ffff"),
        ] {
            assert_eq!(render_name(addr.parse().unwrap()), name);
            assert!(is_name(name));
        }
    }
}
