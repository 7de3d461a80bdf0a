//! What people are told of a leak.

use std::time::Duration;

use proto::time::render_duration;

use super::{Keeper, Leak};

impl Leak {
    /// The alarm: where it passed, who could have seen it, what those say (`answers`), and what to do.
    pub fn text(&self, answers: &[String]) -> String {
        let Self { client, target, rule, node, host, path, began_at, late, .. } = self;
        let late = render_duration(Duration::from_secs(late.as_secs()));
        let peer = self.peer.map_or_else(String::new, |peer| format!(", delivered by {peer}"));
        let since = match (self.confirmed, self.keeper) {
            _ if self.denied => String::new(),
            (true, Keeper::Cloudflare) => format!(", {late} after Cloudflare had confirmed the ban"),
            (true, _) => format!(", {late} after {node} had confirmed the ban"),
            (false, _) => format!(", {late} after the ban was published"),
        };
        let whom = if target.is_host() { rule.clone() } else { format!("{rule}, as {target}") };
        let mut text = format!(
            "{client} is banned ({whom}) and still reached {node}: {host}{path} at {began_at}{peer}{since}. {}: {}.",
            self.sight(),
            self.advice()
        );
        if !answers.is_empty() {
            text.push_str(&format!(" Asked now: {}.", answers.join("; ")));
        }
        if self.untold > 0 {
            text.push_str(&format!(" {} more requests passed since the last such alarm.", self.untold));
        }
        text
    }

    /// Which back ends could have seen it.
    fn sight(&self) -> String {
        let name = |seer: &Keeper| match seer {
            Keeper::Firewall => Some(format!("the firewall of {}", self.node)),
            Keeper::Forwarded => Some(format!("the rules of {} for forwarded clients", self.node)),
            Keeper::Cloudflare => Some("Cloudflare".to_owned()),
            Keeper::NoEnforcer | Keeper::NoFirewall | Keeper::BehindProxy | Keeper::NoEvidence => None,
        };
        let names: Vec<String> = self.seers.iter().filter_map(name).collect();
        let names = if names.is_empty() { "no back end".to_owned() } else { names.join(" and ") };
        let (first, rest) = names.split_at(1);
        format!("{}{rest} could have seen it", first.to_uppercase())
    }

    fn advice(&self) -> String {
        let node = &self.node;
        match (self.keeper, self.confirmed) {
            (Keeper::Firewall, _) if self.denied => format!("the firewall of {node} does not hold it"),
            (Keeper::Forwarded, _) if self.denied => format!("the rules of {node} do not hold it"),
            (Keeper::Cloudflare, _) if self.denied => "Cloudflare does not hold it".to_owned(),
            (Keeper::Firewall, true) => {
                "look for a way around enforce.firewall.chains and ports, or rules that somebody removed".to_owned()
            }
            (Keeper::Forwarded, true) => format!(
                "the rules of {node} see plain HTTP to the service, up to enforce.forwarded_for.rules_max clients"
            ),
            (Keeper::Cloudflare, true) => {
                "look whether the zone is in enforce.cloudflare.scope, whether a rule of yours \
                                           skips it, and whether the request came around Cloudflare"
                    .to_owned()
            }
            (Keeper::Cloudflare, false) => "Cloudflare has not confirmed the ban".to_owned(),
            (Keeper::Firewall | Keeper::Forwarded, false) => {
                format!("{node} has not confirmed the ban; look at what enforce there says in `status`")
            }
            (Keeper::NoEnforcer, _) => {
                format!("no enforce reports as {node}. Run one on that host, with the `node` that its log lines carry")
            }
            (Keeper::NoFirewall, _) => format!("enforce.firewall.backend is \"none\" on {node}"),
            (Keeper::BehindProxy, _) => "it comes through a proxy, and nothing that sees behind it is configured: \
                                         enforce.cloudflare, or enforce.forwarded_for on the node"
                .to_owned(),
            (Keeper::NoEvidence, _) => format!(
                "it comes through a proxy, and enforce.forwarded_for on {node} refuses only clients whose ban says that a \
                 proxy delivered them, which this one does not. Configure enforce.cloudflare, or let the proxy ban it"
            ),
        }
    }
}
