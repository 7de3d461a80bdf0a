//! Guards of the repository itself. Each is a function over a path and a text that returns what it refuses, so that a
//! test can show each one a text that it must refuse; `tests/tidy.rs` runs them over the tree.
//!
//! They read text, not syntax: quick, and clear in what they say. What rustc, clippy or cargo-deny can hold is not here.

/// Which crates each crate may depend on (DESIGN: `proto <- {ingest, detect, enforce} <- deploy <- tests`).
const EDGES: [(&str, &[&str]); 6] = [
    ("proto", &[]),
    ("ingest", &["proto"]),
    ("detect", &["proto"]),
    ("enforce", &["proto"]),
    ("deploy", &["proto", "ingest", "detect", "enforce"]),
    ("tests", &["proto", "ingest", "detect", "enforce", "deploy"]),
];

/// Modules that compute and do nothing else: `name.rs` and all of `name/`.
pub const PURE: [&str; 39] = [
    "proto/src/access",
    "proto/src/api",
    "proto/src/ban",
    "proto/src/client_ip",
    "proto/src/envelope",
    "proto/src/event",
    "proto/src/head",
    "proto/src/net",
    "proto/src/report",
    "proto/src/schema",
    "proto/src/settings",
    "proto/src/subject",
    "proto/src/time",
    "proto/src/wire",
    "ingest/src/frame",
    "ingest/src/parse",
    "ingest/src/source/tail",
    "ingest/src/uplink/outbox",
    "detect/src/cluster/coverage",
    "detect/src/cluster/seal",
    "detect/src/engine",
    "detect/src/peers",
    "detect/src/state",
    "enforce/src/cloudflare/call",
    "enforce/src/cloudflare/mirror",
    "enforce/src/desired",
    "enforce/src/forwarded/claims",
    "enforce/src/forwarded/plan",
    "enforce/src/forwarded/spelling",
    "enforce/src/forwarded/tree",
    "enforce/src/guard",
    "enforce/src/notify/digest",
    "enforce/src/notify/message",
    "enforce/src/notify/queue",
    "enforce/src/notify/template",
    "enforce/src/notify/text",
    "enforce/src/plan",
    "tests/src/brute",
    "tests/src/random",
];

/// What a pure module has no business with.
const IMPURE: [&str; 26] = [
    "tokio",
    "async fn",
    "async move",
    ".await",
    "std::fs",
    "std::env",
    "std::process",
    "std::thread",
    "std::io",
    "std::os",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "UnixListener",
    "SystemTime",
    "time::Instant",
    "Instant}",
    "Instant::now",
    "Clock::system",
    "RandomState",
    "collections::HashMap",
    "collections::HashSet",
    "collections::{HashMap",
    "println!",
    "tracing::",
];

/// `proto::time` is where clocks are read: the wall clock, and the one that nobody sets.
const CLOCK: (&str, &[&str]) = ("proto/src/time.rs", &["SystemTime", "Instant::now", "Clock::system"]);

/// Lines of a Rust file without its tests. The house aims at 500; what is a little longer may stay in one piece.
const FILE_LINES_MAX: usize = 700;

/// Label names whose values a stranger chooses: each new value would be a new time series.
const LABELS: [&str; 12] =
    ["addr", "address", "ip", "client", "peer", "target", "path", "query", "username", "user_agent", "url", "referer"];

/// An edge between our crates that the layout does not have; also dev- and build-dependencies.
pub fn forbidden_edge(krate: &str, dependency: &str) -> Option<String> {
    let ours = |name: &str| EDGES.iter().find(|(known, _)| *known == name).map(|(_, allowed)| *allowed);
    let Some(allowed) = ours(krate) else {
        return Some(format!("crate {krate} is not in the layout"));
    };
    (ours(dependency).is_some() && !allowed.contains(&dependency))
        .then(|| format!("{krate} must not depend on {dependency}"))
}

/// Every manifest inherits lints, and nothing is ever published.
pub fn manifest(path: &str, text: &str) -> Vec<String> {
    let has = |wanted: &str| text.contains(wanted);
    let lines = text.lines().map(str::trim).collect::<Vec<_>>();
    let lints = lines.windows(2).any(|pair| pair == ["[lints]", "workspace = true"]);
    let mut refused = Vec::new();
    if !lints {
        refused.push(format!("{path}: does not inherit the workspace's lints"));
    }
    if !has("publish.workspace = true") && !has("publish = false") {
        refused.push(format!("{path}: could be published"));
    }
    refused
}

/// Whether the file belongs to a pure module.
pub fn is_pure(path: &str) -> bool {
    PURE.iter().any(|module| path.strip_prefix(module).is_some_and(|rest| rest == ".rs" || rest.starts_with('/')))
}

