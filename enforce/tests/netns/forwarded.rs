//! Clients behind a proxy, refused between Traefik and services: one namespace sends what Traefik sends, another is the
//! service, and the host between them has a bridge, as Docker makes it.

use serde_json::{Value, json};

use crate::{Host, Part, until};

const ON: &str = r#"{"firewall":{"backend":"none","resync_interval":"1s"},
    "forwarded_for":{"enabled":true,"ports":["8080","9000-9010"]}}"#;
const WHOLE_LIST: &str = r#"{"firewall":{"backend":"none","resync_interval":"1s"},
    "forwarded_for":{"enabled":true,"whole_list":true}}"#;
const OFF: &str = r#"{"firewall":{"backend":"none","resync_interval":"1s"}}"#;

/// The host, with a bridge that joins Traefik and a service.
struct Bridged<'a> {
    host: &'a Host,
    sender: Part,
    _service: Part,
    namespaces: [String; 2],
}

impl<'a> Bridged<'a> {
    fn new(host: &'a Host) -> Self {
        host.run("ip link add br0 type bridge");
        for address in ["10.88.0.1/24", "fd88::1/64"] {
            host.run(&format!("ip addr add {address} dev br0"));
        }
        host.run("ip link set br0 up");
        let namespaces = ["traefik", "service"].map(|name| host.name.replace("host", name));
        for (ns, last) in namespaces.iter().zip([2, 3]) {
            crate::run("ip", &["netns", "add", ns]);
            host.run(&format!("ip link add port{last} master br0 type veth peer name eth0 netns {ns}"));
            host.run(&format!("ip link set port{last} up"));
            for line in [
                format!("addr add 10.88.0.{last}/24 dev eth0"),
                format!("addr add fd88::{last}/64 dev eth0 nodad"),
                "link set eth0 up".to_owned(),
            ] {
                crate::run("ip", &[&["-n", ns], &line.split(' ').collect::<Vec<_>>()[..]].concat());
            }
        }
        for family in ["4", "6"] {
            host.iptables(family, "-N DOCKER-USER");
            host.iptables(family, "-A DOCKER-USER -j RETURN");
            host.iptables(family, "-A FORWARD -j DOCKER-USER");
        }
        let service = Part::new(&namespaces[1], &["service"]);
        service.read();
        let sender = Part::new(&namespaces[0], &["sender"]);
        Self { host, sender, _service: service, namespaces }
    }

    /// What becomes of a request, sent piece by piece.
    fn send(&self, to: &str, pieces: &[&str]) -> String {
        self.sender.ask(&format!("{to} {}", json!(pieces)))
    }

    /// What becomes of a request over IPv4 and over IPv6.
    fn answers(&self, head: &str) -> [String; 2] {
        ["10.88.0.3:8080", "[fd88::3]:8080"].map(|to| self.send(to, &[&request(head)]))
    }

    fn refuses(&self, head: &str) -> bool {
        match self.answers(head).each_ref().map(String::as_str) {
            ["reset", "reset"] => true,
            ["answered", "answered"] => false,
            other => panic!("{head:?}: {other:?}"),
        }
    }

    /// Waits: one family's rules are changed after the other's.
    fn until(&self, what: &str, answer: &str, head: &str) {
        until(what, || self.answers(head).iter().all(|given| given == answer));
    }

    fn rules(&self) -> Vec<String> {
        self.host.rules().into_iter().filter(|rule| rule.contains("PORTCULLIS-FWD")).collect()
    }
}

impl Drop for Bridged<'_> {
    fn drop(&mut self) {
        for ns in &self.namespaces {
            let _ = std::process::Command::new("ip").args(["netns", "del", ns]).status();
        }
    }
}

/// A request as Traefik 3.5 sends it.
fn request(head: &str) -> String {
    format!(
        "GET /path HTTP/1.1\r\nHost: shop.example.net\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n{head}\
         X-Forwarded-Host: shop.example.net\r\nX-Forwarded-Port: 443\r\nX-Forwarded-Proto: https\r\n\
         X-Forwarded-Server: edge-1\r\nX-Real-Ip: 172.18.0.1\r\nAccept-Encoding: gzip\r\n\r\n"
    )
}

fn backend(enforcer: &Part) -> Value {
    let report = enforcer.report();
    let backends = report["backends"].as_array().into_iter().flatten();
    backends.into_iter().find(|backend| backend["name"] == "forwarded-for").cloned().unwrap_or_default()
}

