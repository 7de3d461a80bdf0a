//! `man`: one manual page with a section for each verb. `portcullis man | man -l -` shows it.

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_mangen::Man;

use super::Exit;
use crate::args::Cli;
use crate::output::Output;

pub(super) fn run(out: &mut Output<'_>) -> anyhow::Result<Exit> {
    let mut page = Vec::new();
    let mut command = Cli::command();
    command.build();
    render(&command, &mut page).context("cannot render the manual page")?;
    out.raw(&page)?;
    Ok(Exit::Done)
}

fn render(command: &Command, page: &mut Vec<u8>) -> std::io::Result<()> {
    let main = Man::new(command.clone()).section("1").manual("Portcullis").source("");
    main.render_title(page)?;
    main.render_name_section(page)?;
    main.render_synopsis_section(page)?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        page.extend_from_slice(format!(".SH \"{}\"\n", verb.get_name().to_uppercase()).as_bytes());
        let verb = Man::new(verb.clone());
        let mut sections = Vec::new();
        verb.render_description_section(&mut sections)?;
        verb.render_synopsis_section(&mut sections)?;
        verb.render_options_section(&mut sections)?;
        verb.render_extra_section(&mut sections)?;
        page.extend_from_slice(nest(&String::from_utf8_lossy(&sections)).as_bytes());
    }
    let mut extra = Vec::new();
    main.render_extra_section(&mut extra)?;
    page.extend_from_slice(nest(&String::from_utf8_lossy(&extra)).replace(".SS NOTES", ".SH NOTES").as_bytes());
    Ok(())
}

/// Sections one level down, and the text of examples as it stands.
fn nest(sections: &str) -> String {
    sections.replace(".SH EXTRA\n", ".SS NOTES\n.nf\n").replace(".SH ", ".SS ") + ".fi\n"
}
