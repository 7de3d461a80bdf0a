//! Which files a source has: patterns, siblings of rotated files, and the directories worth watching.
//!
//! A pattern's `*`, `?` and `[...]` stand within one component of the path, as in a shell; a name that equals the
//! pattern matches too, so that a path with brackets can be given as it is. Compressed files are never followed.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use proto::time::Timestamp;

use super::tail::{FileId, Seen};
use crate::config::FileConfig;

/// Ends of file names whose content is compressed.
const COMPRESSED: [&str; 6] = [".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip"];

/// What a scan of the file system brought.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) seen: Vec<Seen>,
    /// Directories in which a file of the source may appear.
    pub(super) directories: BTreeSet<PathBuf>,
    /// Paths that could not be looked at, and why.
    pub(super) failures: Vec<(PathBuf, String)>,
}

/// All files that match now.
pub(super) fn scan(config: &FileConfig) -> Scan {
    let mut scan = Scan::default();
    let mut paths = BTreeSet::new();
    for pattern in &config.include {
        scan.expand(pattern, &mut paths);
    }
    for path in paths {
        if is_compressed(&path) || is_excluded(&path, &config.exclude) {
            continue;
        }
        if let Some(metadata) = scan.look_at(&path) {
            scan.seen.push(seen(path, &metadata, None));
        }
    }
    scan
}

impl Scan {
    /// Adds the files beside the matched ones whose names begin with a matched name (`access.log.1`).
    pub(super) fn add_siblings(&mut self) {
        let matched: Vec<PathBuf> = self.seen.iter().map(|seen| seen.path.clone()).collect();
        for path in &matched {
            let Some(name) = path.file_name().and_then(OsStr::to_str) else { continue };
            for candidate in self.list(path.parent().unwrap_or(Path::new(""))) {
                let is_sibling = candidate.file_name().and_then(OsStr::to_str).is_some_and(|other| {
                    other.len() > name.len() && other.starts_with(name) && !is_compressed(&candidate)
                });
                if !is_sibling || matched.contains(&candidate) {
                    continue;
                }
                if let Ok(metadata) = fs::metadata(&candidate)
                    && metadata.is_file()
                {
                    self.seen.push(seen(candidate, &metadata, Some(path.clone())));
                }
            }
        }
    }

    fn expand(&mut self, pattern: &Path, found: &mut BTreeSet<PathBuf>) {
        let mut level = vec![PathBuf::new()];
        for component in pattern.components() {
            let wildcard = match component {
                Component::Normal(name) => name.to_str().filter(|name| is_pattern(name)),
                _ => None,
            };
            let Some(wildcard) = wildcard else {
                level.iter_mut().for_each(|path| path.push(component));
                continue;
            };
            let mut next = Vec::new();
            for directory in &level {
                self.directories.insert(or_here(directory));
                let entries = self.list(directory).into_iter();
                next.extend(entries.filter(|path| {
                    path.file_name().and_then(OsStr::to_str).is_some_and(|name| matches(wildcard, name))
                }));
            }
            level = next;
        }
        self.directories.extend(level.iter().map(|path| directory_of(path)));
        found.extend(level);
    }

    fn list(&mut self, directory: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(or_here(directory)).and_then(|entries| {
            entries.map(|entry| entry.map(|entry| directory.join(entry.file_name()))).collect::<io::Result<Vec<_>>>()
        });
        match entries {
            Ok(mut entries) => {
                entries.sort_unstable();
                entries
            }
            Err(error) => {
                if !is_absence(&error) {
                    self.failures.push((directory.to_owned(), error.to_string()));
                }
                Vec::new()
            }
        }
    }

    /// What the path names, links followed. A file that is not there is no failure: it may come.
    fn look_at(&mut self, path: &Path) -> Option<Metadata> {
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => {
                if let Ok(target) = fs::canonicalize(path) {
                    self.directories.insert(directory_of(&target));
                }
                Some(metadata)
            }
            Ok(_) => {
                self.failures.push((path.to_owned(), "not a regular file, so it cannot be followed".to_owned()));
                None
            }
            Err(error) => {
                if !is_absence(&error) {
                    self.failures.push((path.to_owned(), error.to_string()));
                }
                None
            }
        }
    }
}

fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn seen(path: PathBuf, metadata: &Metadata, sibling_of: Option<PathBuf>) -> Seen {
    let nanos = metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
    Seen { path, id: id_of(metadata), size: metadata.size(), modified: Timestamp::from_nanos(nanos), sibling_of }
}

/// The identity of an opened or listed file.
pub(super) fn id_of(metadata: &Metadata) -> FileId {
    FileId { dev: metadata.dev(), inode: metadata.ino() }
}

fn or_here(directory: &Path) -> PathBuf {
    if directory.as_os_str().is_empty() { PathBuf::from(".") } else { directory.to_owned() }
}

