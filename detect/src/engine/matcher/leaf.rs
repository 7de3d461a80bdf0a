//! The matchers: their names and arguments, and what they look at in an event.
//!
//! A new matcher is one line in [`MATCHERS`], one variant, and one arm in [`Test::new`].

use proto::event::{ABSENT, Event};
use proto::net::{NamedSet, NetSet, Target};
use proto::settings::distance;
use regex::{Regex, RegexBuilder, RegexSet, RegexSetBuilder};

use super::REGEX_BYTES_MAX;
use super::error::Fault;
use super::query;
use super::status::StatusSet;
use super::syntax::{Argument, Call};

#[derive(Clone, Copy)]
enum Kind {
    Status,
    OriginStatus,
    ClientIp,
    Host,
    HostRegexp,
    Path,
    PathPrefix,
    PathRegexp,
    Method,
    Header,
    HeaderRegexp,
    Query,
    QueryRegexp,
    UserAgent,
    UserAgentRegexp,
    Router,
    Service,
    EntryPoint,
    Username,
    Node,
    Protocol,
}

const MATCHERS: [(&str, Kind); 21] = [
    ("Status", Kind::Status),
    ("OriginStatus", Kind::OriginStatus),
    ("ClientIP", Kind::ClientIp),
    ("Host", Kind::Host),
    ("HostRegexp", Kind::HostRegexp),
    ("Path", Kind::Path),
    ("PathPrefix", Kind::PathPrefix),
    ("PathRegexp", Kind::PathRegexp),
    ("Method", Kind::Method),
    ("Header", Kind::Header),
    ("HeaderRegexp", Kind::HeaderRegexp),
    ("Query", Kind::Query),
    ("QueryRegexp", Kind::QueryRegexp),
    ("UserAgent", Kind::UserAgent),
    ("UserAgentRegexp", Kind::UserAgentRegexp),
    ("Router", Kind::Router),
    ("Service", Kind::Service),
    ("EntryPoint", Kind::EntryPoint),
    ("Username", Kind::Username),
    ("Node", Kind::Node),
    ("Protocol", Kind::Protocol),
];

/// What one matcher tests.
pub(super) enum Test {
    Status(StatusSet),
    OriginStatus(StatusSet),
    ClientIp(NetSet),
    Field(Field, Predicate),
    /// The name is in lower case.
    Header(String, Predicate),
    Query(String, Predicate),
}

#[derive(Clone, Copy)]
pub(super) enum Field {
    Host,
    Path,
    Method,
    UserAgent,
    Router,
    Service,
    EntryPoint,
    Username,
    Node,
    Protocol,
}

/// What one value must be like. Lists are sorted, for binary search.
pub(super) enum Predicate {
    OneOf(Vec<String>),
    /// One of these hosts: lower case, without a final dot.
    Host(Vec<String>),
    /// One of these, or a chain of routers with one of these in it.
    Chain(Vec<String>),
    Prefix(Vec<String>),
    Pattern(Pattern),
}

impl Test {
    pub(super) fn new<'a>(call: &Call<'a>) -> Result<Self, Fault<'a>> {
        let values = call.arguments.as_slice();
        let field = |field, predicate| Ok(Self::Field(field, predicate));
        match kind(call.name)? {
            Kind::Status => StatusSet::parse(values).map(Self::Status),
            Kind::OriginStatus => StatusSet::parse(values).map(Self::OriginStatus),
            Kind::ClientIp => parse_nets(values).map(Self::ClientIp),
            Kind::Host => field(Field::Host, parse_hosts(values)?),
            Kind::HostRegexp => field(Field::Host, parse_host_patterns(values)?),
            Kind::Path => field(Field::Path, Predicate::OneOf(parse_paths(values)?)),
            Kind::PathPrefix => field(Field::Path, Predicate::Prefix(parse_paths(values)?)),
            Kind::PathRegexp => field(Field::Path, patterns(values)?),
            Kind::Method => field(Field::Method, Predicate::OneOf(sorted(values, |value| value.to_uppercase()))),
            Kind::Header => parse_header(call, one_of),
            Kind::HeaderRegexp => parse_header(call, patterns),
            Kind::Query => parse_query(call, one_of),
            Kind::QueryRegexp => parse_query(call, patterns),
            Kind::UserAgent => field(Field::UserAgent, one_of(values)?),
            Kind::UserAgentRegexp => field(Field::UserAgent, patterns(values)?),
            Kind::Router => field(Field::Router, Predicate::Chain(sorted(values, str::to_owned))),
            Kind::Service => field(Field::Service, one_of(values)?),
            Kind::EntryPoint => field(Field::EntryPoint, one_of(values)?),
            Kind::Username => field(Field::Username, one_of(values)?),
            Kind::Node => field(Field::Node, one_of(values)?),
            Kind::Protocol => field(Field::Protocol, one_of(values)?),
        }
    }

    pub(super) fn is_true(&self, event: &Event<'_>, node: &str) -> bool {
        match self {
            Self::Status(set) => set.contains(event.status),
            Self::OriginStatus(set) => set.contains(event.origin_status),
            Self::ClientIp(nets) => event.client.is_ok_and(|client| nets.contains(client.addr)),
            Self::Field(field, predicate) => predicate.is_true(field.of(event, node)),
            Self::Header(name, predicate) => predicate.is_true(event.headers.get(name).unwrap_or(ABSENT)),
            Self::Query(key, predicate) => query::values(event.text.query, key).any(|value| predicate.is_true(&value)),
        }
    }

    /// The header it needs, in lower case.
    pub(super) fn header(&self) -> Option<&str> {
        match self {
            Self::Header(name, _) => Some(name),
            _ => None,
        }
    }

    /// Cost of one test in no particular unit: only the order counts. A bit, a search in a list, a look-up first, and
    /// regular expressions above any number of the others that people write.
    pub(super) fn cost(&self) -> u32 {
        match self {
            Self::Status(_) | Self::OriginStatus(_) => 1,
            Self::Field(_, predicate) => predicate.cost(),
            Self::ClientIp(_) => 3,
            Self::Header(_, predicate) => 4 + predicate.cost(),
            Self::Query(_, predicate) => 8 + predicate.cost(),
        }
    }
}

