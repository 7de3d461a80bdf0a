//! What third parties read, described by the types themselves: JSON Schema (draft 7) of a public event, of a ban record
//! and of an access, and an AsyncAPI document of where the first two travel.
//!
//! The documents are committed in `deploy/schema/`, and a test holds them to this module. They describe what is
//! written, so every field of an event and of a record is required. Objects stay open: fields are only ever added within v1.

mod asyncapi;
mod example;

use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::access::AccessLine;
use crate::ban::BanRecord;
use crate::envelope::CloudEvent;

/// Every document by the name of its file.
pub fn documents() -> [(&'static str, Value); 4] {
    [
        ("event.v1.schema.json", event()),
        ("ban-record.v1.schema.json", ban_record()),
        ("access.v1.schema.json", access()),
        ("asyncapi.json", asyncapi::document()),
    ]
}

/// Schema of a [`CloudEvent`].
fn event() -> Value {
    let mut schema = generator("/definitions").into_root_schema_for::<CloudEvent>();
    bind_data_to_type(&mut schema, "#/definitions");
    titled(schema, "Portcullis event, version 1")
}

/// Schema of a [`BanRecord`].
fn ban_record() -> Value {
    titled(generator("/definitions").into_root_schema_for::<BanRecord>(), "Portcullis ban record, version 1")
}

/// Schema of an [`AccessLine`].
fn access() -> Value {
    let mut schema = generator("/definitions").into_root_schema_for::<AccessLine<'_>>();
    RecursiveTransform(leave_out_null).transform(&mut schema);
    titled(schema, "Portcullis access, version 1")
}

/// What is absent is left out and never null.
fn leave_out_null(schema: &mut Schema) {
    let null = json!("null");
    if let Some(Value::Array(types)) = schema.get_mut("type") {
        types.retain(|name| *name != null);
        if let [one] = &types[..] {
            let one = one.clone();
            schema.insert("type".to_owned(), one);
        }
    }
    if let Some(Value::Array(any)) = schema.get_mut("anyOf") {
        any.retain(|schema| schema["type"] != null);
    }
}

/// The schemas of an event, a record, and all they are made of, for a document that keeps them at `path`.
fn components(path: &'static str) -> Map<String, Value> {
    let mut generator = generator(path);
    refer_to::<CloudEvent>(&mut generator);
    refer_to::<BanRecord>(&mut generator);
    let mut schemas = generator.take_definitions(true);
    if let Some(event) = schemas.get_mut("CloudEvent").and_then(|event| event.try_into().ok()) {
        bind_data_to_type(event, &format!("#{path}"));
    }
    schemas
}

/// Draft 7 because every validator and AsyncAPI itself read it.
fn generator(definitions: &'static str) -> SchemaGenerator {
    SchemaSettings::draft07()
        .for_serialize()
        .with(|settings| settings.definitions_path = definitions.into())
        .with_transform(RecursiveTransform(keep_plain))
        .into_generator()
}

fn refer_to<T: JsonSchema>(generator: &mut SchemaGenerator) {
    generator.subschema_for::<T>();
}

/// Leaves out what is no format of JSON Schema (`uint32`, which strict validators refuse), what only a reader of absent
/// fields would need, and what would close an object.
fn keep_plain(schema: &mut Schema) {
    if schema.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")) {
        schema.remove("format");
    }
    schema.remove("default");
    schema.remove("additionalProperties");
}

/// An alarm's data is an alarm, any other event's is a ban.
fn bind_data_to_type(schema: &mut Schema, definitions: &str) {
    let data_is = |name: &str| json!({"properties": {"data": {"$ref": format!("{definitions}/{name}")}}});
    schema.insert("if".to_owned(), json!({"properties": {"type": {"const": "io.portcullis.alarm.v1"}}}));
    schema.insert("then".to_owned(), data_is("Alarm"));
    schema.insert("else".to_owned(), data_is("Ban"));
}

fn titled(mut schema: Schema, title: &str) -> Value {
    schema.insert("title".to_owned(), title.into());
    schema.to_value()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_that_is_written_is_required_and_unknown_ones_are_allowed() {
        for (name, document) in documents() {
            assert!(!document.to_string().contains("additionalProperties"), "{name}");
        }
        let written = serde_json::to_value(&example::events()[0].1).unwrap();
        let fields = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let required = |schema: &Value| {
            let mut names: Vec<String> = serde_json::from_value(schema["required"].clone()).unwrap();
            names.sort();
            names
        };
        let schema = event();
        assert_eq!(required(&schema), fields(&written));
        assert_eq!(required(&schema["definitions"]["Ban"]), fields(&written["data"]));
        assert_eq!(required(&schema["definitions"]["Evidence"]), fields(&written["data"]["evidence"]));
    }

    #[test]
    fn an_access_has_a_client_or_says_why_not_and_nothing_is_null() {
        let schema = access();
        assert!(!schema.to_string().contains("null"), "{schema}");
        assert_eq!(schema["required"], json!(["node", "source"]));
        assert_eq!(schema["properties"]["status"]["type"], "integer");
        assert_eq!(schema["oneOf"][1]["required"], json!(["no_client"]));
    }

    #[test]
    fn what_is_null_for_a_permanent_ban_may_be_null_and_nothing_else() {
        let ban = &event()["definitions"]["Ban"]["properties"];
        let nullable: Vec<&String> = ban
            .as_object()
            .unwrap()
            .iter()
            .filter(|(_, schema)| schema.to_string().contains(r#""null""#))
            .map(|(name, _)| name)
            .collect();
        assert_eq!(nullable, ["ban_seconds", "expires_at"]);
    }
}
