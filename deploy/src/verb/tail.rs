//! `tail`: public events as they happen, until interrupted.

use anyhow::bail;
use proto::envelope::{CloudEvent, Data};

use super::{Exit, connect, moment};
use crate::args::ClientArgs;
use crate::output::Output;

pub(super) async fn run(args: ClientArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let mut events = connect(&args)?.tail().await?;
    while let Some(event) = events.next().await? {
        if args.json {
            out.json(&event)?;
        } else {
            out.line(&describe(&event))?;
        }
        out.flush()?;
    }
    bail!("portcullis has ended, and the events with it")
}

fn describe(event: &CloudEvent) -> String {
    let what = match &event.data {
        Data::Ban(ban) => {
            let until = ban.expires_at.map_or_else(|| "permanent".to_owned(), |end| format!("until {}", moment(end)));
            let reason = if ban.reason.is_empty() { String::new() } else { format!(": {}", ban.reason) };
            format!("{} by {} (ban {}, {until}){reason}", ban.target, ban.rule, ban.ban_count)
        }
        Data::Alarm(alarm) => format!("{}: {}", alarm.kind, alarm.text),
    };
    format!("{} {:<6} {what}", moment(event.time), event.kind.as_str())
}
