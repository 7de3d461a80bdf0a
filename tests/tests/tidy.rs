//! The repository holds to its own rules, and each rule is shown to refuse what it is there for.

use std::path::{Path, PathBuf};
use std::process::Command;

use tests::tidy;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every file that belongs to the repository, known to git or about to be, by its path from the root.
fn files() -> Vec<String> {
    let output = Command::new("git")
        .args(["-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"])
        .current_dir(root())
        .output()
        .unwrap();
    let listed = String::from_utf8(output.stdout).unwrap();
    let files: Vec<String> = listed.lines().filter(|path| root().join(path).is_file()).map(str::to_owned).collect();
    assert!(files.iter().any(|path| path == "tests/tests/tidy.rs"), "git lists no files");
    files
}

fn read(path: &str) -> String {
    String::from_utf8_lossy(&std::fs::read(root().join(path)).unwrap()).into_owned()
}

/// Rust files, each with whether it holds nothing but tests.
fn rust_files() -> Vec<(String, String, bool)> {
    let sources: Vec<(String, String)> =
        files().into_iter().filter(|path| path.ends_with(".rs")).map(|path| (path.clone(), read(&path))).collect();
    let modules: Vec<String> = sources.iter().flat_map(|(path, text)| tidy::test_modules(path, text)).collect();
    let is_test = |path: &str| {
        modules
            .iter()
            .any(|module| path.strip_prefix(module.as_str()).is_some_and(|rest| rest == ".rs" || rest.starts_with('/')))
    };
    sources.into_iter().map(|(path, text)| (path.clone(), text, is_test(&path))).collect()
}

#[track_caller]
fn none(refused: impl IntoIterator<Item = String>) {
    let refused: Vec<String> = refused.into_iter().collect();
    assert!(refused.is_empty(), "\n{}\n", refused.join("\n"));
}

#[test]
fn crates_depend_on_nobody_they_should_not_know() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert_eq!(packages.len(), 6);
    let mut edges = 0;
    for package in packages {
        for dependency in package["dependencies"].as_array().unwrap() {
            edges += 1;
            let edge = (package["name"].as_str().unwrap(), dependency["name"].as_str().unwrap());
            assert_eq!(tidy::forbidden_edge(edge.0, edge.1), None);
        }
    }
    assert!(edges > 50, "cargo metadata lists {edges} dependencies");
}

#[test]
fn manifests_inherit_lints_and_publish_nothing() {
    let manifests = files().into_iter().filter(|path| path.ends_with("/Cargo.toml") && !path.contains("/fuzz/"));
    none(manifests.flat_map(|path| tidy::manifest(&path, &read(&path))));
}

#[test]
fn pure_modules_are_pure() {
    let files = rust_files();
    none(files.iter().filter(|file| !file.2).flat_map(|(path, text, _)| tidy::impure(path, text)));
    for module in tidy::PURE {
        let there = |path: &str| path.strip_prefix(module).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'));
        assert!(files.iter().any(|file| there(&file.0)), "{module} is listed as pure and is not there");
    }
}

#[test]
fn files_are_short_enough_to_read() {
    none(rust_files().iter().filter(|file| !file.2).filter_map(|(path, text, _)| tidy::length(path, text)));
}

#[test]
fn modules_are_named_after_something() {
    none(files().iter().filter_map(|path| tidy::module_name(path)));
}

#[test]
fn nothing_is_left_unfinished_or_names_one_machine() {
    let text = |path: &String| {
        let data = [".log", ".lock", ".gz", ".zst", "LICENSE-APACHE"].iter().any(|end| path.ends_with(end));
        !data && !path.contains("/corpus/")
    };
    let refuse = |path: String| {
        let text = read(&path);
        [tidy::unfinished(&path, &text), tidy::machine_path(&path, &text)].concat()
    };
    none(files().into_iter().filter(text).flat_map(refuse));
}

#[test]
fn metric_labels_are_bounded() {
    none(rust_files().iter().flat_map(|(path, text, _)| tidy::metric_label(path, text)));
}

#[test]
fn the_papers_are_there_and_their_links_lead_somewhere() {
    let papers = ["README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE-MIT", "LICENSE-APACHE"];
    for paper in papers {
        assert!(root().join(paper).is_file(), "{paper} is missing");
    }
    let markdown = files().into_iter().filter(|path| path.ends_with(".md"));
    none(markdown.flat_map(|path| tidy::dead_link(&path, &read(&path), |link| root().join(link).exists())));
}

