//! Every way to say who we are, and servers that will not do.

use std::fs::{Permissions, set_permissions};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use proto::bus::config::{Login, NatsConfig};
use proto::bus::nats::Connection;
use proto::time::Clock;
use serde_json::{Value, json};

use crate::server::Server;

/// Long enough for a refusal to be final, and short enough for a test.
const REFUSED_AFTER: Duration = Duration::from_millis(500);

pub(crate) fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    path
}

fn server(text: &str) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let config = write(dir.path(), "nats.conf", &text.replace("DIR", &dir.path().display().to_string()));
    Server::start_with(dir, Some(config))
}

async fn gets_in(config: &NatsConfig) -> bool {
    let connection = Connection::open(config, "test", "test", Clock::steered()).await.unwrap();
    tokio::time::timeout(REFUSED_AFTER, connection.ready()).await.is_ok()
}

async fn check(server: &Server, right: Login, wrong: Login) {
    let config = |login| NatsConfig { login, ..server.config() };
    assert!(gets_in(&config(right)).await);
    assert!(!gets_in(&config(wrong)).await);
    assert!(!gets_in(&config(Login::Anonymous)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_with_a_password_gets_in() {
    let server = server("authorization { users: [{ user: edge-1, password: \"right one\" }] }");
    let file = |name: &str, text: &str| Login::Password("edge-1".to_owned(), write(server.dir.path(), name, text));
    check(&server, file("right", "right one\n"), file("wrong", "wrong one")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_gets_in() {
    let server = server("authorization { token: \"s3cr3t\" }");
    let file = |name: &str, text: &str| Login::Token(write(server.dir.path(), name, text));
    check(&server, file("right", "s3cr3t\n"), file("wrong", "other")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_nkey_gets_in() {
    let (right, wrong) = (KeyPair::new_user(), KeyPair::new_user());
    let server = server(&format!("authorization {{ users: [{{ nkey: {} }}] }}", right.public_key()));
    let file = |name: &str, key: &KeyPair| Login::Nkey(write(server.dir.path(), name, &key.seed().unwrap()));
    check(&server, file("right", &right), file("wrong", &wrong)).await;
}

/// A JWT of the form that NATS signs: `claims` about `subject`, by `issuer`.
fn jwt(issuer: &KeyPair, subject: &str, kind: &str, mut nats: Value) -> String {
    nats["type"] = kind.into();
    nats["version"] = 2.into();
    let claims = json!({"jti": kind, "iat": 1, "iss": issuer.public_key(), "name": kind, "sub": subject, "nats": nats});
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", encode(&json!({"typ": "JWT", "alg": "ed25519-nkey"})), encode(&claims));
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(signed.as_bytes()).unwrap());
    format!("{signed}.{signature}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credentials_file_gets_in() {
    let (operator, account) = (KeyPair::new_operator(), KeyPair::new_account());
    let any = json!({"limits": {"subs": -1, "data": -1, "payload": -1, "conn": -1, "leaf": -1, "imports": -1,
                                "exports": -1, "wildcards": true}});
    let server = server(&format!(
        "operator: {}\nresolver: MEMORY\nresolver_preload: {{ {}: {} }}",
        jwt(&operator, &operator.public_key(), "operator", json!({})),
        account.public_key(),
        jwt(&operator, &account.public_key(), "account", any),
    ));
    let file = |name: &str, issuer: &KeyPair| {
        let user = KeyPair::new_user();
        let limits = json!({"subs": -1, "data": -1, "payload": -1});
        let (token, seed) = (jwt(issuer, &user.public_key(), "user", limits), user.seed().unwrap());
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        );
        Login::Credentials(write(server.dir.path(), name, &text))
    };
    check(&server, file("right", &account), file("wrong", &KeyPair::new_account())).await;
}

fn openssl(dir: &Path, words: &str) {
    let done = Command::new("openssl").args(words.split(' ')).current_dir(dir).output().expect("openssl is needed");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// An authority, and a certificate of it for `name`.
fn certificates(dir: &Path, authority: &str, name: &str) {
    openssl(
        dir,
        &format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {authority}.key -out {authority}.crt \
         -days 2 -subj /CN={authority}"
        ),
    );
    openssl(
        dir,
        &format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"
        ),
    );
    write(dir, "san", "subjectAltName=IP:127.0.0.1\n");
    openssl(
        dir,
        &format!(
            "x509 -req -in {name}.csr -CA {authority}.crt -CAkey {authority}.key -CAcreateserial -days 2 -extfile san \
         -out {name}.crt"
        ),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_both_sides_are_checked() {
    let server = {
        let dir = tempfile::tempdir().unwrap();
        certificates(dir.path(), "ours", "server");
        certificates(dir.path(), "theirs", "stranger");
        certificates(dir.path(), "ours2", "client");
        let text = "tls { cert_file: DIR/server.crt, key_file: DIR/server.key, ca_file: DIR/ours2.crt, verify: true }";
        let config = write(dir.path(), "nats.conf", &text.replace("DIR", &dir.path().display().to_string()));
        Server::start_with(dir, Some(config))
    };
    let path = |name: &str| server.dir.path().join(name);
    let config = |authority: &str, name: Option<&str>| NatsConfig {
        ca_file: Some(path(&format!("{authority}.crt"))),
        identity: name.map(|name| (path(&format!("{name}.crt")), path(&format!("{name}.key")))),
        ..server.config()
    };
    assert!(gets_in(&config("ours", Some("client"))).await);
    assert!(!gets_in(&config("theirs", Some("client"))).await, "a server that we do not know");
    assert!(!gets_in(&config("ours", Some("stranger"))).await, "a client that it does not know");
    assert!(!gets_in(&config("ours", None)).await);
}

#[tokio::test]
async fn a_secret_that_is_missing_or_open_to_others_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let open = write(dir.path(), "token", "s3cr3t");
    set_permissions(&open, Permissions::from_mode(0o644)).unwrap();
    let missing = PathBuf::from("/no/such/token");
    let why = format!("{} is open to others (mode 644)", open.display());
    for (path, why) in [(missing, "cannot read /no/such/token: No such file"), (open, why.as_str())] {
        let config = NatsConfig { login: Login::Token(path), ..NatsConfig::new("nats://127.0.0.1:1") };
        let error = Connection::open(&config, "test", "test", Clock::steered()).await.unwrap_err();
        assert!(error.to_string().starts_with(why), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_server_is_refused_by_its_version() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        // As much of a server as it takes to be connected.
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let info = r#"INFO {"server_id":"x","version":"2.9.10","headers":true,"max_payload":1048576,"proto":1}"#;
            let _gone = stream.write_all(format!("{info}\r\nPONG\r\n").as_bytes());
            let mut buffer = [0; 4096];
            while stream.read(&mut buffer).is_ok_and(|bytes| bytes > 0) {
                let _gone = stream.write_all(b"PONG\r\n");
            }
        }
    });
    let config = NatsConfig::new(&format!("nats://127.0.0.1:{port}"));
    let connection = Connection::open(&config, "test", "test", Clock::steered()).await.unwrap();
    let error = tokio::time::timeout(crate::PATIENCE, connection.ready()).await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "NATS server 2.9.10 is too old: 2.12.1 or newer is needed, for atomic batches");
    let problem = connection.problem().unwrap();
    assert!(problem.text.contains("too old"), "{}", problem.text);
}
