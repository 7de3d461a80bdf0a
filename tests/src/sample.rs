//! The log that ships with Portcullis (`deploy/samples`): a shop's ordinary traffic of forty minutes, and among it those
//! whom Portcullis is for. Written by `cargo run --package tests --example sample`; a test holds the file to this code.
//!
//! Every client has a documentation address (RFC 5737, RFC 3849); only proxies have others, as they must be in the
//! trusted ranges to be believed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::access::{Access, MINUTE, SECOND};
use crate::random::Random;

/// 2026-03-02T08:00:00Z.
pub const BEGIN: i64 = 1_772_438_400 * SECOND;
/// The scanner who comes back after his first ban.
pub const SCANNER: IpAddr = v4(203, 0, 113, 66);
/// Tries passwords on one account after the other.
pub const CREDENTIAL_STUFFER: IpAddr = v4(198, 51, 100, 23);
/// Hides behind Cloudflare and names somebody else in `X-Forwarded-For`.
pub const SPOOFER: IpAddr = v4(203, 0, 113, 140);
/// Whom the spoofer names; an innocent visitor.
pub const SPOOFED: IpAddr = v4(192, 0, 2, 77);
/// Scans with an address of its /64 for each request.
pub const ROTATING: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x66, 0x1, 0, 0, 0, 0);
/// Scans, but too slowly for the rule.
pub const SLOW_SCANNER: IpAddr = v4(203, 0, 113, 9);

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

/// Edges of Cloudflare, which speak for visitors.
const CLOUDFLARE: [IpAddr; 3] = [v4(172, 71, 122, 85), v4(162, 158, 90, 17), v4(172, 68, 10, 201)];
/// An uptime check on the private network, misconfigured: never banned.
const MONITOR: IpAddr = v4(10, 0, 3, 5);

const BROWSERS: [&str; 4] = [
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Version/17.5 Mobile/15E148 Safari/604.1",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5 Safari/605.1.15",
];
const PAGES: [&str; 10] = [
    "/",
    "/products",
    "/products?page=2&sort=price",
    "/cart",
    "/checkout/address",
    "/assets/app.3f9c2.js",
    "/assets/site.81ac.css",
    "/images/lamp.jpg",
    "/api/v2/search?q=desk%20lamp",
    "/blog/2026/02/spring-sale",
];
const PROBES: [&str; 16] = [
    "/.env",
    "/.git/config",
    "/wp-login.php",
    "/wp-admin/setup-config.php?step=1",
    "/phpmyadmin/index.php",
    "/admin/",
    "/backup.zip",
    "/vendor/phpunit/phpunit/src/Util/PHP/eval-stdin.php",
    "/.aws/credentials",
    "/server-status",
    "/actuator/env",
    "/cgi-bin/luci",
    "/shell.php?cmd=id",
    "/config.json",
    "/old/index.html?x=.png",
    "/solr/admin/info/system",
];
const ACCOUNTS: [&str; 6] = ["admin", "root", "test", "office", "anna", "webmaster"];

/// All requests, in the order in which Traefik writes them: by their end.
pub fn accesses() -> Vec<Access> {
    let mut random = Random::new(2);
    let mut list = visitors(&mut random);
    // Ten minutes' ban at 08:06, back at 08:20 for twice as long.
    list.extend(scan(BEGIN + 6 * MINUTE, 22, 1_100, |_| SCANNER));
    list.extend(scan(BEGIN + 20 * MINUTE, 18, 900, |_| SCANNER));
    list.extend(scan(BEGIN + 11 * MINUTE, 24, 1_700, |i| {
        IpAddr::V6(Ipv6Addr::from_bits(ROTATING.to_bits() + u128::from(0x9e37_79b9_u32) * (i + 1)))
    }));
    list.extend(scan(BEGIN + 3 * MINUTE, 130, 5_000, |_| SLOW_SCANNER));
    list.extend(scan(BEGIN + 2 * MINUTE, 40, 2_000, |_| MONITOR));
    list.extend(scan(BEGIN + 15 * MINUTE, 20, 1_300, |_| SPOOFER).map(|access| behind_cloudflare(access, SPOOFED)));
    list.extend(credentials());
    list.sort_by_key(|access| (access.end(), access.start));
    for (i, access) in (1..).zip(&mut list) {
        access.count = 48_210 + i;
    }
    list
}

