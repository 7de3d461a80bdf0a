//! From the bytes of a line to an [`Event`]: envelopes, format, client address.
//!
//! The only place that knows log formats. It refuses lines that are no access entries and says why; it never panics,
//! whatever the bytes, and never guesses. Memory: values are borrowed from the line, the few buffers are used again for
//! every line, and a joined line is bounded by the limit on lines.
//!
//! A [`Parser`] belongs to one file, as it joins pieces of lines that a container runtime has cut.

mod clf;
mod clf_guard;
mod envelope;
pub mod syslog;
pub mod time;
mod traefik;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use proto::client_ip::{ClientIpPolicy, Origin};
use proto::event::{ABSENT, AccessBatch, Event, Headers, Interest, Text};
use proto::net::parse_peer;
use proto::time::Timestamp;

pub use clf_guard::{Suspicion, WaitingRoom};

use clf_guard::{Guard, Mark, Verdict};
use envelope::{DOCKER_START, Envelope, LEVELS_MAX, Stream};

/// Characters of a line that is shown to people.
const SAMPLE_CHARS_MAX: usize = 200;

/// How the lines of a source are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Each line tells: one that begins with `{` is JSON.
    #[default]
    Auto,
    /// Traefik's `json`.
    Json,
    /// Traefik's `common` and `genericCLF`.
    Clf,
}

/// What the newest event was written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeenFormat {
    /// Traefik's `json`.
    Json,
    /// Traefik's `common`.
    Clf,
    /// Traefik's `genericCLF`.
    GenericClf,
}

impl SeenFormat {
    /// The word in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Clf => "clf",
            Self::GenericClf => "generic-clf",
        }
    }
}

/// Why a line is no event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// Not one whole JSON object with readable values.
    NotJson,
    /// A JSON object without any field of an access entry, such as Traefik's own log.
    NotAccess,
    /// Not, to its last byte, the common log format.
    NotClf,
    /// An envelope of a container runtime or shipper that cannot be opened.
    BrokenEnvelope,
    /// Pieces of a line that together are longer than the limit.
    PiecesTooLong,
}

impl Refusal {
    /// A short text for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotJson => "not a JSON object",
            Self::NotAccess => "JSON without the fields of an access entry",
            Self::NotClf => "not the common log format",
            Self::BrokenEnvelope => "broken envelope",
            Self::PiecesTooLong => "longer than the limit when joined",
        }
    }
}

/// What a line was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<T = ()> {
    /// An access.
    Event(T),
    /// Nothing but white space.
    Blank,
    /// A piece of a line whose end is still to come.
    Partial,
    /// No access entry.
    Unparsed(Refusal),
    /// An access that may be forged.
    Suspect(Suspicion),
    /// An access that is handed on later, when it turns out to be none that may be forged.
    Held,
}

/// Request headers of one entry, name and value.
type HeaderList<'a> = Vec<(Cow<'a, str>, Cow<'a, str>)>;

/// The values of one line before their meaning is known. Absent ones are `None`.
#[derive(Debug, Default)]
struct Entry<'a> {
    /// When the request began, and how long it took; zero where that is not known.
    time: Option<Timestamp>,
    duration: Duration,
    client_addr: Option<Cow<'a, str>>,
    client_host: Option<Cow<'a, str>>,
    forwarded_for: Option<Cow<'a, str>>,
    status: u16,
    origin_status: u16,
    method: Option<Cow<'a, str>>,
    path: Option<Cow<'a, str>>,
    host: Option<Cow<'a, str>>,
    protocol: Option<Cow<'a, str>>,
    user_agent: Option<Cow<'a, str>>,
    router: Option<Cow<'a, str>>,
    service: Option<Cow<'a, str>>,
    entry_point: Option<Cow<'a, str>>,
    username: Option<Cow<'a, str>>,
    headers: HeaderList<'a>,
}