#[test]
fn shell_scripts_parse() {
    let scripts: Vec<String> = files()
        .into_iter()
        .filter(|path| {
            path.ends_with(".sh")
                || read(path).lines().next().is_some_and(|line| line.starts_with("#!") && line.ends_with("sh"))
        })
        .collect();
    assert!(scripts.iter().any(|path| path == ".ci/run") && scripts.iter().any(|path| path == "start.sh"));
    for path in scripts {
        let output = Command::new("bash").arg("-n").arg(root().join(&path)).output().unwrap();
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn the_sample_log_is_what_its_code_writes() {
    let written = read("deploy/samples/access.log");
    assert!(written == tests::sample::render_json_log(), "stale: cargo run --package tests --example sample");
}

mod each_guard_refuses {
    use super::*;

    #[track_caller]
    fn one(refused: impl IntoIterator<Item = String>, part: &str) {
        let refused: Vec<String> = refused.into_iter().collect();
        assert!(refused.len() == 1 && refused[0].contains(part), "{refused:?}");
    }

    #[test]
    fn a_forbidden_edge() {
        for (krate, dependency) in [
            ("detect", "ingest"),
            ("ingest", "enforce"),
            ("enforce", "detect"),
            ("proto", "detect"),
            ("detect", "deploy"),
            ("deploy", "tests"),
        ] {
            one(tidy::forbidden_edge(krate, dependency), dependency);
        }
        one(tidy::forbidden_edge("extra", "proto"), "layout");
        assert_eq!(tidy::forbidden_edge("detect", "proto"), None);
        assert_eq!(tidy::forbidden_edge("detect", "redb"), None);
    }

    #[test]
    fn a_manifest_that_goes_its_own_way() {
        one(tidy::manifest("x/Cargo.toml", "publish.workspace = true\n[lints.rust]\n"), "lints");
        one(tidy::manifest("x/Cargo.toml", "[lints]\nworkspace = true\n"), "published");
    }

    #[test]
    fn an_impure_pure_module() {
        for (code, part) in [
            ("use tokio::sync::mpsc;", "tokio"),
            ("async fn f() {}", "async fn"),
            ("let x = f().await;", ".await"),
            ("std::fs::read(path)", "std::fs"),
            ("std::env::var(name)", "std::env"),
            ("let now = SystemTime::now();", "SystemTime"),
            ("use std::time::{Duration, Instant};", "Instant}"),
            ("use std::time::Instant;", "time::Instant"),
            ("use std::collections::HashMap;", "HashMap"),
            ("println!(\"\");", "println!"),
            ("TcpStream::connect(addr)", "TcpStream"),
            ("tracing::warn!(\"\");", "tracing"),
        ] {
            one(tidy::impure("detect/src/engine/window.rs", code), part);
            one(tidy::impure("enforce/src/plan.rs", code), part);
        }
        // Elsewhere, in comments, in tests and in longer names the same words are free.
        none(tidy::impure("detect/src/worker.rs", "use tokio::time::Instant;"));
        none(tidy::impure(
            "detect/src/engine.rs",
            "/// No tokio, no Instant here.\nlet instantly = 1; // not an Instant",
        ));
        none(tidy::impure("detect/src/engine.rs", "fn f() {}\n\n#[cfg(test)]\nmod tests {\n    use std::fs;\n}"));
        none(tidy::impure("proto/src/time.rs", "SystemTime::now()"));
        one(tidy::impure("proto/src/net.rs", "SystemTime::now()"), "SystemTime");
    }

    #[test]
    fn a_file_too_long() {
        one(tidy::length("a.rs", &"x\n".repeat(701)), "701");
        assert_eq!(
            tidy::length("a.rs", &format!("{}#[cfg(test)]\nmod tests {{\n{}}}", "x\n".repeat(690), "x\n".repeat(900))),
            None
        );
    }

    #[test]
    fn a_module_named_after_nothing() {
        for path in ["proto/src/utils.rs", "ingest/src/helpers/a.rs", "detect/src/common.rs"] {
            one(tidy::module_name(path), path);
        }
        assert_eq!(tidy::module_name("detect/src/uncommon.rs"), None);
    }

    #[test]
    fn unfinished_work() {
        for word in [
            concat!("// TO", "DO later"),
            concat!("FIX", "ME"),
            concat!("to", "do!()"),
            concat!("unimpl", "emented!()"),
        ] {
            one(tidy::unfinished("a.rs", word), "unfinished");
        }
        none(tidy::unfinished("a.rs", concat!("mas", "TO", "DON")));
    }

    #[test]
    fn a_path_of_one_machine() {
        one(tidy::machine_path("a.md", concat!("see /ro", "ot/.cargo")), "one machine");
        one(tidy::machine_path("a.md", concat!("\"/wo", "rk/main\"")), "one machine");
        none(tidy::machine_path("a.md", concat!("https://example.org/ho", "me/page and api/ro", "ot/")));
    }

    #[test]
    fn a_label_without_bound() {
        let labels = "#[derive(Clone, EncodeLabelSet)]\nstruct Labels {\n    rule: String,\n    pub path: String,\n}\n";
        one(tidy::metric_label("a.rs", labels), "path");
        none(tidy::metric_label(
            "a.rs",
            "#[derive(EncodeLabelSet)]\nstruct L {\n    rule: String,\n}\nstruct E {\n    path: String,\n}",
        ));
        one(tidy::metric_label("a.rs", concat!("let f: Fam", "ily<Vec<(String, String)>, Counter>;")), "struct");
    }

    #[test]
    fn a_dead_link() {
        let text = "[a](there.md#part) [b](gone.md) [c](https://example.org) [d](#here)";
        one(tidy::dead_link("docs/x.md", text, |link| link == "docs/there.md"), "gone.md");
    }

    #[test]
    fn nothing_by_mistake_of_a_test_module() {
        assert_eq!(
            tidy::test_modules("detect/src/engine.rs", "#[cfg(test)]\nmod simulation;"),
            ["detect/src/engine/simulation"]
        );
        assert_eq!(
            tidy::test_modules("detect/src/lib.rs", "#[cfg(test)]\npub(crate) mod model;"),
            ["detect/src/model"]
        );
        assert!(tidy::test_modules("detect/src/lib.rs", "#[cfg(test)]\nmod tests {").is_empty());
    }
}
