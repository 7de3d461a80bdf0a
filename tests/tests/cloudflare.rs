//! The binary against a stand-in for Cloudflare: killed between calls, and asked what it shows of its secrets. The rest of
//! what is to be shown of Cloudflare is shown in enforce itself, and in tests/cloudflare.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};
use tests::cloudflare::Ours;
use tests::netns::Namespace;
use tests::portcullis::{Service, binary, wait_for};

const TOKEN: &str = "hush-0123456789";
const ZONES: [&str; 2] = ["11111111111111111111111111111111", "22222222222222222222222222222222"];

/// The stand-in, in a namespace of its own.
struct Fake {
    namespace: Namespace,
    fake: tests::cloudflare::Fake,
    port: String,
}

impl Fake {
    fn start() -> Self {
        let namespace = Namespace::new().unwrap();
        let fake = tests::cloudflare::Fake::start(&namespace, "127.0.0.1").unwrap();
        let port = fake.address().rsplit(':').next().unwrap().to_owned();
        Self { namespace, fake, port }
    }

    fn control(&self, wishes: &Value) -> Value {
        self.fake.control(&self.namespace, wishes).unwrap()
    }

    /// Ours, by zone, with how often each is there.
    fn ours(&self) -> Ours {
        self.fake.ours(&self.namespace, "shop").unwrap()
    }

    /// Waits until each zone has exactly these.
    fn expect(&self, wanted: &BTreeSet<String>) {
        let each: BTreeMap<String, usize> = wanted.iter().map(|target| (target.clone(), 1)).collect();
        let expected = |ours: &Ours| {
            ZONES.iter().all(|zone| ours.get(&format!("zones/{zone}")).map_or(each.is_empty(), |found| *found == each))
        };
        let found = wait_for("Cloudflare is as desired", || Some(self.ours()).filter(expected));
        assert!(found.is_ok(), "{found:?}: {:?}", self.ours());
    }
}

fn any_process_shows(secret: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    lines.into_iter().any(|line| String::from_utf8_lossy(&line).contains(secret))
}

#[test]
fn a_kill_between_calls_leaves_no_gap_no_duplicate_and_no_secret() {
    let fake = Fake::start();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::create_dir(path("state")).unwrap();
    fs::write(path("access.log"), "").unwrap();
    fs::write(path("token"), TOKEN).unwrap();
    fs::set_permissions(path("token"), fs::Permissions::from_mode(0o600)).unwrap();
    let config = format!(
        "node = \"edge\"\nstate_dir = \"{}\"\n[api]\nsocket = \"{}\"\n[telemetry]\nlog_format = \"json\"\n\
         log_level = \"debug\"\n[ingest.sources.traefik]\ntype = \"file\"\ninclude = [\"{}\"]\n\
         [enforce.firewall]\nbackend = \"none\"\n[enforce.cloudflare]\napi_token_file = \"{}\"\n\
         installation = \"shop\"\nscope = {{ zones = {ZONES:?} }}\napi_url = \"http://127.0.0.1:{}\"\n",
        path("state"),
        path("api.sock"),
        path("access.log"),
        path("token"),
        fake.port,
    );
    fs::write(path("portcullis.toml"), config).unwrap();
    let start = || Service::start(folder.path(), fake.namespace.name()).unwrap();
    let mut shown = String::new();

    // At first Cloudflare knows another token, and says ours back when it refuses it.
    let mut service = start();
    wait_for("the refusal is told", || {
        let answer = service.verb(&["status", "--json"]).unwrap();
        shown.push_str(&answer.stdout);
        answer.stdout.contains("code 9109").then_some(())
    })
    .unwrap();
    assert!(!any_process_shows(TOKEN));
    fake.control(&json!({"settings": {"token": TOKEN, "pause": 0.02}}));

    let mut wanted: BTreeSet<String> = (0..20).map(|n| format!("203.0.113.{n}")).collect();
    let order: Vec<&str> = wanted.iter().map(String::as_str).collect();
    for target in order {
        service.verb(&["ban", target, "--reason", "test"]).unwrap().expect(0).unwrap();
    }
    for some in [5, 15] {
        let count = |fake: &Fake| fake.ours().values().map(BTreeMap::len).sum::<usize>();
        wait_for("some are there", || (count(&fake) >= some).then_some(())).unwrap();
        service.kill().unwrap();
        service = start();
    }
    fake.expect(&wanted);
    let freed: Vec<String> = wanted.iter().filter(|target| target.ends_with('5')).cloned().collect();
    for target in freed {
        service.verb(&["unban", &target]).unwrap().expect(0).unwrap();
        wanted.remove(&target);
    }
    service.kill().unwrap();
    let service = start();
    fake.expect(&wanted);
    wait_for("all is well", || {
        let answer = service.verb(&["status"]).unwrap();
        shown.push_str(&answer.stdout);
        (answer.code == 0).then_some(())
    })
    .unwrap();
    shown.push_str(&service.log_text());
    service.stop().unwrap();
    fake.expect(&wanted);

    let config = path("portcullis.toml");
    let command = format!("{} enforce --teardown -c {config} 2>&1", binary().unwrap().display());
    let said = fake.namespace.run("sh", &["-c", &command]).unwrap();
    let is_begun = |zone: &str| {
        let begins = |line: &&str| line.contains("Removing our entries from Cloudflare") && line.contains(zone);
        said.lines().filter(begins).count() == 1
    };
    assert!(ZONES.into_iter().all(is_begun), "what it waits for is said before it waits: {said}");
    for zone in ZONES {
        let line = format!("removed {} entries at Cloudflare: zone {zone} (installation shop)", wanted.len());
        assert!(said.contains(&line), "{said}");
    }
    fake.expect(&BTreeSet::new());
    let stats = &fake.control(&json!({}))["stats"];
    assert_eq!(stats.get("over"), None, "{stats}");
    assert!(shown.contains("code 9109") && !(shown + &said).contains(TOKEN));
}
