//! One request, and the lines that Traefik writes about it: JSON with all fields, and the common log format.
//!
//! Field names and their order are those of Traefik v3 with request headers kept.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};

/// Nanoseconds in a second.
pub const SECOND: i64 = 1_000_000_000;
/// Nanoseconds in a minute.
pub const MINUTE: i64 = 60 * SECOND;

/// One request.
#[derive(Clone, Debug)]
pub struct Access {
    /// When it began, in nanoseconds since the epoch.
    pub start: i64,
    /// How long it took, in nanoseconds.
    pub duration: i64,
    /// TCP peer.
    pub peer: IpAddr,
    /// First `X-Forwarded-For` header, whole, where a trusted peer sent one.
    pub forwarded_for: Option<String>,
    /// `Cf-Connecting-Ip`, where Cloudflare sent one.
    pub cf_connecting_ip: Option<String>,
    /// `-` when no credentials were sent.
    pub username: String,
    /// Status sent to the client.
    pub status: u16,
    /// Request method.
    pub method: &'static str,
    /// With the query.
    pub path: String,
    /// `User-Agent`.
    pub user_agent: &'static str,
    /// Number of the request since Traefik started.
    pub count: u64,
}

impl Access {
    /// A GET at `start` by `peer`, answered with `status`.
    pub fn new(start: i64, peer: IpAddr, status: u16, path: impl Into<String>) -> Self {
        Self {
            start,
            duration: 8_400_000,
            peer,
            forwarded_for: None,
            cf_connecting_ip: None,
            username: "-".to_owned(),
            status,
            method: "GET",
            path: path.into(),
            user_agent: "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
            count: 1,
        }
    }

    /// When it ended, which is when Traefik writes its line.
    pub fn end(&self) -> i64 {
        self.start + self.duration
    }

    /// A port that belongs to the client, the same for the same request.
    fn port(&self) -> u64 {
        32_768 + self.count * 7_919 % 28_000
    }

    fn client_host(&self) -> String {
        self.forwarded_for.clone().unwrap_or_else(|| self.peer.to_string())
    }

    /// Whether a service answered: Traefik itself answers what no router takes, and challenges.
    fn reached_service(&self) -> bool {
        !matches!(self.status, 401 | 429)
    }

    /// The line of `accessLog.format = "json"`, without its line feed.
    pub fn render_json(&self) -> String {
        let peer = match self.peer {
            IpAddr::V4(addr) => format!("{addr}:{}", self.port()),
            IpAddr::V6(addr) => format!("[{addr}]:{}", self.port()),
        };
        let start = render_time(self.start);
        let size = 180 + self.count * 131 % 20_000;
        let origin_status = if self.reached_service() { self.status } else { 0 };
        let overhead = 41_000 + i64::try_from(self.count % 1_000).unwrap_or(0) * 13;
        let mut line = object(json!({
            "ClientAddr": peer,
            "ClientHost": self.client_host(),
            "ClientPort": self.port().to_string(),
            "ClientUsername": self.username,
            "DownstreamContentSize": size,
            "DownstreamStatus": self.status,
            "Duration": self.duration,
            "GzipRatio": 0,
            "OriginContentSize": if origin_status == 0 { 0 } else { size },
            "OriginDuration": if origin_status == 0 { 0 } else { self.duration - overhead },
            "OriginStatus": origin_status,
            "Overhead": overhead,
            "RequestAddr": "shop.example.net",
            "RequestContentSize": 0,
            "RequestCount": self.count,
            "RequestHost": "shop.example.net",
            "RequestMethod": self.method,
            "RequestPath": self.path,
            "RequestPort": "-",
            "RequestProtocol": "HTTP/2.0",
            "RequestScheme": "https",
            "RetryAttempts": 0,
            "RouterName": "shop@docker",
            "StartLocal": start,
            "StartUTC": start,
            "TLSCipher": "TLS_AES_128_GCM_SHA256",
            "TLSVersion": "1.3",
            "entryPointName": "websecure",
            "level": "info",
            "msg": "",
            "request_User-Agent": self.user_agent,
            "time": format!("{}Z", &render_time(self.end())[..19]),
        }));
        if origin_status != 0 {
            line.insert("ServiceAddr".to_owned(), json!("10.0.3.12:8080"));
            line.insert("ServiceName".to_owned(), json!("shop@docker"));
            line.insert("ServiceURL".to_owned(), json!("http://10.0.3.12:8080"));
            line.insert("downstream_Content-Type".to_owned(), json!("text/html; charset=utf-8"));
            line.insert("origin_Content-Type".to_owned(), json!("text/html; charset=utf-8"));
        }
        if let Some(chain) = &self.forwarded_for {
            line.insert("request_X-Forwarded-For".to_owned(), json!(chain));
        }
        if let Some(addr) = &self.cf_connecting_ip {
            line.insert("request_Cf-Connecting-Ip".to_owned(), json!(addr));
        }
        json!(line).to_string()
    }

    /// The line of `accessLog.format = "common"`, without its line feed. It names no peer.
    pub fn render_clf(&self) -> String {
        let (router, service) =
            if self.reached_service() { ("shop@docker", "http://10.0.3.12:8080") } else { ("shop@docker", "-") };
        format!(
            r#"{} - {} [{}] "{} {} HTTP/2.0" {} {} "-" "{}" {} "{router}" "{service}" {}ms"#,
            self.client_host(),
            self.username,
            render_clf_time(self.start),
            self.method,
            self.path,
            self.status,
            180 + self.count * 131 % 20_000,
            self.user_agent,
            self.count,
            self.duration / 1_000_000,
        )
    }
}

/// Keys in alphabetical order, as Traefik writes them.
fn object(value: Value) -> BTreeMap<String, Value> {
    match value {
        Value::Object(map) => map.into_iter().collect(),
        _ => BTreeMap::new(),
    }
}

/// Year, month, day of a day number since 1970-01-01 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

/// RFC 3339 in UTC with nanoseconds.
pub fn render_time(nanos: i64) -> String {
    let secs = nanos.div_euclid(SECOND);
    let (year, month, day) = civil(secs.div_euclid(86_400));
    let of_day = secs.rem_euclid(86_400);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        of_day / 3_600,
        of_day / 60 % 60,
        of_day % 60,
        nanos.rem_euclid(SECOND)
    )
}

/// CLF's time, in UTC.
fn render_clf_time(nanos: i64) -> String {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let time = render_time(nanos);
    let month = time[5..7].parse::<usize>().unwrap_or(1);
    format!("{}/{}/{}:{} +0000", &time[8..10], MONTHS[month - 1], &time[..4], &time[11..19])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_traefik_writes_them() {
        let nanos = 1_767_881_955_980_170_592;
        assert_eq!(render_time(nanos), "2026-01-08T14:19:15.980170592Z");
        assert_eq!(render_clf_time(nanos), "08/Jan/2026:14:19:15 +0000");
        assert_eq!(render_time(951_782_400 * SECOND), "2000-02-29T00:00:00.000000000Z");
    }
}
