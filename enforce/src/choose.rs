//! Which back end works on this host. Each that the configuration allows is tried for a moment, the best first, and the
//! first that works is taken. A dry run only looks whether it is there.

use std::time::Duration;

use proto::report::Problem;
use proto::time::{Clock, render_duration};

use crate::backend::dry_run::DryRun;
use crate::backend::ipset::{self, Ipset};
use crate::backend::iptables::Iptables;
use crate::backend::iptables::trial::Probe;
use crate::backend::nftables::Nftables;
use crate::backend::{Rules, Sets};
use crate::command::CommandError;
use crate::config::{BackendKind, Chains, FirewallConfig};
use crate::host;
use crate::plan::plain;
use crate::reconcile::chain_of;

/// How long it may take to tell whether one way works. A program that hangs is ended then.
const TRIAL_DEADLINE: Duration = Duration::from_secs(10);

/// A way to ban on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// iptables rules that look members of ipset's sets up.
    Ipset,
    /// Our own table of nf_tables.
    Nftables,
    /// An iptables rule a ban.
    Plain,
}

/// A method, and where it is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    method: Method,
    /// Also in the variant of iptables that the host does not use, which another program may not expect to be there.
    in_any_variant: bool,
}

impl Way {
    const fn new(method: Method, in_any_variant: bool) -> Self {
        Self { method, in_any_variant }
    }

    /// Those that a configuration allows, the best first.
    fn allowed(config: &FirewallConfig) -> &'static [Self] {
        const IPSET_IN_USE: Way = Way::new(Method::Ipset, false);
        const IPSET: Way = Way::new(Method::Ipset, true);
        const PLAIN: Way = Way::new(Method::Plain, true);
        const NFTABLES: Way = Way::new(Method::Nftables, false);
        match (config.backend, &config.chains) {
            (BackendKind::Auto, Chains::Auto) => &[IPSET_IN_USE, NFTABLES, IPSET, PLAIN],
            // Who lists chains wants bans in these, and nftables bans before all of them.
            (BackendKind::Auto, Chains::Listed(_)) | (BackendKind::Iptables, _) => &[IPSET, PLAIN],
            (BackendKind::Nftables, _) => &[NFTABLES],
            (BackendKind::None, _) => &[],
        }
    }
}

impl Method {
    /// The word for it in the configuration.
    pub(crate) fn backend(self) -> &'static str {
        match self {
            Self::Ipset | Self::Plain => "iptables",
            Self::Nftables => "nftables",
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::Ipset => "iptables with ipset",
            Self::Nftables => "nftables",
            Self::Plain => "plain iptables rules",
        }
    }
}

/// What was taken.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) method: Method,
    pub(crate) sets: Sets,
    /// None in a dry run without rules to look at.
    pub(crate) rules: Option<Rules>,
    /// What and why, for people.
    pub(crate) why: String,
    /// What is worse than it could be.
    pub(crate) limited: Option<Problem>,
}

/// Why nothing was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unchosen {
    /// Why and what to do, for people.
    pub(crate) text: String,
    /// What is better than all that may work could not be tried just now.
    pub(crate) is_undecided: bool,
}

/// How to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trial {
    /// Only look.
    DryRun,
    /// Rules that cannot be read just now will do: they may hold ours. What does not answer may do so next time.
    Patient,
    /// They will not, and it does not count: it has been so for long.
    Strict,
}

/// Tries what the configuration allows.
///
/// # Errors
/// Why nothing works.
pub(crate) async fn choose(config: &FirewallConfig, trial: Trial, clock: &Clock) -> Result<Chosen, Unchosen> {
    let dry_run = trial == Trial::DryRun;
    if !dry_run && !host::may_change_firewall() {
        let text = "cannot change the firewall: run as root or with CAP_NET_ADMIN; nobody is banned on this host";
        return Err(Unchosen { text: text.to_owned(), is_undecided: false });
    }
    let mut failed = Vec::new();
    for &way in Way::allowed(config) {
        let method = way.method;
        let attempted = tokio::time::timeout(TRIAL_DEADLINE, attempt(way, config, trial, clock)).await;
        match attempted.unwrap_or_else(|_| Err(Failure::silence())) {
            Ok((sets, rules)) => {
                let why = explain(method, config.backend, &failed);
                let limited = (method == Method::Plain && !dry_run).then(|| warn_of_plain(config, &failed));
                return Ok(Chosen { method, sets, rules, why, limited });
            }
            // A lock that is held says nothing of what works: to take another would be to give up what does.
            Err(Failure { reason, passing: true, .. }) if trial == Trial::Patient => {
                let name = method.describe();
                let text = format!("cannot tell yet whether {name} works here ({reason}); it is tried again");
                return Err(Unchosen { text, is_undecided: true });
            }
            // The same again is one reason.
            Err(failure)
                if failed.iter().any(|known: &Failed| known.0 == method && known.1.reason == failure.reason) => {}
            Err(failure) => failed.push((method, failure)),
        }
    }
    let text =
        format!("nobody is banned on this host: {}; {}; it is tried again", list(&failed), advise(config, &failed));
    // Where nothing works, a dry run still tells who would be banned.
    match (dry_run, Way::allowed(config).first()) {
        (true, Some(&Way { method, .. })) => {
            Ok(Chosen { method, sets: Sets::DryRun(DryRun), rules: None, why: text, limited: None })
        }
        _ => Err(Unchosen { text, is_undecided: false }),
    }
}

