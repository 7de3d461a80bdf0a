//! `type = "file"`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::section;
use proto::settings::{Field, Mistakes, Unknown};
use serde::Deserialize;

use super::source::{Lines, RawLines, SourceKind};

/// Default of `poll_interval`: with inotify only a safety net.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Bounds of `poll_interval`.
const POLL_INTERVAL_RANGE: std::ops::RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(60);

/// A source of files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    /// Paths or patterns (`*`, `?`, `[...]` within one component).
    pub include: Vec<PathBuf>,
    /// Patterns of files that are not followed; those without `/` are compared with the file name.
    pub exclude: Vec<String>,
    /// How often everything is looked at.
    pub poll_interval: Duration,
    /// Whether files that are there at the very first start begin at their end.
    pub skip_existing: bool,
    /// Whether inotify is used.
    pub inotify: bool,
}

impl FileConfig {
    /// Defaults for `include`.
    pub fn new(include: Vec<PathBuf>) -> Self {
        let (exclude, skip_existing) = Default::default();
        Self { include, exclude, poll_interval: POLL_INTERVAL, skip_existing, inotify: true }
    }
}

/// `type = "file"` as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RawFile {
    #[serde(flatten)]
    lines: RawLines,
    /// Absolute paths or patterns of files to follow.
    include: Field<Vec<String>>,
    /// Patterns of files not to follow: absolute, or of file names.
    exclude: Field<Vec<String>>,
    /// How often directories and files are looked at without a notification.
    poll_interval: Field<Duration>,
    /// `beginning` or `end`: where files begin that are there at the very first start.
    read_from: Field<String>,
    /// Whether the kernel is asked to tell of changes; `false` where it cannot (network file systems).
    inotify: Field<bool>,
    /// What nobody knows.
    #[serde(flatten)]
    unknown: Unknown,
}

section!(RawFile);

const KEYS: [&str; 5] = ["include", "exclude", "poll_interval", "read_from", "inotify"];

impl RawFile {
    pub(super) fn check(self, mistakes: &mut Mistakes) -> (Lines, SourceKind) {
        self.unknown.check(&[&KEYS[..], &RawLines::KEYS[..]].concat(), mistakes);
        let lines = self.lines.check(mistakes);
        let include = self.include.required("include", mistakes);
        if include.as_ref().is_some_and(Vec::is_empty) {
            mistakes.add("include", "at least one path or pattern is needed");
        }
        let include: Vec<PathBuf> = include.unwrap_or_default().into_iter().map(PathBuf::from).collect();
        include.iter().for_each(|path| check_pattern("include", path, mistakes));
        let exclude = self.exclude.or("exclude", Vec::new(), mistakes);
        for pattern in exclude.iter().filter(|pattern| pattern.contains('/')) {
            check_pattern("exclude", Path::new(pattern), mistakes);
        }
        let read_from = self.read_from.take("read_from", mistakes);
        if let Some(other) = read_from.as_deref().filter(|place| !matches!(*place, "beginning" | "end")) {
            mistakes.add("read_from", format!("expected `beginning` or `end`, got {other:?}"));
        }
        let poll_interval = self.poll_interval.or("poll_interval", POLL_INTERVAL, mistakes);
        if !POLL_INTERVAL_RANGE.contains(&poll_interval) {
            mistakes.add("poll_interval", "must be from 10ms to 1m");
        }
        let skip_existing = read_from.as_deref() == Some("end");
        let inotify = self.inotify.or("inotify", true, mistakes);
        (lines, SourceKind::File(FileConfig { include, exclude, poll_interval, skip_existing, inotify }))
    }
}

fn check_pattern(key: &str, pattern: &Path, mistakes: &mut Mistakes) {
    let text = pattern.to_string_lossy();
    if !pattern.is_absolute() {
        mistakes.add(key, format!("{text:?} must be an absolute path"));
    }
    if text.contains("**") {
        mistakes.add(key, format!("{text:?}: `**` is not supported; a `*` stands within one directory"));
    }
}