/// A pure module that reaches for the world. Tests and comments may.
pub fn impure(path: &str, text: &str) -> Vec<String> {
    if !is_pure(path) {
        return Vec::new();
    }
    let allowed = if path == CLOCK.0 { CLOCK.1 } else { &[] };
    let mut refused = Vec::new();
    for (number, line) in code_lines(text) {
        for word in IMPURE.iter().filter(|word| !allowed.contains(word)) {
            if has_word(line, word) {
                refused.push(format!("{path}:{number}: a pure module uses {word}"));
            }
        }
    }
    refused
}

/// A file too long to read.
pub fn length(path: &str, text: &str) -> Option<String> {
    let lines = without_tests(text).lines().count();
    (lines > FILE_LINES_MAX).then(|| format!("{path}: {lines} lines without tests, at most {FILE_LINES_MAX}"))
}

/// A module named after nothing.
pub fn module_name(path: &str) -> Option<String> {
    let named =
        |part: &str| matches!(part.strip_suffix(".rs").unwrap_or(part), "utils" | "util" | "helpers" | "common");
    path.split('/').any(named).then(|| format!("{path}: name a module after what it knows"))
}

/// Words for work that is not done.
pub fn unfinished(path: &str, text: &str) -> Vec<String> {
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("unimpl", "emented!"),
        concat!("to", "do!"),
    ];
    words_in(path, text, &words, "unfinished")
}

/// Paths of one machine. Users' files live under /etc, /var, /run and /usr.
pub fn machine_path(path: &str, text: &str) -> Vec<String> {
    let words = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/tm", "p/w/")];
    let mut refused = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        for word in words.iter().filter(|word| line.contains(**word)) {
            // A part of a longer path or address is somebody else's.
            let before = line.find(word).and_then(|at| line[..at].chars().next_back());
            if !before.is_some_and(|c| c.is_alphanumeric() || "./-_}".contains(c)) {
                refused.push(format!("{path}:{number}: names a place on one machine: {word}"));
            }
        }
    }
    refused
}

/// A metric whose label takes what a stranger chooses.
pub fn metric_label(path: &str, text: &str) -> Vec<String> {
    let mut refused = Vec::new();
    let mut in_labels = false;
    for (number, line) in code_lines(text) {
        in_labels |= line.contains("EncodeLabelSet") && line.contains("derive");
        let name =
            line.trim().trim_start_matches("pub(crate) ").trim_start_matches("pub ").trim_start_matches("pub(super) ");
        if let Some((field, _)) = name.split_once(':')
            && in_labels
            && LABELS.contains(&field.trim())
        {
            refused.push(format!("{path}:{number}: label {field} has no bound"));
        }
        in_labels &= !line.trim_start().starts_with('}');
        if line.contains(concat!("Fam", "ily<Vec<(")) || line.contains(concat!("Fam", "ily<[(")) {
            refused.push(format!("{path}:{number}: labels without names cannot be checked; use a struct"));
        }
    }
    refused
}

/// Relative links of a Markdown file: those that `exists` denies.
pub fn dead_link(path: &str, text: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets
        .filter(|target| !target.contains("://") && !target.starts_with('#') && !target.starts_with("mailto:"))
        .map(|target| target.split('#').next().unwrap_or(target))
        .filter(|target| {
            let full = if folder.is_empty() { (*target).to_owned() } else { format!("{folder}/{target}") };
            !exists(&full)
        })
        .map(|target| format!("{path}: links to {target}, which is not there"))
        .collect()
}

fn words_in(path: &str, text: &str, words: &[&str], what: &str) -> Vec<String> {
    let mut refused = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        for word in words.iter().filter(|word| has_word(line, word)) {
            refused.push(format!("{path}:{number}: {what}: {word}"));
        }
    }
    refused
}

/// Whether `word` stands in `line` and is not the part of a longer name.
fn has_word(line: &str, word: &str) -> bool {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let bounded_before = !word.starts_with(is_name) || !before.is_some_and(is_name);
        let bounded_after = !word.ends_with(is_name) || !after.is_some_and(is_name);
        bounded_before && bounded_after
    })
}

/// The part of a Rust file that stands before its unit tests.
fn without_tests(text: &str) -> &str {
    text.find("\n#[cfg(test)]\nmod tests").map_or(text, |end| &text[..end])
}

/// Numbered lines of code: no tests, no comments.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let code = |line| str::split(line, "// ").next().unwrap_or(line);
    (1..)
        .zip(without_tests(text).lines())
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        .map(move |(n, line)| (n, code(line)))
}

/// Modules that a Rust file declares for tests only, as path prefixes: their files are tests.
pub fn test_modules(path: &str, text: &str) -> Vec<String> {
    let stem = path.strip_suffix(".rs").unwrap_or(path);
    let folder = match stem.rsplit_once('/') {
        Some((folder, "lib" | "main" | "mod")) => folder,
        _ => stem,
    };
    let lines = text.lines().map(str::trim).collect::<Vec<_>>();
    let declared = lines.windows(2).filter(|pair| pair[0] == "#[cfg(test)]");
    declared
        .filter_map(|pair| pair[1].strip_suffix(';')?.rsplit_once("mod "))
        .map(|(_, name)| format!("{folder}/{name}"))
        .collect()
}
