//! `bans`: what is in force now.

use proto::ban::{Ban, Origin};
use proto::time::Timestamp;

use super::{Exit, connect, moment, remaining};
use crate::args::ClientArgs;
use crate::output::Output;

/// Columns of [`row`].
pub(super) const HEADER: [&str; 7] = ["target", "rule", "origin", "count", "since", "remaining", "reason"];

pub(super) async fn run(args: ClientArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let reply = connect(&args)?.bans().await?;
    let bans = reply.bans.iter().flat_map(|record| &record.bans);
    if args.json {
        for ban in bans {
            out.json(ban)?;
        }
        return Ok(Exit::Done);
    }
    let now = out.now();
    out.table(HEADER, bans.map(|ban| row(ban, now)))?;
    if reply.bans.is_empty() && out.is_terminal() {
        out.line("nobody is banned")?;
    }
    Ok(Exit::Done)
}

pub(super) fn row(ban: &Ban, now: Timestamp) -> [String; 7] {
    let origin = match ban.origin {
        Origin::Detect => "detect",
        Origin::Operator => "operator",
    };
    [
        ban.target.to_string(),
        ban.rule.clone(),
        origin.to_owned(),
        ban.ban_count.to_string(),
        moment(ban.banned_at),
        remaining(ban.expires_at, now),
        ban.reason.clone(),
    ]
}
