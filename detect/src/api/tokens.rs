//! Bearer tokens of the operator API: who may ask what.
//!
//! The file holds hashes, so whoever reads it learns no token. One token a line, `NAME SCOPE sha256:HEX`; empty lines and
//! lines that begin with `#` are skipped. A token is long and random, so one round of SHA-256 is enough: guessing 128
//! bits is hopeless, fast hash or slow. Mistakes name the line and never show what stands in it, which may be a token.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use axum::http::Method;
use proto::api::{TOKEN_BYTES_MAX, TOKEN_BYTES_MIN};
use proto::secret;
use proto::subject::is_name;
use ring::digest::{SHA256, digest};
use subtle::ConstantTimeEq;

use crate::error::ApiFileError;

/// Tokens in one file: each request is compared with all of them.
const TOKENS_MAX: usize = 1000;
/// Longest file of tokens in bytes; 1,000 tokens with a comment each are shorter.
const FILE_BYTES_MAX: u64 = 256 * 1024;
/// Bytes of a hash.
const HASH_BYTES: usize = 32;

/// What a token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    /// To ask.
    Read,
    /// To ask and to order.
    Write,
}

impl Scope {
    /// What a request needs: `GET` changes nothing, all else may.
    pub(super) fn needed(method: &Method) -> Self {
        if matches!(*method, Method::GET | Method::HEAD) { Self::Read } else { Self::Write }
    }

    /// As the file writes it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Read, Self::Write].into_iter().find(|scope| scope.as_str() == text)
    }
}

/// SHA-256 of a token. Compared in constant time, and not printed.
#[derive(Clone, Copy)]
pub(super) struct Hash([u8; HASH_BYTES]);

impl Hash {
    /// Of a token as sent; `None` when no token is so short or so long.
    pub(super) fn of(token: &[u8]) -> Option<Self> {
        let sane = (TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&token.len());
        let hash = sane.then(|| digest(&SHA256, token))?;
        hash.as_ref().try_into().ok().map(Self)
    }

    fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?.as_bytes();
        let mut hash = [0; HASH_BYTES];
        if hex.len() != 2 * HASH_BYTES {
            return None;
        }
        for (byte, pair) in hash.iter_mut().zip(hex.chunks_exact(2)) {
            let digit = |c: u8| char::from(c).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self(hash))
    }

    fn equals(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hash(..)")
    }
}

/// Whom a token belongs to.
#[derive(Clone, Debug)]
pub(super) struct Holder {
    /// Its name, for the log.
    pub(super) name: Arc<str>,
    /// What it may do.
    pub(super) scope: Scope,
    hash: Hash,
}

/// All tokens.
#[derive(Clone, Debug, Default)]
pub(super) struct Tokens(Vec<Holder>);

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// When the file cannot be read, is open to others, or has mistakes: all of them.
    pub(super) fn load(path: &Path) -> Result<Self, ApiFileError> {
        let text = secret::read_file(path, FILE_BYTES_MAX)?;
        Self::parse(text.expose())
            .map_err(|mistakes| ApiFileError::Tokens { path: path.to_owned(), mistakes: mistakes.join("; ") })
    }

    fn parse(text: &str) -> Result<Self, Vec<String>> {
        let mut holders: Vec<Holder> = Vec::new();
        let mut mistakes = Vec::new();
        for (number, line) in (1..).zip(text.lines().map(str::trim)) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match parse_line(line, &holders) {
                Ok(holder) => holders.push(holder),
                Err(mistake) => mistakes.push(format!("line {number}: {mistake}")),
            }
        }
        if holders.len() > TOKENS_MAX {
            mistakes.push(format!("more than {TOKENS_MAX} tokens"));
        }
        if mistakes.is_empty() { Ok(Self(holders)) } else { Err(mistakes) }
    }

    /// The holder of a token. Takes the same time whoever it is, and whether it is anybody.
    pub(super) fn find(&self, hash: &Hash) -> Option<&Holder> {
        self.0.iter().fold(None, |found, holder| if holder.hash.equals(hash) { Some(holder) } else { found })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }
}

fn parse_line(line: &str, others: &[Holder]) -> Result<Holder, &'static str> {
    let mut words = line.split_whitespace();
    let (Some(name), Some(scope), Some(hash), None) = (words.next(), words.next(), words.next(), words.next()) else {
        return Err("expected a name, a scope and the hash of a token");
    };
    if !is_name(name) {
        return Err("expected a name of 1 to 63 of a-z, 0-9 and -");
    }
    let scope = Scope::parse(scope).ok_or("expected the scope `read` or `write`")?;
    let hash =
        Hash::parse(hash).ok_or("expected `sha256:` and 64 hexadecimal digits: the hash of a token, not a token")?;
    if others.iter().any(|other| *other.name == *name) {
        return Err("another token has this name");
    }
    if others.iter().any(|other| other.hash.equals(&hash)) {
        return Err("another name has this token");
    }
    Ok(Holder { name: name.into(), scope, hash })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of 64 times `a` and of 64 times `b`, as `sha256sum` prints them.
    const A: &str = "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb";
    const B: &str = "a0fab1377f49a759b57f63318262ebe89fabfc990e8e93ceac2984561482b9d4";

    #[test]
    fn a_token_is_known_by_its_hash() {
        let text = format!("# who may what\n\n  laptop write sha256:{A}\nmonitor\tread sha256:{}\n", B.to_uppercase());
        let tokens = Tokens::parse(&text).unwrap();
        assert_eq!(tokens.count(), 2);
        let holder = tokens.find(&Hash::of(&[b'a'; 64]).unwrap()).unwrap();
        assert_eq!((&*holder.name, holder.scope), ("laptop", Scope::Write));
        assert!(tokens.find(&Hash::of(&[b'c'; 64]).unwrap()).is_none());
        assert!(!format!("{tokens:?}").contains("ffe0"), "a hash is not printed either");
    }

    #[test]
    fn a_token_that_could_be_guessed_is_none() {
        assert!(Hash::of(&[b'a'; TOKEN_BYTES_MIN - 1]).is_none());
        assert!(Hash::of(&[b'a'; TOKEN_BYTES_MIN]).is_some());
        assert!(Hash::of(&[b'a'; TOKEN_BYTES_MAX]).is_some());
        assert!(Hash::of(&[b'a'; TOKEN_BYTES_MAX + 1]).is_none());
    }

    #[test]
    fn every_mistake_is_told_by_line_and_never_by_what_stands_there() {
        let text = format!(
            "laptop write deadbeefdeadbeefdeadbeefdeadbeef\nroot admin sha256:{A}\nlaptop\na read sha256:{A} x\n\
             b read sha256:{A}\nb read sha256:{B}\nc read sha256:{A}\nUp read sha256:{B}\n"
        );
        let mistakes = Tokens::parse(&text).unwrap_err();
        let lines: Vec<&str> = mistakes.iter().map(|mistake| mistake.split(':').next().unwrap()).collect();
        assert_eq!(lines, ["line 1", "line 2", "line 3", "line 4", "line 6", "line 7", "line 8"], "{mistakes:#?}");
        assert!(mistakes.iter().all(|mistake| !mistake.contains("deadbeef") && !mistake.contains("ffe0")));
    }

    #[test]
    fn asking_needs_less_than_ordering() {
        assert_eq!(Scope::needed(&Method::GET), Scope::Read);
        assert_eq!(Scope::needed(&Method::POST), Scope::Write);
        assert_eq!(Scope::needed(&Method::DELETE), Scope::Write);
        assert!(Scope::Write >= Scope::Read);
    }
}
