//! One host of a cluster: its configuration, the roles that run on it, its access log and its kernel.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use proto::report::Role;

use crate::access::Access;
use crate::netns::Namespace;
use crate::portcullis::{Answer, binary, verb};
use crate::process::Process;

/// Sets in which bans stand, as an administrator sees them.
const BAN_SETS: [&str; 2] = ["portcullis-v4", "portcullis-v6"];

/// One host.
#[derive(Debug)]
pub struct Host {
    name: String,
    address: Ipv4Addr,
    namespace: Namespace,
    folder: PathBuf,
    skew_seconds: i64,
    roles: BTreeMap<Role, Process>,
}

impl Host {
    /// A host with a folder under `folder`; nothing runs on it yet.
    pub fn new(name: &str, address: Ipv4Addr, namespace: Namespace, folder: &Path) -> Result<Self> {
        let folder = folder.join(name);
        std::fs::create_dir_all(folder.join("state"))?;
        let host = Self { name: name.to_owned(), address, namespace, folder, skew_seconds: 0, roles: BTreeMap::new() };
        std::fs::write(host.access_log(), "")?;
        Ok(host)
    }

    /// Writes its configuration: what every host has, then the bus and whatever a test adds.
    pub fn configure(&self, bus: &str, extra: &str) -> Result<()> {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let text = format!(
            "node = \"{}\"\nstate_dir = \"{}\"\n[api]\nsocket = \"{}\"\n[telemetry]\nlog_format = \"json\"\n\
             [ingest.sources.traefik]\ntype = \"file\"\ninclude = [\"{}\"]\n[bus]\nkind = \"nats\"\n{bus}\n\
             [detect.escalation]\njitter = \"0%\"\n{extra}\n",
            self.name,
            path("state"),
            path("api.sock"),
            path("access.log"),
        );
        Ok(std::fs::write(self.folder.join("portcullis.toml"), text)?)
    }

    /// Its name, which is also that of its node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its network.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// What Traefik writes on it.
    pub fn access_log(&self) -> PathBuf {
        self.folder.join("access.log")
    }

    /// From their next start on, roles see the clock this much ahead, or behind when negative.
    pub fn skew(&mut self, seconds: i64) {
        self.skew_seconds = seconds;
    }

    /// From their next start on, roles call their node so.
    pub fn rename(&self, name: &str) -> Result<()> {
        let path = self.folder.join("portcullis.toml");
        let text = std::fs::read_to_string(&path)?;
        Ok(std::fs::write(&path, text.replacen(&self.name, name, 1))?)
    }

    /// Appends sections to its configuration, which a SIGHUP or the next start takes over.
    pub fn amend(&self, sections: &str) -> Result<()> {
        let mut file = OpenOptions::new().append(true).open(self.folder.join("portcullis.toml"))?;
        Ok(file.write_all(sections.as_bytes())?)
    }

