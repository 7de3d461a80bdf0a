//! The verbs of the built binary: what they answer, and with which exit code. And the scenarios: small logs, each with
//! the bans that must come of it and why.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tests::portcullis::portcullis;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

#[test]
fn every_scenario_gives_the_bans_it_explains() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut scenarios: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    scenarios.sort();
    assert!(scenarios.len() >= 10);
    for scenario in scenarios {
        let path = |name: &str| scenario.join(name).display().to_string();
        let why = std::fs::read_to_string(path("why.md")).unwrap();
        let answer = portcullis(["replay", "--json", "-c", &path("config.toml"), &path("input.log")]).unwrap();
        let found = answer.expect(0).unwrap().json().unwrap();
        let expected = std::fs::read_to_string(path("expected.ndjson")).unwrap();
        let expected: Vec<Value> = expected.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(found, expected, "{}\n{why}", scenario.display());
    }
}

#[test]
fn misuse_ends_with_2() {
    for words in [&["ban"][..], &["ban", "host.example"], &["replay"], &["nonsense"], &["unban"]] {
        let answer = portcullis(words).unwrap().expect(2).unwrap();
        assert!(answer.stdout.is_empty() && !answer.stderr.is_empty(), "{words:?}: {answer:?}");
    }
}

#[test]
fn a_bad_configuration_ends_with_64_and_names_every_mistake() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("portcullis.toml");
    let text = "nodee = \"x\"\n[detect.rules.a]\nmatch = \"Status(\"\nmax_retry = 0\nfind_time = \"1m\"\nban_time = 5\n\
                [enforce.firewall]\nbackend = \"pf\"\n[ingest.client_ip]\ntrusted_proxies = [\"300.0.0.0/8\"]\n";
    std::fs::write(&path, text).unwrap();
    let path = path.display().to_string();
    let answer = portcullis(["check", "-c", &path]).unwrap().expect(64).unwrap();
    for key in [
        "nodee",
        "detect.rules.a.match",
        "detect.rules.a.max_retry",
        "detect.rules.a.ban_time",
        "enforce.firewall.backend",
        "ingest.client_ip.trusted_proxies",
    ] {
        assert!(answer.stderr.lines().any(|line| line.contains(key)), "{key}:\n{}", answer.stderr);
    }
    for verb in [&["run", "-c"][..], &["replay", "/dev/null", "-c"]] {
        portcullis(verb.iter().copied().chain([path.as_str()])).unwrap().expect(64).unwrap();
    }
    portcullis(["check", "-c", "/nonexistent.toml"]).unwrap().expect(64).unwrap();
}

#[test]
fn the_configurations_in_deploy_pass_check() {
    for file in ["example.toml", "kubernetes/portcullis.toml", "shippers/docker.toml"] {
        let answer = portcullis(["check", "-c", &format!("{ROOT}/deploy/{file}")]).unwrap();
        assert!(!answer.expect(0).unwrap().stdout.is_empty(), "{file}");
    }
}

#[test]
fn check_reads_the_secrets_of_back_ends_and_notifiers_and_shows_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let text = format!(
        "[enforce.cloudflare]\napi_token_file = {:?}\nscope = \"user\"\n[enforce.telegram]\nbot_token_file = {:?}\n\
         chat_id = 1\n[enforce.webhooks.a]\nurl_file = {:?}\nsecret_file = {:?}\n",
        path("cloudflare"),
        path("telegram"),
        path("hook"),
        path("secret"),
    );
    std::fs::write(path("portcullis.toml"), text).unwrap();
    let write = |name: &str, text: &str| {
        std::fs::write(path(name), text).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(path(name), mode).unwrap();
    };
    write("telegram", "\n");
    write("hook", "hush-hush");
    let check = |code| portcullis(["check", "-c", &path("portcullis.toml")]).unwrap().expect(code).unwrap();
    let answer = check(64);
    for (key, file) in [
        ("enforce.cloudflare.api_token_file", "cloudflare"),
        ("enforce.telegram.bot_token_file", "telegram"),
        ("enforce.webhooks.a.url_file", "hook"),
        ("enforce.webhooks.a.secret_file", "secret"),
    ] {
        let is_named = |line: &str| line.contains(key) && line.contains(&path(file));
        assert!(answer.stderr.lines().any(is_named), "{key}:\n{}", answer.stderr);
    }
    for (name, text) in [("cloudflare", "hush"), ("telegram", "1:hush"), ("hook", "https://x/hush"), ("secret", "hush")]
    {
        write(name, text);
    }
    let fine = check(0);
    assert!(!format!("{answer:?}{fine:?}").contains("hush"), "{answer:?} {fine:?}");
}

#[test]
fn check_refuses_a_listener_whose_senders_are_strangers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("portcullis.toml");
    for (mode, more, code) in [
        ("udp", "", 64),
        ("tcp", "", 64),
        ("udp", "allowed_senders = ['10.0.0.0/8']", 0),
        ("tcp", "allowed_senders = ['10.0.0.0/8']", 0),
        ("tcp", "tls = { cert_file = '/c', key_file = '/k' }", 64),
        ("tcp", "tls = { cert_file = '/c', key_file = '/k', client_ca_file = '/a' }", 0),
    ] {
        let source = format!("type = 'syslog'\nmode = '{mode}'\nlisten = '0.0.0.0:5514'\n{more}\n");
        std::fs::write(&path, format!("[ingest.sources.edge]\n{source}")).unwrap();
        let answer = portcullis(["check", "-c", &path.display().to_string()]).unwrap().expect(code).unwrap();
        let said = if code == 0 { &answer.stdout } else { &answer.stderr };
        let wanted = if code == 0 { "edge: syslog over" } else { "ingest.sources.edge.allowed_senders: is required" };
        assert!(said.contains(wanted), "{source}: {answer:?}");
    }
}

#[test]
fn a_verb_without_a_service_says_so_and_ends_with_1() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.sock").display().to_string();
    for words in [&["status"][..], &["bans"], &["unban", "192.0.2.1"], &["explain", "192.0.2.1"], &["tail"]] {
        let answer = portcullis(words.iter().copied().chain(["--socket", &socket])).unwrap().expect(1).unwrap();
        assert!(answer.stderr.contains(&socket), "{words:?}: {answer:?}");
    }
}

#[test]
fn a_log_that_cannot_be_read_is_named() {
    let answer = portcullis(["replay", "/nonexistent.log"]).unwrap().expect(1).unwrap();
    assert!(answer.stderr.contains("/nonexistent.log"), "{answer:?}");
}

#[test]
fn replay_lines_tell_the_client_and_why_not() {
    let scenario = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios/host-name-in-chain");
    let path = |name: &str| scenario.join(name).display().to_string();
    let answer = portcullis(["replay", "--lines", "-c", &path("config.toml"), &path("input.log")]).unwrap();
    let lines = answer.expect(0).unwrap().stdout;
    assert!(lines.contains("not an address"), "{lines}");
}

#[test]
fn completions_and_the_manual_are_printed() {
    for (words, part) in
        [(&["completions", "bash"][..], "_portcullis"), (&["man"], ".TH"), (&["--version"], "portcullis")]
    {
        let answer = portcullis(words).unwrap().expect(0).unwrap();
        assert!(answer.stdout.contains(part), "{words:?}");
    }
}
