//! `unban`: lifts bans, and says what still covers those that were asked for.

use proto::api::UnbanRequest;

use super::{Exit, connect};
use crate::args::UnbanArgs;
use crate::output::Output;

pub(super) async fn run(args: UnbanArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let request = UnbanRequest { targets: args.targets, all: args.all };
    let reply = connect(&args.client)?.unban(&request).await?;
    if args.client.json {
        out.json(&reply)?;
    } else {
        for target in &reply.lifted {
            out.line(&format!("unbanned {target}"))?;
        }
        for target in &reply.not_banned {
            out.line(&format!("{target} was not banned"))?;
        }
        for covered in &reply.covered {
            let by = covered.by;
            out.line(&format!(
                "{} is still banned with {by}; `portcullis unban {by}` frees all of it",
                covered.target
            ))?;
        }
        if args.all && reply.lifted.is_empty() {
            out.line("nobody was banned")?;
        }
    }
    Ok(if reply.covered.is_empty() { Exit::Done } else { Exit::Failed })
}
