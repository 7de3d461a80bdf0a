//! `allow`: never ban a target from now on. `--me` keeps administrators from locking themselves out.

use std::net::IpAddr;

use proto::api::AllowRequest;
use proto::net::{Target, parse_addr};

use super::{Exit, Misuse, connect, join, moment};
use crate::args::{AllowArgs, whole_seconds};
use crate::output::Output;

pub(super) async fn run(args: AllowArgs, out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let target = match args.target {
        Some(target) => target,
        None => Target::host(ssh_peer(|name| std::env::var(name).ok())?),
    };
    let request = AllowRequest { target, seconds: args.length.map(whole_seconds) };
    let reply = connect(&args.client)?.allow(&request).await?;
    if args.client.json {
        out.json(&reply)?;
        return Ok(Exit::Done);
    }
    let until = reply.until.map_or_else(|| "for ever".to_owned(), |end| format!("until {}", moment(end)));
    out.line(&format!("{} is allowed {until}: nobody bans it", reply.target))?;
    if !reply.lifted.is_empty() {
        out.line(&format!("unbanned {}", join(&reply.lifted)))?;
    }
    for covered in &reply.covered {
        out.line(&format!("{} stays banned around it; firewalls let {} through", covered.by, covered.target))?;
    }
    Ok(Exit::Done)
}

/// The peer of the SSH session, as sshd(8) puts it into the environment: the first word of either variable. sudo drops
/// both unless told to keep them.
fn ssh_peer(variable: impl Fn(&str) -> Option<String>) -> Result<IpAddr, Misuse> {
    let value = variable("SSH_CONNECTION").or_else(|| variable("SSH_CLIENT")).ok_or_else(|| {
        let hint = "`--me` needs an SSH session: neither SSH_CONNECTION nor SSH_CLIENT is set";
        Misuse(format!("{hint} (with sudo: `sudo --preserve-env=SSH_CONNECTION portcullis allow --me`)"))
    })?;
    let address = value.split_whitespace().next().and_then(parse_addr);
    address.ok_or_else(|| Misuse(format!("`--me` found no address in the SSH session's {value:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ssh_peer_is_the_first_word() {
        let peer = |given: &'static [(&str, &str)]| {
            ssh_peer(|name| given.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
        };
        let v4 = peer(&[("SSH_CONNECTION", "192.0.2.7 50022 192.0.2.1 22"), ("SSH_CLIENT", "192.0.2.8 1 22")]);
        assert_eq!(v4.unwrap().to_string(), "192.0.2.7");
        assert_eq!(peer(&[("SSH_CLIENT", "fe80::1%eth0 50022 22")]).unwrap().to_string(), "fe80::1");
        assert!(peer(&[]).unwrap_err().to_string().contains("SSH_CONNECTION"));
        assert!(peer(&[("SSH_CLIENT", "UNKNOWN 0 0")]).unwrap_err().to_string().contains("UNKNOWN"));
    }
}
