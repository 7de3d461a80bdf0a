//! `pause` and `resume`: nobody is banned for a while.

use proto::api::{PauseReply, PauseRequest};

use super::{Exit, connect, describe_pause};
use crate::args::{ClientArgs, PauseArgs, whole_seconds};
use crate::output::Output;

pub(super) async fn pause(args: PauseArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let request = PauseRequest { seconds: args.length.map(whole_seconds) };
    show(&connect(&args.client)?.pause(&request).await?, args.client.json, out)
}

pub(super) async fn resume(args: ClientArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    show(&connect(&args)?.resume().await?, args.json, out)
}

fn show(reply: &PauseReply, json: bool, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    if json {
        out.json(reply)?;
    } else {
        let now = out.now();
        let text = reply.paused.map_or_else(
            || "not paused: bans that are not over are in force".to_owned(),
            |pause| describe_pause(&pause, now),
        );
        out.line(&text)?;
    }
    Ok(Exit::Done)
}
