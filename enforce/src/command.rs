//! Running the host's programs: without a shell, with a deadline, with what they said when they fail.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::errno::Errno;
use proto::time::render_duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

/// A program that runs longer is killed. Filling a set with a million members takes about 10 s.
const DEADLINE: Duration = Duration::from_secs(30);
/// Bytes of output that are kept. A million listed members make about 70 MB.
const OUTPUT_MAX: u64 = 256 << 20;
/// Bytes of error text that are kept.
const STDERR_MAX: u64 = 4096;
/// Where system programs are when PATH does not say so.
const SYSTEM_DIRS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// A program could not be run, or failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It could not be started or talked to.
    #[error("cannot run {program}")]
    Run {
        /// Its path.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was killed at the deadline.
    #[error("{program} was still running after {}", render_duration(DEADLINE))]
    Deadline {
        /// Its path.
        program: String,
    },
    /// It may still come into effect.
    #[error("`{command}` does not end; nothing is changed until it does")]
    Unfinished {
        /// The command line.
        command: String,
    },
    /// nf_tables said no, or nothing.
    #[error("nf_tables: cannot {what}")]
    Kernel {
        /// What it was asked for.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// It is not on this host.
    #[error("{program} is not installed")]
    NotInstalled {
        /// Its name.
        program: &'static str,
    },
    /// Somebody held the lock that all users of iptables share.
    #[error("`{command}` waited for the lock of iptables in vain: {said}")]
    Locked {
        /// The command line.
        command: String,
        /// Its error text, in one line.
        said: String,
    },
    /// It said no.
    #[error("`{command}` failed: {said}")]
    Failed {
        /// The command line.
        command: String,
        /// Its error text, in one line.
        said: String,
    },
}

impl CommandError {
    /// Whether it may end by itself, so that it says nothing of what the kernel can do.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Locked { .. } | Self::Deadline { .. } | Self::Unfinished { .. })
    }

    /// Whether the kernel lacks the subsystem that was asked.
    pub(crate) fn is_absence(&self) -> bool {
        // The last is netlink's answer where nf_tables is not built in.
        let absent = [Errno::EPROTONOSUPPORT, Errno::EAFNOSUPPORT, Errno::EOPNOTSUPP, Errno::EINVAL];
        let said = match self {
            Self::Kernel { source, .. } => source.raw_os_error(),
            _ => None,
        };
        said.is_some_and(|code| absent.contains(&Errno::from_raw(code)))
    }
}

/// What a program left behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) success: bool,
    /// `None` = a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    /// In one line.
    pub(crate) stderr: String,
}

/// Finds a program in PATH, then where system programs are.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&path).chain(SYSTEM_DIRS.map(PathBuf::from));
    dirs.map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// A program that was started and waits for its input.
#[derive(Debug)]
pub(crate) struct Started {
    name: String,
    child: Child,
}

/// Starts a program; what it is to do comes with its input. It is killed when dropped.
pub(crate) fn start(program: &Path, args: &[&str], stdin: Stdio) -> Result<Started, CommandError> {
    let name = program.display().to_string();
    let started = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    match started {
        Ok(child) => Ok(Started { name, child }),
        Err(source) => Err(CommandError::Run { program: name, source }),
    }
}

impl Started {
    /// Whether it still waits.
    pub(crate) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills it, as somebody else might.
    #[cfg(test)]
    pub(crate) async fn end(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Gives it all of its input, and waits for its end. Its failure is not an error here.
    pub(crate) async fn finish(self, input: &[u8]) -> Result<Ended, CommandError> {
        let Self { name, mut child } = self;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let write = async {
            if let Some(mut stdin) = stdin {
                // A program that stops reading says why when it ends.
                let _ = stdin.write_all(input).await;
            }
        };
        let work = async {
            let ((), out, err, status) =
                tokio::join!(write, read(stdout, OUTPUT_MAX), read(stderr, STDERR_MAX), child.wait());
            Ok::<_, io::Error>((out?, err?, status?))
        };
        match tokio::time::timeout(DEADLINE, work).await {
            Ok(Ok((stdout, stderr, status))) => {
                let (success, code) = (status.success(), status.code());
                Ok(Ended { success, code, stdout, stderr: one_line(&stderr) })
            }
            Ok(Err(source)) => Err(CommandError::Run { program: name, source }),
            Err(_) => Err(CommandError::Deadline { program: name }),
        }
    }
}

/// Runs a program without input to its end. Its failure is not an error here.
pub(crate) async fn run(program: &Path, args: &[&str]) -> Result<Ended, CommandError> {
    start(program, args, Stdio::null())?.finish(&[]).await
}

/// Runs a program that has to succeed.
pub(crate) async fn succeed(program: &Path, args: &[&str]) -> Result<Vec<u8>, CommandError> {
    let ended = run(program, args).await?;
    if ended.success {
        return Ok(ended.stdout);
    }
    Err(CommandError::Failed { command: format!("{} {}", program.display(), args.join(" ")), said: ended.stderr })
}

async fn read(pipe: Option<impl AsyncRead + Unpin>, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        (&mut pipe).take(max).read_to_end(&mut bytes).await?;
        // Read on, so that the program does not wait for us.
        tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    }
    Ok(bytes)
}

/// What a program said, for a log line: trimmed, in one line, printable.
pub(crate) fn one_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(STDERR_MAX as usize)]);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    #[test]
    fn a_failure_says_which_command_and_why() {
        let shell = find("sh").unwrap();
        let error = block(succeed(&shell, &["-c", "echo first >&2; echo second >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().ends_with("failed: first; second"), "{error}");
    }

    #[test]
    fn a_kernel_without_nf_tables_is_told_from_one_that_fails() {
        let kernel = |errno: Errno| CommandError::Kernel { what: "look", source: errno.into() };
        assert!(kernel(Errno::EINVAL).is_absence() && kernel(Errno::EPROTONOSUPPORT).is_absence());
        assert!(!kernel(Errno::EPERM).is_absence() && !kernel(Errno::ENOBUFS).is_absence());
    }

    #[test]
    fn a_program_that_does_not_read_its_input_does_no_harm() {
        let deaf = async { start(&find("true").unwrap(), &[], Stdio::piped())?.finish(&vec![b'x'; 1 << 20]).await };
        assert!(block(deaf).unwrap().success);
        assert!(matches!(block(run(Path::new("/nonexistent"), &[])), Err(CommandError::Run { .. })));
    }
}