type Failed = (Method, Failure);

/// Why a way does not work.
struct Failure {
    reason: String,
    /// It may work in a moment.
    passing: bool,
    /// What makes it work, where that is known.
    remedy: Option<&'static str>,
}

impl Failure {
    fn silence() -> Self {
        let reason = format!("no answer within {}", render_duration(TRIAL_DEADLINE));
        Self { reason, passing: true, remedy: None }
    }

    fn not_installed(program: &str, remedy: &'static str) -> Self {
        Self { reason: format!("{program} is not installed"), passing: false, remedy: Some(remedy) }
    }

    /// A trial that failed. What may pass needs no remedy.
    fn refusal(error: &CommandError, remedy: &'static str) -> Self {
        let passing = error.is_passing();
        Self { reason: chain_of(error), passing, remedy: (!passing).then_some(remedy) }
    }

    fn of_nftables(error: &CommandError) -> Self {
        Self::refusal(error, if error.is_absence() { LOAD_NF_TABLES } else { LOAD_FOR_NF_TABLES })
    }
}

const INSTALL_IPTABLES: &str = "install iptables";
const INSTALL_IPSET: &str = "install ipset";
const LOAD_SETS: &str = "load the kernel module ip_set_hash_net";
const LOAD_MATCH: &str = "load the kernel module xt_set (and nft_compat, for iptables-nft)";
const LOAD_TIME: &str = "load the kernel modules xt_time and xt_comment (and nft_compat, for iptables-nft)";
const LOAD_NF_TABLES: &str = "load the kernel module nf_tables";
const LOAD_FOR_NF_TABLES: &str = "load the kernel modules nft_objref and nft_counter";

/// What to do where one of these is to work, each thing once.
fn advise(config: &FirewallConfig, failed: &[Failed]) -> String {
    let mut remedies: Vec<&str> = Vec::new();
    for remedy in failed.iter().filter_map(|(_, failure)| failure.remedy) {
        if !remedies.contains(&remedy) {
            remedies.push(remedy);
        }
    }
    match config.backend {
        BackendKind::Nftables | BackendKind::Iptables => remedies.push("set backend = \"auto\""),
        BackendKind::Auto if config.chains != Chains::Auto => remedies.push("leave chains to \"auto\""),
        BackendKind::Auto | BackendKind::None if remedies.is_empty() => remedies.push("see what holds it up"),
        BackendKind::Auto | BackendKind::None => {}
    }
    remedies.join(", or ")
}

fn list(failed: &[Failed]) -> String {
    let reason = |(method, failure): &Failed| {
        let verb = if *method == Method::Plain { "do" } else { "does" };
        format!("{} {verb} not work here ({})", method.describe(), failure.reason)
    };
    failed.iter().map(reason).collect::<Vec<_>>().join(", ")
}

fn explain(method: Method, backend: BackendKind, failed: &[Failed]) -> String {
    match (failed, backend) {
        ([], BackendKind::Auto) => format!("{}, the first choice of auto", method.describe()),
        ([], _) => format!("{}, as configured", method.describe()),
        ([(first, _), ..], _) if *first == method => {
            format!("{} in the variant that the host does not use, because {}", method.describe(), list(failed))
        }
        _ => format!("{}, because {}", method.describe(), list(failed)),
    }
}

fn warn_of_plain(config: &FirewallConfig, failed: &[Failed]) -> Problem {
    let remedy = failed.iter().find_map(|(method, failure)| failure.remedy.filter(|_| *method == Method::Ipset));
    let text = format!(
        "bans are plain iptables rules, which slow every packet down and are at most {}, because {}{}",
        plain::bans_max(config),
        list(failed),
        remedy.map_or_else(String::new, |remedy| format!("; {remedy}"))
    );
    Problem::warning(text)
}

