//! TLS of sources of requests, and what a reload replaces.

use std::fs::{Permissions, copy, rename, set_permissions, write};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::certificates::Certificates;
use super::grpc::{Caller, export, framed};
use super::role::{Client, DEADLINE, Role, line, lines, ndjson, paths, start, start_with};

/// Shakes hands as a client that trusts the authority of `of`, perhaps with its certificate of a client.
async fn shake_hands(
    role: &Role,
    of: &Certificates,
    with_certificate: bool,
    protocol: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let read = |name: &str| CertificateDer::from_pem_file(of.path(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(read("ca.crt")).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
    let mut config = if with_certificate {
        let key = PrivateKeyDer::from_pem_file(of.path("client.key")).unwrap();
        config.with_client_auth_cert(vec![read("client.crt")], key).unwrap()
    } else {
        config.with_no_client_auth()
    };
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let stream = TcpStream::connect(role.addr).await.unwrap();
    TlsConnector::from(Arc::new(config)).connect("127.0.0.1".try_into().unwrap(), stream).await
}

fn tls(of: &Certificates) -> Value {
    json!({ "cert_file": of.path("server.crt"), "key_file": of.path("server.key") })
}

/// Puts a secret in place whole: a reload must not see it half written.
fn put(path: &str, text: &str) {
    let staged = format!("{path}.new");
    write(&staged, text).unwrap();
    set_permissions(&staged, Permissions::from_mode(0o600)).unwrap();
    rename(staged, path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_must_show_a_certificate_and_has_none_is_refused() {
    let ours = Certificates::make();
    let mut keys = tls(&ours);
    keys["client_ca_file"] = json!(ours.path("ca.crt"));
    for (kind, protocol) in [("http", "http/1.1"), ("otlp", "h2")] {
        let mut role = start(json!({ "type": kind, "tls": keys })).await;
        // The first was how the test found the port open.
        role.report(|report| report.refused == 1).await;
        if let Ok(stream) = shake_hands(&role, &ours, false, protocol).await {
            assert!(Client(stream).is_closed().await, "{kind}: TLS 1.3 tells a client afterwards");
        }
        role.report(|report| report.refused == 2).await;
        let stream = shake_hands(&role, &ours, true, protocol).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol.as_bytes()));
        let (found, _, is_right) = if kind == "http" {
            let mut client = Client(stream);
            client.send(ndjson(&lines(0..1))).await;
            role.take_until(async { client.answer().await.status == 200 }).await
        } else {
            let mut caller = Caller::over(stream).await;
            role.take_until(async { caller.call(&[], framed(0, &export(&[line(0)]))).await.code() == 0 }).await
        };
        assert_eq!((found, is_right), (paths(0..1), true), "{kind}");
        role.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_text_and_a_handshake_that_never_ends_are_cut_off() {
    let ours = Certificates::make();
    let check = async |kind: &str| {
        let role = start(json!({ "type": kind, "tls": tls(&ours), "idle_timeout": "1d" })).await;
        role.report(|report| report.refused == 1).await;
        let (mut plain, mut silent, mut begun) =
            (Client::new(&role).await, Client::new(&role).await, Client::new(&role).await);
        plain.send(ndjson(&lines(0..1))).await;
        begun.send(b"\x16\x03\x01\x02\x00\x01").await;
        // What TLS says to plain text is its own matter; no answer of HTTP is among it.
        let mut said = Vec::new();
        let read = tokio::time::timeout(DEADLINE, plain.0.read_to_end(&mut said));
        let (_reset, silent, begun) = tokio::join!(read, silent.is_closed(), begun.is_closed());
        assert!(silent && begun && !said.starts_with(b"HTTP"), "{kind}: {said:?}");
        let report = role.report(|report| report.refused == 4).await;
        assert_eq!(report.lines, 0);
        role.stop().await;
    };
    tokio::join!(check("http"), check("otlp"));
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_takes_over_certificates_and_tokens_and_nothing_that_is_wrong() {
    let (first, second, live) = (Certificates::make(), Certificates::make(), Certificates::make());
    let install = |of: &Certificates| {
        for name in ["server.crt", "server.key"] {
            let staged = live.path("staged");
            copy(of.path(name), &staged).unwrap();
            rename(staged, live.path(name)).unwrap();
        }
    };
    install(&first);
    let (old, new) = (("authorization", "Bearer 0123456789abcdef"), ("authorization", "Bearer fedcba9876543210"));
    let keys = json!({ "type": "otlp", "tls": tls(&live) });
    let role = start_with(keys, 64, &[("tokens_file", "0123456789abcdef\n")]).await;
    let tokens = role.dir.path().join("tokens_file").display().to_string();
    let empty = || framed(0, b"");
    let mut open = Caller::over(shake_hands(&role, &first, false, "h2").await.unwrap()).await;
    assert_eq!(open.call(&[old], empty()).await.code(), 0);
    assert!(shake_hands(&role, &second, false, "h2").await.is_err());

    // One file is right and the other is not: neither is taken over.
    install(&second);
    put(&tokens, "short\n");
    role.reload.send_modify(|count| *count += 1);
    role.problem("line 1: a token has 16 characters at least: certificates and secrets stay as they were").await;
    shake_hands(&role, &first, false, "h2").await.unwrap();
    assert_eq!(open.call(&[old], empty()).await.code(), 0);

    put(&tokens, "fedcba9876543210\n");
    role.reload.send_modify(|count| *count += 1);
    let taken_over = async {
        while shake_hands(&role, &second, false, "h2").await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, taken_over).await.expect("the new certificate");
    assert!(shake_hands(&role, &first, false, "h2").await.is_err());
    assert_eq!(open.call(&[new], empty()).await.code(), 0, "on a connection of before");
    assert_eq!(open.call(&[old], empty()).await.code(), 16);
    let clear = async {
        while role.nodes.all().iter().any(|node| !node.problems.is_empty()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, clear).await.expect("no problem is left");
    role.stop().await;
}
