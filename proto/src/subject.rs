//! Names on the bus and in configurations.

/// The rule name of bans that an operator ordered.
pub const OPERATOR: &str = "operator";
/// Reserved for what Portcullis says of itself.
pub const SYSTEM: &str = "system";

/// Whether `name` may name a node, source or rule: `[a-z0-9-]{1,63}`.
pub fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Maps any host name to a valid name: lower case, everything else `-`, at most 63 bytes, never empty.
pub fn name_from_host(host: &str) -> String {
    let mapped: String = host
        .chars()
        .take(63)
        .map(|c| c.to_ascii_lowercase())
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' })
        .collect();
    let trimmed = mapped.trim_matches('-');
    if trimmed.is_empty() { "node".to_owned() } else { trimmed.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_become_valid_names() {
        for (host, name) in [("Edge-1.example", "edge-1-example"), ("", "node"), ("ü", "node"), ("a_b", "a-b")] {
            assert_eq!(name_from_host(host), name);
        }
        assert!(is_name(&name_from_host(&"x".repeat(200))));
        assert!(!is_name("") && !is_name("A") && !is_name("a.b") && is_name("a-1"));
    }
}
