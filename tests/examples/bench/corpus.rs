//! A Traefik log of any length: what a busy site writes, about 1.1 KB a line, among it scanners who must be banned.
//!
//! Visitors make 1,000 requests a second; every scanner probes 40 times within three seconds and is never seen again. So
//! it is known who must be banned, and a fast but wrong answer is no result.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tests::access::{Access, SECOND};
use tests::random::Random;

use crate::table::to_f64;

/// From one line to the next, in nanoseconds.
const STEP: i64 = SECOND / 1_000;
/// Clients who ban nobody's patience: at most a few refused requests a minute each.
const VISITORS: u64 = 5_000;
/// Lines in which one scanner is at work, and after how many of them he has one.
const BLOCK_LINES: u64 = 3_320;
const PROBE_EVERY: u64 = 83;
/// Bad requests that ban.
pub(crate) const MAX_RETRY: u64 = 15;

const BROWSERS: [&str; 3] = [
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5 Safari/605.1.15",
];
const PAGES: [&str; 8] = [
    "/",
    "/products?page=2&sort=price",
    "/cart",
    "/assets/app.3f9c2.js",
    "/assets/site.81ac.css",
    "/images/lamp.jpg",
    "/api/v2/search?q=desk%20lamp",
    "/blog/2026/02/spring-sale",
];
/// Not found; half of them are files that no rule counts.
const MISSING: [&str; 4] = ["/apple-touch-icon.png", "/products/discontinued-lamp", "/favicon.ico", "/feed"];
const PROBES: [&str; 6] =
    ["/.env", "/.git/config", "/wp-login.php", "/phpmyadmin/index.php", "/backup.zip", "/old/index.html?x=.png"];

/// A log on the disk.
#[derive(Debug)]
pub(crate) struct Corpus {
    /// Where.
    pub(crate) path: PathBuf,
    /// How many lines.
    pub(crate) lines: u64,
    /// How many bytes.
    pub(crate) bytes: u64,
    /// How many addresses must be banned.
    pub(crate) offenders: usize,
}

impl Corpus {
    /// Writes `lines` lines to `path`; the last request ends at `end`, in nanoseconds since the epoch.
    pub(crate) fn write(path: &Path, lines: u64, end: i64) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("could not create {}", path.display()))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        let mut random = Random::new(3);
        let begin = end - STEP * i64::try_from(lines)?;
        let mut bytes = 0;
        for number in 0..lines {
            let access = request(number, begin + STEP * i64::try_from(number)?, &mut random);
            let line = access.render_json();
            bytes += u64::try_from(line.len())? + 1;
            writeln!(file, "{line}")?;
        }
        file.flush().with_context(|| format!("could not write {}", path.display()))?;
        // The rest of the last block may hold too few probes for a ban.
        let last = (lines % BLOCK_LINES).div_ceil(PROBE_EVERY) >= MAX_RETRY;
        let offenders = usize::try_from(lines / BLOCK_LINES + u64::from(last))?;
        Ok(Self { path: path.to_owned(), lines, bytes, offenders })
    }

    /// Bytes of a line, on average.
    pub(crate) fn line_bytes(&self) -> f64 {
        to_f64(self.bytes) / to_f64(self.lines)
    }
}

/// The request whose line is written at `end`, which is when it ended.
pub(crate) fn request(number: u64, end: i64, random: &mut Random) -> Access {
    let (client, status, path) = if number.is_multiple_of(PROBE_EVERY) {
        (address(198, 19, number / BLOCK_LINES), 404, random.pick(&PROBES))
    } else {
        let visitor = address(198, 18, random.below(VISITORS));
        match random.below(1_000) {
            0..=29 => (visitor, 404, random.pick(&MISSING)),
            30..=33 => (visitor, 401, "/account/git/info/refs?service=git-upload-pack"),
            34..=35 => (visitor, 500, "/checkout"),
            36..=180 => (visitor, 304, random.pick(&PAGES)),
            181..=210 => (visitor, 302, "/checkout"),
            _ => (visitor, 200, random.pick(&PAGES)),
        }
    };
    let duration = 900_000 + i64::try_from(random.below(180_000_000)).unwrap_or(0);
    let mut access = Access::new(end - duration, client, status, path);
    access.duration = duration;
    access.user_agent = random.pick(&BROWSERS);
    access.count = number + 1;
    access
}

/// Address `number` of a /16; of the networks for benchmarks (RFC 2544), so that nobody is meant.
pub(crate) fn address(a: u8, b: u8, number: u64) -> IpAddr {
    let [high, low] = u16::try_from(number % 65_536).unwrap_or(0).to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(a, b, high, low))
}
