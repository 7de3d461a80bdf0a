//! A host with a peer, each a network namespace, and the parts of a test that run in them.

use std::env;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, sleep};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use super::nftables;

/// Polls of a state that has to come, 50 ms apart.
const POLLS_MAX: usize = 200;

/// A host with a client's namespace at its other end.
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) variant: &'static str,
    pub(crate) state: TempDir,
}

impl Host {
    pub(crate) fn new(variant: &'static str) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("pc-host-{}-{number}", std::process::id());
        let host = Self { name, variant, state: tempfile::tempdir().unwrap() };
        let peer = host.peer();
        for ns in [&host.name, &peer] {
            run("ip", &["netns", "add", ns]);
            run("ip", &["-n", ns, "link", "set", "lo", "up"]);
        }
        run("ip", &["-n", &host.name, "link", "add", "pc0", "type", "veth", "peer", "name", "pc1", "netns", &peer]);
        for (ns, link, addresses) in [
            (&host.name, "pc0", &["10.77.0.1/24", "fd77::1/64"][..]),
            (&peer, "pc1", &["10.77.0.2/24", "10.77.0.3/24", "fd77::2/64", "fd77::3/64"][..]),
        ] {
            for address in addresses {
                let v6: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
                run("ip", &[&["-n", ns, "addr", "add", address, "dev", link][..], v6].concat());
            }
            run("ip", &["-n", ns, "link", "set", link, "up"]);
        }
        // A rule of someone else decides which variant is in use.
        host.iptables("4", "-A INPUT -s 198.18.0.1 -j DROP");
        host.iptables("6", "-A INPUT -s 2001:db8::bad -j DROP");
        host
    }

    pub(crate) fn peer(&self) -> String {
        self.name.replace("host", "peer")
    }

    /// Runs a command in the host's namespace; its output, if it succeeded.
    pub(crate) fn try_run(&self, line: &str) -> Option<String> {
        self.output(line).ok()
    }

    pub(crate) fn run(&self, line: &str) -> String {
        self.output(line).unwrap_or_else(|said| panic!("`{line}` failed: {said}"))
    }

    /// What a command printed, or what it said as it failed.
    fn output(&self, line: &str) -> Result<String, String> {
        let output = Command::new("ip").args(["netns", "exec", &self.name]).args(line.split(' ')).output().unwrap();
        let [printed, said] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        if output.status.success() { Ok(printed) } else { Err(said) }
    }

    /// The variant of iptables: that of others where bans are in nftables.
    pub(crate) fn iptables_variant(&self) -> &str {
        if self.variant == "nftables" { "nft" } else { self.variant }
    }

    /// A configuration that looks at rules every second.
    pub(crate) fn quick(&self) -> String {
        self.config("{}")
    }

    /// The same with further keys of `[enforce.firewall]`.
    pub(crate) fn config(&self, keys: &str) -> String {
        let mut firewall: Value = serde_json::from_str(keys).unwrap();
        if firewall["resync_interval"].is_null() {
            firewall["resync_interval"] = "1s".into();
        }
        if self.variant == "nftables" {
            firewall["backend"] = "nftables".into();
        }
        serde_json::json!({ "firewall": firewall }).to_string()
    }

    pub(crate) fn iptables(&self, family: &str, rest: &str) -> String {
        let name = if family == "4" { "iptables" } else { "ip6tables" };
        self.run(&format!("{name}-{} -w 5 {rest}", self.iptables_variant()))
    }

    /// Rules of both families, without comments and counters.
    pub(crate) fn rules(&self) -> Vec<String> {
        let saved = ["iptables", "ip6tables"].map(|name| self.run(&format!("{name}-{}-save", self.iptables_variant())));
        saved.iter().flat_map(|saved| saved.lines()).filter(|line| line.starts_with("-A")).map(str::to_owned).collect()
    }

    pub(crate) fn foreign(&self) -> Vec<String> {
        self.rules().into_iter().filter(|rule| !rule.contains("PORTCULLIS")).collect()
    }

    pub(crate) fn enforcer(&self, config: &str) -> Part {
        self.enforcer_after("", config)
    }