fn wait_for(enforcer: &Part, clients: u64) {
    until("so many are refused", || backend(enforcer)["members"] == clients && !problems(enforcer).contains("differ"));
}

fn problems(enforcer: &Part) -> String {
    enforcer.report()["problems"].to_string()
}

/// Of those that [`refuses_exactly`] bans.
fn explains(enforcer: &Part) {
    let holds =
        |address: &str| -> Vec<Value> { serde_json::from_str(&enforcer.ask(&format!("explain {address}"))).unwrap() };
    for (address, state, entry) in [
        ("192.0.2.1", "held", Some("192.0.2.1")),
        ("198.51.100.8", "held", Some("198.51.100.0/24")),
        ("192.0.2.77", "not_due", None),
        ("192.0.2.78", "not_due", None),
    ] {
        let holds = holds(address);
        assert_eq!((holds.len(), &holds[1]["backend"]), (2, &"forwarded-for".into()), "{holds:?}");
        assert_eq!((&holds[0]["state"], &holds[1]["state"]), (&"idle".into(), &state.into()), "{holds:?}");
        assert_eq!(holds[1]["entry"].as_str(), entry, "{holds:?}");
        assert_eq!(holds[1]["until"].is_string(), entry.is_some(), "{holds:?}");
    }
}

pub(crate) fn refuses_exactly(host: &Host) {
    let bridged = Bridged::new(host);
    let enforcer = host.enforcer(ON);
    enforcer.ask("ban 192.0.2.77 600");
    enforcer.ask("ban-forwarded 192.0.2.1,2001:db8::1,198.51.100.0/24,2001:db8:7:8::/64,203.0.113.0/25 600");
    wait_for(&enforcer, 4);
    for caught in [
        "X-Forwarded-For: 192.0.2.1, 172.18.0.1\r\n",
        "X-Forwarded-For: 192.0.2.1\r\n",
        "x-forwarded-for: 192.0.2.1,172.18.0.1\r\n",
        "X-FORWARDED-FOR: 2001:DB8::1\r\n",
        "Cf-Connecting-Ip: 192.0.2.1\r\nX-Forwarded-For: 9.9.9.9,192.0.2.1, 172.18.0.1\r\n",
        "CF-CONNECTING-IP: 2001:db8::1\r\n",
        "X-Forwarded-For: 198.51.100.255, 172.18.0.1\r\n",
        "X-Forwarded-For: 2001:db8:7:8:a:b:c:d, 172.18.0.1\r\n",
        "Cf-Connecting-Ip: 2001:db8:7:8::\r\n",
    ] {
        assert!(bridged.refuses(caught), "not refused: {caught:?}");
    }
    explains(&enforcer);
    for other in [
        "X-Forwarded-For: 192.0.2.10\r\nCf-Connecting-Ip: 192.0.2.10\r\n",
        "X-Forwarded-For: 192.0.2.100, 172.18.0.1\r\n",
        "X-Forwarded-For: 92.0.2.1\r\n",
        "X-Forwarded-For: 2001:db8::10, 172.18.0.1\r\nCf-Connecting-Ip: 2001:db8::10\r\n",
        "X-Forwarded-For: 2001:db8::1:1\r\n",
        "X-Forwarded-For: 198.51.10.1\r\n",
        "X-Forwarded-For: 2001:db8:7:80::1\r\n",
        "X-Forwarded-For: 203.0.113.5\r\n",
        "X-Forwarded-For: 192.0.2.77, 172.18.0.1\r\n",
        "X-Forwarded-For: 9.9.9.9, 192.0.2.1, 172.18.0.1\r\n",
        "X-Real-Ip: 192.0.2.1\r\nCookie: seen=192.0.2.1, 192.0.2.1\r\n",
        "User-Agent: X-Forwarded-For: 192.0.2.1, Cf-Connecting-Ip: 192.0.2.1\r\n",
        "X-X-Forwarded-For: 192.0.2.1\r\n",
    ] {
        assert!(!bridged.refuses(other), "refused: {other:?}");
    }
    let said = backend(&enforcer);
    assert_eq!((&said["desired"], said["dropped_packets"].as_u64() > Some(0)), (&json!(5), false), "{said}");
    until("refused packets are counted", || backend(&enforcer)["dropped_packets"] == 18);
    assert!(
        backend(&enforcer)
            .to_string()
            .contains("1 networks cannot be told from others in a header, such as 203.0.113.0/25")
    );
    assert_eq!(problems(&enforcer), "[]");
}