    /// Starts a role, unless it runs.
    pub fn start(&mut self, role: Role) -> Result<()> {
        if self.roles.contains_key(&role) {
            return Ok(());
        }
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.namespace.name()]);
        if self.skew_seconds != 0 {
            command.arg("env").args(skewed(self.skew_seconds)?);
        }
        command.arg(binary()?).args([role.as_str(), "-c"]).arg(self.folder.join("portcullis.toml"));
        let name = format!("{} on {}", role.as_str(), self.name);
        let process = Process::start(&name, &mut command, &self.log(role))?;
        self.roles.insert(role, process);
        Ok(())
    }

    /// SIGKILL for a role, if it runs.
    pub fn kill(&mut self, role: Role) -> Result<()> {
        self.roles.remove(&role).map_or(Ok(()), |mut process| process.kill())
    }

    /// SIGTERM for a role, if it runs, and waits for its orderly end.
    pub fn stop(&mut self, role: Role) -> Result<()> {
        self.roles.remove(&role).map_or(Ok(()), |mut process| process.stop())
    }

    /// Sends a signal by name to a role, if it runs.
    pub fn signal(&self, role: Role, signal: &str) -> Result<()> {
        self.roles.get(&role).map_or(Ok(()), |process| process.signal(signal))
    }

    /// Fails when a role has ended by itself.
    pub fn check_alive(&mut self) -> Result<()> {
        for (role, process) in &mut self.roles {
            let ended = process.ended();
            ensure!(ended.is_none(), "{} on {} ended: {ended:?}\n{}", role.as_str(), self.name, process.log_text());
        }
        Ok(())
    }

    /// Runs a verb against the operator API of this host.
    pub fn verb(&self, args: &[&str]) -> Result<Answer> {
        verb(self.namespace.name(), &self.socket(), args)
    }

    /// Starts a verb that does not end by itself; what it prints is in its output.
    pub fn start_verb(&self, args: &[&str]) -> Result<Process> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.namespace.name()]).arg(binary()?);
        command.args(args).arg("--socket").arg(self.socket());
        Process::start(&args.join(" "), &mut command, &self.folder.join("verb.log"))
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("api.sock")
    }

    /// Appends the lines of `accesses` to its log, in one write: no line is seen in halves.
    pub fn write(&self, accesses: &[Access]) -> Result<()> {
        let lines: String = accesses.iter().map(|access| access.render_json() + "\n").collect();
        let mut log = OpenOptions::new().append(true).open(self.access_log())?;
        Ok(log.write_all(lines.as_bytes())?)
    }

    /// Whom its kernel bans, and for how many seconds from now; `None` = for ever.
    pub fn banned(&self) -> Result<BTreeMap<String, Option<u64>>> {
        Ok(parse_sets(&self.namespace.run("ipset", &["save"])?))
    }

    /// Takes away what `enforce` keeps on disk for its next start, as if it had never come to write it.
    pub fn remove_last_set(&self) -> Result<()> {
        match std::fs::remove_file(self.folder.join("state/enforce.json")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// What a role has logged, in all its lives.
    pub fn log_text(&self, role: Role) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log(role)).unwrap_or_default()).into_owned()
    }

    fn log(&self, role: Role) -> PathBuf {
        self.folder.join(format!("{}.log", role.as_str()))
    }

    /// Every error that a running role has logged. A panic fails at once.
    pub fn errors(&self) -> Result<Vec<String>> {
        let mut errors = Vec::new();
        for process in self.roles.values() {
            process.no_panics()?;
            errors.extend(process.errors());
        }
        Ok(errors)
    }
}

/// Members of our ban sets in the words of `ipset save`: `add SET MEMBER timeout 598 comment "..."`.
fn parse_sets(text: &str) -> BTreeMap<String, Option<u64>> {
    let mut banned = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let (Some("add"), Some(set), Some(member)) = (words.next(), words.next(), words.next()) else { continue };
        if BAN_SETS.contains(&set) {
            let seconds = words.skip_while(|word| *word != "timeout").nth(1).and_then(|number| number.parse().ok());
            banned.insert(member.to_owned(), seconds.filter(|seconds| *seconds != 0));
        }
    }
    banned
}

/// The environment in which libfaketime shows another wall clock. Clocks that measure stay as they are.
fn skewed(seconds: i64) -> Result<Vec<String>> {
    let folders = std::fs::read_dir("/usr/lib").context("could not list /usr/lib")?.flatten();
    let library = folders.map(|folder| folder.path().join("faketime/libfaketime.so.1")).find(|path| path.is_file());
    let library = library.context("libfaketime is missing: apt-get install faketime")?;
    Ok(vec![
        format!("LD_PRELOAD={}", library.display()),
        format!("FAKETIME={seconds:+}s"),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
        "NO_FAKE_STAT=1".to_owned(),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bans_are_told_from_other_sets() {
        let text = "create portcullis-v4 hash:net family inet timeout 0 comment\n\
                    add portcullis-v4 203.0.113.7 timeout 598 comment \"forceful-browsing\"\n\
                    add portcullis-v6 2001:db8::/64 timeout 0 comment \"operator\"\n\
                    add portcullis-guard-v4 10.0.0.0/8\nadd portcullis-new-v4 203.0.113.8 timeout 5\n";
        let expected = [("2001:db8::/64".to_owned(), None), ("203.0.113.7".to_owned(), Some(598))];
        assert_eq!(parse_sets(text), BTreeMap::from(expected));
    }
}
