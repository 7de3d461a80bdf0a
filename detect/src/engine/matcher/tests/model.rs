//! Conditions against a model that knows neither grammar nor plan, and against any text.

use proptest::prelude::*;

use super::*;

/// What a condition means.
#[derive(Clone, Debug)]
enum Model {
    Leaf(Known),
    Not(Box<Model>),
    All(Vec<Model>),
    Any(Vec<Model>),
}

#[derive(Clone, Debug)]
enum Known {
    Status(Vec<(u16, u16)>),
    OriginStatus(u16),
    Path(Vec<String>),
    PathPrefix(String),
    /// Its expression is plain text.
    PathRegexp(Vec<String>),
    Method(String),
    Host(String),
    Header(String),
    Query(String),
    Router(String),
    Node(String),
    ClientV4(u8, u8),
}

#[derive(Clone, Debug)]
struct Sample {
    status: u16,
    origin_status: u16,
    path: String,
    method: String,
    host: String,
    header: Option<String>,
    query: Option<String>,
    router: Vec<String>,
    node: String,
    client: Option<u8>,
}

impl Sample {
    fn with<T>(&self, then: impl FnOnce(&Event<'_>) -> T) -> T {
        let query = self.query.as_ref().map(|value| format!("x=1&k={value}")).unwrap_or_default();
        let pairs: Vec<(&str, &str)> = self.header.iter().map(|value| ("X-Key", value.as_str())).collect();
        let client = self.client.map(|last| Client { addr: IpAddr::from([192, 0, 2, last]), via_proxy: false });
        let router = self.router.join(" -> ");
        then(&Event {
            status: self.status,
            origin_status: self.origin_status,
            client: client.ok_or(NoClient::Absent),
            text: Text {
                path: &self.path,
                method: &self.method,
                host: &self.host,
                query: &query,
                router: &router,
                ..Text::default()
            },
            headers: Headers::from_pairs(&pairs),
            ..Event::default()
        })
    }
}

impl Known {
    fn is_true(&self, sample: &Sample) -> bool {
        match self {
            Self::Status(ranges) => ranges.iter().any(|&(first, last)| (first..=last).contains(&sample.status)),
            Self::OriginStatus(status) => sample.origin_status == *status,
            Self::Path(list) => list.contains(&sample.path),
            Self::PathPrefix(prefix) => sample.path.starts_with(prefix),
            Self::PathRegexp(list) => list.iter().any(|part| sample.path.contains(part)),
            Self::Method(method) => sample.method == method.to_uppercase(),
            Self::Host(host) => sample.host.to_lowercase() == host.to_lowercase(),
            Self::Header(value) => sample.header.as_deref().unwrap_or("-") == value,
            Self::Query(value) => sample.query.as_ref() == Some(value),
            Self::Router(name) => sample.router.contains(name),
            Self::Node(node) => sample.node == *node,
            Self::ClientV4(last, bits) => {
                sample.client.is_some_and(|client| u32::from(client ^ last) >> (8 - u32::from(*bits)) == 0)
            }
        }
    }

    fn render(&self) -> (&'static str, Vec<String>) {
        match self {
            Self::Status(ranges) => ("Status", ranges.iter().map(render_range).collect()),
            Self::OriginStatus(status) => ("OriginStatus", vec![render_range(&(*status, *status))]),
            Self::Path(list) => ("Path", list.clone()),
            Self::PathPrefix(prefix) => ("PathPrefix", vec![prefix.clone()]),
            Self::PathRegexp(list) => ("PathRegexp", list.clone()),
            Self::Method(method) => ("Method", vec![method.clone()]),
            Self::Host(host) => ("Host", vec![host.clone()]),
            Self::Header(value) => ("Header", vec!["x-key".to_owned(), value.clone()]),
            Self::Query(value) => ("Query", vec!["k".to_owned(), value.clone()]),
            Self::Router(name) => ("Router", vec![name.clone()]),
            Self::Node(node) => ("Node", vec![node.clone()]),
            Self::ClientV4(last, bits) => ("ClientIP", vec![format!("192.0.2.{last}/{}", 24 + bits)]),
        }
    }
}

fn render_range((first, last): &(u16, u16)) -> String {
    match (*first, *last) {
        (0, _) => "-".to_owned(),
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    }
}

impl Model {
    fn is_true(&self, sample: &Sample) -> bool {
        match self {
            Self::Leaf(known) => known.is_true(sample),
            Self::Not(part) => !part.is_true(sample),
            Self::All(parts) => parts.iter().all(|part| part.is_true(sample)),
            Self::Any(parts) => parts.iter().any(|part| part.is_true(sample)),
        }
    }

    /// `style` is read digit by digit: where to put white space, which quotes, whether to add parentheses.
    fn render(&self, tight: usize, style: &mut u64) -> String {
        let mut choose = |of: u64| {
            *style = style.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*style >> 33) % of
        };
        let space = ["", " ", "\n\t", "  "][choose(4) as usize];
        let needless = choose(4) == 0;
        let quote = if choose(2) == 0 { '`' } else { '"' };
        let (own, text) = match self {
            Self::Leaf(known) => {
                let (name, arguments) = known.render();
                let quoted: Vec<String> = arguments.iter().map(|value| format!("{quote}{value}{quote}")).collect();
                (3, format!("{name}{space}({space}{}{space})", quoted.join(&format!("{space},"))))
            }
            Self::Not(part) => (3, format!("!{space}{}", part.render(3, style))),
            Self::All(parts) => (2, Self::join(parts, 2, &format!("{space}&&{space}"), style)),
            Self::Any(parts) => (1, Self::join(parts, 1, &format!("{space}||{space}"), style)),
        };
        if own < tight || needless { format!("({space}{text}{space})") } else { text }
    }