pub(crate) fn has_limits_that_are_known(host: &Host) {
    let bridged = Bridged::new(host);
    let enforcer = host.enforcer(ON);
    enforcer.ask("ban-forwarded 192.0.2.1 600");
    wait_for(&enforcer, 1);
    let (to, head) = ("10.88.0.3:8080", "X-Forwarded-For: 192.0.2.1, 172.18.0.1\r\n");
    let whole = request(head);
    let (first, second) = whole.split_at(whole.find("192.0").unwrap() + 4);
    assert_eq!(bridged.send(to, &[first, second]), "answered", "a header split over two packets is found");
    let hidden = "\u{1}\u{2}hidden\r\n\r\n";
    assert_eq!(bridged.send(to, &[hidden]), "answered", "what TLS and HTTP/2 hide");
    assert_eq!(bridged.send("10.88.0.3:8443", &[&whole]), "answered", "a port that is not meant");
    // What a service is sent as a body is no head, and is refused all the same.
    let post = format!("{}{head}", request("Content-Length: 45\r\n"));
    assert_eq!(bridged.send(to, &[&post]), "reset");
    // Far down in one large packet.
    let long = request(&format!("Cookie: {}\r\n{head}", "x".repeat(12_000)));
    assert_eq!(bridged.send(to, &[&long]), "reset");
    // An answer that holds the text is let through.
    assert_eq!(bridged.send(to, &["GET /echo HTTP/1.1\r\n\r\n"]), "answered");
    drop(enforcer);

    let enforcer = host.enforcer(WHOLE_LIST);
    enforcer.ask("ban-forwarded 192.0.2.1,2001:db8::1 600");
    wait_for(&enforcer, 2);
    for caught in ["9.9.9.9, 192.0.2.1, 172.18.0.1", "9.9.9.9,192.0.2.1", "192.0.2.1", "1.1.1.1, 2001:db8::1"] {
        assert!(bridged.refuses(&format!("X-Forwarded-For: {caught}\r\n")), "not refused: {caught:?}");
    }
    for other in
        ["9.9.9.9, 192.0.2.10, 172.18.0.1", "9.9.9.9,192.0.2.100", "1192.0.2.1, 1.1.1.1", "1.1.1.1, 2001:db8::1f"]
    {
        assert!(!bridged.refuses(&format!("X-Forwarded-For: {other}\r\n")), "refused: {other:?}");
    }
    // A line of a log, or a query to a database, that holds what a stranger said.
    for other in ["Cookie: seen=1, 192.0.2.1,\r\n", "User-Agent: X-Forwarded-For: 192.0.2.1, 192.0.2.1,\r\n"] {
        assert!(!bridged.refuses(other), "no packet without the header is looked at: {other:?}");
    }
    assert_eq!(bridged.send("10.88.0.3:8443", &[&request(head)]), "reset", "without ports all are meant");
    assert_eq!(bridged.send("10.88.0.3:8443", &["GET /echo HTTP/1.1\r\n\r\n"]), "answered", "an answer is let through");
    drop(enforcer);

    // Docker without IPv6.
    for line in ["-F FORWARD", "-F DOCKER-USER", "-X DOCKER-USER"] {
        host.iptables("6", line);
    }
    let enforcer = host.enforcer(ON);
    enforcer.ask("ban-forwarded 192.0.2.1 600");
    wait_for(&enforcer, 1);
    until("that is in force", || backend(&enforcer)["revision"].as_u64() > Some(0));
    assert!(problems(&enforcer).contains("ipv6: chain DOCKER-USER does not exist"), "{}", problems(&enforcer));
    assert!(!problems(&enforcer).contains("degraded"), "{}", problems(&enforcer));
}

