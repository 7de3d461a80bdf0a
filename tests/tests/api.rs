//! The operator API from another host: the built binary behind TLS, real certificates, real tokens, and strangers.

use std::fs::{Permissions, set_permissions, write};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use tests::portcullis::portcullis;

/// Writes a file that only its owner can read.
fn write_private(path: &Path, text: &str) {
    write(path, text).unwrap();
    set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn check_asks_for_tls_beyond_loopback_and_tells_where_it_would_listen() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("portcullis.toml");
    let check = |api: &str| {
        write(&path, format!("[api]\ntokens_file = \"/etc/portcullis/tokens\"\n{api}\n")).unwrap();
        portcullis(["check", "-c", path.to_str().unwrap()]).unwrap()
    };
    let answer = check("listen = \"10.99.0.1:9478\"").expect(64).unwrap();
    assert!(answer.stderr.starts_with("api.tls: is required beyond loopback"), "{}", answer.stderr);
    let answer = check("listen = \"127.0.0.1:9478\"").expect(0).unwrap();
    assert!(answer.stdout.contains("http://127.0.0.1:9478, tokens in /etc/portcullis/tokens\n"), "{}", answer.stdout);
    let tls = "listen = \"10.99.0.1:9478\"\ntls = { cert_file = \"/c\", key_file = \"/k\" }";
    let answer = check(tls).expect(0).unwrap();
    assert!(answer.stdout.contains("https://10.99.0.1:9478, tokens in "), "{}", answer.stdout);
}

#[test]
fn run_does_not_start_with_tokens_that_others_can_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    write_private(&folder.path().join("tokens"), "");
    set_permissions(path("tokens"), Permissions::from_mode(0o644)).unwrap();
    let text = format!(
        "state_dir = {:?}\n[api]\nsocket = {:?}\nlisten = \"127.0.0.1:0\"\ntokens_file = {:?}\n\
         [enforce.firewall]\nbackend = \"none\"\n",
        path("state"),
        path("api.sock"),
        path("tokens"),
    );
    write(path("portcullis.toml"), text).unwrap();
    let answer = portcullis(["run", "--dry-run", "-c", &path("portcullis.toml"), "/dev/null"]).unwrap();
    let answer = answer.expect(1).unwrap();
    assert!(answer.stderr.contains("tokens is open to others (mode 644)"), "{}", answer.stderr);
}

/// SHA-256 in hexadecimal digits, by the tool that the README names.
fn sha256(text: &str) -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..64].to_owned()
}

/// Tests that need root and a network namespace, which is where the addresses are.
mod netns {
    use std::io::Read;
    use std::net::{Ipv4Addr, SocketAddr, TcpStream};

    use anyhow::{Context, Result};
    use tests::netns::Namespace;
    use tests::portcullis::{Answer, Service, binary, wait_for};

    use super::*;

    /// Where the service is, and where else it answers without a certificate for it.
    const ADDRESS: &str = "10.99.0.1";
    const OTHER_ADDRESS: &str = "10.99.0.2";
    const PORT: u16 = 9478;

    /// A host with the service, and what its operators know.
    struct Bench {
        folder: tempfile::TempDir,
        namespace: Namespace,
        /// Tokens of a reader and of a writer, and one that is nobody's.
        tokens: [String; 3],
        service: Option<Service>,
    }

