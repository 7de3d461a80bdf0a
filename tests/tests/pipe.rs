//! Portcullis in a pipe: `ingest --stdout`, and standard input as a source.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proto::access::AccessLine;
use proto::time::Clock;
use serde_json::Value;
use tests::access::Access;
use tests::portcullis::{binary, portcullis, wait_for};

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/samples/access.log");

/// Portcullis with both ends of its pipe in our hands. Ended when dropped.
struct Pipe {
    child: Child,
    folder: tempfile::TempDir,
    input: Option<ChildStdin>,
    output: Option<BufReader<ChildStdout>>,
}

impl Pipe {
    fn start(args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        // What never comes would be waited for without an end.
        let mut command = Command::new("timeout");
        command.args(["--signal=KILL", "120"]).arg(binary().unwrap());
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take();
        let output = child.stdout.take().map(BufReader::new);
        Self { child, folder, input, output }
    }

    fn write(&mut self, text: &str) {
        self.input.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.output.as_mut().unwrap().read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "a line, not an end:\n{}", self.log());
        serde_json::from_str(&line).unwrap()
    }

    fn read_rest(&mut self) -> Vec<Value> {
        self.output.as_mut().unwrap().lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    fn ended(&mut self) -> ExitStatus {
        let status = wait_for("it ends", || self.child.try_wait().unwrap()).unwrap();
        assert!(!self.log().contains("ERROR") && !self.log().contains("panicked"), "{}", self.log());
        status
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        // It may have ended. The signal is passed on; SIGKILL would not be.
        let _sent =
            Command::new("kill").args(["-s", "TERM", &self.child.id().to_string()]).stderr(Stdio::null()).status();
        (self.input, self.output) = (None, None);
        let _ended = self.child.wait();
    }
}

/// Answers of the service with status 404, a millisecond apart, up to now.
fn probes(count: i64) -> String {
    let now = Clock::system().now().as_nanos();
    let client = "203.0.113.66".parse().unwrap();
    let probe = |i: i64| Access::new(now - (count - i) * 1_000_000, client, 404, format!("/probe/{i}?n={i}"));
    (0..count).map(|i| probe(i).render_json() + "\n").collect()
}

fn write(path: &Path, text: &str) {
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

#[test]
fn what_comes_out_is_what_the_log_says() {
    let sample = std::fs::read_to_string(SAMPLE).unwrap();
    let mut pipe = Pipe::start(&["ingest", "--stdout", "-"]);
    let mut input = pipe.input.take().unwrap();
    let given = sample.clone();
    let writer = std::thread::spawn(move || input.write_all(given.as_bytes()).unwrap());
    let told = pipe.read_rest();
    writer.join().unwrap();
    assert_eq!(pipe.ended().code(), Some(0));
    let logged = sample
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| serde_json::from_str::<Value>(line).unwrap_or_default());
    let (accesses, strange): (Vec<Value>, Vec<Value>) = logged.partition(|line| line["RequestMethod"].is_string());
    assert_eq!(told.len(), accesses.len(), "one for each access, whatever its status");
    assert!(!strange.is_empty() && pipe.log().contains(&format!("unparsed={}", strange.len())), "{}", pipe.log());
    for (told, logged) in told.iter().zip(&accesses) {
        let path = [&told["path"], &told["query"]].map(|part| part.as_str().unwrap_or_default());
        assert_eq!(path.join("?").trim_end_matches('?'), logged["RequestPath"].as_str().unwrap());
        assert_eq!(told["status"], logged["DownstreamStatus"]);
        assert_eq!(told["method"], logged["RequestMethod"]);
        assert_eq!(told["host"], logged["RequestHost"]);
        assert_eq!(told["user_agent"], logged["request_User-Agent"]);
        assert_eq!(told["username"].as_str().unwrap_or("-"), logged["ClientUsername"].as_str().unwrap_or("-"));
        let peer = logged["ClientAddr"].as_str().unwrap().rsplit_once(':').unwrap().0;
        assert_eq!(told["peer"], peer.trim_matches(['[', ']']));
        assert!(told["client"].is_string() != told["no_client"].is_string(), "{told}");
        assert!(told.get("offset").is_none(), "a pipe has no places: {told}");
        let text = told.to_string();
        let typed: AccessLine<'_> = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_value(&typed).unwrap(), *told, "no field that the type does not have");
    }
}

#[test]
fn a_line_comes_out_while_the_pipe_stays_open() {
    let mut pipe = Pipe::start(&["ingest", "--stdout"]);
    for i in 0..3 {
        pipe.write(&probes(1));
        assert_eq!(pipe.read()["status"], 404, "line {i}");
    }
}

#[test]
fn lines_that_are_no_accesses_never_come_out() {
    let mut pipe = Pipe::start(&["ingest", "--stdout"]);
    pipe.write("{\"level\":\"info\",\"msg\":\"x\"}\n\u{1b}[31mno entry\n\n");
    pipe.write(probes(1).trim_end());
    pipe.input = None;
    assert_eq!(pipe.read_rest().len(), 1, "the last line needs no end");
    assert_eq!(pipe.ended().code(), Some(0));
    let log = pipe.log();
    assert!(log.contains("lines=4") && log.contains("accesses=1") && log.contains("unparsed=2"), "{log}");
    assert!(log.contains("sample=") && !log.contains('\u{1b}'), "{log}");
}

