//! The answer to `explain`: what this host knows of an address at Cloudflare.

use std::net::IpAddr;

use proto::api::{BackendHold, HoldState};

use super::usage::Usage;
use super::{Duty, Runner, status};
use crate::config::{Mode, Scope};

impl Runner {
    /// Whether the address has an entry, and why or why not; of a host that has the duty.
    pub(super) fn explain(&self, address: IpAddr) -> BackendHold {
        if !self.is_held() {
            let holder = self.duty.as_ref().and_then(Duty::holder);
            let text = holder.map_or_else(|| "done by no host yet".to_owned(), |node| format!("done by {node}"));
            return BackendHold::without(HoldState::Standby, text);
        }
        let Some(mirror) = &self.mirror else {
            let why = self.installation.as_ref().err().map_or_else(String::new, |error| status::chain(error));
            return BackendHold::without(HoldState::Idle, why);
        };
        let mut hold = mirror.explain(address);
        if hold.state == HoldState::Waiting && self.around.dry_run {
            return BackendHold { detail: "dry run: nothing is changed".to_owned(), state: HoldState::Idle, ..hold };
        }
        if let (HoldState::Waiting, Err(error)) = (hold.state, &self.client) {
            hold.detail = format!("{}: {}", hold.detail, status::chain(error));
        }
        if hold.state != HoldState::Held {
            return hold;
        }
        match (&self.config.scope, self.usage) {
            (Scope::List { .. }, Some(Usage::Unused)) => {
                let detail = "it is on the list, which no custom rule uses".to_owned();
                BackendHold { detail, state: HoldState::Idle, ..hold }
            }
            (Scope::List { list, .. }, _) => {
                BackendHold { detail: format!("on ${list}: what is done with it is up to your rules"), ..hold }
            }
            _ if self.config.mode == Mode::Block => hold,
            _ => {
                let mode = self.config.mode.as_str();
                BackendHold { detail: format!("{}; mode {mode} lets pass whoever solves it", hold.detail), ..hold }
            }
        }
    }
}
