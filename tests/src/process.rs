//! A process that a test starts, with all that it prints in a file. Killed when dropped.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::portcullis::wait_for;

/// One process. Its standard output and error are appended to files, so that several lives of it share them.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, whose standard error goes to `log`, and its output beside it with the ending `.out`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(append(&log.with_extension("out"))?)
            .stderr(append(log)?)
            .spawn()
            .with_context(|| format!("could not start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// How it ended; `None` while it runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// What it has logged, in this and in former lives.
    pub fn log_text(&self) -> String {
        read(&self.log)
    }

    /// What it has printed as data, in this and in former lives.
    pub fn output_text(&self) -> String {
        read(&self.log.with_extension("out"))
    }

    /// Fails when it has logged an error. Call it at the end of every test.
    pub fn no_errors(&self) -> Result<()> {
        let errors = self.errors();
        ensure!(errors.is_empty(), "{} logged errors:\n{}", self.name, errors.join("\n"));
        Ok(())
    }

    /// Fails when it has panicked.
    pub fn no_panics(&self) -> Result<()> {
        let log = self.log_text();
        ensure!(!log.contains("panicked at"), "{} panicked:\n{log}", self.name);
        Ok(())
    }

    /// Every error that it has logged, with its name.
    pub fn errors(&self) -> Vec<String> {
        let log = self.log_text();
        log.lines().filter(|line| is_error(line)).map(|line| format!("{}: {line}", self.name)).collect()
    }

    /// SIGKILL: nothing is tidied up.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("could not kill {}", self.name))?;
        self.child.wait().with_context(|| format!("could not wait for {}", self.name))?;
        Ok(())
    }

    /// SIGTERM, and waits for an orderly end.
    pub fn stop(&mut self) -> Result<()> {
        self.signal("TERM")?;
        let status = wait_for(&format!("{} ends", self.name), || self.ended())?;
        ensure!(status.success(), "{} ended with {status}:\n{}", self.name, self.log_text());
        Ok(())
    }

    /// Sends a signal by name.
    pub fn signal(&self, signal: &str) -> Result<()> {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", signal, &pid]).status().context("could not start kill")?;
        ensure!(status.success(), "could not send {signal} to {}", self.name);
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already ended, or to be ended: either is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn append(path: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.with_context(|| format!("could not open {}", path.display()))
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

/// Whether a line of a JSON or text log is of level ERROR, or a panic.
fn is_error(line: &str) -> bool {
    let json = serde_json::from_str::<Value>(line).ok();
    match json.as_ref().and_then(|entry| entry.get("level")).and_then(Value::as_str) {
        Some(level) => level.eq_ignore_ascii_case("error"),
        None => line.contains("ERROR") || line.contains("panicked"),
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
