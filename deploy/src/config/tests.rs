//! What is read from where, which mistakes are told, and that `example.toml` documents everything as it is.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::*;

const EXAMPLE: &str = include_str!("../../example.toml");

/// A directory with files; the environment is empty.
fn files(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn location(dir: &Path) -> Location {
    Location::new(Some(dir.join("portcullis.toml")), Vec::new()).with_environment([])
}

fn texts(invalid: &Invalid) -> Vec<String> {
    invalid.mistakes().iter().map(ToString::to_string).collect()
}

#[test]
fn nothing_given_means_the_defaults() {
    let dir = files(&[("portcullis.toml", "")]);
    let config = location(dir.path()).load().unwrap();
    assert!(is_name(&config.node));
    assert_eq!(config.state_dir, Path::new(STATE_DIR));
    let telemetry = TelemetryConfig { listen: None, log_format: LogFormat::Text, log_level: LOG_LEVEL.to_owned() };
    assert_eq!(config.telemetry, telemetry);
    let missing = config.require_sources().unwrap_err();
    assert!(missing.mistakes()[0].text.contains("portcullis run LOG"));
}

#[test]
fn all_mistakes_are_told_at_once_with_their_keys() {
    let dir = files(&[(
        "portcullis.toml",
        r#"
            node = "Edge 1"
            stat_dir = "/x"
            api = { socket = 3, listen = "[::]:9478", tls = { cert_file = "c", key = "k" } }
            bus = { kind = "kafka", urls = ["x"], prefix = "P", replicas = 9, tls = { c = 1 } }
            telemetry = { listen = "9477", log_format = "xml", log_level = "detect=loud" }
            ingest.sources.a = { type = "file", include = ["relative"] }
            detect.lateness_max = "1"
            enforce.firewall.bans_max = nan
        "#,
    )]);
    let invalid = location(dir.path()).load().unwrap_err();
    let texts = texts(&invalid);
    let keys: Vec<&str> = invalid.mistakes().iter().map(|mistake| mistake.key.as_str()).collect();
    assert_eq!(
        keys,
        [
            "api.tls.key",
            "api.tls.key_file",
            "api.tokens_file",
            "bus.kind",
            "bus.prefix",
            "bus.replicas",
            "bus.tls.c",
            "bus.urls",
            "detect.lateness_max",
            "enforce.firewall.bans_max",
            "ingest.sources.a.include",
            "node",
            "stat_dir",
            "telemetry.listen",
            "telemetry.log_format",
            "telemetry.log_level",
        ],
        "{texts:#?}"
    );
    assert_eq!(texts[12], "stat_dir: unknown key; did you mean `state_dir`?");
}

#[test]
fn a_nats_source_needs_nats() {
    let text = "[ingest.sources.shop]\ntype = 'nats'\n";
    let dir = files(&[("portcullis.toml", text)]);
    let told = texts(&location(dir.path()).load().unwrap_err());
    assert!(told.len() == 1 && told[0].starts_with("ingest.sources.shop.type: "), "{told:?}");
    let logs = Location::new(Some(dir.path().join("portcullis.toml")), vec!["/a.log".into()]).with_environment([]);
    assert_eq!(logs.load().unwrap().ingest.sources.len(), 1, "files take its place");
    let nats = load(&format!("bus.kind = 'nats'\n{text}"));
    assert!(nats.require_no_nats_source().is_err());
}

#[test]
fn a_syntax_error_names_file_and_line_and_hides_no_other_mistake() {
    let dir = files(&[("portcullis.toml", "node = 'a'\nstate_dir = \n"), ("conf.d/a.toml", "nod = 1")]);
    let texts = texts(&location(dir.path()).load().unwrap_err());
    let file = dir.path().join("portcullis.toml");
    assert_eq!(texts.len(), 2, "{texts:?}");
    assert!(texts[0].starts_with(&format!("{}: line 2, column ", file.display())), "{}", texts[0]);
    assert!(!texts[0].contains('\n') && texts[0].len() < file.as_os_str().len() + 120, "{}", texts[0]);
    assert_eq!(texts[1], "nod: unknown key; did you mean `node`?");
}

#[test]
fn a_file_that_is_missing_or_endless_is_a_mistake() {
    let dir = files(&[]);
    let told = texts(&location(dir.path()).load().unwrap_err());
    assert!(told[0].contains("portcullis.toml: cannot be read: No such file"), "{told:?}");
    let endless = Location::new(Some("/dev/zero".into()), Vec::new()).with_environment([]);
    let told = texts(&endless.load().unwrap_err());
    assert_eq!(told, ["/dev/zero: is longer than 4194304 bytes"]);
}

#[test]
fn later_files_win_by_name_and_tables_are_merged() {
    let dir = files(&[
        ("portcullis.toml", "node = 'main'\ntelemetry = { log_level = 'warn', log_format = 'json' }"),
        ("conf.d/20-b.toml", "node = 'b'"),
        ("conf.d/10-a.toml", "node = 'a'\ntelemetry.log_level = 'debug'"),
        ("conf.d/30-c.toml.disabled", "node = 'c'"),
    ]);
    let config = location(dir.path()).load().unwrap();
    assert_eq!((config.node.as_str(), config.telemetry.log_level.as_str()), ("b", "debug"));
    assert_eq!(config.telemetry.log_format, LogFormat::Json);
}

#[test]
fn the_environment_wins_and_is_read_as_what_it_looks_like() {
    let dir = files(&[("portcullis.toml", "node = 'main'\ndetect.ipv6_prefix = 56\ndetect.escalation.max = '30d'")]);
    let variables = [
        ("PORTCULLIS__NODE", "007"),
        ("PORTCULLIS__DETECT__IPV6_PREFIX", "48"),
        ("PORTCULLIS__DETECT__ESCALATION__FACTOR", "1.50"),
        ("PORTCULLIS__DETECT__NEVER_BAN_BUILTIN", "false"),
        ("PORTCULLIS__DETECT__NEVER_BAN", r#"["192.0.2.0/24"]"#),
        ("PORTCULLIS_SOCKET", "not ours: one underscore"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let config = location(dir.path()).with_environment(variables).load().unwrap();
    assert_eq!((config.node.as_str(), config.detect.engine.ipv6_prefix), ("007", 48));
    assert_eq!(config.detect.engine.never_ban, ["192.0.2.0/24".parse().unwrap()]);
    assert!(config.detect.engine.rules.iter().all(|rule| rule.escalation.max.as_secs() == 30 * 86_400));

    let unknown = [("PORTCULLIS__DETECT__IPV6_PREFX".to_owned(), "48".to_owned())];
    let told = texts(&location(dir.path()).with_environment(unknown).load().unwrap_err());
    assert_eq!(told, ["detect.ipv6_prefx: unknown key; did you mean `ipv6_prefix`?"]);
}

#[test]
fn log_arguments_take_the_place_of_sources_and_nothing_else() {
    let text = "ingest.sources.a = { type = 'file', include = ['/a'] }
        ingest.client_ip.trusted_proxies = ['203.0.113.9']
        enforce.firewall.ban_prefix_min_ipv4 = 20";
    let dir = files(&[("portcullis.toml", text)]);
    let file = dir.path().join("portcullis.toml");
    let config = Location::new(Some(file), vec!["/b".into()]).with_environment([]).load().unwrap();
    let names: Vec<&str> = config.ingest.sources.iter().map(|source| source.name.as_str()).collect();
    assert_eq!(names, ["traefik"]);
    let proxy = "203.0.113.9".parse().unwrap();
    assert!(config.ingest.client_ip.is_trusted(proxy));
    assert!(config.detect.engine.trusted_proxies.contains(proxy), "what is trusted may not be banned");
    assert_eq!(config.detect.engine.operator_prefix_min, (20, 32), "what is not enforced is not ordered either");
}

#[test]
fn two_listeners_at_one_address_are_told_with_both_keys() {
    let text = "api = { listen = '127.0.0.1:9478', tokens_file = '/t', socket = '/run/one.sock' }
        telemetry.listen = '127.0.0.1:9478'
        [ingest.sources]
        a = { type = 'syslog', mode = 'udp', listen = '127.0.0.1:5514' }
        b = { type = 'syslog', mode = 'tcp', listen = '127.0.0.1:5514' }
        c = { type = 'http', listen = '0.0.0.0:5514', allowed_senders = ['10.0.0.0/8'] }
        d = { type = 'syslog', mode = 'unix', path = '/run/one.sock' }
        e = { type = 'otlp', listen = '127.0.0.1:0' }
        f = { type = 'otlp', listen = '127.0.0.1:0' }";
    let dir = files(&[("portcullis.toml", text)]);
    assert_eq!(
        texts(&location(dir.path()).load().unwrap_err()),
        [
            "ingest.sources.c.listen: 0.0.0.0:5514 is taken by ingest.sources.b.listen = \"127.0.0.1:5514\": give one of \
             them another",
            "ingest.sources.d.path: /run/one.sock is taken by api.socket = \"/run/one.sock\": give one of them another",
            "telemetry.listen: 127.0.0.1:9478 is taken by api.listen = \"127.0.0.1:9478\": give one of them another",
        ]
    );
}

#[test]
fn the_api_beyond_loopback_needs_tls_and_always_tokens() {
    let mistakes = |api: &str| {
        let dir = files(&[("portcullis.toml", &format!("api = {{ {api} }}"))]);
        location(dir.path()).load().map_or_else(|invalid| texts(&invalid), |_| Vec::new())
    };
    let tls = r#"tls = { cert_file = "/c", key_file = "/k" }"#;
    for (api, wrong) in [
        (r#"listen = "127.0.0.1:1", tokens_file = "/t""#.to_owned(), &[][..]),
        (r#"listen = "[::1]:1", tokens_file = "/t""#.to_owned(), &[]),
        (format!(r#"listen = "0.0.0.0:1", tokens_file = "/t", {tls}"#), &[]),
        (r#"listen = "10.0.0.6:1", tokens_file = "/t""#.to_owned(), &["api.tls: is required beyond loopback"]),
        (r#"listen = "[::]:1", tokens_file = "/t""#.to_owned(), &["api.tls: is required beyond loopback"]),
        (r#"listen = "127.0.0.1:1""#.to_owned(), &["api.tokens_file: is required"]),
        (
            r#"tokens_file = "/t", tls = {}"#.to_owned(),
            &[
                "api.tls: is for TCP, and means nothing without `listen`",
                "api.tls.cert_file: is required",
                "api.tls.key_file: is required",
                "api.tokens_file: is for TCP",
            ],
        ),
        (r#"listen = "host:1", tokens_file = "/t""#.to_owned(), &["api.listen: expected an address and a port"]),
    ] {
        let told = mistakes(&api);
        let agree = told.len() == wrong.len() && told.iter().zip(wrong).all(|(told, wrong)| told.starts_with(wrong));
        assert!(agree, "{api}: {told:#?}");
    }
}

#[test]
fn a_verb_finds_the_configured_socket_whatever_else_is_wrong() {
    let dir = files(&[("portcullis.toml", "nod = 1\napi.socket = '/x/api.sock'")]);
    assert_eq!(location(dir.path()).peek("/api/socket").as_deref(), Some("/x/api.sock"));
    assert_eq!(location(&dir.path().join("none")).peek("/api/socket"), None);
}

/// `example.toml` with switched-off lines switched on: all of them, or the defaults alone.
fn example(with_examples: bool) -> String {
    let mut text = String::new();
    let (mut prose, mut in_example) = (String::new(), false);
    for line in EXAMPLE.lines() {
        let off = line.strip_prefix('#').filter(|rest| rest.starts_with(|c: char| c == '[' || c.is_ascii_lowercase()));
        let is_header = off.unwrap_or(line).starts_with('[');
        if is_header {
            in_example = prose.contains("Example:");
        }
        match off {
            Some(off) if with_examples || !(in_example || prose.contains("Example:")) => text.push_str(off),
            Some(_) => {}
            None if line.starts_with('#') => prose.push_str(line),
            None => text.push_str(line),
        }
        text.push('\n');
        if off.is_some() || !line.starts_with('#') {
            prose.clear();
        }
    }
    text
}

fn load(text: &str) -> Config {
    let dir = files(&[("portcullis.toml", text)]);
    location(dir.path()).load().unwrap_or_else(|invalid| panic!("{:#?}", texts(&invalid)))
}

#[test]
fn the_example_is_right_as_it_stands_and_with_everything_switched_on() {
    assert_eq!(load(EXAMPLE).ingest.sources.len(), 1);
    // Sources that need NATS are among the examples.
    let all = load(&example(true).replace("kind = \"local\"", "kind = \"nats\""));
    assert_eq!((all.node.as_str(), all.telemetry.listen.is_some()), ("edge-1", true));
    assert_eq!(all.detect.engine.rules.len(), 4);
}

#[test]
fn the_example_tells_the_real_defaults_of_cloudflare() {
    let documented = load(&example(true).replace("kind = \"local\"", "kind = \"nats\"")).enforce.cloudflare;
    let needed = "[enforce.cloudflare]\napi_token_file = \"/run/secrets/cloudflare\"\n\
                  scope = { zones = [\"023e105f4ecef8ad9ca31a8372d0c353\"] }\ninstallation = \"shop\"\n";
    assert_eq!(documented, load(&format!("{EXAMPLE}{needed}")).enforce.cloudflare);
}

#[test]
fn hosts_of_a_cluster_share_the_name_that_cloudflare_knows_them_by() {
    let section = "[enforce.cloudflare]\napi_token = \"t\"\nscope = \"user\"\n";
    let dir = files(&[("portcullis.toml", &format!("bus.kind = \"nats\"\n{section}"))]);
    let invalid = location(dir.path()).load().unwrap_err();
    assert_eq!(texts(&invalid).len(), 1);
    assert!(texts(&invalid)[0].starts_with("enforce.cloudflare.installation: is required over NATS"));
}

#[test]
fn the_example_tells_the_real_defaults() {
    // The rule that is off is compared as well, switched on.
    let bots =
        [("PORTCULLIS__DETECT__BUILTIN_RULES", "true"), ("PORTCULLIS__DETECT__RULES__BAD-BOTS__ENABLED", "true")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()));
    for variables in [Vec::new(), bots.to_vec()] {
        let load = |text: &str| {
            let dir = files(&[("portcullis.toml", text)]);
            let mut config = location(dir.path()).with_environment(variables.clone()).load().unwrap();
            if text == EXAMPLE {
                // The default for root, whoever runs this test.
                config.api.socket = crate::socket::SYSTEM.into();
            }
            format!("{config:#?}")
        };
        let (documented, real) = (load(&example(false)), load(EXAMPLE));
        let differing: Vec<_> = documented.lines().zip(real.lines()).filter(|(a, b)| a != b).take(5).collect();
        assert!(documented == real, "documented and real: {differing:#?}");
    }
}

/// Every field of every raw section, and whether the example gives it anywhere: read off the sections themselves, so
/// that a new key cannot be forgotten.
fn fields_given(raw: &RawConfig) -> BTreeMap<String, bool> {
    let debug = format!("{raw:#?}");
    let (mut fields, mut open) = (BTreeMap::new(), Vec::new());
    for line in debug.lines().map(str::trim) {
        let section = open.last().copied().unwrap_or_default();
        if let Some((field, value)) = line.split_once(": ")
            && field.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && str::starts_with(section, "Raw")
        {
            *fields.entry(format!("{section}.{field}")).or_insert(false) |= value != "Absent,";
        }
        if let Some(opened) = line.strip_suffix('{') {
            open.push(opened.trim_end().rsplit([' ', '(']).next().unwrap_or_default());
        }
        if line.starts_with('}') {
            open.pop();
        }
    }
    fields
}

#[test]
fn the_example_documents_every_key() {
    let dir = files(&[("portcullis.toml", &example(true))]);
    let mut mistakes = Mistakes::new();
    let raw: RawConfig = serde_json::from_value(location(dir.path()).read(&mut mistakes)).unwrap();
    let fields = fields_given(&raw);
    assert!(fields.len() > 60, "the sections are seen: {fields:#?}");
    // Keys that are known only to say that this version does not have them.
    let not_yet = |section: &str, keys: &[&str]| keys.iter().map(|key| format!("{section}.{key}")).collect::<Vec<_>>();
    // Of the ways to log in to NATS one excludes the others; they stand in the text.
    let mut absent = not_yet("RawBus", &["credentials_file", "nkey_file", "token_file"]);
    // Of a secret and its file one is given, and of the ways to log in to Cloudflare.
    absent.extend(not_yet("RawCloudflare", &["api_key", "api_key_file", "api_token", "email"]));
    absent.extend(not_yet("RawTelegram", &["bot_token"]));
    absent.extend(not_yet("RawWebhook", &["secret", "token", "url_file"]));
    absent.sort();
    let missing: Vec<String> = fields.into_iter().filter(|(_, given)| !given).map(|(field, _)| field).collect();
    assert_eq!(missing, absent);
}
