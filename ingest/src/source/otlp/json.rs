//! OTLP in JSON: protobuf's mapping with lower camel case, 64-bit integers as strings or numbers.
//!
//! Each level is cut into the text of its parts before a part is read, so nothing of a request is kept but one record.

use std::borrow::Cow;
use std::ops::ControlFlow;

use serde::Deserialize;
use serde::de::Error;
use serde_json::value::RawValue;

use super::{Each, HOST_NAME, OtlpError, Part, Record, Scalar};
use crate::source::http::body::{BodyError, each_element};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    #[serde(borrow, default)]
    resource_logs: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ResourceLogs<'a> {
    #[serde(borrow, default)]
    resource: Option<&'a RawValue>,
    #[serde(borrow, default)]
    scope_logs: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Resource<'a> {
    #[serde(borrow, default)]
    attributes: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ScopeLogs<'a> {
    #[serde(borrow, default)]
    log_records: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LogRecord<'a> {
    #[serde(default)]
    time_unix_nano: Option<Number>,
    #[serde(borrow, default)]
    body: Option<&'a RawValue>,
    #[serde(borrow, default)]
    attributes: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Pair<'a> {
    #[serde(default)]
    key: String,
    #[serde(borrow, default)]
    value: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Pairs<'a> {
    #[serde(borrow, default)]
    values: Option<&'a RawValue>,
}

/// Lists and bytes are left out.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AnyValue<'a> {
    #[serde(default)]
    string_value: Option<String>,
    #[serde(default)]
    bool_value: Option<bool>,
    #[serde(default)]
    int_value: Option<Number>,
    #[serde(default)]
    double_value: Option<Number>,
    #[serde(borrow, default)]
    kvlist_value: Option<&'a RawValue>,
}

/// A number, or the text of one.
#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Int(i64),
    Float(f64),
    Text(String),
}

pub(super) fn read(body: &[u8], record_bytes_max: usize, each: &mut Each<'_>) -> Result<u64, OtlpError> {
    // What is derived takes an array for a struct.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(OtlpError::Json(serde_json::Error::custom("expected an object")));
    }
    let request: Request<'_> = serde_json::from_slice(body).map_err(OtlpError::Json)?;
    let mut records = 0;
    let outcome = elements(request.resource_logs, &mut |resource_logs| {
        let resource_logs: ResourceLogs<'_> = parse(resource_logs)?;
        let host = resource_logs.resource.map(host).transpose()?.flatten();
        if each(Part::Host(host.as_deref())).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        elements(resource_logs.scope_logs, &mut |scope_logs| {
            let scope_logs: ScopeLogs<'_> = parse(scope_logs)?;
            elements(scope_logs.log_records, &mut |text| {
                records += 1;
                let bytes = text.get().len();
                let record = if bytes <= record_bytes_max { Some(record(text)?) } else { None };
                Ok(each(Part::Record(record.as_ref(), bytes)))
            })
        })
    });
    let _flow = outcome.map_err(OtlpError::Element)?;
    Ok(records)
}

fn parse<'a, T: Deserialize<'a>>(text: &'a RawValue) -> Result<T, BodyError> {
    serde_json::from_str(text.get()).map_err(BodyError::Json)
}

type Take<'t> = dyn FnMut(&RawValue) -> Result<ControlFlow<()>, BodyError> + 't;

fn elements(array: Option<&RawValue>, take: &mut Take<'_>) -> Result<ControlFlow<()>, BodyError> {
    array.map_or(Ok(ControlFlow::Continue(())), |array| each_element(array.get(), take))
}

fn each_pair(
    array: Option<&RawValue>,
    take: &mut dyn FnMut(String, Scalar<'static>),
) -> Result<ControlFlow<()>, BodyError> {
    elements(array, &mut |text| {
        let pair: Pair<'_> = parse(text)?;
        if let Some(value) = pair.value
            && let Some(scalar) = parse::<AnyValue<'_>>(value)?.scalar()
        {
            take(pair.key, scalar);
        }
        Ok(ControlFlow::Continue(()))
    })
}

fn host(resource: &RawValue) -> Result<Option<String>, BodyError> {
    let mut host = None;
    let _flow = each_pair(parse::<Resource<'_>>(resource)?.attributes, &mut |key, value| {
        if let Scalar::Text(name) = value
            && key == HOST_NAME
        {
            host = Some(name.into_owned());
        }
    })?;
    Ok(host)
}

fn record(text: &RawValue) -> Result<Record<'static>, BodyError> {
    let LogRecord { time_unix_nano, body, attributes } = parse(text)?;
    let mut record = Record::default();
    if let Some(Scalar::Int(nanos)) = time_unix_nano.map(Number::scalar) {
        record.time_ns = u64::try_from(nanos).unwrap_or(0);
    }
    let mut keep = |key: String, value| record.fields.push((Cow::Owned(key), value));
    if let Some(body) = body {
        let body: AnyValue<'_> = parse(body)?;
        if let Some(pairs) = body.kvlist_value {
            let _flow = each_pair(parse::<Pairs<'_>>(pairs)?.values, &mut keep)?;
        }
        record.text = body.string_value.map(Cow::Owned);
    }
    let mut keep = |key: String, value| record.fields.push((Cow::Owned(key), value));
    let _flow = each_pair(attributes, &mut keep)?;
    Ok(record)
}

impl AnyValue<'_> {
    fn scalar(self) -> Option<Scalar<'static>> {
        let Self { string_value, bool_value, int_value, double_value, kvlist_value: _ } = self;
        let text = || string_value.map(|text| Scalar::Text(Cow::Owned(text)));
        let number = || int_value.or(double_value).map(Number::scalar);
        text().or_else(|| bool_value.map(Scalar::Bool)).or_else(number)
    }
}

impl Number {
    fn scalar(self) -> Scalar<'static> {
        match self {
            Self::Int(number) => Scalar::Int(number),
            Self::Float(number) => Scalar::Float(number),
            Self::Text(text) => match text.parse() {
                Ok(number) => Scalar::Int(number),
                Err(_) => Scalar::Text(Cow::Owned(text)),
            },
        }
    }
}
