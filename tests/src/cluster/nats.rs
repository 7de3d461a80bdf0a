//! A small NATS client, as a third party might write one: what it reads on the bus owes nothing to our own bus.
//!
//! It publishes requests and reads their answers, and nothing else. The protocol is that of the NATS documentation,
//! "Client protocol"; batched direct gets are those of ADR-31.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::netns::Namespace;

/// A server that lives answers within a fraction of this; a cluster without a leader does not.
const SILENCE: Duration = Duration::from_secs(2);
/// Messages of one direct get.
const BATCH: u64 = 1_000;
/// The longest message that a server takes unless told otherwise is 1 MiB.
const PAYLOAD_MAX: usize = 2 << 20;

/// A message, with the headers that JetStream writes about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Where it was published; of a stored message, where it was published first.
    pub subject: String,
    /// Of an answer without content, such as 404 or 503.
    pub status: Option<u16>,
    /// Names and values.
    pub headers: Vec<(String, String)>,
    /// Content.
    pub payload: Vec<u8>,
}

impl Message {
    /// Value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Its place in its stream.
    pub fn sequence(&self) -> Option<u64> {
        self.header("Nats-Sequence")?.parse().ok()
    }

    /// Its content as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.payload).with_context(|| format!("{} is not JSON", self.subject))
    }
}

/// One connection.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<TcpStream>,
    inboxes: u64,
}

impl Client {
    /// Connects from `namespace` to the server at `address`.
    pub fn connect(namespace: &Namespace, address: Ipv4Addr) -> Result<Self> {
        let address = SocketAddr::new(address.into(), 4222);
        let stream = namespace.within(|| Ok(TcpStream::connect_timeout(&address, SILENCE)?))?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_nodelay(true)?;
        let mut client = Self { stream: BufReader::new(stream), inboxes: 0 };
        ensure!(client.line()?.starts_with("INFO "), "no NATS server at {address}");
        client.send(br#"CONNECT {"verbose":false,"pedantic":true,"headers":true,"no_responders":true}"#)?;
        client.send(b"SUB _INBOX.portcullis-tests.* 1")?;
        client.send(b"PING")?;
        ensure!(client.line()? == "PONG", "the NATS server at {address} refused us");
        Ok(client)
    }

    /// Publishes `payload` and returns the first answer.
    pub fn request(&mut self, subject: &str, payload: &[u8]) -> Result<Message> {
        let inbox = self.publish(subject, payload)?;
        self.answer(&inbox)
    }

    /// A request to the JetStream API; its answer, unless that is an error.
    pub fn api(&mut self, subject: &str, payload: &Value) -> Result<Value> {
        let answer = self.request(&format!("$JS.API.{subject}"), payload.to_string().as_bytes())?;
        ensure!(answer.status.is_none(), "{subject}: status {:?}", answer.status);
        let answer = answer.json()?;
        ensure!(answer.get("error").is_none(), "{subject}: {}", answer["error"]);
        Ok(answer)
    }

    /// The newest message of `subject` in `stream`; `None` where there is none.
    pub fn last(&mut self, stream: &str, subject: &str) -> Result<Option<Message>> {
        let answer = self.request(&format!("$JS.API.DIRECT.GET.{stream}.{subject}"), b"")?;
        match answer.status {
            None => Ok(Some(stored(answer))),
            Some(404) => Ok(None),
            Some(status) => bail!("{stream}: status {status}"),
        }
    }

    /// What the newest message of `subject` in `stream` holds, by its leader's word: for streams that allow no direct gets.
    pub fn newest(&mut self, stream: &str, subject: &str) -> Result<Vec<u8>> {
        let answer = self.api(&format!("STREAM.MSG.GET.{stream}"), &json!({"last_by_subj": subject}))?;
        let data = answer["message"]["data"].as_str().unwrap_or_default();
        BASE64.decode(data).context("a message that is not in base64")
    }

    /// All messages of `stream` whose subject matches `filter`, oldest first.
    pub fn messages(&mut self, stream: &str, filter: &str) -> Result<Vec<Message>> {
        let mut list = Vec::new();
        let mut next = 1;
        loop {
            let (found, pending) = self.batch(stream, filter, next)?;
            next = found.last().and_then(Message::sequence).map_or(next, |sequence| sequence + 1);
            list.extend(found);
            if pending == 0 {
                return Ok(list);
            }
        }
    }

    /// Messages from sequence `next`, and how many come after them.
    fn batch(&mut self, stream: &str, filter: &str, next: u64) -> Result<(Vec<Message>, u64)> {
        let request = json!({"seq": next, "batch": BATCH, "next_by_subj": filter}).to_string();
        let inbox = self.publish(&format!("$JS.API.DIRECT.GET.{stream}"), request.as_bytes())?;
        let mut list = Vec::new();
        loop {
            let answer = self.answer(&inbox)?;
            match answer.status {
                None => list.push(stored(answer)),
                Some(404) => return Ok((list, 0)),
                Some(204) => {
                    let pending = answer.header("Nats-Num-Pending").context("an end of a batch without a count")?;
                    return Ok((list, pending.parse()?));
                }
                Some(status) => bail!("{stream}: status {status}"),
            }
        }
    }

    /// Sends a request; the inbox of its answers.
    fn publish(&mut self, subject: &str, payload: &[u8]) -> Result<String> {
        self.inboxes += 1;
        let inbox = format!("_INBOX.portcullis-tests.{}", self.inboxes);
        let mut line = format!("PUB {subject} {inbox} {}\r\n", payload.len()).into_bytes();
        line.extend_from_slice(payload);
        self.send(&line)?;
        Ok(inbox)
    }

    fn answer(&mut self, inbox: &str) -> Result<Message> {
        loop {
            let line = self.line()?;
            let words: Vec<&str> = line.split(' ').collect();
            match words.as_slice() {
                ["PING"] => self.send(b"PONG")?,
                ["HMSG", subject, _, head, total] | ["HMSG", subject, _, _, head, total] => {
                    let message = self.content(subject, head.parse()?, total.parse()?)?;
                    if *subject == inbox {
                        return Ok(message);
                    }
                }
                ["MSG", subject, _, total] | ["MSG", subject, _, _, total] => {
                    let message = self.content(subject, 0, total.parse()?)?;
                    if *subject == inbox {
                        return Ok(message);
                    }
                }
                ["-ERR", ..] => bail!("the NATS server says: {line}"),
                _ => {}
            }
        }
    }

    fn content(&mut self, subject: &str, head: usize, total: usize) -> Result<Message> {
        ensure!(head <= total && total <= PAYLOAD_MAX, "a message of {total} bytes");
        let mut bytes = vec![0; total + 2];
        self.stream.read_exact(&mut bytes)?;
        bytes.truncate(total);
        let payload = bytes.split_off(head);
        let text = String::from_utf8(bytes)?;
        let mut lines = text.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
        let headers = lines.filter_map(|line| line.split_once(':'));
        let headers = headers.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect();
        Ok(Message { subject: subject.to_owned(), status, headers, payload })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line).context("no answer of the NATS server")? > 0, "the server hung up");
        Ok(line.trim_end().to_owned())
    }

    fn send(&mut self, line: &[u8]) -> Result<()> {
        let stream = self.stream.get_mut();
        stream.write_all(line)?;
        Ok(stream.write_all(b"\r\n")?)
    }
}

/// A stored message under its own subject, not under that of the inbox it came to.
fn stored(mut message: Message) -> Message {
    if let Some(subject) = message.header("Nats-Subject").map(str::to_owned) {
        message.subject = subject;
    }
    message
}