impl Field {
    fn of<'a>(self, event: &Event<'a>, node: &'a str) -> &'a str {
        match self {
            Self::Host => event.text.host,
            Self::Path => event.text.path,
            Self::Method => event.text.method,
            Self::UserAgent => event.text.user_agent,
            Self::Router => event.text.router,
            Self::Service => event.text.service,
            Self::EntryPoint => event.text.entry_point,
            Self::Username => event.text.username,
            Self::Node => node,
            Self::Protocol => event.text.protocol,
        }
    }
}

impl Predicate {
    fn is_true(&self, value: &str) -> bool {
        match self {
            Self::OneOf(list) => contains(list, value),
            Self::Host(list) => {
                let host = value.strip_suffix('.').unwrap_or(value);
                let lower = || host.bytes().map(|b| b.to_ascii_lowercase());
                list.binary_search_by(|listed| listed.bytes().cmp(lower())).is_ok()
            }
            Self::Chain(list) => contains(list, value) || value.split(" -> ").any(|router| contains(list, router)),
            Self::Prefix(list) => list.iter().any(|prefix| value.starts_with(prefix.as_str())),
            Self::Pattern(pattern) => pattern.is_match(value),
        }
    }

    fn cost(&self) -> u32 {
        match self {
            Self::OneOf(_) | Self::Host(_) | Self::Chain(_) | Self::Prefix(_) => 2,
            Self::Pattern(_) => 1_000,
        }
    }
}

fn contains(list: &[String], value: &str) -> bool {
    list.binary_search_by(|listed| listed.as_str().cmp(value)).is_ok()
}

/// One regular expression, or several of which any must match. They are not joined to one text, as what an expression
/// means (a comment in `(?x)`, for one) must not reach into the next.
pub(super) enum Pattern {
    One(Regex),
    AnyOf(RegexSet),
}

impl Pattern {
    fn parse<'a>(arguments: &[Argument<'a>], ignore_case: bool) -> Result<Self, Fault<'a>> {
        // Each by itself first, so that a mistake has its place.
        for argument in arguments {
            let mut builder = RegexBuilder::new(&argument.value);
            let regex = builder.size_limit(REGEX_BYTES_MAX).case_insensitive(ignore_case).build();
            let regex = regex.map_err(|error| Fault::new(argument.raw, render_regex_error(&error)))?;
            if arguments.len() == 1 {
                return Ok(Self::One(regex));
            }
        }
        let mut builder = RegexSetBuilder::new(arguments.iter().map(|argument| &argument.value));
        let set = builder.size_limit(REGEX_BYTES_MAX).case_insensitive(ignore_case).build();
        set.map(Self::AnyOf).map_err(|error| Fault::new(arguments[0].raw, render_regex_error(&error)))
    }

    fn is_match(&self, value: &str) -> bool {
        #[cfg(test)]
        super::tests::count_regex_run();
        match self {
            Self::One(regex) => regex.is_match(value),
            Self::AnyOf(set) => set.is_match(value),
        }
    }
}

fn render_regex_error(error: &regex::Error) -> String {
    match error {
        regex::Error::CompiledTooBig(limit) => {
            format!("expected regular expressions that compile to at most {limit} bytes, got larger ones")
        }
        // The crate's own text is several lines with a drawing; the last says what is wrong.
        other => {
            let text = other.to_string();
            let last = text.lines().last().unwrap_or_default();
            format!("expected a regular expression ({})", last.trim_start_matches("error: "))
        }
    }
}