    /// Finds a stand-in in `dir` for a program of this variant: it notes each call in `calls`, runs `shell`, then becomes
    /// the program. Returns what to run before the enforcer.
    pub(crate) fn stand_in(&self, dir: &Path, suffix: &str, shell: &str) -> String {
        for family in ["iptables", "ip6tables"] {
            let name = format!("{family}-{}-{suffix}", self.variant);
            let path = dir.join(&name);
            let dir = dir.display();
            let script =
                format!("#!/bin/sh\ncd {dir}\necho >> calls\n{shell}\nPATH=${{PATH#*:}}\nexec {name} \"$@\"\n");
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        format!("export PATH={}:$PATH", dir.display())
    }

    /// A program in `dir`, which comes before all others after the shell that is returned.
    pub(crate) fn program(&self, dir: &Path, name: &str, shell: &str) -> String {
        let made = dir.join(format!("{name}.new"));
        fs::write(&made, format!("#!/bin/sh\ncd {}\n{shell}\n", dir.display())).unwrap();
        fs::set_permissions(&made, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(made, dir.join(name)).unwrap();
        format!("export PATH={}:$PATH", dir.display())
    }

    /// Runs a teardown beside the enforcer of this host; what it removed and what is left.
    pub(crate) fn teardown_beside(&self, config: &str) -> String {
        let own = env::current_exe().unwrap();
        let told =
            self.run(&format!("{} --inside teardown-beside {config} {}", own.display(), self.state.path().display()));
        told.trim_end().to_owned()
    }

    pub(crate) fn enforcer_after(&self, shell: &str, config: &str) -> Part {
        let args = ["enforcer", config, self.state.path().to_str().unwrap(), "for-real"];
        let part = Part::after(shell, &self.name, &args);
        part.ask("publish");
        part.wait_for_report();
        part
    }

    pub(crate) fn client(&self, from: &str) -> Part {
        let to = if from.contains(':') { "fd77::1" } else { "10.77.0.1" };
        Part::new(&self.peer(), &["client", from, to])
    }

    pub(crate) fn server(&self) -> Part {
        let server = Part::new(&self.name, &["server"]);
        server.read();
        server
    }

    pub(crate) fn holds(&self, address: &str) -> bool {
        if self.variant == "nftables" {
            return nftables::holds(self, address);
        }
        let set = if address.contains(':') { "portcullis-v6" } else { "portcullis-v4" };
        self.try_run(&format!("ipset -q test {set} {address}")).is_some()
    }

    pub(crate) fn timeout(&self, address: &str) -> Option<u64> {
        let saved = self.run("ipset save portcullis-v4");
        let line = saved.lines().find(|line| line.starts_with(&format!("add portcullis-v4 {address} ")))?;
        line.split(' ').skip_while(|word| *word != "timeout").nth(1)?.parse().ok()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for ns in [&self.name, &self.peer()] {
            drop(Namespace(ns.clone()));
        }
    }
}

/// Is removed in the end.
pub(crate) struct Namespace(pub(crate) String);

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

pub(crate) fn run(program: &str, args: &[&str]) {
    assert!(Command::new(program).args(args).status().unwrap().success(), "{program} {args:?}");
}

/// A part of the test that runs in a namespace.
pub(crate) struct Part {
    child: std::cell::RefCell<Child>,
    pipes: std::cell::RefCell<Option<(ChildStdin, BufReader<ChildStdout>)>>,
}

impl Part {
    pub(crate) fn new(ns: &str, args: &[&str]) -> Self {
        Self::after("", ns, args)
    }

    /// Runs a line of shell first. It has the mounts to itself, as `ip netns exec` makes a mount namespace.
    pub(crate) fn after(shell: &str, ns: &str, args: &[&str]) -> Self {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", ns, "sh", "-ec", &format!("{shell}\nexec \"$0\" \"$@\"")]);
        command.arg(env::current_exe().unwrap()).arg("--inside").args(args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let pipes = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child: child.into(), pipes: Some(pipes).into() }
    }

    pub(crate) fn read(&self) -> String {
        let mut line = String::new();
        self.pipes.borrow_mut().as_mut().unwrap().1.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "a part ended early");
        line.trim_end().to_owned()
    }

    pub(crate) fn ask(&self, command: &str) -> String {
        writeln!(self.pipes.borrow_mut().as_mut().unwrap().0, "{command}").unwrap();
        self.read()
    }

    pub(crate) fn through(&self, command: &str) -> bool {
        self.ask(command) == "true"
    }

    pub(crate) fn report(&self) -> Value {
        serde_json::from_str(&self.ask("report")).unwrap()
    }

    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let text: String = serde_json::from_str(&self.ask("metrics")).unwrap();
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// The role is up, its rules are in place and it knows the ban set.
    pub(crate) fn wait_for_report(&self) {
        until("the enforcer is up", || {
            let backend = &self.report()["backends"][0];
            backend["revision"].as_u64() > Some(0)
                && backend["detail"].as_array().is_some_and(|lines| !lines.is_empty())
        });
    }

    /// Ends it in good order.
    pub(crate) fn stop(self) {
        drop(self.pipes.borrow_mut().take());
        assert!(self.child.borrow_mut().wait().unwrap().success());
    }
}

impl Part {
    /// SIGKILL: nothing is tidied up.
    pub(crate) fn kill(self) {
        let mut child = self.child.borrow_mut();
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        drop(self.pipes.borrow_mut().take());
        let mut child = self.child.borrow_mut();
        if thread::panicking() {
            let _ = child.kill();
        }
        let _ = child.wait();
    }
}

pub(crate) fn until(what: &str, state: impl FnMut() -> bool) {
    until_in(POLLS_MAX, what, state);
}

/// The like of what takes its time by design.
pub(crate) fn until_at_last(what: &str, state: impl FnMut() -> bool) {
    until_in(9 * POLLS_MAX, what, state);
}

fn until_in(polls: usize, what: &str, mut state: impl FnMut() -> bool) {
    for _ in 0..polls {
        if state() {
            return;
        }
        sleep(Duration::from_millis(50));
    }
    panic!("it never came true that {what}");
}

/// Shell that puts nothing in the place of programs.
pub(crate) fn hide(pattern: &str) -> String {
    format!("for f in {pattern}; do mount --bind /dev/null \"$f\"; done")
}