fn visitors(random: &mut Random) -> Vec<Access> {
    let mut list = Vec::new();
    for number in 0..1_500 {
        let at = BEGIN + number * 40 * MINUTE / 1_500 + i64::try_from(random.below(900_000_000)).unwrap_or(0);
        let visitor = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 10 + u8::try_from(random.below(200)).unwrap_or(0)));
        let (status, path) = match random.below(100) {
            0..=1 => (404, "/favicon.ico"),
            2 => (404, "/products/discontinued-lamp"),
            3 => (401, "/account/git/info/refs?service=git-upload-pack"),
            4 => (429, "/api/v2/search?q=lamp"),
            5..=18 => (304, random.pick(&PAGES)),
            19..=22 => (302, "/checkout"),
            _ => (200, random.pick(&PAGES)),
        };
        let mut access = Access::new(at, visitor, status, path);
        access.duration = 900_000 + i64::try_from(random.below(180_000_000)).unwrap_or(0);
        access.user_agent = random.pick(&BROWSERS);
        if random.chance(3) {
            // A download: its line appears long after it began.
            access.duration += 20 * SECOND;
        }
        list.push(if random.chance(30) { through_cloudflare(access, random) } else { access });
    }
    list
}

/// A visitor whose requests Cloudflare delivers.
fn through_cloudflare(mut access: Access, random: &mut Random) -> Access {
    let visitor = access.peer.to_string();
    access.peer = random.pick(&CLOUDFLARE);
    access.forwarded_for = Some(visitor.clone());
    access.cf_connecting_ip = Some(visitor);
    access
}

/// A client behind Cloudflare who sends an `X-Forwarded-For` of his own; Cloudflare appends the truth.
fn behind_cloudflare(mut access: Access, named: IpAddr) -> Access {
    let client = access.peer;
    access.peer = CLOUDFLARE[0];
    access.forwarded_for = Some(format!("{named},{client}"));
    access.cf_connecting_ip = Some(client.to_string());
    access
}

/// `count` probes from `begin`, one every `step_ms` milliseconds.
fn scan(begin: i64, count: u32, step_ms: i64, client: impl Fn(u128) -> IpAddr) -> impl Iterator<Item = Access> {
    (0..count).map(move |i| {
        let probe = PROBES[usize::try_from(i).unwrap_or(0) % PROBES.len()];
        let at = begin + i64::from(i) * step_ms * 1_000_000 + i64::from(i * 37 % 100) * 1_000_000;
        let mut access = Access::new(at, client(u128::from(i)), 404, probe);
        access.user_agent = "Mozilla/5.0 zgrab/0.x";
        access
    })
}

fn credentials() -> impl Iterator<Item = Access> {
    (0..26u32).map(|i| {
        let at = BEGIN + 13 * MINUTE + i64::from(i) * 17 * SECOND + 250_000_000;
        let mut access = Access::new(at, CREDENTIAL_STUFFER, 401, "/account/login");
        access.username = (*ACCOUNTS.get(usize::try_from(i).unwrap_or(0) % ACCOUNTS.len()).unwrap_or(&"-")).to_owned();
        access.user_agent = "python-requests/2.32.3";
        access
    })
}

/// What else Traefik and its plugins write into the file; no access entries.
const NOISE: [&str; 3] = [
    r#"{"level":"info","msg":"Configuration loaded from flags.","time":"2026-03-02T08:00:00Z"}"#,
    "DEBUG: BouncerTraefikPlugin: 2026/03/02 08:00:11 handleStreamCache:updated",
    "",
];

/// `access.log`: JSON, one object a line.
pub fn render_json_log() -> String {
    let lines = accesses().iter().map(Access::render_json).collect::<Vec<_>>();
    with_noise(&lines)
}

/// The same requests in the common log format.
pub fn render_clf_log() -> String {
    let lines = accesses().iter().map(Access::render_clf).collect::<Vec<_>>();
    with_noise(&lines)
}

fn with_noise(lines: &[String]) -> String {
    let mut log = String::new();
    for (i, line) in lines.iter().enumerate() {
        if i % 650 == 3 {
            log.push_str(NOISE[i / 650 % NOISE.len()]);
            log.push('\n');
        }
        log.push_str(line);
        log.push('\n');
    }
    log
}
