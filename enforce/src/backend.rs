//! The ways to enforce bans on a host. Each back end renders and applies steps and observes what is in force; it decides
//! nothing.

pub(crate) mod dry_run;
pub(crate) mod ipset;
pub(crate) mod iptables;
pub(crate) mod nftables;
pub(crate) mod plain;
pub(crate) mod subsystem;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proto::net::Target;
use proto::report::Problem;
use proto::time::Clock;

use crate::backend::dry_run::DryRun;
use crate::backend::ipset::{Header, Ipset};
use crate::backend::iptables::Iptables;
use crate::backend::nftables::Nftables;
use crate::backend::plain::Plain;
use crate::command::CommandError;
use crate::plan::{Family, Kernel, SetId, Step};

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

/// What a short look at our sets says.
#[derive(Debug)]
pub(crate) enum Look {
    /// How each set was made, and its size.
    Headers(BTreeMap<SetId, Header>),
    /// Nobody but us has changed anything since members were last observed.
    Unchanged,
    /// Somebody may have.
    Changed,
    /// There is nothing to observe.
    Nothing,
}

/// Where members are kept.
#[derive(Clone, Debug)]
pub(crate) enum Sets {
    /// In kernel sets of ipset.
    Ipset(Ipset),
    /// In kernel sets of nf_tables.
    Nftables(Nftables),
    /// In rules.
    Plain(Plain),
    /// Nowhere; what would be done is logged.
    DryRun(DryRun),
}

impl Sets {
    /// Carries the steps out, in order.
    pub(crate) async fn apply(&self, steps: &[Step]) -> Applied {
        match self {
            Self::Ipset(ipset) => ipset.apply(steps).await,
            Self::Nftables(nftables) => nftables.apply(steps).await,
            Self::Plain(plain) => plain.apply(steps).await,
            Self::DryRun(dry_run) => dry_run.apply(steps),
        }
    }

    /// Looks whether everything should be observed.
    pub(crate) async fn look(&self) -> Result<Look, CommandError> {
        match self {
            Self::Ipset(ipset) => ipset.headers().await.map(Look::Headers),
            Self::Nftables(nftables) => {
                nftables.is_unchanged().await.map(|same| if same { Look::Unchanged } else { Look::Changed })
            }
            // Its rules are looked at as rules.
            Self::Plain(_) => Ok(Look::Unchanged),
            Self::DryRun(_) => Ok(Look::Nothing),
        }
    }

    /// Everything in our sets; `None` where there is nothing to observe.
    pub(crate) async fn observe(&self, clock: &Clock) -> Result<Option<Kernel>, CommandError> {
        match self {
            Self::Ipset(ipset) => ipset.observe(clock).await.map(Some),
            Self::Nftables(nftables) => nftables.observe(clock).await.map(Some),
            Self::Plain(plain) => Ok(Some(plain.observe().await)),
            Self::DryRun(_) => Ok(None),
        }
    }

    /// Whether the kernel's set holds the address; `None` where there is no kernel set.
    pub(crate) async fn test(&self, set: SetId, address: IpAddr) -> Result<Option<bool>, CommandError> {
        match self {
            Self::Ipset(ipset) => ipset.test(set, address).await.map(Some),
            Self::Nftables(nftables) => nftables.test(set, address).await.map(Some),
            Self::Plain(_) | Self::DryRun(_) => Ok(None),
        }
    }

    /// Where people find the ban.
    pub(crate) fn describe(&self, target: &Target) -> String {
        let set = SetId::Bans(Family::of(target));
        match self {
            Self::Nftables(_) => format!("in set {}", nftables::describe_ban(target)),
            Self::Plain(_) => "a rule of its own".to_owned(),
            Self::Ipset(_) | Self::DryRun(_) => format!("in set {}", set.name()),
        }
    }

    /// Bans held at most, where that is less than anyone would configure.
    pub(crate) async fn bans_max(&self) -> Option<u32> {
        match self {
            Self::Plain(plain) => Some(plain.bans_max().await),
            Self::Ipset(_) | Self::Nftables(_) | Self::DryRun(_) => None,
        }
    }
}

/// What a look at the rules brought about.
#[derive(Debug, Default)]
pub(crate) struct RulesOutcome {
    /// What is not as it should be.
    pub(crate) problems: Vec<Problem>,
    /// What was chosen and why, a line a family.
    pub(crate) detail: Vec<String>,
    /// Steps taken, by kind.
    pub(crate) steps: Vec<&'static str>,
    /// Families in which something had drifted.
    pub(crate) repairs: u64,
    /// Packets and bytes dropped since our chains were made.
    pub(crate) dropped: (u64, u64),
    /// Where each family's bans stand now, for people.
    pub(crate) places: BTreeMap<Family, String>,
    /// Families whose rules could not be looked at.
    pub(crate) unseen: BTreeSet<Family>,
    /// Families whose rules could not be put in place, or not be lifted.
    pub(crate) failed: usize,
    /// Families in which no configured chain exists, now.
    pub(crate) placeless: BTreeSet<Family>,
    /// Rules were to go, because of a pause.
    pub(crate) lifts: bool,
    /// A change that began before does not end, and may yet come into effect.
    pub(crate) unfinished: bool,
}

/// What looks up members in the path of packets.
#[derive(Debug)]
pub(crate) enum Rules {
    /// Chains and jumps of iptables.
    Iptables(Box<Iptables>),
    /// Our own table.
    Nftables(Nftables),
}

impl Rules {
    /// Looks at the rules of these families and puts right what differs.
    pub(crate) async fn resync(&mut self, families: &[Family]) -> RulesOutcome {
        match self {
            Self::Iptables(iptables) => iptables.resync(families).await,
            Self::Nftables(nftables) => nftables.resync(families).await,
        }
    }

    /// Removes rules of ours in these families that could ban without a member in the sets.
    pub(crate) async fn lift(&mut self, families: &[Family]) -> RulesOutcome {
        match self {
            Self::Iptables(iptables) => iptables.lift(families).await,
            // They only look members up.
            Self::Nftables(_) => RulesOutcome { lifts: true, ..RulesOutcome::default() },
        }
    }
}