pub(crate) fn keeps_rules(host: &Host) {
    let bridged = Bridged::new(host);
    let before = host.rules();
    let enforcer = host.enforcer(ON);
    let head = |n: u32| format!("X-Forwarded-For: 192.0.2.{n}, 172.18.0.1\r\n");
    let many: Vec<String> = (1..=60).map(|n| format!("192.0.2.{n}")).collect();
    enforcer.ask(&format!("ban-forwarded {} 600", many.join(",")));
    wait_for(&enforcer, 60);
    assert!(bridged.refuses(&head(42)) && !bridged.refuses(&head(61)));
    let placed = bridged.rules();

    host.iptables("4", "-F PORTCULLIS-FWD");
    until("our chain is filled again", || bridged.rules() == placed);
    host.iptables("6", "-D DOCKER-USER 1");
    until("the jump is back", || bridged.rules() == placed);
    host.iptables("4", "-I DOCKER-USER 1 -m conntrack --ctstate ESTABLISHED -j ACCEPT");
    until("we move above a rule that accepts", || {
        host.iptables("4", "-S DOCKER-USER").lines().nth(1).is_some_and(|rule| rule.contains("PORTCULLIS-FWD"))
    });
    host.iptables("4", "-D DOCKER-USER -m conntrack --ctstate ESTABLISHED -j ACCEPT");
    until("repairs are counted", || backend(&enforcer)["repairs"].as_u64() >= Some(3));

    enforcer.ask("pause on");
    bridged.until("nobody is refused", "answered", &head(1));
    enforcer.ask("pause off");
    bridged.until("they are refused again", "reset", &head(1));
    enforcer.ask("never 192.0.2.1");
    bridged.until("whom nobody may ban is not refused", "answered", &head(1));
    enforcer.ask("never 198.18.0.0/24");
    bridged.until("he is refused again", "reset", &head(1));

    let switch = |value| host.run(&format!("sysctl -qw net.bridge.bridge-nf-call-iptables={value}"));
    switch(0);
    until("that packets pass unseen is said", || problems(&enforcer).contains("containers on br0 are not seen"));
    assert_eq!(bridged.send("10.88.0.3:8080", &[&request(&head(1))]), "answered", "they are seen after all");
    switch(1);
    until("that is over", || problems(&enforcer) == "[]");

    // A restart takes over without a gap, and waits for a whole set before it takes anybody out.
    enforcer.stop();
    assert!(bridged.refuses(&head(42)));
    let args = ["enforcer", ON, host.state.path().to_str().unwrap(), "for-real"];
    let enforcer = Part::new(&host.name, &args);
    wait_for(&enforcer, 60);
    assert_eq!(bridged.rules(), placed, "something was changed");
    enforcer.ask("ban-forwarded 192.0.2.100 2");
    bridged.until("whom the bus does not know is free", "answered", &head(42));
    assert!(bridged.refuses(&head(100)));
    enforcer.stop();
    bridged.until("a ban ends while nobody enforces", "answered", &head(100));

    // A reboot, with only what was kept.
    let enforcer = host.enforcer(ON);
    enforcer.ask("ban-forwarded 192.0.2.5 600");
    wait_for(&enforcer, 1);
    enforcer.stop();
    host.run(&format!("{} --inside teardown {OFF}", std::env::current_exe().unwrap().display()).replace('\n', " "));
    assert_eq!(host.rules(), before, "teardown leaves something");
    let enforcer = Part::new(&host.name, &args);
    bridged.until("what was kept is in force", "reset", &head(5));
    enforcer.stop();

    // Switched off, it takes its rules away.
    let enforcer = host.enforcer(OFF);
    until("nothing of ours is left", || host.rules() == before);
    drop(enforcer);
}

pub(crate) fn leaves_out_the_oldest(host: &Host) {
    let bridged = Bridged::new(host);
    let enforcer = host.enforcer(&ON.replace("\"enabled\":true", "\"enabled\":true,\"rules_max\":6"));
    for n in 1..=3 {
        enforcer.ask(&format!("ban-forwarded 192.0.2.{n} 600"));
    }
    wait_for(&enforcer, 2);
    let head = |n: u32| format!("X-Forwarded-For: 192.0.2.{n}\r\n");
    bridged.until("the newest are refused", "reset", &head(3));
    assert!(bridged.refuses(&head(2)) && !bridged.refuses(&head(1)));
    until("that one is left out is said", || problems(&enforcer).contains("rules_max is 6"));
    assert_eq!(enforcer.metric("portcullis_forwarded_left_out"), Some(1.0));
    enforcer.ask("unban 192.0.2.3");
    bridged.until("it comes in when there is room", "reset", &head(1));
    drop(enforcer);

    // A dry run changes nothing.
    let before = host.rules();
    let args = ["enforcer", ON, host.state.path().to_str().unwrap(), "dry-run"];
    let enforcer = Part::new(&host.name, &args);
    enforcer.ask("ban-forwarded 192.0.2.9 600");
    until("it is said who would be refused", || backend(&enforcer)["members"] == 1);
    assert!(!bridged.refuses(&head(9)));
    assert_eq!(host.rules(), before);
}
