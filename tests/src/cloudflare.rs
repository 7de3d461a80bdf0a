//! The stand-in for Cloudflare, in a network namespace.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::netns::Namespace;

/// Entries of ours that are there: by place and value, with how often each is there.
pub type Ours = BTreeMap<String, BTreeMap<String, usize>>;

/// It runs until it is dropped.
#[derive(Debug)]
pub struct Fake {
    process: Child,
    address: String,
}

impl Fake {
    /// Starts it at `address` of `namespace`.
    pub fn start(namespace: &Namespace, address: &str) -> Result<Self> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/cloudflare/fake.py");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace.name(), "python3", script, address]);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("no python3")?;
        let mut port = String::new();
        BufReader::new(process.stdout.take().context("no output")?).read_line(&mut port)?;
        Ok(Self { process, address: format!("{address}:{}", port.trim()) })
    }

    /// Address and port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Changes how it behaves and what is there; tells what is there, also of no wishes. From within `namespace`.
    pub fn control(&self, namespace: &Namespace, wishes: &Value) -> Result<Value> {
        let url = format!("http://{}/_fake", self.address);
        let said = namespace.run("curl", &["-s", "--noproxy", "*", "-d", &wishes.to_string(), &url])?;
        Ok(serde_json::from_str(&said)?)
    }

    /// Access rules of `installation`.
    pub fn ours(&self, namespace: &Namespace, installation: &str) -> Result<Ours> {
        let state = self.control(namespace, &json!({}))?;
        let mut ours = Ours::new();
        for (place, rules) in state["rules"].as_object().context("no rules")? {
            for rule in rules.as_array().context("no list of rules")? {
                let is_ours = |notes: &str| notes.starts_with(&format!("portcullis:{installation}:"));
                if rule["notes"].as_str().is_some_and(is_ours) {
                    let value = rule["configuration"]["value"].as_str().context("no value")?.to_owned();
                    *ours.entry(place.clone()).or_default().entry(value).or_default() += 1;
                }
            }
        }
        Ok(ours)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        // Already ended, or to be ended: either is fine.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