    fn join(parts: &[Self], tight: usize, by: &str, style: &mut u64) -> String {
        parts.iter().map(|part| part.render(tight, style)).collect::<Vec<_>>().join(by)
    }
}

fn word() -> impl Strategy<Value = String> {
    "[a-c]{1,2}"
}

fn any_path() -> impl Strategy<Value = String> {
    prop_oneof![4 => "/[a-c]{0,2}", 1 => Just("-".to_owned())]
}

fn any_status() -> impl Strategy<Value = u16> {
    prop_oneof![Just(0), Just(200), 400u16..=406, 100u16..=999]
}

fn any_method() -> impl Strategy<Value = String> {
    prop_oneof![Just("GET".to_owned()), Just("put".to_owned())]
}

fn known() -> impl Strategy<Value = Known> {
    let range = (any_status(), 0u16..4).prop_map(|(first, length)| match first {
        0 => (0, 0),
        first => (first, (first + length).min(999)),
    });
    prop_oneof![
        4 => prop::collection::vec(range, 1..4).prop_map(Known::Status),
        1 => any_status().prop_map(Known::OriginStatus),
        2 => prop::collection::vec(any_path(), 1..4).prop_map(Known::Path),
        1 => any_path().prop_map(Known::PathPrefix),
        2 => prop::collection::vec(word(), 1..3).prop_map(Known::PathRegexp),
        1 => any_method().prop_map(Known::Method),
        1 => "[a-cA-C]{1,2}".prop_map(Known::Host),
        1 => prop_oneof![word(), Just("-".to_owned())].prop_map(Known::Header),
        1 => word().prop_map(Known::Query),
        1 => word().prop_map(Known::Router),
        1 => word().prop_map(Known::Node),
        1 => (0u8..4, 0u8..=8).prop_map(|(last, bits)| Known::ClientV4(last, bits)),
    ]
}

fn model() -> impl Strategy<Value = Model> {
    known().prop_map(Model::Leaf).prop_recursive(5, 32, 4, |inner| {
        prop_oneof![
            inner.clone().prop_map(|part| Model::Not(Box::new(part))),
            prop::collection::vec(inner.clone(), 1..4).prop_map(Model::All),
            prop::collection::vec(inner, 1..4).prop_map(Model::Any),
        ]
    })
}

fn sample() -> impl Strategy<Value = Sample> {
    let status = prop_oneof![6 => any_status(), 1 => any::<u16>()];
    let texts = (any_path(), any_method().prop_map(|method| method.to_uppercase()), "[a-cA-C]{1,2}", word());
    let optional = (prop::option::of(word()), prop::option::of(word()), prop::option::of(0u8..4));
    (status, any_status(), texts, optional, prop::collection::vec(word(), 1..3)).prop_map(
        |(status, origin_status, (path, method, host, node), (header, query, client), router)| Sample {
            status,
            origin_status,
            path,
            method,
            host,
            header,
            query,
            router,
            node,
            client,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn a_condition_is_true_when_the_model_says_so(
        model in model(), style: u64, samples in prop::collection::vec(sample(), 1..8),
    ) {
        let condition = model.render(0, &mut { style });
        let matcher = Matcher::parse(&condition).map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!(matcher.source(), &condition);
        for sample in &samples {
            let (result, leaves) = sample.with(|event| {
                let explained = matcher.0.tree.explain(&|index| matcher.0.leaves[index].explain(event, &sample.node));
                assert_eq!(explained.0, matcher.matches(event, &sample.node), "{condition}");
                (matcher.matches(event, &sample.node), explained.1)
            });
            prop_assert_eq!(result, model.is_true(sample), "{} on {:?}", condition, sample);
            prop_assert!(!result || matcher.may_match_status(sample.status), "{}", condition);
            prop_assert!(!leaves.is_empty());
        }
    }

    #[test]
    fn any_text_parses_or_is_refused_at_a_place_in_it(text in "\\PC{0,60}|[\\x00-\\x7f]{0,60}") {
        never_panics(&text)?;
    }

    #[test]
    fn any_tokens_parse_or_are_refused_at_a_place_in_them(
        tokens in prop::collection::vec(prop::sample::select(vec![
            "Status", "(", ")", "`404`", "\"500-599\"", ",", "&&", "||", "!", " ", "\n", "Path", "`/ü`", "`", "\"",
            "\\",
            "PathRegexp", "`(`", "`a|b`", "Query", "Header", "ClientIP", "`10.0.0.0/8`", "Status(`404`)", "é", "&",
        ]), 0..14),
    ) {
        never_panics(&tokens.concat())?;
    }
}

fn never_panics(text: &str) -> Result<(), TestCaseError> {
    match Matcher::parse(text) {
        Ok(matcher) => {
            prop_assert_eq!(matcher.source(), text);
            let again = Matcher::parse(&format!("( {text}\n)")).unwrap();
            for status in [0, 200, 404, 500] {
                let event = Event { status, ..path("/ab") };
                prop_assert_eq!(matcher.matches(&event, "n"), again.matches(&event, "n"));
                prop_assert_eq!(matcher.may_match_status(status), again.may_match_status(status));
            }
        }
        Err(error) => {
            prop_assert!(text.is_char_boundary(error.position));
            prop_assert!(error.line >= 1 && error.column >= 1 && error.to_string().ends_with('^'));
        }
    }
    Ok(())
}
