//! The command line: every verb and flag, as typed. Nothing is opened or looked up here.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use proto::net::{NotATarget, Target, parse_addr};
use proto::time::parse_duration;

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed or (status) degraded, 2 misused, 64 bad configuration.

Examples:
  portcullis replay access.log                who would have been banned, and when
  portcullis run --dry-run access.log         the same live, changing nothing
  portcullis run                              what /etc/portcullis/portcullis.toml says
  portcullis explain 203.0.113.7              why it is banned, or why not";

/// Bans HTTP attackers: reads Traefik access logs, decides bans, and has firewalls drop the clients.
#[derive(Debug, Parser)]
#[command(name = "portcullis", version, about, after_help = EXIT_CODES, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run all roles in one process: read logs, decide bans, enforce them
    Run(RunArgs),
    /// Read this host's logs and send what may matter to the cluster
    Ingest(IngestArgs),
    /// Decide bans for the whole cluster; any number may run, one is active
    Detect(RoleArgs),
    /// Keep this host's firewall equal to the cluster's ban set, or remove all that is ours
    Enforce(EnforceArgs),
    /// Report every mistake of a configuration at once, or what it would run
    Check(CheckArgs),
    /// Tell who would have been banned, when and why; touches nothing
    Replay(ReplayArgs),
    /// Ban an address or a network
    Ban(BanArgs),
    /// Lift bans
    Unban(UnbanArgs),
    /// Never ban an address or a network from now on, and unban it at once
    Allow(AllowArgs),
    /// Lift every ban on all hosts, and ban nobody meanwhile
    Pause(PauseArgs),
    /// End a pause: bans that are not over are in force again
    Resume(ClientArgs),
    /// List the bans in force
    Bans(ClientArgs),
    /// Show the health of every role; exit 1 when anything is degraded
    Status(ClientArgs),
    /// Tell why an address is banned, or why it is not
    Explain(ExplainArgs),
    /// Print bans, unbans and alarms as they happen
    Tail(ClientArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Print the manual page
    Man,
}