fn kind(name: &str) -> Result<Kind, Fault<'_>> {
    if let Some((_, kind)) = MATCHERS.iter().find(|(known, _)| *known == name) {
        return Ok(*kind);
    }
    let lower = name.to_ascii_lowercase();
    let near = MATCHERS.iter().map(|(known, _)| (distance(&lower, &known.to_ascii_lowercase()), known)).min();
    // Names further away than this have nothing to do with each other.
    let near = near.filter(|(distance, _)| *distance <= 1 + name.len() / 3);
    let hint = near.map_or_else(String::new, |(_, near)| format!(" (nearest: `{near}`)"));
    Err(Fault::new(name, format!("expected a known matcher{hint}, got `{name}`")))
}

fn sorted(arguments: &[Argument<'_>], normalize: impl Fn(&str) -> String) -> Vec<String> {
    let mut list: Vec<String> = arguments.iter().map(|argument| normalize(&argument.value)).collect();
    list.sort_unstable();
    list.dedup();
    list
}

fn one_of<'a>(arguments: &[Argument<'a>]) -> Result<Predicate, Fault<'a>> {
    Ok(Predicate::OneOf(sorted(arguments, str::to_owned)))
}

fn patterns<'a>(arguments: &[Argument<'a>]) -> Result<Predicate, Fault<'a>> {
    Pattern::parse(arguments, false).map(Predicate::Pattern)
}

/// Refuses the first argument that `is_right` does not accept.
fn check<'a>(arguments: &[Argument<'a>], expected: &str, is_right: impl Fn(&str) -> bool) -> Result<(), Fault<'a>> {
    match arguments.iter().find(|argument| !is_right(&argument.value)) {
        None => Ok(()),
        Some(wrong) => Err(Fault::new(wrong.raw, format!("expected {expected}, got `{}`", wrong.value))),
    }
}

fn parse_hosts<'a>(arguments: &[Argument<'a>]) -> Result<Predicate, Fault<'a>> {
    check(arguments, "a host in ASCII", |host| host.is_ascii() && !host.is_empty())?;
    check(arguments, "a host without wildcards (`HostRegexp` takes patterns)", |host| !host.contains('*'))?;
    let normalize = |host: &str| host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    Ok(Predicate::Host(sorted(arguments, normalize)))
}

/// Traefik matches hosts in lower case; ignoring the case does the same without making a copy of each host.
fn parse_host_patterns<'a>(arguments: &[Argument<'a>]) -> Result<Predicate, Fault<'a>> {
    check(arguments, "a regular expression in ASCII", str::is_ascii)?;
    Pattern::parse(arguments, true).map(Predicate::Pattern)
}

fn parse_paths<'a>(arguments: &[Argument<'a>]) -> Result<Vec<String>, Fault<'a>> {
    check(arguments, "a path that begins with `/`, or `-`", |path| path.starts_with('/') || path == ABSENT)?;
    Ok(sorted(arguments, str::to_owned))
}

fn parse_nets<'a>(arguments: &[Argument<'a>]) -> Result<NetSet, Fault<'a>> {
    let mut nets = Vec::new();
    for argument in arguments {
        if let Some(set) = NamedSet::parse(&argument.value) {
            nets.extend(set.nets());
        } else if let Ok(target) = argument.value.parse::<Target>() {
            nets.push(target.net());
        } else {
            let expected = "expected an address, a CIDR, `cloudflare` or `private`";
            return Err(Fault::new(argument.raw, format!("{expected}, got `{}`", argument.value)));
        }
    }
    Ok(NetSet::new(nets))
}

type ParsePredicate = for<'s, 'a> fn(&'s [Argument<'a>]) -> Result<Predicate, Fault<'a>>;

fn parse_header<'a>(call: &Call<'a>, values: ParsePredicate) -> Result<Test, Fault<'a>> {
    // A token of RFC 9110, section 5.6.2: with anything else, such as a colon, the name never occurs.
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    check(&call.arguments[..1], "the name of a header", |name| !name.is_empty() && name.bytes().all(is_token))?;
    if call.arguments.len() == 1 {
        return Err(Fault::new(call.closing, format!("expected `,` and a value after the name in `{}`", call.name)));
    }
    Ok(Test::Header(call.arguments[0].value.to_ascii_lowercase(), values(&call.arguments[1..])?))
}

/// A name alone means an empty value (`?debug`, `?debug=`), as in Traefik.
fn parse_query<'a>(call: &Call<'a>, values: ParsePredicate) -> Result<Test, Fault<'a>> {
    let key = call.arguments[0].value.clone();
    let predicate = match &call.arguments[1..] {
        [] => Predicate::OneOf(vec![String::new()]),
        rest => values(rest)?,
    };
    Ok(Test::Query(key, predicate))
}

#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    MATCHERS.iter().map(|(name, _)| *name)
}
