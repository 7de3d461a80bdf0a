//! How our entries are known: by how their note or comment begins, to the letter.

/// Begins the notes of every installation.
pub(in crate::cloudflare) const ALL: &str = "portcullis:";

/// The beginning of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cloudflare) struct Mark(String);

impl Mark {
    /// Of an installation, whose name matches `[a-z0-9-]{1,63}`.
    pub(in crate::cloudflare) fn new(installation: &str) -> Self {
        Self(format!("{ALL}{installation}:"))
    }

    /// Of an installation without a name: no entry has it.
    pub(in crate::cloudflare) fn of_nobody() -> Self {
        Self::new("")
    }

    /// The note of an entry that `rule` is behind.
    pub(in crate::cloudflare) fn note(&self, rule: &str) -> String {
        format!("{}{rule}", self.0)
    }

    /// What our notes begin with.
    pub(in crate::cloudflare) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the entry with this note is ours.
    pub(in crate::cloudflare) fn is_on(&self, note: &str) -> bool {
        note.starts_with(&self.0)
    }

    /// Name of the installation that made the entry with this note, if it is like ours.
    pub(in crate::cloudflare) fn of_other(note: &str) -> Option<&str> {
        let (name, _) = note.strip_prefix(ALL)?.split_once(':')?;
        proto::subject::is_name(name).then_some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_beginning_is_ours() {
        let mark = Mark::new("a");
        assert_eq!(mark.note("flood"), "portcullis:a:flood");
        for (note, ours, other) in [
            ("portcullis:a:flood", true, Some("a")),
            ("portcullis:a:", true, Some("a")),
            ("Portcullis:a:flood", false, None),
            ("portcullis:A:flood", false, None),
            (" portcullis:a:flood", false, None),
            ("portcullis:ab:flood", false, Some("ab")),
            ("portcullis:a", false, None),
            ("see portcullis:a:flood", false, None),
            ("", false, None),
        ] {
            assert_eq!((mark.is_on(note), Mark::of_other(note)), (ours, other), "{note}");
        }
    }
}