/// Which configuration.
#[derive(Clone, Debug, Default, Args)]
pub struct ConfigArgs {
    /// Configuration file [default: /etc/portcullis/portcullis.toml, where there is one]
    #[arg(short, long = "config", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
SIGHUP reloads rules, lists and limits. The first SIGTERM or SIGINT ends in order, the second at once, unless it comes
within 100 ms of the first. Bans stay in
force when it ends; `portcullis enforce --teardown` removes them.

Examples:
  portcullis run /var/log/traefik/access.log
  portcullis run --dry-run -c portcullis.toml")]
pub struct RunArgs {
    /// Which configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Report what would be done, and change no firewall
    #[arg(long)]
    pub dry_run: bool,
    /// Access logs to follow, in place of the configured sources; `*` and `?` may stand in quotes, `-` is standard input
    #[arg(value_name = "LOG")]
    pub logs: Vec<PathBuf>,
}

/// Of `ingest`.
#[derive(Debug, Args)]
#[command(after_help = "\
As a role it works over NATS: `[bus]` with kind = \"nats\" and urls. With --stdout it needs neither bus nor state: each
access becomes a JSON object on standard output (deploy/schema/access.v1.schema.json), whether a rule can match it or
not; lines that are no accesses are counted on standard error. It ends when standard input does or its reader has gone;
log files are followed until a signal. SIGHUP reloads what can be changed without a restart.

Examples:
  portcullis ingest                                       this host's part of a cluster
  tail -F access.log | portcullis ingest --stdout - | jq .client
  portcullis ingest --stdout - < access.log               and ends")]
pub struct IngestArgs {
    /// Which configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Write accesses to standard output, one JSON object a line, and send nothing
    #[arg(long)]
    pub stdout: bool,
    /// Access logs to follow from their beginning, in place of the configured sources; `-` is standard input, which is also
    /// read when there is no source at all
    #[arg(value_name = "LOG", requires = "stdout")]
    pub logs: Vec<PathBuf>,
}

/// Of a role that runs by itself.
#[derive(Debug, Args)]
#[command(after_help = "\
Roles that run by themselves work over NATS: `[bus]` with kind = \"nats\" and urls. `portcullis run` needs none.
SIGHUP reloads what can be changed without a restart. The first SIGTERM or SIGINT ends in order, the second at once.")]
pub struct RoleArgs {
    /// Which configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Of `enforce`.
#[derive(Debug, Args)]
#[command(after_help = "\
As a role it works over NATS: `[bus]` with kind = \"nats\" and urls. Bans stay in force when it ends.

--teardown works while `run` or `enforce` runs on this host: a file `paused` in state_dir has it lift all bans first and
keeps it from putting anything back, until the file is removed. Such a file may be written by hand as well. What cannot
be removed is named with the reason, and the exit code is 1. One that does not let go within two minutes has to be stopped.

Examples:
  portcullis enforce                          follow the cluster's ban set
  portcullis enforce --teardown --dry-run     list what would be removed, and whom it would pause
  portcullis enforce --teardown")]
pub struct EnforceArgs {
    /// Remove every chain, jump and set that Portcullis made
    #[arg(long)]
    pub teardown: bool,
    /// Report what would be done, and change no firewall; with --teardown: list what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Which configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Of `check`.
#[derive(Debug, Args)]
#[command(after_help = "\
Mistakes go to standard error, one a line with its key; exit 64. A summary of what would run goes to standard output.

Example:
  portcullis check -c portcullis.toml")]
pub struct CheckArgs {
    /// Which configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Decide by line
    Auto,
    /// Traefik's JSON
    Json,
    /// Common log format, Traefik's or generic
    Clf,
}

/// Of `replay`.
#[derive(Debug, Args)]
#[command(after_help = "\
Files are merged by the time of their events. Names in never_ban are not resolved. The same input prints the same bytes.

Examples:
  portcullis replay /var/log/traefik/access.log*
  portcullis replay --lines access.log.gz | less
  portcullis replay --json access.log | jq .target")]
pub struct ReplayArgs {
    /// Which configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Show each line's client, the rules it matched, and why not
    #[arg(long)]
    pub lines: bool,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
    /// How the lines are written
    #[arg(long, value_enum, default_value_t = LogFormat::Auto)]
    pub format: LogFormat,
    /// Log files, plain, .gz or .zst
    #[arg(value_name = "LOG", required = true)]
    pub logs: Vec<PathBuf>,
}

/// How to reach the running Portcullis, and how to print its answer.
#[derive(Clone, Debug, Default, Args)]
pub struct ClientArgs {
    /// Socket of the operator API [default: the configured one, else /run/portcullis/api.sock]
    #[arg(long, value_name = "PATH", conflicts_with_all = ["url", "token_file", "ca_file"])]
    pub socket: Option<PathBuf>,
    /// Operator API of another host, such as https://detect-1.example:9478 [env: PORTCULLIS_URL]
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// File with the token for --url; else the variable PORTCULLIS_TOKEN holds it
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Authorities (PEM) that the certificate of --url must come from [default: the system's]
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// Of `ban`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portcullis ban 203.0.113.7
  portcullis ban 2001:db8::/48 --for 1d --reason 'credential stuffing'
  portcullis ban 203.0.113.0/24 --permanent")]
pub struct BanArgs {
    /// Address or network
    #[arg(value_parser = target)]
    pub target: Target,
    /// Length of the ban, such as 10m, 1h 30m or 7d
    #[arg(long = "for", value_name = "DURATION", value_parser = length, default_value = "1h")]
    pub length: Duration,
    /// Ban until it is lifted
    #[arg(long, conflicts_with = "length")]
    pub permanent: bool,
    /// Why, for people
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub reason: String,
    /// How to reach it.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Of `unban`.
#[derive(Debug, Args)]
#[command(after_help = "\
An IPv6 address also frees the prefix that it is counted by. A wider ban that covers it stays and is named: exit 1.
The count of offences begins anew.

Examples:
  portcullis unban 203.0.113.7 203.0.113.8
  portcullis unban --all")]
pub struct UnbanArgs {
    /// Addresses or networks
    #[arg(value_name = "TARGET", value_parser = target, required_unless_present = "all")]
    pub targets: Vec<Target>,
    /// Everybody
    #[arg(long, conflicts_with = "targets")]
    pub all: bool,
    /// How to reach it.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Of `allow`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portcullis allow 198.51.100.7
  portcullis allow --me --for 24h             the address that this SSH session comes from")]
pub struct AllowArgs {
    /// Address or network
    #[arg(value_name = "TARGET", value_parser = target, required_unless_present = "me")]
    pub target: Option<Target>,
    /// The address that this SSH session comes from
    #[arg(long, conflicts_with = "target")]
    pub me: bool,
    /// For how long, such as 24h [default: for ever]
    #[arg(long = "for", value_name = "DURATION", value_parser = length)]
    pub length: Option<Duration>,
    /// How to reach it.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Of `pause`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  portcullis pause --for 1h")]
pub struct PauseArgs {
    /// For how long, such as 1h [default: until `portcullis resume`]
    #[arg(long = "for", value_name = "DURATION", value_parser = length)]
    pub length: Option<Duration>,
    /// How to reach it.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Of `explain`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  portcullis explain 203.0.113.7")]
pub struct ExplainArgs {
    /// Address
    #[arg(value_parser = address)]
    pub address: IpAddr,
    /// How to reach it.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Of `completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  portcullis completions bash > /etc/bash_completion.d/portcullis")]
pub struct CompletionsArgs {
    /// Which shell
    pub shell: Shell,
}

fn target(text: &str) -> Result<Target, NotATarget> {
    text.parse()
}

fn address(text: &str) -> Result<IpAddr, String> {
    parse_addr(text).ok_or_else(|| format!("expected an IP address, got {text:?}"))
}

fn length(text: &str) -> Result<Duration, String> {
    let length = parse_duration(text)?;
    if length < Duration::from_secs(1) { Err("expected at least 1s".to_owned()) } else { Ok(length) }
}

/// A length in whole seconds, rounded up, as the API takes it.
pub fn whole_seconds(length: Duration) -> u64 {
    length.as_secs().saturating_add(u64::from(length.subsec_nanos() > 0))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &[&str]) -> Result<Verb, clap::error::ErrorKind> {
        let words = std::iter::once("portcullis").chain(words.iter().copied());
        Cli::try_parse_from(words).map(|cli| cli.verb).map_err(|error| error.kind())
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_ban_lasts_an_hour_unless_told() {
        let Verb::Ban(args) = parse(&["ban", "::ffff:192.0.2.77/120"]).unwrap() else { panic!("not a ban") };
        assert_eq!((args.target.to_string().as_str(), args.length), ("192.0.2.0/24", Duration::from_secs(3600)));
        let Verb::Ban(args) = parse(&["ban", "192.0.2.1", "--permanent"]).unwrap() else { panic!("not a ban") };
        assert!(args.permanent);
        assert_eq!(whole_seconds(Duration::from_millis(1500)), 2);
    }

    #[test]
    fn misuse_is_refused() {
        use clap::error::ErrorKind::{ArgumentConflict, MissingRequiredArgument, ValueValidation};
        for (words, kind) in [
            (&["ban", "host.example"][..], ValueValidation),
            (&["ban", "192.0.2.1", "--for", "10"], ValueValidation),
            (&["ban", "192.0.2.1", "--for", "10ms"], ValueValidation),
            (&["ban", "192.0.2.1", "--for", "1h", "--permanent"], ArgumentConflict),
            (&["unban"], MissingRequiredArgument),
            (&["unban", "--all", "192.0.2.1"], ArgumentConflict),
            (&["allow"], MissingRequiredArgument),
            (&["allow", "--me", "192.0.2.1"], ArgumentConflict),
            (&["explain", "192.0.2.0/24"], ValueValidation),
            (&["replay"], MissingRequiredArgument),
            (&["ingest", "access.log"], MissingRequiredArgument),
            (&["status", "--socket", "/x", "--url", "https://x"], ArgumentConflict),
            (&["status", "--socket", "/x", "--token-file", "/t"], ArgumentConflict),
        ] {
            assert_eq!(parse(words).unwrap_err(), kind, "{words:?}");
        }
    }

    #[test]
    fn every_verb_has_help_that_fits_a_line() {
        for verb in Cli::command().get_subcommands() {
            let about = verb.get_about().map(ToString::to_string).unwrap_or_default();
            // Beside the longest verb in 100 columns.
            assert!((5..=84).contains(&about.len()) && !about.ends_with('.'), "{}: {about:?}", verb.get_name());
        }
    }
}
