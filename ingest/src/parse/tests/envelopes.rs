//! What shippers put around a line, and what clients forge to look like a line of its own.

use super::*;

#[test]
fn envelopes_are_opened_and_pieces_joined_for_each_stream() {
    let line = JSON.lines().next().unwrap();
    let expected = show(&mut parser(&[]), line);
    let mut parser = parser(&[]);
    let docker = |text: &str, stream: &str| serde_json::json!({"log": text, "stream": stream, "time": "x"}).to_string();
    assert_eq!(show(&mut parser, &docker(&format!("{line}\n"), "stdout")), expected);
    assert_eq!(show(&mut parser, &format!("2026-01-01T00:00:00Z stdout F {line}")), expected);
    let (head, tail) = line.split_at(300);
    let piece = |stream: &str, tag: &str, text: &str| format!("2026-01-01T00:00:00Z {stream} {tag} {text}");
    assert_eq!(show(&mut parser, &piece("stdout", "P", head)), Outcome::Partial);
    assert!(parser.is_joining());
    assert_eq!(show(&mut parser, &piece("stderr", "F", "noise")), Outcome::Unparsed(Refusal::NotClf));
    assert_eq!(show(&mut parser, &piece("stdout", "F", tail)), expected);
    assert!(!parser.is_joining());
    assert_eq!(show(&mut parser, &docker(head, "stdout")), Outcome::Partial);
    assert_eq!(show(&mut parser, &docker(&format!("{tail}\n"), "stdout")), expected);
    assert_eq!(show(&mut parser, &piece("stdout", "P", head)), Outcome::Partial);
    assert_eq!(parser.abandon(), 1);
    assert_eq!(show(&mut parser, &piece("stdout", "F", tail)), Outcome::Unparsed(Refusal::NotClf));
}

#[test]
fn every_shippers_line_is_the_line_inside() {
    let mut parser = parser(&[]);
    let expected = event(
        "2026-01-14T09:45:33.759Z 198.51.100.7 404/0 GET shop.example /wp-login.php?a=1&b=\"é\" HTTP/2.0 [curl/8.5.0] [-] - \
         websecure -",
    );
    for line in ENVELOPES.lines() {
        assert_eq!(show(&mut parser, line), expected, "{line}");
        assert!(!parser.is_joining());
    }
    assert_eq!(ENVELOPES.lines().count(), 22);
}