/// Turns the lines of one file into events.
#[derive(Debug)]
pub struct Parser {
    format: Format,
    line_bytes_max: usize,
    policy: Arc<ClientIpPolicy>,
    interest: Arc<Interest>,
    /// Headers that the rules or the client's address need, lower case.
    wanted: Vec<String>,
    seen_format: Option<SeenFormat>,
    /// Opened envelopes, by level.
    buffers: [Vec<u8>; LEVELS_MAX],
    /// Pieces of unfinished lines: standard output, standard error.
    pieces: [Pieces; 2],
    headers: HeaderList<'static>,
    pairs: Vec<(&'static str, &'static str)>,
    guard: Guard,
    written_at: Option<Timestamp>,
    /// When the line at hand came; `None` for finished logs.
    now: Option<Timestamp>,
}

#[derive(Debug, Default)]
struct Pieces {
    open: bool,
    too_long: bool,
    bytes: Vec<u8>,
}

impl Parser {
    /// A parser for one file. `line_bytes_max` bounds a line that is joined from pieces.
    pub fn new(format: Format, line_bytes_max: usize, policy: Arc<ClientIpPolicy>, interest: Arc<Interest>) -> Self {
        let mut parser = Self {
            format,
            line_bytes_max,
            policy,
            interest,
            wanted: Vec::new(),
            seen_format: None,
            buffers: <[Vec<u8>; LEVELS_MAX]>::default(),
            pieces: <[Pieces; 2]>::default(),
            headers: Vec::new(),
            pairs: Vec::new(),
            guard: Guard::default(),
            written_at: None,
            now: None,
        };
        parser.collect_wanted();
        parser
    }

    /// From now on clients are resolved by `policy` and the headers of `interest` are kept.
    pub fn set_rules(&mut self, policy: Arc<ClientIpPolicy>, interest: Arc<Interest>) {
        (self.policy, self.interest) = (policy, interest);
        self.collect_wanted();
    }

    fn collect_wanted(&mut self) {
        let cdn = self.policy.cdn_headers.iter().map(|cdn| cdn.header.to_ascii_lowercase());
        self.wanted = self.interest.headers.iter().cloned().chain(cdn).collect();
        self.wanted.sort_unstable();
        self.wanted.dedup();
    }

    /// The next lines come at `now`: their order and counts are looked at, and suspects are no events. Without it, as with
    /// finished logs, none are: what came together is not known of them.
    pub fn set_now(&mut self, now: Timestamp) {
        self.now = Some(now);
    }

    /// There was a line that was too long to be read.
    pub fn note_oversized(&mut self) {
        self.guard.note_oversized();
    }

    /// Accesses of the common log format that wait to be believed do so in `room`, which others may share.
    pub fn set_room(&mut self, room: WaitingRoom) {
        self.guard.set_room(room);
    }

    /// No further line will come. Returns how many accesses were [held](Outcome::Held) in vain and not counted yet.
    pub fn give_up_held(&mut self) -> u64 {
        self.guard.give_up();
        self.guard.take_condemned()
    }

    /// How many accesses that were [held](Outcome::Held) turned out to be suspects, and were not counted yet.
    pub fn take_condemned(&mut self) -> u64 {
        self.guard.take_condemned()
    }

