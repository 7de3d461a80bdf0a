//! From files and the environment to one value: the file, then `conf.d/*.toml` beside it by name, then `PORTCULLIS__*`.
//! Tables are merged, anything else is replaced.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use config::{ConfigError, Environment, FileFormat, Source, ValueKind};
use proto::settings::Mistakes;
use serde_json::{Map, Number, Value};

use super::{Config, Invalid, check};

/// The configuration file unless told; it need not exist.
pub const DEFAULT_FILE: &str = "/etc/portcullis/portcullis.toml";
/// Longest configuration file in bytes. Lists of networks make the longest; 4 MiB hold 200,000 of them.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// `PORTCULLIS__SECTION__KEY`. Two underscores, as keys have single ones.
const ENVIRONMENT_PREFIX: &str = "PORTCULLIS";
const ENVIRONMENT_SEPARATOR: &str = "__";

/// Where the configuration is, so that it can be read again.
#[derive(Clone, Debug, Default)]
pub struct Location {
    file: Option<PathBuf>,
    logs: Vec<PathBuf>,
    /// In place of the process's environment.
    environment: Option<BTreeMap<String, String>>,
}

impl Location {
    /// `file` must exist when given. `logs`, when there are any, take the place of the configured sources.
    pub fn new(file: Option<PathBuf>, logs: Vec<PathBuf>) -> Self {
        Self { file, logs, environment: None }
    }

    /// Reads other variables than those of the process.
    #[must_use]
    pub fn with_environment(self, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        Self { environment: Some(variables.into_iter().collect()), ..self }
    }

    /// Reads other logs.
    #[must_use]
    pub(crate) fn with_logs(self, logs: Vec<PathBuf>) -> Self {
        Self { logs, ..self }
    }

    /// Reads and checks everything, now.
    pub fn load(&self) -> Result<Config, Invalid> {
        let mut mistakes = Mistakes::new();
        let value = self.read(&mut mistakes);
        let config = check(value, &self.logs, &mut mistakes);
        let mistakes = mistakes.into_sorted();
        match config {
            Some(config) if mistakes.is_empty() => Ok(config),
            _ => Err(Invalid(mistakes)),
        }
    }

    /// The text at a JSON pointer, be the rest right or wrong.
    pub(crate) fn peek(&self, pointer: &str) -> Option<String> {
        self.read(&mut Mistakes::new()).pointer(pointer).and_then(Value::as_str).map(str::to_owned)
    }

    pub(super) fn read(&self, mistakes: &mut Mistakes) -> Value {
        let mut builder = config::Config::builder();
        for path in self.files(mistakes) {
            let Some(text) = read_file(&path, mistakes) else { continue };
            let source = config::File::from_str(&text, FileFormat::Toml);
            // Read alone first: the builder would stop at the first bad file, and not say which.
            match source.collect() {
                Ok(_) => builder = builder.add_source(source),
                Err(error) => mistakes.add(&path.display().to_string(), syntax_error(&error)),
            }
        }
        let mut value = match builder.build() {
            Ok(config) => render(config.cache),
            Err(error) => {
                mistakes.add("", error.to_string());
                Value::Object(Map::new())
            }
        };
        for (key, given) in self.variables(mistakes) {
            set(&mut value, &key, given);
        }
        value
    }

    /// Which files there are, in order.
    fn files(&self, mistakes: &mut Mistakes) -> Vec<PathBuf> {
        let main = self.file.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
        let dir = main.parent().unwrap_or(Path::new("")).join("conf.d");
        let mut parts = Vec::new();
        match dir.read_dir() {
            Ok(entries) => {
                parts.extend(entries.filter_map(|entry| entry.ok().map(|entry| entry.path())));
                parts.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
                parts.sort();
            }
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            Err(error) => mistakes.add(&dir.display().to_string(), format!("cannot be listed: {error}")),
        }
        if self.file.is_some() || main.exists() {
            parts.insert(0, main);
        }
        parts
    }

    /// What the environment says, by dotted key in lower case.
    fn variables(&self, mistakes: &mut Mistakes) -> BTreeMap<String, Value> {
        let environment = Environment::with_prefix(ENVIRONMENT_PREFIX)
            .prefix_separator(ENVIRONMENT_SEPARATOR)
            .separator(ENVIRONMENT_SEPARATOR)
            .source(self.environment.clone().map(|variables| variables.into_iter().collect()));
        match environment.collect() {
            Ok(variables) => variables.into_iter().map(|(key, value)| (key, variable(value.to_string()))).collect(),
            Err(error) => {
                mistakes.add("", format!("the environment cannot be read: {error}"));
                BTreeMap::new()
            }
        }
    }
}

fn read_file(path: &Path, mistakes: &mut Mistakes) -> Option<String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text));
    let wrong = match read {
        Ok(bytes) if bytes as u64 > FILE_BYTES_MAX => format!("is longer than {FILE_BYTES_MAX} bytes"),
        Ok(_) => return Some(text),
        Err(error) => format!("cannot be read: {error}"),
    };
    mistakes.add(&path.display().to_string(), wrong);
    None
}

/// The parser's report in one line. It shows `... at line 3, column 5`, the line itself, a marker, and the message.
fn syntax_error(error: &ConfigError) -> String {
    let cause = match error {
        ConfigError::FileParse { cause, .. } => cause.to_string(),
        other => other.to_string(),
    };
    let position = cause.lines().next().and_then(|first| first.split_once(" at ")).map(|(_, position)| position);
    match (position, cause.lines().rfind(|line| !line.trim().is_empty())) {
        (Some(position), Some(message)) => format!("{position}: {message}"),
        _ => cause.replace('\n', " "),
    }
}

/// A variable's text as what it looks like: `true`, `12`, `2.5`, a list or table as JSON, else text. Digits that no
/// number is written with, such as `007`, stay text.
fn variable(text: String) -> Value {
    let is_json = text.starts_with(['[', '{']);
    let parsed = serde_json::from_str(&text).ok().filter(|value: &Value| match value {
        Value::Bool(_) | Value::Number(_) => true,
        Value::Array(_) | Value::Object(_) => is_json,
        Value::Null | Value::String(_) => false,
    });
    parsed.unwrap_or(Value::String(text))
}

/// Sets a dotted key, making tables on the way.
fn set(root: &mut Value, key: &str, given: Value) {
    let mut place = root;
    for part in key.split('.') {
        if !place.is_object() {
            *place = Value::Object(Map::new());
        }
        place = &mut place[part];
    }
    *place = given;
}

/// As JSON. Numbers that JSON does not have become text, which no check takes for a number.
fn render(value: config::Value) -> Value {
    match value.kind {
        ValueKind::Nil => Value::Null,
        ValueKind::Boolean(flag) => flag.into(),
        ValueKind::I64(number) => number.into(),
        ValueKind::U64(number) => number.into(),
        ValueKind::I128(number) => number.to_string().into(),
        ValueKind::U128(number) => number.to_string().into(),
        ValueKind::Float(number) => Number::from_f64(number).map_or_else(|| number.to_string().into(), Value::Number),
        ValueKind::String(text) => text.into(),
        ValueKind::Array(items) => items.into_iter().map(render).collect(),
        ValueKind::Table(entries) => entries.into_iter().map(|(key, value)| (key, render(value))).collect(),
    }
}
