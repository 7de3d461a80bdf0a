//! Where verbs write their data: tables for people, one JSON object a line for programs.
//!
//! Callers escape nothing: cells and JSON are escaped here.

use std::fmt;
use std::io::{self, ErrorKind, Write};

use anyhow::Context;
use comfy_table::presets::{NOTHING, UTF8_FULL_CONDENSED};
use comfy_table::{Cell, ContentArrangement, Table};
use proto::time::{Clock, Timestamp};
use serde::Serialize;

use crate::text::{escape, render_json};

/// Narrowest terminal that tables are fitted to, in columns. Fitted to less, or to the 0 of a terminal that does not know
/// its size, words would be cut into letters.
const WIDTH_MIN: u16 = 60;

/// The reader of our output has gone: a quiet end, not a failure.
#[derive(Debug)]
pub struct OutputClosed;

impl fmt::Display for OutputClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the reader of the output has gone")
    }
}

impl std::error::Error for OutputClosed {}

/// Standard output, or what stands for it in tests.
pub struct Output<'a> {
    out: &'a mut dyn Write,
    terminal: bool,
    clock: Clock,
}

impl fmt::Debug for Output<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Output").field("terminal", &self.terminal).finish_non_exhaustive()
    }
}

impl<'a> Output<'a> {
    /// `terminal` says whether a person looks at it: tables then have borders and fit the width.
    pub fn new(out: &'a mut dyn Write, terminal: bool, clock: Clock) -> Self {
        Self { out, terminal, clock }
    }

    /// Whether a person looks at it.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// The present moment, for ages and remaining times.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// The clock behind [`Output::now`].
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Writes one line of prose, escaped.
    pub fn line(&mut self, text: &str) -> anyhow::Result<()> {
        let result = writeln!(self.out, "{}", escape(text));
        written(result)
    }

    /// Writes one JSON object as one line.
    pub fn json(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        let line = render_json(value).context("cannot write the answer as JSON")?;
        written(writeln!(self.out, "{line}"))
    }

    /// Writes a table with a header; nothing at all when it has no rows.
    pub fn table<const N: usize>(
        &mut self,
        header: [&str; N],
        rows: impl IntoIterator<Item = [String; N]>,
    ) -> anyhow::Result<()> {
        let mut table = Table::new();
        if self.terminal {
            let fits = table.width().is_some_and(|width| width >= WIDTH_MIN);
            let arrangement = if fits { ContentArrangement::Dynamic } else { ContentArrangement::Disabled };
            table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(arrangement);
        } else {
            table.load_style(NOTHING).force_no_tty().set_content_arrangement(ContentArrangement::Disabled);
        }
        table.set_header(header.map(Cell::new));
        for row in rows {
            table.add_row(row.map(|cell| Cell::new(escape(&cell))));
        }
        if table.is_empty() {
            return Ok(());
        }
        for line in table.lines() {
            // Without borders every cell is padded left and right: the left pad of the first is no data.
            let line = if self.terminal { &line } else { line.strip_prefix(' ').unwrap_or(&line) };
            written(writeln!(self.out, "{}", line.trim_end()))?;
        }
        Ok(())
    }

    /// Writes bytes as they are: for output that we made ourselves.
    pub fn raw(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        written(self.out.write_all(bytes))
    }

    /// Hands everything to the reader.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        written(self.out.flush())
    }
}

fn written(result: io::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(OutputClosed.into()),
        other => other.context("cannot write to standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_has_gone_is_told_apart_from_a_failure() {
        let mut closed = Closed;
        let error = Output::new(&mut closed, false, Clock::system()).line("x").unwrap_err();
        assert!(error.is::<OutputClosed>());
    }

    #[test]
    fn plain_tables_are_aligned_and_escaped() {
        let mut bytes = Vec::new();
        let mut out = Output::new(&mut bytes, false, Clock::system());
        let rows = [["192.0.2.1".to_owned(), "\x1b[31mred".to_owned()], ["::1".to_owned(), String::new()]];
        out.table(["target", "reason"], rows).unwrap();
        out.table(["a", "b"], []).unwrap();
        assert_eq!(
            String::from_utf8(bytes).unwrap(),
            "target     reason\n192.0.2.1  \\u{1b}[31mred\n::1\n",
            "columns are apart, lines end without spaces, an empty table is silent"
        );
    }
}
