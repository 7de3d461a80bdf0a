//! Protobuf's wire format (protobuf.dev/programming-guides/encoding), as much of it as OTLP's logs need, without a copy.

use std::borrow::Cow;
use std::ops::ControlFlow;

use super::{Each, HOST_NAME, Part, Record, Scalar};

/// Field numbers of `logs.proto`, `resource.proto` and `common.proto`.
const REQUEST_RESOURCE_LOGS: u32 = 1;
const RESOURCE_LOGS_RESOURCE: u32 = 1;
const RESOURCE_LOGS_SCOPE_LOGS: u32 = 2;
const RESOURCE_ATTRIBUTES: u32 = 1;
const SCOPE_LOGS_RECORDS: u32 = 2;
const RECORD_TIME: u32 = 1;
const RECORD_BODY: u32 = 5;
const RECORD_ATTRIBUTES: u32 = 6;
const PAIR_KEY: u32 = 1;
const PAIR_VALUE: u32 = 2;
const VALUE_TEXT: u32 = 1;
const VALUE_BOOL: u32 = 2;
const VALUE_INT: u32 = 3;
const VALUE_FLOAT: u32 = 4;
const VALUE_PAIRS: u32 = 6;
const VALUE_BYTES: u32 = 7;
const PAIRS_VALUES: u32 = 1;

/// Why something is no such message.
type Mistake = &'static str;

/// One field's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wire<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32,
    Bytes(&'a [u8]),
}

/// The fields of one message, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Result<u64, Mistake> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or("a number has no end")?;
            self.0 = rest;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("a number is longer than 64 bits")
    }

    fn take(&mut self, bytes: u64) -> Result<&'a [u8], Mistake> {
        let bytes = usize::try_from(bytes).ok();
        let (taken, rest) = bytes.and_then(|bytes| self.0.split_at_checked(bytes)).ok_or("a value has no end")?;
        self.0 = rest;
        Ok(taken)
    }

    fn next(&mut self) -> Result<Option<(u32, Wire<'a>)>, Mistake> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = u32::try_from(self.varint()?).map_err(|_| "the number of a field is too large")?;
        let value = match key & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => {
                let bytes = self.take(8)?.try_into().map_err(|_| "a value has no end")?;
                Wire::Fixed64(u64::from_le_bytes(bytes))
            }
            2 => {
                let bytes = self.varint()?;
                Wire::Bytes(self.take(bytes)?)
            }
            5 => {
                self.take(4)?;
                Wire::Fixed32
            }
            _ => return Err("a value is of no known type"),
        };
        if key >> 3 == 0 { Err("a field has the number 0") } else { Ok(Some((key >> 3, value))) }
    }

    /// Hands every value of the field `number`, which are messages, to `take`, until that breaks.
    fn messages(
        mut self,
        number: u32,
        mut take: impl FnMut(Fields<'a>) -> Result<ControlFlow<()>, Mistake>,
    ) -> Result<ControlFlow<()>, Mistake> {
        while let Some((found, value)) = self.next()? {
            if found == number && take(value.message()?)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

impl<'a> Wire<'a> {
    fn bytes(self) -> Result<&'a [u8], Mistake> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::Varint(_) | Self::Fixed64(_) | Self::Fixed32 => Err("a value is of another type than its field"),
        }
    }

    fn message(self) -> Result<Fields<'a>, Mistake> {
        self.bytes().map(Fields)
    }

    fn text(self) -> Result<Cow<'a, str>, Mistake> {
        self.bytes().map(String::from_utf8_lossy)
    }
}

pub(super) fn read(body: &[u8], record_bytes_max: usize, each: &mut Each<'_>) -> Result<u64, Mistake> {
    let mut records = 0;
    let _flow = Fields(body).messages(REQUEST_RESOURCE_LOGS, |resource_logs| {
        // A resource may stand behind its records.
        let host = host(Fields(resource_logs.0))?;
        if each(Part::Host(host.as_deref())).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        resource_logs.messages(RESOURCE_LOGS_SCOPE_LOGS, |scope_logs| {
            scope_logs.messages(SCOPE_LOGS_RECORDS, |fields| {
                records += 1;
                let bytes = fields.0.len();
                let record = if bytes <= record_bytes_max { Some(record(fields)?) } else { None };
                Ok(each(Part::Record(record.as_ref(), bytes)))
            })
        })
    })?;
    Ok(records)
}

fn host(resource_logs: Fields<'_>) -> Result<Option<Cow<'_, str>>, Mistake> {
    let mut host = None;
    let _flow = resource_logs.messages(RESOURCE_LOGS_RESOURCE, |resource| {
        resource.messages(RESOURCE_ATTRIBUTES, |pair_fields| {
            if let (key, Some(Value::Scalar(Scalar::Text(name)))) = pair(pair_fields)?
                && key == HOST_NAME
            {
                host = Some(name);
            }
            Ok(ControlFlow::Continue(()))
        })
    })?;
    Ok(host)
}

fn record(mut fields: Fields<'_>) -> Result<Record<'_>, Mistake> {
    let mut record = Record::default();
    while let Some((number, wire)) = fields.next()? {
        match number {
            RECORD_TIME => {
                if let Wire::Fixed64(nanos) = wire {
                    record.time_ns = nanos;
                }
            }
            RECORD_BODY => match value(wire.message()?)? {
                Some(Value::Scalar(Scalar::Text(text))) => record.text = Some(text),
                Some(Value::Pairs(pairs)) => {
                    let _flow = pairs.messages(PAIRS_VALUES, |pair| keep(pair, &mut record))?;
                }
                Some(Value::Scalar(_)) | None => {}
            },
            RECORD_ATTRIBUTES => {
                let _flow = keep(wire.message()?, &mut record)?;
            }
            _ => {}
        }
    }
    Ok(record)
}

fn keep<'a>(fields: Fields<'a>, record: &mut Record<'a>) -> Result<ControlFlow<()>, Mistake> {
    if let (key, Some(Value::Scalar(scalar))) = pair(fields)? {
        record.fields.push((key, scalar));
    }
    Ok(ControlFlow::Continue(()))
}

/// What a value can be; lists are left out.
enum Value<'a> {
    Scalar(Scalar<'a>),
    Pairs(Fields<'a>),
}

fn pair(mut fields: Fields<'_>) -> Result<(Cow<'_, str>, Option<Value<'_>>), Mistake> {
    let (mut key, mut found) = (Cow::default(), None);
    while let Some((number, wire)) = fields.next()? {
        match number {
            PAIR_KEY => key = wire.text()?,
            PAIR_VALUE => found = value(wire.message()?)?,
            _ => {}
        }
    }
    Ok((key, found))
}

fn value(mut fields: Fields<'_>) -> Result<Option<Value<'_>>, Mistake> {
    let mut value = None;
    while let Some((number, wire)) = fields.next()? {
        value = match (number, wire) {
            (VALUE_TEXT | VALUE_BYTES, wire) => Some(Value::Scalar(Scalar::Text(wire.text()?))),
            (VALUE_BOOL, Wire::Varint(flag)) => Some(Value::Scalar(Scalar::Bool(flag != 0))),
            (VALUE_INT, Wire::Varint(number)) => Some(Value::Scalar(Scalar::Int(number.cast_signed()))),
            (VALUE_FLOAT, Wire::Fixed64(bits)) => Some(Value::Scalar(Scalar::Float(f64::from_bits(bits)))),
            (VALUE_PAIRS, wire) => Some(Value::Pairs(wire.message()?)),
            _ => value,
        };
    }
    Ok(value)
}