#[test]
fn a_reader_that_has_gone_is_a_quiet_end() {
    let mut pipe = Pipe::start(&["ingest", "--stdout"]);
    pipe.write(&probes(1));
    pipe.read();
    pipe.output = None;
    let mut input = pipe.input.take().unwrap();
    let lines = probes(100);
    // Until nobody reads any more.
    while input.write_all(lines.as_bytes()).is_ok() {}
    assert_eq!(pipe.ended().code(), Some(0));
}

#[test]
fn a_slow_reader_stops_the_reading_and_loses_nothing() {
    let mut pipe = Pipe::start(&["ingest", "--stdout"]);
    // A full queue holds the accesses of some 33 MB of lines.
    let (chunk, chunks) = (probes(1000), 120);
    let mut input = pipe.input.take().unwrap();
    let (written, total) = (Arc::new(AtomicUsize::new(0)), chunk.len() * chunks);
    let progress = written.clone();
    let writer = std::thread::spawn(move || {
        for _ in 0..chunks {
            for part in chunk.as_bytes().chunks(4096) {
                input.write_all(part).unwrap();
                progress.fetch_add(part.len(), Ordering::Relaxed);
            }
        }
    });
    let mut before = usize::MAX;
    wait_for("the writer stands still", || {
        std::thread::sleep(Duration::from_millis(300));
        let now = written.load(Ordering::Relaxed);
        (std::mem::replace(&mut before, now) == now && now > 0).then_some(())
    })
    .unwrap();
    assert!(before < total / 2, "{before} of {total} bytes were taken while nobody read");
    assert_eq!(pipe.read_rest().len(), chunks * 1000);
    writer.join().unwrap();
    assert_eq!(pipe.ended().code(), Some(0));
}

#[test]
fn a_signal_ends_it_after_what_was_read_is_written() {
    let mut pipe = Pipe::start(&["ingest", "--stdout"]);
    pipe.write(&probes(200));
    pipe.read();
    pipe.signal("TERM");
    assert_eq!(pipe.read_rest().len(), 199, "and the end of the output, with the input still open");
    assert_eq!(pipe.ended().code(), Some(0));
}

#[test]
fn files_are_followed_from_their_beginning_and_lines_have_a_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    write(&path, &probes(2));
    let mut pipe = Pipe::start(&["ingest", "--stdout", &path.display().to_string()]);
    let (first, second) = (pipe.read(), pipe.read());
    let length = std::fs::metadata(&path).unwrap().len();
    write(&path, &probes(1));
    let third = pipe.read();
    assert_eq!((first["offset"].as_u64(), third["offset"].as_u64()), (Some(0), Some(length)));
    assert!(second["offset"].as_u64() > Some(0));
    assert_eq!(first["generation"].as_str().unwrap().len(), 16);
    assert_eq!(first["generation"], third["generation"]);
    pipe.signal("TERM");
    assert_eq!(pipe.read_rest(), [] as [Value; 0]);
    assert_eq!(pipe.ended().code(), Some(0));
}

#[test]
fn headers_that_a_rule_looks_at_come_out() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("portcullis.toml");
    let rule = "match = \"Header(`Referer`, `x`)\"\nmax_retry = 5\nfind_time = \"1m\"\nban_time = \"1m\"\n";
    std::fs::write(&config, format!("[detect.rules.a]\n{rule}")).unwrap();
    let mut pipe = Pipe::start(&["ingest", "--stdout", "-c", &config.display().to_string()]);
    pipe.write("{\"ClientHost\":\"192.0.2.1\",\"request_Referer\":\"y\",\"request_Accept\":\"z\"}\n");
    let told = pipe.read();
    assert_eq!(told["headers"], serde_json::json!({"Referer": "y"}));
}

#[test]
fn run_decides_bans_from_standard_input_and_ends_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let text = format!(
        "state_dir = {:?}\napi.socket = {:?}\nenforce.firewall.backend = \"none\"\n\
         [ingest.sources.pipe]\ntype = \"stdin\"\n",
        path("state"),
        path("api.sock")
    );
    std::fs::write(path("portcullis.toml"), text).unwrap();
    let mut pipe = Pipe::start(&["run", "-c", &path("portcullis.toml")]);
    pipe.write(&probes(15));
    wait_for("it is banned while the pipe is open", || {
        pipe.log().lines().any(|line| line.contains("Client banned") && line.contains("203.0.113.66")).then_some(())
    })
    .unwrap();
    pipe.input = None;
    assert_eq!(pipe.ended().code(), Some(0), "{}", pipe.log());
    assert!(pipe.log().contains("Stopped"), "{}", pipe.log());
}

#[test]
fn one_standard_input_feeds_one_source() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("portcullis.toml");
    std::fs::write(&path, "ingest.sources.a.type = 'stdin'\ningest.sources.b.type = 'stdin'\n").unwrap();
    let answer = portcullis(["check".as_ref(), "-c".as_ref(), path.as_os_str()]).unwrap().expect(64).unwrap();
    assert!(answer.stderr.starts_with("ingest.sources.b: ") && answer.stderr.contains("`a`"), "{answer:?}");
}
