//! fail2ban as the peer: the same rule in its words, in folders of its own, in a namespace.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use tests::netns::Namespace;
use tests::portcullis::wait_for;

use crate::process::is_installed;

/// Where packages put its actions.
const ACTIONS: &str = "/etc/fail2ban/action.d";
/// The built-in rule `forceful-browsing`, for lines whose fields stand in Traefik's order.
const FILTER: &str = r#"[Definition]
failregex = ^\{"ClientAddr":"<HOST>:\d+",.*"DownstreamStatus":40[1-5],
ignoreregex = "RequestPath":"[^"?]*\.(?:png|txt|jpg|ico|js|css|ttf|woff2?)/*["?]
datepattern = "StartUTC":"%%Y-%%m-%%dT%%H:%%M:%%S\.%%f\d*Z"
"#;

/// Whether it can take part.
pub(crate) fn available() -> bool {
    ["fail2ban-server", "fail2ban-client", "fail2ban-regex"].iter().all(|program| is_installed(program))
        && Path::new(ACTIONS).join("iptables.conf").is_file()
}

/// Writes the filter into `folder`.
pub(crate) fn write_filter(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("bench.conf");
    fs::write(&path, FILTER).context("could not write the filter for fail2ban")?;
    Ok(path)
}

/// `fail2ban-regex` over a log.
pub(crate) fn regex(log: &Path, filter: &Path) -> Command {
    let mut command = Command::new("fail2ban-regex");
    // Times without a zone are UTC here.
    command.env("TZ", "UTC").arg(log).arg(filter);
    command
}

/// How many lines `fail2ban-regex` found to match, of what it printed.
pub(crate) fn matched(printed: &str) -> Option<u64> {
    let line = printed.lines().find(|line| line.starts_with("Lines: "))?;
    let before = line.split(" matched").next()?;
    before.rsplit(' ').next()?.parse().ok()
}

/// A running `fail2ban-server`. Ended when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts it in `namespace`, with all that it writes in `folder`, to follow `log`; returns when its jail runs.
    pub(crate) fn start(namespace: &Namespace, folder: &Path, log: &Path) -> Result<Self> {
        let config = folder.join("fail2ban");
        write_config(&config, log).context("could not write a configuration for fail2ban")?;
        let socket = config.join("socket").display().to_string();
        let child = Command::new("ip")
            .args(["netns", "exec", namespace.name(), "fail2ban-server", "-f", "-c"])
            .arg(&config)
            .args(["-s", &socket, "start"])
            .env("TZ", "UTC")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("could not start fail2ban-server")?;
        let server = Self { child, log: config.join("log") };
        wait_for("fail2ban's jail runs", || {
            let mut ask = Command::new("fail2ban-client");
            ask.args(["-s", &socket, "status", "bench"]).stdin(Stdio::null()).stdout(Stdio::null());
            ask.stderr(Stdio::null()).status().ok()?.success().then_some(())
        })
        .with_context(|| server.log_text())?;
        Ok(server)
    }

    /// How it waits for lines: `polling`, `pyinotify`.
    pub(crate) fn backend(&self) -> String {
        let text = self.log_text();
        let backend = text.lines().find_map(|line| line.rsplit_once("Initiated '"));
        backend.and_then(|(_, rest)| rest.split('\'').next()).unwrap_or("unknown").to_owned()
    }

    /// What it has logged.
    fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Fails when it did.
    pub(crate) fn no_errors(&self) -> Result<()> {
        let text = self.log_text();
        let errors: Vec<&str> = text.lines().filter(|line| line.contains(" ERROR ")).take(5).collect();
        ensure!(errors.is_empty(), "fail2ban logged errors:\n{}", errors.join("\n"));
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its namespace is about to go: nothing needs to be undone in order.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_config(config: &Path, log: &Path) -> Result<()> {
    fs::create_dir_all(config.join("filter.d"))?;
    write_filter(&config.join("filter.d"))?;
    symlink(ACTIONS, config.join("action.d"))?;
    let at = |name: &str| config.join(name).display().to_string();
    fs::write(
        config.join("fail2ban.conf"),
        format!(
            "[Definition]\nloglevel = INFO\nlogtarget = {}\nsyslogsocket = auto\nsocket = {}\npidfile = {}\n\
             dbfile = {}\ndbpurgeage = 1d\ndbmaxmatches = 10\n",
            at("log"),
            at("socket"),
            at("pid"),
            at("db"),
        ),
    )?;
    // Its actions drop as ours do. `auto` is pyinotify where that is installed, else polling once a second.
    fs::write(
        config.join("jail.conf"),
        format!(
            "[DEFAULT]\nbackend = auto\nusedns = no\nmaxretry = 15\nfindtime = 60\nbantime = 3600\n\
             [bench]\nenabled = true\nfilter = bench\nlogpath = {}\n\
             action = iptables[type=allports, protocol=all, name=bench, blocktype=DROP]\n",
            log.display(),
        ),
    )?;
    Ok(())
}