async fn attempt(
    Way { method, in_any_variant }: Way,
    config: &FirewallConfig,
    trial: Trial,
    clock: &Clock,
) -> Result<(Sets, Option<Rules>), Failure> {
    let (dry_run, patient) = (trial == Trial::DryRun, trial == Trial::Patient);
    let mut iptables = Iptables::new(config.clone(), dry_run, clock.clone());
    let probe = Probe { patient, in_any_variant };
    if method != Method::Nftables && !iptables.is_installed().await {
        return Err(Failure::not_installed("iptables", INSTALL_IPTABLES));
    }
    let sets = match method {
        Method::Ipset => {
            let ipset = Ipset::find().ok_or_else(|| Failure::not_installed("ipset", INSTALL_IPSET))?;
            if !dry_run {
                try_ipset(&ipset, &mut iptables, probe).await?;
            }
            Sets::Ipset(ipset)
        }
        Method::Nftables => {
            let nftables = Nftables::new(config);
            if dry_run {
                nftables.is_there().await.map_err(|error| Failure::of_nftables(&error))?;
                return Ok((Sets::DryRun(DryRun), None));
            }
            nftables.probe().await.map_err(|error| Failure::of_nftables(&error))?;
            return Ok((Sets::Nftables(nftables.clone()), Some(Rules::Nftables(nftables))));
        }
        Method::Plain if dry_run => Sets::DryRun(DryRun),
        Method::Plain => {
            let rule = "-s 192.0.2.1/32 -m time --datestop 2037-12-31T00:00:00 -m comment --comment probe -j DROP";
            iptables.probe(rule, probe).await.map_err(|error| Failure::refusal(&error, LOAD_TIME))?;
            Sets::Plain(iptables.hold_bans().await)
        }
    };
    let rules = (!dry_run || host::may_change_firewall()).then(|| Rules::Iptables(Box::new(iptables)));
    Ok((if dry_run { Sets::DryRun(DryRun) } else { sets }, rules))
}

/// A set such as ours, and a rule that looks it up.
async fn try_ipset(ipset: &Ipset, iptables: &mut Iptables, probe: Probe) -> Result<(), Failure> {
    ipset.probe().await.map_err(|error| Failure::refusal(&error, LOAD_SETS))?;
    let rule = format!("-m set --match-set {} src -j RETURN", ipset::PROBE);
    let tried = iptables.probe(&rule, probe).await;
    ipset.end_probe().await;
    tried.map_err(|error| Failure::refusal(&error, LOAD_MATCH))
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn who_lists_chains_is_not_given_what_ignores_them() {
        let mut config = FirewallConfig::default();
        let methods = |config: &FirewallConfig| Way::allowed(config).iter().map(|way| way.method).collect::<Vec<_>>();
        assert!(methods(&config).contains(&Method::Nftables));
        config.chains = Chains::Listed(Vec::new());
        assert_eq!(methods(&config), [Method::Ipset, Method::Plain]);
    }

    #[test]
    fn legacy_is_not_woken_beside_nft_where_nftables_works() {
        let ways = Way::allowed(&FirewallConfig::default());
        let nftables = ways.iter().position(|way| way.method == Method::Nftables).unwrap();
        assert!(ways.iter().position(|way| way.in_any_variant).unwrap() > nftables);
        assert_eq!(
            ways.last().unwrap().method,
            Method::Plain,
            "sets are better than rules wherever they are looked up"
        );
        let text = explain(Method::Ipset, BackendKind::Auto, &[(Method::Ipset, Failure::silence())]);
        assert!(text.contains("in the variant that the host does not use"), "{text}");
    }

    #[test]
    fn auto_says_what_it_took_and_why_nothing_better() {
        let none = explain(Method::Ipset, BackendKind::Auto, &[]);
        assert_eq!(none, "iptables with ipset, the first choice of auto");
        let nftables = failed(Errno::EPROTONOSUPPORT);
        let failed = [(Method::Ipset, Failure::not_installed("ipset", INSTALL_IPSET)), nftables];
        let text = explain(Method::Plain, BackendKind::Auto, &failed);
        assert_eq!(
            text,
            "plain iptables rules, because iptables with ipset does not work here (ipset is not installed), nftables does \
             not work here (nf_tables: cannot try: Protocol not supported (os error 93))"
        );
        let warning = warn_of_plain(&FirewallConfig::default(), &failed).text;
        assert!(warning.contains("at most 1000") && warning.ends_with("; install ipset"), "{warning}");
    }

    /// nftables, where the kernel said this.
    fn failed(errno: Errno) -> Failed {
        let error = CommandError::Kernel { what: "try", source: errno.into() };
        (Method::Nftables, Failure::of_nftables(&error))
    }

    #[test]
    fn what_is_there_already_is_not_advised() {
        let said = |said: &str| CommandError::Failed { command: "ipset create".to_owned(), said: said.to_owned() };
        let sets = || (Method::Ipset, Failure::refusal(&said("Invalid argument"), LOAD_SETS));
        let config = FirewallConfig::default();
        let warning = warn_of_plain(&config, &[sets()]).text;
        assert!(warning.ends_with("load the kernel module ip_set_hash_net"), "ipset is installed: {warning}");
        assert!(advise(&config, &[failed(Errno::EINVAL)]).contains("module nf_tables"));
        let text = advise(&config, &[sets(), failed(Errno::ENOENT), sets()]);
        assert_eq!(
            text, "load the kernel module ip_set_hash_net, or load the kernel modules nft_objref and nft_counter",
            "nf_tables is there"
        );
        let locked = CommandError::Locked { command: "iptables-restore".to_owned(), said: "busy".to_owned() };
        let warning = warn_of_plain(&config, &[(Method::Ipset, Failure::refusal(&locked, LOAD_MATCH))]).text;
        assert!(warning.ends_with("busy)"), "what may pass needs no module: {warning}");
    }
}