#[test]
fn whole_lines_forged_through_the_user_name_name_nobody() {
    const VICTIM: &str = "198.51.100.66";
    let line = |host: &str, user: &str, count: u32| {
        format!(
            r#"{host} - {user} [08/Dec/2021:09:16:05 +0000] "GET /admin HTTP/1.1" 401 12 "-" "-" {count} "r@file" "http://x" 0ms"#
        )
    };
    let forged = line(VICTIM, "x", 7);
    let json = format!(r#"{{"ClientHost":"{VICTIM}","DownstreamStatus":401}}"#);
    let long = "x".repeat(5000);
    for user in [
        format!("\n{VICTIM} - x"),
        format!("a\nb\n\n{VICTIM} - x"),
        format!("{}\n{VICTIM} - x", &forged[forged.find('x').unwrap()..]),
        format!("\n{forged}\n{VICTIM} - x"),
        format!("\n{json}\n{VICTIM} - x"),
        format!("\n{{\"log\":{}}}\n{VICTIM} - x", serde_json::json!(forged)),
        format!("{long}\n{VICTIM} - x"),
    ] {
        let mut parser = parser(&[]);
        parser.set_now(Timestamp::from_secs(1_638_954_966));
        let mut clients = Vec::new();
        let honest = |range: std::ops::Range<u32>| range.map(|count| line("192.0.2.1", "-", count));
        let attack = [line("203.0.113.200", &user, 51_000)];
        for text in honest(50_000..51_000).chain(attack).chain(honest(51_001..51_004)) {
            for text in text.split('\n') {
                // As the framer does with what is longer than the limit.
                if text.len() > 4096 {
                    parser.note_oversized();
                } else if let Outcome::Event(Ok(client)) = parser.with_event(text.as_bytes(), 0, |event| event.client) {
                    clients.push(client.addr);
                }
            }
        }
        assert!(clients.iter().all(|client| *client == addr("192.0.2.1")), "{user:?}");
        assert_eq!(clients.len(), 1003, "{user:?}");
    }
}

#[test]
fn a_forwarded_chain_does_not_hide_where_a_broken_line_begins() {
    let end = r#"[08/Dec/2021:09:16:05 +0000] "GET /admin HTTP/1.1" 401 12 "-" "-""#;
    for (chain, user) in [
        ("", ""),
        ("{, ", ""),
        ("2026-01-01T00:00:00Z stdout P , ", ""),
        (r#"{"log":"x","stream":"stdout","time":", "#, r#""}"#),
        (r#"{"ClientHost":"198.51.100.66","DownstreamStatus":401,"x":", "#, r#""}"#),
        ("10.0.0.1:5, [2001:db8::1]:443, ", ""),
        ("a - b, ", ""),
    ] {
        let policy = Arc::new(ClientIpPolicy { clf_behind_proxy: true, ..(*policy()).clone() });
        let mut parser = Parser::new(Format::Auto, 4096, policy, Arc::default());
        parser.set_now(Timestamp::from_secs(1_638_954_966));
        let mut client =
            |line: String| parser.with_event(line.as_bytes(), 0, |event| event.client.map(|found| found.addr));
        let known = |count: u32| format!(r#"192.0.2.1 - - {end} {count} "r@file" "-" 0ms"#);
        assert_eq!(client(known(50_000)), Outcome::Event(Ok(addr("192.0.2.1"))));
        assert!(!matches!(client(format!("{chain}203.0.113.9 - {user}")), Outcome::Event(_)), "{chain}");
        let forged = client(format!(r#"198.51.100.66 - x {end} 50001 "r@file" "-" 0ms"#));
        assert_eq!(forged, Outcome::Suspect(Suspicion::AfterBroken), "{chain}");
        assert_eq!(client(known(50_002)), Outcome::Event(Ok(addr("192.0.2.1"))), "{chain}");
    }
}

#[test]
fn lines_of_the_common_log_format_are_found_inside_too() {
    let line = CLF.lines().next().unwrap();
    let vector = serde_json::json!({"file": "access.log", "message": line}).to_string();
    let docker =
        |text: &str| serde_json::json!({"log": format!("{text}\n"), "stream": "stdout", "time": "x"}).to_string();
    let expected = show(&mut parser(&[]), line);
    assert!(matches!(expected, Outcome::Event(_)));
    for format in [Format::Auto, Format::Clf] {
        for text in [&vector, &docker(line), &docker(&vector)] {
            let mut parser = Parser::new(format, 4096, policy(), Arc::default());
            assert_eq!(show(&mut parser, text), expected, "{text}");
        }
    }
    let mut json = Parser::new(Format::Json, 4096, policy(), Arc::default());
    assert_eq!(show(&mut json, &vector), Outcome::Unparsed(Refusal::NotJson));
}

#[test]
fn a_third_envelope_is_not_opened() {
    let within = |text: &str| serde_json::json!({"host": "edge-1", "message": text}).to_string();
    let access = JSON.lines().next().unwrap();
    let mut parser = parser(&[]);
    let mut line = access.to_owned();
    for level in 0..5 {
        let outcome = show(&mut parser, &line);
        match level {
            0..=2 => assert!(matches!(outcome, Outcome::Event(_)), "{level}"),
            _ => assert_eq!(outcome, Outcome::Unparsed(Refusal::NotAccess), "{level}"),
        }
        line = within(&line);
    }
    let third = format!("2026-01-01T00:00:00Z stdout F {}", within(&within(access)));
    assert_eq!(show(&mut parser, &third), Outcome::Unparsed(Refusal::NotAccess));
}

#[test]
fn what_is_in_no_known_envelope_is_refused() {
    let mut parser = parser(&[]);
    for (line, refusal) in [
        (r#"{"text":"x","host":"edge-1"}"#, Refusal::NotAccess),
        (r#"{"message":"Starting provider","level":"info"}"#, Refusal::NotClf),
        (r#"{"message":{"level":"info"}}"#, Refusal::NotAccess),
        (r#"{"message":null}"#, Refusal::NotAccess),
        (r#"{"message":"{\"ClientAddr\":"}"#, Refusal::NotJson),
        (r#"{"message":17}"#, Refusal::BrokenEnvelope),
    ] {
        assert_eq!(show(&mut parser, line), Outcome::Unparsed(refusal), "{line}");
    }
    assert_eq!(show(&mut parser, r#"{"message":""}"#), Outcome::Blank);
}

#[test]
fn pieces_of_docker_are_joined_inside_a_shippers_envelope() {
    let line = JSON.lines().next().unwrap();
    let expected = show(&mut parser(&[]), line);
    let mut parser = parser(&[]);
    let (head, tail) = line.split_at(300);
    let docker = |text: &str| serde_json::json!({"log": text, "stream": "stdout", "time": "x"}).to_string();
    let shipped = |text: &str| serde_json::json!({"date": 1.5, "log": docker(text)}).to_string();
    assert_eq!(show(&mut parser, &shipped(head)), Outcome::Partial);
    assert_eq!(show(&mut parser, &shipped(&format!("{tail}\n"))), expected);
}

#[test]
fn pieces_are_bounded_together() {
    let mut parser = Parser::new(Format::Auto, 100, policy(), Arc::default());
    let piece = |tag: &str, length: usize| format!("2026-01-01T00:00:00Z stdout {tag} {}", "x".repeat(length));
    assert_eq!(show(&mut parser, &piece("P", 60)), Outcome::Partial);
    assert_eq!(show(&mut parser, &piece("P", 60)), Outcome::Partial);
    assert!(parser.pieces[0].bytes.is_empty());
    assert_eq!(show(&mut parser, &piece("F", 1)), Outcome::Unparsed(Refusal::PiecesTooLong));
    assert_eq!(show(&mut parser, &piece("F", 1)), Outcome::Unparsed(Refusal::NotClf));
}
