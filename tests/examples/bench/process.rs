//! What one run of a program costs: time, processor time, and memory at its peak.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use proto::time::Clock;

/// Between two looks at the memory of a process. The kernel keeps the peak, so only growth in its last moment is missed.
const POLL: Duration = Duration::from_millis(3);
/// A run that takes longer is given up: far above what a slow machine needs for ten million lines.
const RUN_MAX: Duration = Duration::from_secs(900);

/// One run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// From start to end, in seconds.
    pub(crate) seconds: f64,
    /// User and system time of all its threads, in seconds.
    pub(crate) cpu_seconds: f64,
    /// Peak of its resident memory in KiB; 0 when it ended before it was looked at.
    pub(crate) peak_kib: u64,
}

/// Runs a program to its end, its output into `stdout`; fails when it fails.
pub(crate) fn measure(command: &mut Command, stdout: &Path) -> Result<Run> {
    let name = command.get_program().display().to_string();
    let output = File::create(stdout).with_context(|| format!("could not create {}", stdout.display()))?;
    let clock = Clock::system();
    let cpu_before = cpu_of_children()?;
    let start = clock.now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("could not start {name}"))?;
    let pid = child.id();
    let (ended, end) = mpsc::channel::<()>();
    // Looking goes on beside the waiting, so that the end is seen when it comes.
    let watcher = std::thread::spawn(move || {
        let mut peak_kib = 0;
        let looks = RUN_MAX.as_millis() / POLL.as_millis();
        for _ in 0..looks {
            peak_kib = peak(pid).unwrap_or(0).max(peak_kib);
            if end.recv_timeout(POLL) != Err(mpsc::RecvTimeoutError::Timeout) {
                return peak_kib;
            }
        }
        // Still our child: nobody has waited for it.
        let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        peak_kib
    });
    let status = child.wait().with_context(|| format!("could not wait for {name}"))?;
    let seconds = clock.now().since(start).as_secs_f64();
    drop(ended);
    let Ok(peak_kib) = watcher.join() else { bail!("the look at {name} panicked") };
    ensure!(status.success(), "{name} ended with {status}");
    // Of the `kill` above it holds nothing: then the run has failed.
    Ok(Run { seconds, cpu_seconds: cpu_of_children()? - cpu_before, peak_kib })
}

/// Peak of a process's resident memory in KiB (`VmHWM`, see proc(5)); `None` when it is gone.
pub(crate) fn peak(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.split_whitespace().next()?.parse().ok()
}

/// User and system time of all children that were waited for, in seconds.
fn cpu_of_children() -> Result<f64> {
    cpu_of(UsageWho::RUSAGE_CHILDREN)
}

/// User and system time of this process, in seconds: with what the kernel does for its packets when it sends them.
pub(crate) fn cpu_of_self() -> Result<f64> {
    cpu_of(UsageWho::RUSAGE_SELF)
}

fn cpu_of(who: UsageWho) -> Result<f64> {
    let usage = getrusage(who).context("could not read processor time")?;
    let seconds = |time: nix::sys::time::TimeVal| {
        Duration::new(time.tv_sec().try_into().unwrap_or(0), u32::try_from(time.tv_usec()).unwrap_or(0) * 1_000)
    };
    Ok((seconds(usage.user_time()) + seconds(usage.system_time())).as_secs_f64())
}

/// Whether a program can be started.
pub(crate) fn is_installed(program: &str) -> bool {
    let quiet = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    quiet.is_ok_and(|status| status.success())
}
