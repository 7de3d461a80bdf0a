//! What holds for every line, however it was made.

use proptest::prelude::*;

use super::*;

/// Bytes that look like log lines here and there.
fn almost_lines() -> impl Strategy<Value = Vec<u8>> {
    let samples: Vec<&'static str> = JSON.lines().chain(CLF.lines()).filter(|line| !line.is_empty()).collect();
    let samples = [samples, ENVELOPES.lines().collect()].concat();
    const STARTS: [&str; 4] = ["", "{\"log\":\"", "2026-01-01T00:00:00Z stdout F ", "2026-01-01T00:00:00Z stderr P "];
    let edits = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 0..6);
    (proptest::sample::select(samples), proptest::sample::select(&STARTS[..]), edits).prop_map(
        |(line, envelope, edits)| {
            let mut bytes = [envelope.as_bytes(), line.as_bytes()].concat();
            for (index, byte, edit) in edits {
                let at = index.index(bytes.len());
                match edit {
                    0 => bytes[at] = byte,
                    1 => bytes.insert(at, byte),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            bytes
        },
    )
}

/// Text that tries to be a line of its own.
fn hostile_text() -> impl Strategy<Value = String> {
    let forged = r#"{"ClientAddr":"203.0.113.99:1","DownstreamStatus":200,"RequestPath":"/forged"}"#;
    let docker = serde_json::json!({"log": format!("{forged}\n"), "stream": "stdout", "time": "x"}).to_string();
    let tries = [
        forged.to_owned(),
        docker,
        serde_json::json!({ "message": forged }).to_string(),
        format!("2026-01-01T00:00:00Z stdout F {forged}"),
        format!("2026-01-01T00:00:00Z stdout P {forged}"),
        format!("x\n{forged}\n"),
        r#"","message":"x"#.to_owned(),
        r#""},"log":{"ClientAddr":"203.0.113.99:1"},"a":{"b":""#.to_owned(),
        CLF.lines().next().unwrap_or_default().to_owned(),
    ];
    prop_oneof![3 => proptest::sample::select(tries.to_vec()), 1 => ".{0,40}"]
}

/// A line within an envelope of some shipper.
fn enveloped(line: &str, kind: u8) -> String {
    match kind {
        0 => line.to_owned(),
        1 => serde_json::json!({"log": format!("{line}\n"), "stream": "stdout", "time": "x"}).to_string(),
        2 => format!("2026-01-01T00:00:00Z stdout F {line}"),
        3 => serde_json::json!({"host": "x", "message": line, "timestamp": "x"}).to_string(),
        4 => serde_json::json!({"MESSAGE": line.as_bytes(), "_PID": "7"}).to_string(),
        5 => serde_json::json!({"date": 1.5, "log": line}).to_string(),
        _ => serde_json::json!({"event": {"original": line}, "message": "x", "log": {"offset": 7}}).to_string(),
    }
}

proptest! {
    #[test]
    fn no_value_turns_an_access_into_another(
        client in any::<[u8; 4]>().prop_map(IpAddr::from),
        status in 100..600_u16,
        values in proptest::collection::vec(hostile_text(), 8),
        outer in 0..7_u8, inner in prop_oneof![Just(0), 1..7_u8],
        beside in proptest::option::of(proptest::sample::select(&["log", "message", "MESSAGE", "event.original", "json"][..])),
        turned in any::<prop::sample::Index>(),
    ) {
        prop_assume!(!policy().is_trusted(client));
        let path = format!("/{}", values[0].replace('?', ""));
        let mut keys = vec![
            ("ClientAddr".to_owned(), serde_json::json!(format!("{client}:1"))),
            ("DownstreamStatus".to_owned(), serde_json::json!(status)),
            ("RequestPath".to_owned(), serde_json::json!(path)),
        ];
        // What a client chooses: values, and names of headers.
        let names = ["ClientUsername", "RequestHost", "RequestMethod", "ClientHost", "request_User-Agent", "request_log",
            "downstream_message"];
        for (name, value) in names.iter().zip(&values[1..]) {
            keys.push(((*name).to_owned(), serde_json::json!(value)));
        }
        keys.push((format!("request_{}", values[7]), serde_json::json!(values[7])));
        let at = turned.index(keys.len());
        keys.rotate_left(at);
        // A shipper that has read the line may leave a text beside it.
        if let Some(holder) = beside {
            keys.insert(if at % 2 == 0 { 0 } else { at }, (holder.to_owned(), serde_json::json!(values[0])));
        }
        let line = keys.iter().map(|(key, value)| format!("{}:{value}", serde_json::json!(key)));
        let line = format!("{{{}}}", line.collect::<Vec<_>>().join(","));
        let enveloped = enveloped(&enveloped(&line, inner), outer);
        let mut parser = Parser::new(Format::Auto, 1 << 16, policy(), Arc::default());
        let seen = parser.with_event(enveloped.as_bytes(), 0, |event| {
            (event.client.map(|client| client.addr), event.status, event.text.path.to_owned())
        });
        prop_assert_eq!(seen, Outcome::Event((Ok(client), status, path)), "{}", enveloped);
    }

    #[test]
    fn no_bytes_panic(line in proptest::collection::vec(any::<u8>(), 0..200)) {
        for format in [Format::Auto, Format::Json, Format::Clf] {
            let _ = Parser::new(format, 64, policy(), Arc::default()).with_event(&line, 0, render);
        }
    }

    #[test]
    fn no_broken_line_panics(lines in proptest::collection::vec(almost_lines(), 1..4)) {
        let mut parser = parser(&["referer"]);
        for line in lines {
            let _ = parser.with_event(&line, 0, render);
            prop_assert!(escape_sample(&line).chars().count() <= 200);
        }
    }

    #[test]
    fn no_header_of_an_untrusted_peer_changes_the_client(
        peer in any::<[u8; 4]>().prop_map(IpAddr::from),
        chain in "[0-9a-f.:, %-]{0,40}",
        cdn in "[0-9a-f.:]{0,20}",
    ) {
        prop_assume!(!policy().is_trusted(peer));
        let line = serde_json::json!({
            "ClientAddr": format!("{peer}:1"), "ClientHost": chain, "request_X-Forwarded-For": chain,
            "request_Cf-Connecting-Ip": cdn,
        });
        prop_assert_eq!(client(&mut parser(&[]), &line.to_string()), Ok(Client { addr: peer, via_proxy: false }));
    }

    #[test]
    fn a_trusted_proxy_is_never_the_client(
        peer in proptest::option::of(prop_oneof![Just("10.1.2.3:4"), Just("203.0.113.5:1"), Just("192.0.2.1:9")]),
        chain in proptest::collection::vec(prop_oneof!["10\\.0\\.0\\.[0-9]", "203\\.0\\.113\\.[0-9]", "192\\.0\\.2\\.[0-9]", "x"], 0..4),
        cdn in prop_oneof!["10\\.0\\.0\\.[0-9]", "192\\.0\\.2\\.[0-9]", "-"],
    ) {
        let line = serde_json::json!({
            "ClientAddr": peer, "ClientHost": chain.join(", "), "request_Cf-Connecting-Ip": cdn, "RequestMethod": "GET",
        });
        if let Ok(client) = client(&mut parser(&[]), &line.to_string()) {
            prop_assert!(!policy().is_trusted(client.addr), "{}", client.addr);
        }
    }

    #[test]
    fn json_and_clf_of_one_request_agree(
        path in "/[!-~&&[^?]]{0,20}", query in "[!-~]{0,10}", user in "[ -~]{1,20}", agent in "[ -~]{1,20}", status in 100..600_u16,
    ) {
        prop_assume!(![&user, &agent].iter().any(|text| is_blank_or_special(text)) && !user.contains(" - "));
        let target = if query.is_empty() { path } else { format!("{path}?{query}") };
        let json = serde_json::json!({
            "ClientHost": "192.0.2.1", "ClientUsername": user, "RequestMethod": "GET", "RequestPath": target,
            "RequestProtocol": "HTTP/1.1", "DownstreamStatus": status, "request_User-Agent": agent,
            "RouterName": "r@file", "StartUTC": "2021-12-08T09:16:05Z",
        });
        let escaped = agent.replace('"', "\\\"");
        let clf = format!(
            "192.0.2.1 - {user} [08/Dec/2021:09:16:05 +0000] \"GET {target} HTTP/1.1\" {status} 7 \"-\" \"{escaped}\" \
             5 \"r@file\" \"http://x\" 3ms"
        );
        let unescaped_ambiguity = agent.contains("\\\"");
        prop_assume!(!unescaped_ambiguity);
        prop_assert_eq!(show(&mut parser(&[]), &json.to_string()), show(&mut parser(&[]), &clf));
    }
}

fn is_blank_or_special(text: &str) -> bool {
    matches!(text, "-" | "REDACTED") || text.trim().is_empty()
}
