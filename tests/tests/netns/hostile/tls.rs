//! The same ports with TLS: what comes in place of a handshake, within it and after it.

use std::fs::{File, read_to_string};
use std::process::{Command, Stdio};

use super::*;

/// Something of a stranger who knows what TLS is.
fn throw(client: &Client, random: &mut Random, port: u16) -> Result<()> {
    let mut stream = attacker(random, port)?;
    let bytes = random_bytes(random);
    match random.below(4) {
        // In place of a handshake: a record that holds anything.
        0 => stream.write_all(&[b"\x16\x03\x01\x02\x00".to_vec(), bytes].concat())?,
        // Within it: a greeting that is cut or changed, and whatever follows.
        1 => {
            let mut greeting = greeting(client)?;
            let at = usize::try_from(random.below(greeting.len() as u64))?;
            if random.chance(50) {
                greeting.truncate(at);
            } else {
                greeting[at] ^= 1 << random.below(8);
            }
            stream.write_all(&greeting)?;
            stream.write_all(&bytes)?;
        }
        // After it: what cannot be decrypted.
        2 => client.connect(stream.try_clone()?)?.sock.write_all(&bytes)?,
        // What can, and is garbage for whoever reads it.
        _ => {
            let mut shaken = client.connect(stream.try_clone()?)?;
            shaken.write_all(&bytes)?;
            shaken.flush()?;
        }
    }
    if random.chance(10) {
        let _answer = stream.read(&mut [0; 512])?;
    }
    Ok(())
}

/// The first bytes of a handshake.
fn greeting(client: &Client) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    client.greet(host(NETWORK, 1))?.write_tls(&mut bytes)?;
    Ok(bytes)
}

#[test]
fn garbage_before_within_and_after_handshakes_harms_nobody() {
    let place = Place::with_tls();
    let client = place.tls.clone().unwrap();
    let told = pelt(&place, |random, port| {
        // A refusal is what they are there for.
        let _refused = throw(&client, random, port);
    });
    println!("{told}");
    place.service.stop().unwrap();
}

#[test]
fn who_never_ends_a_handshake_is_let_go() {
    let place = Place::with_tls();
    let greeting = greeting(place.tls.as_ref().unwrap()).unwrap();
    let served = serve_beside(&place, || {
        let attack = || {
            let mut random = Random::new(1);
            let mut slow = Vec::new();
            for n in 0..90 {
                let port = [SYSLOG, HTTP, OTLP][n % 3];
                // Nothing at all, a part of a greeting, and a whole one without what follows.
                let begin = [0, greeting.len() / 2, greeting.len()][n / 3 % 3];
                let mut stream = attacker(&mut random, port)?;
                // What is over its share is closed at once.
                if stream.write_all(&greeting[..begin]).is_ok() {
                    stream.set_nonblocking(true)?;
                    slow.push(stream);
                }
            }
            wait_let_go(slow)
        };
        place.senders.within(attack).unwrap();
    });
    println!("{served}");
    place.service.stop().unwrap();
}

/// Connections of openssl, which asks again and again for a new handshake (TLS 1.2) or for new keys (TLS 1.3).
#[test]
fn who_asks_for_new_keys_without_an_end_is_let_go() {
    let place = Place::with_tls();
    let [authority, told] = ["ca.crt", "told"].map(|name| place.folder.path().join(name));
    let ways = [("-tls1_2", b"R\n", "RENEGOTIATING"), ("-tls1_3", b"K\n", "KEYUPDATE")];
    let served = serve_beside(&place, || {
        for (port, (version, letter, asks)) in
            [SYSLOG, HTTP, OTLP].into_iter().flat_map(|port| ways.map(|way| (port, way)))
        {
            let output = File::create(&told).unwrap();
            let mut child = Command::new("ip")
                .args(["netns", "exec", place.senders.name(), "openssl", "s_client", version, "-verify_return_error"])
                .args(["-connect", &server(port).to_string(), "-CAfile"])
                .arg(&authority)
                .stdin(Stdio::piped())
                .stdout(output.try_clone().unwrap())
                .stderr(output)
                .spawn()
                .unwrap();
            let mut input = child.stdin.take().unwrap();
            // One letter a look, which is one request: of several that are read at once only the first counts.
            wait_until("a sender who wants new keys is let go", PATIENCE, || {
                let _ended = input.write_all(letter);
                child.try_wait().unwrap()
            })
            .unwrap();
            let told = read_to_string(&told).unwrap();
            assert!(told.contains("Verify return code: 0 (ok)") && told.contains(asks), "{port} {version}: {told}");
        }
    });
    println!("{served}");
    place.service.stop().unwrap();
}
