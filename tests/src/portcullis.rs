//! The built binary, driven from outside: verbs that run to their end, and the service.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use proto::time::Clock;
use serde_json::Value;

use crate::process::Process;

/// Whatever has not happened by then does not happen. Far above what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// Looks again and again until `look` finds something; fails with `what` when it never does.
pub fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> Result<T> {
    wait_until(what, PATIENCE, look)
}

/// As [`wait_for`], for what may take longer, or must come sooner.
pub fn wait_until<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let clock = Clock::system();
    let end = clock.now().saturating_add(patience);
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        ensure!(clock.now() < end, "waited {patience:?} in vain: {what}");
        std::thread::sleep(PAUSE);
    }
}

/// The binary, built once by cargo with the profile of the tests.
pub fn binary() -> Result<&'static Path> {
    static BINARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BINARY.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    built.as_deref().map_err(|error| anyhow::Error::msg(error.clone()))
}

fn build() -> Result<PathBuf> {
    // target/debug/deps/main-0123 -> target/debug/portcullis
    let own = std::env::current_exe().context("could not find this test")?;
    let folder = own.parent().and_then(Path::parent).context("could not find the target directory")?;
    let binary = folder.join("portcullis");
    // Set by tests/run.sh where the tests run as another user than the one who built them.
    if std::env::var_os("PORTCULLIS_BUILT").is_none() {
        let release = folder.ends_with("release").then_some("--release");
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", "deploy"])
            .args(release)
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status()
            .context("could not start cargo")?;
        ensure!(status.success(), "portcullis does not build");
    }
    ensure!(binary.is_file(), "no {}", binary.display());
    Ok(binary)
}

/// What a verb answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// Data.
    pub stdout: String,
    /// All else.
    pub stderr: String,
}

impl Answer {
    /// Each line of stdout as JSON.
    pub fn json(&self) -> Result<Vec<Value>> {
        self.stdout
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}")))
            .collect()
    }

    /// This answer, if its exit code is `code`.
    pub fn expect(self, code: i32) -> Result<Self> {
        ensure!(self.code == code, "exit {} instead of {code}:\n{}{}", self.code, self.stdout, self.stderr);
        Ok(self)
    }
}

/// Runs a verb to its end.
pub fn portcullis<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Result<Answer> {
    let output = Command::new("timeout")
        .args(["--signal=KILL", "60"])
        .arg(binary()?)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .context("could not start portcullis")?;
    let text = |bytes| String::from_utf8(bytes).context("portcullis printed what is not UTF-8");
    Ok(Answer { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout)?, stderr: text(output.stderr)? })
}

/// Runs a verb from within `namespace` against the service at `socket`.
pub fn verb(namespace: &str, socket: &Path, args: &[&str]) -> Result<Answer> {
    let output = Command::new("ip")
        .args(["netns", "exec", namespace, "timeout", "--signal=KILL", "60"])
        .arg(binary()?)
        .args(args)
        .arg("--socket")
        .arg(socket)
        .stdin(Stdio::null())
        .output()
        .context("could not start portcullis")?;
    Ok(Answer {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout)?,
        stderr: String::from_utf8(output.stderr)?,
    })
}

/// `portcullis run`, in a folder of its own and in a network namespace. Killed when dropped.
#[derive(Debug)]
pub struct Service {
    folder: PathBuf,
    namespace: String,
    process: Process,
}

impl Service {
    /// Starts it in `namespace`; `folder` holds `portcullis.toml` and stays when it ends, so that it can start again.
    /// Returns when it answers.
    pub fn start(folder: &Path, namespace: &str) -> Result<Self> {
        let binary = binary()?.display().to_string();
        Self::start_as(folder, namespace, &[&binary])
    }

    /// The same, with `input` as its standard input.
    pub fn start_reading(folder: &Path, namespace: &str, input: &Path) -> Result<Self> {
        let (binary, input) = (binary()?.display().to_string(), input.display().to_string());
        Self::start_as(folder, namespace, &["sh", "-c", "input=$0; exec \"$@\" <\"$input\"", &input, &binary])
    }

    /// The same, by the command `portcullis`, which ends in the binary.
    pub fn start_as(folder: &Path, namespace: &str, portcullis: &[&str]) -> Result<Self> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).args(portcullis);
        command.args(["run", "-c"]).arg(folder.join("portcullis.toml"));
        let process = Process::start("portcullis run", &mut command, &folder.join("portcullis.log"))?;
        let mut service = Self { folder: folder.to_owned(), namespace: namespace.to_owned(), process };
        let mut ended = None;
        let ready = wait_for("portcullis answers", || {
            ended = service.process.ended();
            let answers = service.verb(&["bans", "--json"]).is_ok_and(|answer| answer.code == 0);
            (answers || ended.is_some()).then_some(())
        });
        if ready.is_err() || ended.is_some() {
            bail!("portcullis run did not come up ({ended:?}):\n{}", service.log_text());
        }
        Ok(service)
    }

    /// Runs a verb against it, from within its namespace.
    pub fn verb(&self, args: &[&str]) -> Result<Answer> {
        verb(&self.namespace, &self.folder.join("api.sock"), args)
    }

    /// The records of `bans --json`.
    pub fn bans(&self) -> Result<Vec<Value>> {
        self.verb(&["bans", "--json"])?.expect(0)?.json()
    }

    /// What it has logged, in this and in former lives.
    pub fn log_text(&self) -> String {
        self.process.log_text()
    }

    /// Fails when it has logged an error. Call it at the end of every test.
    pub fn no_errors(&self) -> Result<()> {
        self.process.no_errors()
    }

    /// SIGKILL: nothing is tidied up.
    pub fn kill(mut self) -> Result<()> {
        self.no_errors()?;
        self.process.kill()
    }

    /// SIGTERM, and waits for an orderly end.
    pub fn stop(mut self) -> Result<()> {
        self.process.stop()?;
        self.no_errors()
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) -> Result<()> {
        self.process.signal(name)
    }
}

impl Drop for Service {
    #[expect(clippy::print_stderr, reason = "what a failed test leaves for its reader")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("portcullis logged:\n{}", self.log_text());
        }
    }
}