fn directory_of(path: &Path) -> PathBuf {
    or_here(path.parent().unwrap_or(Path::new("")))
}

fn is_compressed(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    COMPRESSED.iter().any(|end| name.ends_with(end))
}

fn is_excluded(path: &Path, patterns: &[String]) -> bool {
    patterns.iter().any(|pattern| {
        if !pattern.contains('/') {
            return path.file_name().and_then(OsStr::to_str).is_some_and(|name| matches(pattern, name));
        }
        let (wanted, parts) = (Path::new(pattern).components(), path.components());
        let pairs = || wanted.clone().zip(parts.clone());
        wanted.clone().count() == parts.clone().count()
            && pairs().all(|(want, part)| match (want.as_os_str().to_str(), part.as_os_str().to_str()) {
                (Some(want), Some(part)) => matches(want, part),
                _ => want == part,
            })
    })
}

fn is_pattern(name: &str) -> bool {
    name.contains(['*', '?', '['])
}

/// Whether one component of a path matches: `*` any characters, `?` one, `[a-z]` one of, `[!a-z]` none of. Hidden names
/// match only patterns that begin with a dot.
fn matches(pattern: &str, name: &str) -> bool {
    if pattern == name {
        return true;
    }
    if name.starts_with('.') && !pattern.starts_with('.') {
        return false;
    }
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // The classic loop: on a mismatch the newest star takes one character more.
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        if pattern.get(p) == Some(&'*') {
            p += 1;
            star = Some((p, n));
        } else if let Some(next) = match_one(&pattern, p, name[n]) {
            (p, n) = (next, n + 1);
        } else if let Some((after, taken)) = star {
            star = Some((after, taken + 1));
            (p, n) = (after, taken + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// Where the pattern goes on when its element at `p` matches `c`.
fn match_one(pattern: &[char], p: usize, c: char) -> Option<usize> {
    match pattern.get(p)? {
        '?' => Some(p + 1),
        '[' => {
            let negated = matches!(pattern.get(p + 1), Some('!' | '^'));
            let first = p + 1 + usize::from(negated);
            // A bracket right after the opening one is a member.
            let Some(end) = (first + 1..pattern.len()).find(|i| pattern[*i] == ']') else {
                return (c == '[').then_some(p + 1);
            };
            (is_member(&pattern[first..end], c) != negated).then_some(end + 1)
        }
        literal => (*literal == c).then_some(p + 1),
    }
}

fn is_member(set: &[char], c: char) -> bool {
    match set {
        [] => false,
        [low, '-', high, rest @ ..] => (*low..=*high).contains(&c) || is_member(rest, c),
        [one, rest @ ..] => *one == c || is_member(rest, c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_as_in_a_shell() {
        for (pattern, name) in [
            ("access.log", "access.log"),
            ("access*.log", "access.log"),
            ("access*.log", "access-2.log"),
            ("*", "a"),
            ("a*b*c", "aXbbXc"),
            ("a?c", "aéc"),
            ("a[0-9].log", "a7.log"),
            ("a[0-9].log", "a[0-9].log"),
            ("a[!0-9]", "ax"),
            ("a[]x]", "a]"),
            ("a[", "a["),
            (".h*", ".hidden"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("access*.log", "access.log.1"),
            ("*", ".hidden"),
            ("a[0-9]", "ax"),
            ("a[!0-9]", "a1"),
            ("a?", "a"),
            ("", "a"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn a_scan_finds_files_and_siblings_but_nothing_compressed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        for name in ["access.log", "access.log.1", "access.log.2.gz", "other.log", "debug.log", "sub/access.log"] {
            fs::write(at(name), "x").unwrap();
        }
        let mut config = FileConfig::new(vec![at("*.log"), at("*/access.log"), at("missing.log")]);
        config.exclude = vec!["debug*".to_owned()];
        let mut found = scan(&config);
        let names = |scan: &Scan| -> Vec<PathBuf> { scan.seen.iter().map(|seen| seen.path.clone()).collect() };
        assert_eq!(names(&found), [at("access.log"), at("other.log"), at("sub/access.log")]);
        assert!(found.failures.is_empty(), "{:?}", found.failures);
        assert!(found.directories.contains(directory.path()) && found.directories.contains(&at("sub")));
        found.add_siblings();
        let siblings: Vec<_> = found.seen.iter().filter(|seen| seen.sibling_of.is_some()).collect();
        assert_eq!(siblings.len(), 1);
        assert_eq!(siblings[0].path, at("access.log.1"));
    }

    #[test]
    fn what_is_no_file_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        let found = scan(&FileConfig::new(vec![directory.path().to_owned()]));
        assert!(found.seen.is_empty());
        assert_eq!(found.failures.len(), 1);
    }
}
