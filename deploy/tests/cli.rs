//! The binary as a shell sees it: exit codes, what goes where, and a reader that goes away.

#![expect(clippy::unwrap_used, reason = "in a test, that is a failure")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};

fn portcullis(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
    command.args(words).stdin(Stdio::null()).env_remove("SSH_CONNECTION").env_remove("SSH_CLIENT");
    command
}

fn run(words: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = portcullis(words).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

#[test]
fn misuse_is_2_and_says_so_on_standard_error() {
    for (words, said) in [
        (&["ban", "nobody"][..], "expected an IP address"),
        (&["detect", "--nats", "x"], "unexpected argument"),
        (&["allow", "--me"], "SSH_CONNECTION"),
    ] {
        let (code, stdout, stderr) = run(words);
        assert_eq!((code, stdout.as_str()), (2, ""), "{words:?}");
        assert!(stderr.contains(said), "{words:?}: {stderr}");
    }
}

#[test]
fn a_bad_configuration_is_64_with_one_mistake_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.toml");
    fs::write(&file, "nod = 1\nbus.kind = 'kafka'\n\"a\\u001b[2J\" = 1\n").unwrap();
    let file = file.to_str().unwrap();
    for words in [&["check", "-c", file][..], &["run", "-c", file], &["replay", "-c", file, "/dev/null"]] {
        let (code, stdout, stderr) = run(words);
        assert_eq!((code, stdout.as_str()), (64, ""), "{words:?}");
        let lines: Vec<&str> = stderr.lines().collect();
        assert_eq!(lines.len(), 3, "{stderr}");
        assert!(lines[0].starts_with("a\\u{1b}[2J: unknown key; known are `node`, `state_dir`, "), "{stderr}");
        assert!(lines[1].starts_with("bus.kind: expected"), "{stderr}");
        assert_eq!(lines[2], "nod: unknown key; did you mean `node`?");
    }
    fs::write(file, "").unwrap();
    let (code, _, stderr) = run(&["run", "-c", file]);
    assert_eq!(code, 64);
    assert!(stderr.starts_with("ingest.sources: no log to read"), "{stderr}");
    for role in ["ingest", "detect", "enforce"] {
        let (code, _, stderr) = run(&[role, "-c", file]);
        assert_eq!(code, 64);
        assert!(stderr.starts_with(&format!("bus.kind: `portcullis {role}` works over NATS")), "{stderr}");
    }
}

#[test]
fn check_says_what_would_run() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/example.toml");
    let (code, stdout, stderr) = run(&["check", "-c", example]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(stdout.contains("source     traefik: /var/log/traefik/access*.log\n"), "{stdout}");
    assert!(stdout.contains("rule       forceful-browsing: 15 in 1m, first ban 10m\n"), "{stdout}");
}

#[test]
fn a_server_that_is_not_there_is_1() {
    let (code, stdout, stderr) = run(&["status", "--socket", "/nonexistent/api.sock"]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert_eq!(stderr, "error: portcullis does not run here (no socket at /nonexistent/api.sock)\n");
}

#[test]
fn a_reader_that_goes_away_is_a_quiet_0() {
    // Far more than a pipe holds, so that the writer is still at it when the reader goes.
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(&stream);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            reader.read_line(&mut line).unwrap();
        }
        let event = r#"{"specversion":"1.0","id":"1","source":"s","type":"io.portcullis.alarm.v1","time":"2026-01-08T14:19:15Z","subject":"x","datacontenttype":"application/json","data":{"kind":"x","text":"y"}}"#;
        let mut writer = &stream;
        let head = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";
        let mut sent = std::io::Write::write_all(&mut writer, head.as_bytes());
        while sent.is_ok() {
            sent = std::io::Write::write_all(&mut writer, format!("{event}\n").as_bytes());
        }
    });
    let words = ["tail", "--json", "--socket", socket.to_str().unwrap()];
    let mut child = portcullis(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert!(first.starts_with('{'));
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap().as_str()), (Some(0), ""));
    server.join().unwrap();
}
