//! `ban`: an operator's ban.

use proto::api::BanRequest;

use super::{Exit, connect, moment};
use crate::args::{BanArgs, whole_seconds};
use crate::output::Output;

pub(super) async fn run(args: BanArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let seconds = (!args.permanent).then(|| whole_seconds(args.length));
    let request = BanRequest { target: args.target, seconds, reason: args.reason };
    let reply = connect(&args.client)?.ban(&request).await?;
    if args.client.json {
        out.json(&reply.ban)?;
    } else {
        let until = reply
            .ban
            .expires_at
            .map_or_else(|| "until it is lifted".to_owned(), |end| format!("until {}", moment(end)));
        out.line(&format!("banned {} {until}", reply.ban.target))?;
    }
    Ok(Exit::Done)
}
