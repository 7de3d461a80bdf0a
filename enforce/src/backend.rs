//! The ways to enforce bans on a host. Each back end renders and applies steps and observes what is in force; it decides
//! nothing.

pub(crate) mod dry_run;
pub(crate) mod ipset;
pub(crate) mod iptables;

use std::collections::BTreeMap;
use std::net::IpAddr;

use proto::time::Clock;

use crate::backend::dry_run::DryRun;
use crate::backend::ipset::{Header, Ipset};
use crate::command::CommandError;
use crate::plan::{Kernel, SetId, Step};

/// A step that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    /// Index of the step.
    pub(crate) step: usize,
    /// What the kernel said.
    pub(crate) why: String,
}

/// What became of a list of steps: all not named here are done.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// Steps that the kernel refused, ascending.
    pub(crate) refused: Vec<Refused>,
    /// Everything from this step on was not tried, because of this.
    pub(crate) stopped: Option<(usize, CommandError)>,
}

/// Where members are kept.
#[derive(Clone, Debug)]
pub(crate) enum Sets {
    /// In kernel sets.
    Ipset(Ipset),
    /// Nowhere; what would be done is logged.
    DryRun(DryRun),
}

impl Sets {
    /// Carries the steps out, in order.
    pub(crate) async fn apply(&self, steps: &[Step]) -> Applied {
        match self {
            Self::Ipset(ipset) => ipset.apply(steps).await,
            Self::DryRun(dry_run) => dry_run.apply(steps),
        }
    }

    /// Headers of our sets; `None` where there is nothing to observe.
    pub(crate) async fn headers(&self) -> Result<Option<BTreeMap<SetId, Header>>, CommandError> {
        match self {
            Self::Ipset(ipset) => ipset.headers().await.map(Some),
            Self::DryRun(_) => Ok(None),
        }
    }

    /// Everything in our sets; `None` where there is nothing to observe.
    pub(crate) async fn observe(&self, clock: &Clock) -> Result<Option<Kernel>, CommandError> {
        match self {
            Self::Ipset(ipset) => ipset.observe(clock).await.map(Some),
            Self::DryRun(_) => Ok(None),
        }
    }

    /// Whether the kernel's set holds the address; `None` where there is no kernel set.
    pub(crate) async fn test(&self, set: SetId, address: IpAddr) -> Result<Option<bool>, CommandError> {
        match self {
            Self::Ipset(ipset) => ipset.test(set, address).await.map(Some),
            Self::DryRun(_) => Ok(None),
        }
    }
}