    /// What becomes of an access if it is not handed on. Those that have waited for it are handed on first, at its offset,
    /// because what was before is done.
    fn judge<T>(
        &mut self,
        mark: Mark,
        (line, offset): (&[u8], u64),
        each: &mut impl FnMut(&Event<'_>) -> T,
    ) -> Option<Outcome<T>> {
        let now = self.now?;
        match self.guard.judge(mark, line, now) {
            Verdict::Fits => None,
            Verdict::Suspect(suspicion) => Some(Outcome::Suspect(suspicion)),
            Verdict::Held(_) => Some(Outcome::Held),
            Verdict::Believed => {
                // What is judged once is not judged again.
                self.now = None;
                for held in self.guard.take_released().iter() {
                    let _shown = self.read(held, (LEVELS_MAX, offset), each);
                }
                self.now = Some(now);
                None
            }
        }
    }

    /// When the newest event was written, by the writer's clock: at the end of its request. `None` where it does not say.
    pub fn written_at(&self) -> Option<Timestamp> {
        self.written_at
    }

    /// What the newest event was written in; `None` before the first.
    pub fn seen_format(&self) -> Option<SeenFormat> {
        self.seen_format
    }

    /// Whether pieces of a line wait for its end. A batch must not end between them.
    pub fn is_joining(&self) -> bool {
        self.pieces.iter().any(|pieces| pieces.open)
    }

    /// Forgets the pieces of unfinished lines. Returns how many lines that were.
    pub fn abandon(&mut self) -> u64 {
        let open = self.pieces.iter_mut().filter(|pieces| pieces.open);
        open.map(|pieces| *pieces = Pieces::default()).count() as u64
    }

    /// The lines of `other` go on in what comes here: pieces of unfinished ones, and what is known of their writer.
    pub fn take_over(&mut self, other: &mut Self) {
        self.pieces = std::mem::take(&mut other.pieces);
        self.guard.take_over(&mut other.guard);
    }

    /// Parses `line` (without its line end) and appends its event to `out`.
    pub fn parse(&mut self, line: &[u8], offset: u64, out: &mut AccessBatch) -> Outcome {
        self.with_event(line, offset, |event| out.push(event))
    }

    /// Parses `line` (without its line end) and shows its event to `each`, after those of lines that were held, if it is what
    /// they waited for.
    pub fn with_event<T>(&mut self, line: &[u8], offset: u64, mut each: impl FnMut(&Event<'_>) -> T) -> Outcome<T> {
        let outcome = self.read(line, (0, offset), &mut each);
        // A forwarded chain may make the beginning of a broken line look like anything, a piece included.
        if matches!(outcome, Outcome::Unparsed(_) | Outcome::Partial) {
            self.guard.note_unparsed(line);
        }
        outcome
    }

    /// Reads what is inside so many envelopes.
    fn read<T>(
        &mut self,
        text: &[u8],
        (level, offset): (usize, u64),
        each: &mut impl FnMut(&Event<'_>) -> T,
    ) -> Outcome<T> {
        if level < LEVELS_MAX
            && let Some(piece) = envelope::open_cri(text)
        {
            return self.read_piece(piece, (level, offset), each);
        }
        let line = text.trim_ascii();
        match line.first() {
            None => Outcome::Blank,
            Some(b'{') => self.read_object(line, (level, offset), each),
            Some(_) if self.format == Format::Json => Outcome::Unparsed(Refusal::NotJson),
            Some(_) => self.read_clf(line, offset, each),
        }
    }

    /// An access entry, or else an envelope: most objects are entries, and those are read once.
    fn read_object<T>(
        &mut self,
        line: &[u8],
        (level, offset): (usize, u64),
        each: &mut impl FnMut(&Event<'_>) -> T,
    ) -> Outcome<T> {
        let may_open = level < LEVELS_MAX;
        let is_docker = may_open && line.starts_with(DOCKER_START);
        let mut refusal = Refusal::NotClf;
        if self.format != Format::Clf && !is_docker {
            let headers = recycle(std::mem::take(&mut self.headers));
            match traefik::parse(line, &self.wanted, headers) {
                Ok(entry) => return self.show_json(entry, (line, offset), each),
                Err(why) => refusal = why,
            }
        }
        if !may_open || refusal == Refusal::NotJson {
            return Outcome::Unparsed(refusal);
        }
        let mut buffer = std::mem::take(&mut self.buffers[level]);
        let place = (level + 1, offset);
        let outcome = match envelope::open(line, &mut buffer) {
            Envelope::Text => self.read(&buffer, place, each),
            Envelope::Object(object) => self.read(object.as_bytes(), place, each),
            Envelope::Piece { stream, partial } => self.read_piece((stream, partial, &buffer), (level, offset), each),
            Envelope::Broken => Outcome::Unparsed(Refusal::BrokenEnvelope),
            // Its entry stands beside the line, as Fluent Bit merges them.
            Envelope::Access if is_docker && self.format != Format::Clf => {
                match traefik::parse(line, &self.wanted, Vec::new()) {
                    Ok(entry) => self.show_json(entry, (line, offset), each),
                    Err(refusal) => Outcome::Unparsed(refusal),
                }
            }
            Envelope::Access | Envelope::Other => Outcome::Unparsed(refusal),
        };
        self.buffers[level] = buffer;
        outcome
    }

    fn read_piece<T>(
        &mut self,
        (stream, partial, text): (Stream, bool, &[u8]),
        (level, offset): (usize, u64),
        each: &mut impl FnMut(&Event<'_>) -> T,
    ) -> Outcome<T> {
        let place = (level + 1, offset);
        let pieces = &mut self.pieces[stream as usize];
        if !partial && !pieces.open {
            return self.read(text, place, each);
        }
        pieces.open = partial;
        pieces.too_long |= pieces.bytes.len() + text.len() > self.line_bytes_max;
        if pieces.too_long {
            pieces.bytes = Vec::new();
        } else {
            pieces.bytes.extend_from_slice(text);
        }
        if partial {
            return Outcome::Partial;
        }
        let whole = std::mem::take(pieces);
        if whole.too_long {
            return Outcome::Unparsed(Refusal::PiecesTooLong);
        }
        self.read(&whole.bytes, place, each)
    }

    fn show_json<T>(
        &mut self,
        entry: Entry<'_>,
        (line, offset): (&[u8], u64),
        each: &mut impl FnMut(&Event<'_>) -> T,
    ) -> Outcome<T> {
        if let Some(outcome) = self.judge(Mark::Json, (line, offset), each) {
            return outcome;
        }
        self.seen_format = Some(SeenFormat::Json);
        Outcome::Event(self.show(entry, offset, each))
    }

    fn read_clf<T>(&mut self, line: &[u8], offset: u64, each: &mut impl FnMut(&Event<'_>) -> T) -> Outcome<T> {
        // Clients may send any bytes; a line must not escape by not being UTF-8.
        let text = String::from_utf8_lossy(line);
        let Some(parsed) = clf::parse(&text, self.policy.clf_behind_proxy) else {
            return Outcome::Unparsed(Refusal::NotClf);
        };
        let count = |end: clf::TraefikEnd<'_>| Mark::Counted(end.request_count.unwrap_or(0), parsed.request.time);
        if let Some(outcome) = self.judge(parsed.traefik.map_or(Mark::Generic, count), (line, offset), each) {
            return outcome;
        }
        let line = parsed;
        self.seen_format = Some(if line.traefik.is_some() { SeenFormat::Clf } else { SeenFormat::GenericClf });
        let mut headers = recycle(std::mem::take(&mut self.headers));
        let request = line.request;
        for (name, value) in [("Referer", &request.referer), ("User-Agent", &request.user_agent)] {
            if present(value).is_some() {
                headers.push((Cow::Borrowed(name), value.clone()));
            }
        }
        let entry = Entry {
            time: Some(request.time),
            duration: line.traefik.map_or(Duration::ZERO, |end| end.duration),
            client_host: present(line.host).map(Cow::Borrowed),
            status: request.status.parse().ok().filter(|status| *status <= 999).unwrap_or(0),
            method: present(request.method).map(Cow::Borrowed),
            path: present(request.path).map(Cow::Borrowed),
            protocol: present(request.protocol).map(Cow::Borrowed),
            user_agent: present(&request.user_agent).is_some().then_some(request.user_agent),
            router: line.traefik.and_then(|end| present(end.router)).map(Cow::Borrowed),
            username: present(line.username).map(Cow::Borrowed),
            headers,
            ..Entry::default()
        };
        Outcome::Event(self.show(entry, offset, each))
    }

    /// Resolves the client and hands the event out.
    fn show<T>(&mut self, entry: Entry<'_>, offset: u64, each: &mut impl FnMut(&Event<'_>) -> T) -> T {
        self.written_at = entry.time.map(|time| time.saturating_add(entry.duration));
        let peer = entry.client_addr.as_deref().and_then(parse_peer);
        let chain = entry.forwarded_for.as_deref().or(entry.client_host.as_deref());
        let header = |name: &str| {
            let found = entry.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.as_ref())
        };
        let client = self.policy.resolve(Origin { peer, chain }, header);
        let mut pairs = recycle_pairs(std::mem::take(&mut self.pairs));
        let asked_for = |name: &str| self.interest.headers.iter().any(|wanted| wanted.eq_ignore_ascii_case(name));
        let kept = entry.headers.iter().filter(|(name, _)| asked_for(name));
        pairs.extend(kept.map(|(name, value)| (name.as_ref(), value.as_ref())));
        let event = Event {
            time: entry.time,
            client,
            peer,
            status: entry.status,
            origin_status: entry.origin_status,
            text: entry.text(),
            headers: Headers::from_pairs(&pairs),
            offset,
        };
        let result = each(&event);
        self.pairs = recycle_pairs(pairs);
        self.headers = recycle(entry.headers);
        result
    }
}

impl Entry<'_> {
    fn text(&self) -> Text<'_> {
        fn or_absent<'a>(value: &'a Option<Cow<'_, str>>) -> &'a str {
            value.as_deref().unwrap_or(ABSENT)
        }
        let full_path = or_absent(&self.path);
        let (path, query) = full_path.split_once('?').unwrap_or((full_path, ""));
        Text {
            method: or_absent(&self.method),
            path: if path.is_empty() { ABSENT } else { path },
            query,
            host: without_port(or_absent(&self.host)),
            protocol: or_absent(&self.protocol),
            user_agent: or_absent(&self.user_agent),
            router: or_absent(&self.router),
            service: or_absent(&self.service),
            entry_point: or_absent(&self.entry_point),
            username: or_absent(&self.username),
        }
    }
}

fn present(value: &str) -> Option<&str> {
    (!value.is_empty() && value != ABSENT).then_some(value)
}

/// The host of `host:port`, an IPv6 address without its brackets.
fn without_port(host: &str) -> &str {
    let bare = if let Some(rest) = host.strip_prefix('[') {
        rest.split_once(']').map_or(host, |(address, _)| address)
    } else {
        host.split_once(':').filter(|(_, port)| !port.contains(':')).map_or(host, |(name, _)| name)
    };
    if bare.is_empty() { ABSENT } else { bare }
}

/// The same allocation, empty, for values of another lifetime: collecting a vector's own iterator reuses its memory.
fn recycle<'b>(mut list: HeaderList<'_>) -> HeaderList<'b> {
    list.clear();
    list.into_iter().map(|_| (Cow::Borrowed(""), Cow::Borrowed(""))).collect()
}

/// See [`recycle`].
fn recycle_pairs<'b>(mut list: Vec<(&str, &str)>) -> Vec<(&'b str, &'b str)> {
    list.clear();
    list.into_iter().map(|_| ("", "")).collect()
}

/// A line as it may be shown to people: control characters escaped, cut to 200 characters.
pub fn escape_sample(line: &[u8]) -> String {
    // A character has at most four bytes, so this much is enough and an endless line costs nothing.
    let bytes = &line[..line.len().min(SAMPLE_CHARS_MAX * 4)];
    let text = String::from_utf8_lossy(bytes);
    let mut sample = String::new();
    for c in text.chars() {
        // Quotes cannot harm a terminal, and a JSON line is full of them.
        let escaped = if matches!(c, '"' | '\'' | '\\') { c.to_string() } else { c.escape_debug().to_string() };
        if sample.chars().count() + escaped.chars().count() > SAMPLE_CHARS_MAX {
            break;
        }
        sample.push_str(&escaped);
    }
    sample
}

#[cfg(test)]
mod tests;
