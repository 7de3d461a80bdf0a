//! The answer to `explain`: what this host holds of an address, and why or why not.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proto::api::BackendHold;
use proto::net::Target;

use crate::backend::Sets;
use crate::plan::{Family, SetId};
use crate::reconcile::{Reconciler, chain_of};

impl Reconciler {
    /// Which ban holds the address here, and why or why not. The kernel is asked when the answer is awaited.
    pub(crate) fn explain(
        &self,
        address: IpAddr,
        node: &str,
        places: &BTreeMap<Family, String>,
    ) -> impl Future<Output = BackendHold> + use<> {
        let now = self.clock.now();
        let host = Target::host(address);
        let candidates = (0..=host.prefix()).rev().map(|prefix| Target::new(host.addr(), prefix));
        let banned = candidates.clone().find(|target| self.desired.contains(target));
        let entry = candidates.clone().find(|target| self.desired.wanted(target).is_some());
        let held = entry.and_then(|target| self.kernel.held(&target));
        let family = Family::of(&host);
        let set = SetId::Bans(family);
        let refused = banned.is_some_and(|target| self.desired.refusal(&target).is_some());
        let spared = self.desired.is_paused() || refused || (banned.is_some() && self.guard.refuse(&host).is_some());
        let detail = match (entry, banned) {
            _ if self.sets.is_none() => "no firewall back end".to_owned(),
            _ if self.desired.is_paused() => format!("paused {}", self.paused().unwrap_or_default()),
            (Some(target), _) => match (held, self.refused.get(&target), self.guard.refuse(&host)) {
                (_, Some(why), _) => format!("{target} was refused by the kernel: {why}"),
                (_, _, Some(refusal)) => format!("let through although {target} is banned: {refusal}"),
                (Some(held), ..) => {
                    let left = held.ends.map_or(0, |end| end.since(now).as_secs());
                    let place = places.get(&family).map_or("no chain", String::as_str);
                    let set = self.sets.as_ref().map_or_else(String::new, |sets| sets.describe(&target));
                    format!("{set}, {left} s left of its timeout, dropped in {place}")
                }
                (None, ..) => "about to be added".to_owned(),
            },
            (None, Some(target)) => self.desired.refusal(&target).map_or_else(
                || format!("{target} does not fit: bans_max is reached"),
                |refusal| format!("{target} is not banned here: {refusal}"),
            ),
            (None, None) => "not banned".to_owned(),
        };
        let in_force = held.is_some_and(|held| held.ends.is_none_or(|end| now < end));
        let hold = BackendHold {
            node: node.to_owned(),
            backend: self.backend_name().to_owned(),
            entry: entry.filter(|_| in_force),
            detail,
            spared,
        };
        let sets = self.sets.clone();
        async move { ask_kernel(hold, sets, set, host.addr()).await }
    }
}

/// Adds what the kernel itself says, where that is not what we know.
async fn ask_kernel(mut hold: BackendHold, sets: Option<Sets>, set: SetId, address: IpAddr) -> BackendHold {
    let Some(sets) = sets else { return hold };
    match sets.test(set, address).await {
        Ok(Some(in_kernel)) if in_kernel != hold.entry.is_some() => {
            let said = if in_kernel { "the kernel's set holds it" } else { "the kernel's set does not hold it" };
            hold.detail = format!("{}; yet {said}", hold.detail);
            if !in_kernel {
                hold.entry = None;
            }
        }
        Ok(_) => {}
        Err(error) => hold.detail = format!("{}; the kernel could not be asked: {}", hold.detail, chain_of(&error)),
    }
    hold
}