    /// `openssl` with `words`, in `folder`.
    fn openssl(folder: &Path, words: &str) -> Result<String> {
        let output = Command::new("openssl").args(words.split(' ')).current_dir(folder).output()?;
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        anyhow::ensure!(output.status.success(), "openssl {words}: {complaint}");
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// An authority `NAME.crt`, and a certificate of its own for the service.
    fn certify(folder: &Path, authority: &str) -> Result<()> {
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";
        openssl(
            folder,
            &format!("req -x509 {key} -keyout {authority}.key -out {authority}.crt -subj /CN={authority}"),
        )?;
        openssl(
            folder,
            &format!("req {key} -keyout api.key -out api.csr -subj /CN=portcullis").replace(" -days 2", ""),
        )?;
        write(folder.join("api.ext"), format!("subjectAltName=IP:{ADDRESS}"))?;
        let signer = format!("-CA {authority}.crt -CAkey {authority}.key -CAcreateserial");
        openssl(folder, &format!("x509 -req -in api.csr {signer} -days 2 -extfile api.ext -out api.crt"))?;
        set_permissions(folder.join("api.key"), Permissions::from_mode(0o600))?;
        Ok(())
    }

    impl Bench {
        fn start() -> Result<Self> {
            let folder = tempfile::tempdir()?;
            let namespace = Namespace::new()?;
            for address in [ADDRESS, OTHER_ADDRESS] {
                namespace.run("ip", &["addr", "add", &format!("{address}/32"), "dev", "lo"])?;
            }
            certify(folder.path(), "authority")?;
            let token = || openssl(folder.path(), "rand -hex 32");
            let tokens = [token()?, token()?, token()?];
            let path = |name: &str| folder.path().join(name);
            write_private(&path("tokens"), &Self::lines(&tokens[..2]));
            write(path("access.log"), "")?;
            // At the lowest level, as no level may show a token.
            let text = format!(
                "state_dir = {:?}\n[telemetry]\nlog_level = \"trace\"\nlog_format = \"json\"\n\
                 [api]\nsocket = {:?}\nlisten = \"0.0.0.0:{PORT}\"\ntokens_file = {:?}\n\
                 tls = {{ cert_file = {:?}, key_file = {:?} }}\n\
                 [ingest.sources.traefik]\ntype = \"file\"\ninclude = [{:?}]\n[enforce.firewall]\nbackend = \"none\"\n",
                path("state"),
                path("api.sock"),
                path("tokens"),
                path("api.crt"),
                path("api.key"),
                path("access.log"),
            );
            write(path("portcullis.toml"), text)?;
            let service = Some(Service::start(folder.path(), namespace.name())?);
            Ok(Self { folder, namespace, tokens, service })
        }

        /// The file's lines for a reader's token and, if there is another, a writer's.
        fn lines(tokens: &[String]) -> String {
            let roles = ["reader read", "writer write"];
            roles.iter().zip(tokens).map(|(role, token)| format!("{role} sha256:{}\n", sha256(token))).collect()
        }

        fn service(&self) -> &Service {
            self.service.as_ref().unwrap()
        }

        /// Runs a verb against `address` with a token.
        fn verb_at(&self, address: &str, authority: &str, token: &str, words: &[&str]) -> Result<Answer> {
            let ca_file = self.folder.path().join(authority);
            let output = Command::new("ip")
                .args(["netns", "exec", self.namespace.name(), "timeout", "--signal=KILL", "60"])
                .arg(binary()?)
                .args(words)
                .arg("--ca-file")
                .arg(ca_file)
                .env("PORTCULLIS_URL", format!("https://{address}:{PORT}"))
                .env("PORTCULLIS_TOKEN", token)
                .stdin(Stdio::null())
                .output()
                .context("could not start portcullis")?;
            let text = String::from_utf8;
            let code = output.status.code().unwrap_or(-1);
            Ok(Answer { code, stdout: text(output.stdout)?, stderr: text(output.stderr)? })
        }

        fn verb(&self, token: &str, words: &[&str]) -> Result<Answer> {
            self.verb_at(ADDRESS, "authority.crt", token, words)
        }

        /// Stops it in order. Neither a token nor its hash may stand in the log.
        fn stop(mut self) -> Result<()> {
            let service = self.service.take().context("stopped already")?;
            let log = service.log_text();
            assert!(log.contains("Operator API listens"), "{log}");
            for token in &self.tokens {
                assert!(!log.contains(token) && !log.contains(&sha256(token)), "a token is in the log");
            }
            service.stop()
        }
    }

    #[test]
    fn a_reader_asks_a_writer_orders_and_each_refusal_says_why() {
        let bench = Bench::start().unwrap();
        let [reader, writer, stranger] = bench.tokens.clone();
        bench.verb(&writer, &["ban", "192.0.2.1", "--for", "1h"]).unwrap().expect(0).unwrap();
        let bans = bench.verb(&reader, &["bans", "--json"]).unwrap().expect(0).unwrap().json().unwrap();
        assert_eq!(bans[0]["target"], "192.0.2.1");
        for (answer, said) in [
            (bench.verb(&reader, &["unban", "--all"]), "the token reader has the scope `read`, this needs `write`"),
            (bench.verb(&stranger, &["bans"]), "does not know this token"),
            (bench.verb(&stranger, &["unban", "--all"]), "does not know this token"),
            (bench.verb_at(OTHER_ADDRESS, "authority.crt", &writer, &["unban", "--all"]), "it is another host's"),
        ] {
            let answer = answer.unwrap();
            assert!(answer.code == 1 && answer.stderr.contains(said), "{said}: {answer:?}");
            assert!(answer.stdout.is_empty(), "{answer:?}");
        }
        assert_eq!(bench.service().bans().unwrap().len(), 1, "nothing refused has had an effect");
        let log = bench.service().log_text();
        assert!(log.contains("\"token\":\"writer\"") && log.contains("/v1/ban"), "orders name their token: {log}");
        bench.stop().unwrap();
    }

    #[test]
    fn a_certificate_is_trusted_by_its_authority_alone_or_by_itself() {
        let bench = Bench::start().unwrap();
        let writer = bench.tokens[1].clone();
        // As the README makes it.
        let itself = format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -keyout new.key -out new.crt \
             -subj /CN=portcullis -addext subjectAltName=IP:{ADDRESS} -addext basicConstraints=critical,CA:FALSE"
        );
        openssl(bench.folder.path(), &itself).unwrap();
        let answer = bench.verb_at(ADDRESS, "new.crt", &writer, &["bans"]).unwrap().expect(1).unwrap();
        assert!(answer.stderr.contains("is not trusted") && answer.stderr.contains("--ca-file"), "{answer:?}");
        for name in ["crt", "key"] {
            let path = |stem: &str| bench.folder.path().join(format!("{stem}.{name}"));
            std::fs::rename(path("new"), path("api")).unwrap();
        }
        bench.service().signal("HUP").unwrap();
        wait_for("the new certificate", || {
            bench.verb_at(ADDRESS, "api.crt", &writer, &["bans"]).is_ok_and(|answer| answer.code == 0).then_some(())
        })
        .unwrap();
        bench.stop().unwrap();
    }

