//! The built binary, driven from outside: verbs that run to their end, and the service.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use proto::time::Clock;
use serde_json::Value;

/// Whatever has not happened by then does not happen. Far above what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// Looks again and again until `look` finds something; fails with `what` when it never does.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let clock = Clock::system();
    let end = clock.now().saturating_add(PATIENCE);
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        ensure!(clock.now() < end, "waited {PATIENCE:?} in vain: {what}");
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

/// `portcullis run`, in a folder of its own and in a network namespace. Killed when dropped.
#[derive(Debug)]
pub struct Service {
    folder: PathBuf,
    namespace: String,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
}

impl Service {
    /// Starts it in `namespace`; `folder` holds `portcullis.toml` and stays when it ends, so that it can start again.
    /// Returns when it answers.
    pub fn start(folder: &Path, namespace: &str) -> Result<Self> {
        let mut child = Command::new("ip")
            .args(["netns", "exec", namespace])
            .arg(binary()?)
            .args(["run", "-c"])
            .arg(folder.join("portcullis.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("could not start portcullis run")?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = child.stderr.take().context("no stderr")?;
        let lines = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if let Ok(mut lines) = lines.lock() {
                    lines.push(line);
                }
            }
        });
        let mut service = Self { folder: folder.to_owned(), namespace: namespace.to_owned(), child, log };
        let mut ended = None;
        let ready = wait_for("portcullis answers", || {
            ended = service.child.try_wait().ok().flatten();
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
        let output = Command::new("ip")
            .args(["netns", "exec", &self.namespace, "timeout", "--signal=KILL", "60"])
            .arg(binary()?)
            .args(args)
            .arg("--socket")
            .arg(self.folder.join("api.sock"))
            .stdin(Stdio::null())
            .output()
            .context("could not start portcullis")?;
        Ok(Answer {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout)?,
            stderr: String::from_utf8(output.stderr)?,
        })
    }

    /// The records of `bans --json`.
    pub fn bans(&self) -> Result<Vec<Value>> {
        self.verb(&["bans", "--json"])?.expect(0)?.json()
    }

    /// What it has logged.
    pub fn log_text(&self) -> String {
        let mut text = String::new();
        if let Ok(lines) = self.log.lock() {
            for line in lines.iter() {
                let _ = writeln!(text, "{line}");
            }
        }
        text
    }

    /// Fails when it has logged an error. Call it at the end of every test.
    pub fn no_errors(&self) -> Result<()> {
        let log = self.log_text();
        let errors: Vec<&str> = log.lines().filter(|line| is_error(line)).collect();
        ensure!(errors.is_empty(), "portcullis logged errors:\n{}", errors.join("\n"));
        Ok(())
    }

    /// SIGKILL: nothing is tidied up.
    pub fn kill(mut self) -> Result<()> {
        self.no_errors()?;
        self.child.kill().context("could not kill portcullis")?;
        self.child.wait().context("could not wait for portcullis")?;
        Ok(())
    }

    /// SIGTERM, and waits for an orderly end.
    pub fn stop(mut self) -> Result<()> {
        self.signal("TERM")?;
        let status: ExitStatus = wait_for("portcullis ends", || self.child.try_wait().ok().flatten())?;
        ensure!(status.success(), "portcullis ended with {status}:\n{}", self.log_text());
        self.no_errors()
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) -> Result<()> {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status().context("could not start kill")?;
        ensure!(status.success(), "could not send {name} to portcullis");
        Ok(())
    }
}

/// Whether a line of a JSON or text log is of level ERROR, or a panic.
fn is_error(line: &str) -> bool {
    let json = serde_json::from_str::<Value>(line).ok();
    match json.as_ref().and_then(|entry| entry.get("level")).and_then(Value::as_str) {
        Some(level) => level.eq_ignore_ascii_case("error"),
        None => line.contains("ERROR") || line.contains("panicked"),
    }
}

impl Drop for Service {
    #[expect(clippy::print_stderr, reason = "what a failed test leaves for its reader")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("portcullis logged:\n{}", self.log_text());
        }
        // Already ended, or to be ended: either is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_in_a_log_is_seen() {
        assert!(is_error(r#"{"timestamp":"x","level":"ERROR","fields":{"message":"Task failed"}}"#));
        assert!(is_error("2026-03-02T08:00:00Z ERROR Task failed"));
        assert!(is_error("thread 'main' panicked at x.rs"));
        assert!(!is_error(r#"{"level":"INFO","fields":{"message":"No ERROR here"}}"#));
    }
}