    #[test]
    fn tail_brings_events_over_tls() {
        let bench = Bench::start().unwrap();
        let [reader, writer, _] = bench.tokens.clone();
        let line = std::thread::scope(|scope| {
            let tail = scope.spawn(|| {
                // Ends with its reader, once the first event is there.
                let mut child = Command::new("ip")
                    .args(["netns", "exec", bench.namespace.name()])
                    .arg(binary().unwrap())
                    .args(["tail", "--json", "--ca-file"])
                    .arg(bench.folder.path().join("authority.crt"))
                    .env("PORTCULLIS_URL", format!("https://{ADDRESS}:{PORT}"))
                    .env("PORTCULLIS_TOKEN", &reader)
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap();
                let mut line = String::new();
                let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
                std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
                child.kill().unwrap();
                child.wait().unwrap();
                line
            });
            // Whether it listens yet cannot be seen: give it events until it has one.
            wait_for("tail prints an event", || {
                bench.verb(&writer, &["ban", "192.0.2.7"]).unwrap().expect(0).unwrap();
                bench.verb(&writer, &["unban", "192.0.2.7"]).unwrap().expect(0).unwrap();
                tail.is_finished().then_some(())
            })
            .unwrap();
            tail.join().unwrap()
        });
        assert!(line.contains("io.portcullis.") && line.contains("192.0.2.7"), "{line}");
        bench.stop().unwrap();
    }

    #[test]
    fn guessers_are_told_to_wait_and_lock_nobody_out() {
        let bench = Bench::start().unwrap();
        let [reader, _, stranger] = bench.tokens.clone();
        wait_for("guesses are limited", || {
            let answer = bench.verb(&stranger, &["bans"]).unwrap().expect(1).unwrap();
            answer.stderr.contains("too many failures from 10.99.0.1").then_some(())
        })
        .unwrap();
        bench.verb(&reader, &["bans"]).unwrap().expect(0).unwrap();
        let log = bench.service().log_text();
        assert!(log.contains("Operator API refused a peer") && log.contains("too_many_failures"), "{log}");
        bench.stop().unwrap();
    }

    #[test]
    fn silent_and_garbled_connections_keep_no_operator_out() {
        let bench = Bench::start().unwrap();
        let reader = bench.tokens[0].clone();
        let address = SocketAddr::from((ADDRESS.parse::<Ipv4Addr>().unwrap(), PORT));
        let mut held = bench
            .namespace
            .within(|| {
                // More than one peer may have, all from one address: what is over is closed.
                (0..100).map(|_| Ok(TcpStream::connect(address)?)).collect::<Result<Vec<_>>>()
            })
            .unwrap();
        for (i, stream) in held.iter_mut().enumerate() {
            // Half a handshake, or what is none. Closed ones cannot take it.
            let bytes: &[u8] = if i % 2 == 0 { b"\x16\x03\x01" } else { b"GET / HTTP/1.1\r\n\r\n" };
            let _closed = stream.write_all(bytes);
        }
        // All of them are this address's: the operator comes in once those that time out are gone.
        wait_for("an operator from the same address", || {
            bench.verb(&reader, &["bans"]).is_ok_and(|answer| answer.code == 0).then_some(())
        })
        .unwrap();
        // Plain HTTP gets no answer in the clear.
        let mut answer = Vec::new();
        let mut plain = held.swap_remove(1);
        let _reset = plain.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
        bench.stop().unwrap();
    }

    #[test]
    fn sighup_takes_over_a_new_certificate_and_new_tokens() {
        let bench = Bench::start().unwrap();
        let [reader, writer, newcomer] = bench.tokens.clone();
        bench.verb(&reader, &["bans"]).unwrap().expect(0).unwrap();
        certify(bench.folder.path(), "successor").unwrap();
        let path = bench.folder.path().join("tokens");
        write_private(&path, &Bench::lines(&[newcomer.clone(), writer.clone()]));
        bench.service().signal("HUP").unwrap();
        wait_for("the new certificate", || {
            bench
                .verb_at(ADDRESS, "successor.crt", &newcomer, &["bans"])
                .is_ok_and(|answer| answer.code == 0)
                .then_some(())
        })
        .unwrap();
        let answer = bench.verb_at(ADDRESS, "successor.crt", &reader, &["bans"]).unwrap().expect(1).unwrap();
        assert!(answer.stderr.contains("does not know this token"), "{answer:?}");
        bench.verb(&writer, &["bans"]).unwrap().expect(1).unwrap();
        bench.stop().unwrap();
    }
}
