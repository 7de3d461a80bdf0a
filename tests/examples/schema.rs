//! Writes the schemas of what third parties read anew, after the types in `proto` have changed.

use std::path::Path;

use anyhow::Context;

fn main() -> anyhow::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/schema");
    std::fs::create_dir_all(&folder).context("could not make deploy/schema")?;
    for (name, document) in proto::schema::documents() {
        let text = serde_json::to_string_pretty(&document).with_context(|| format!("could not render {name}"))?;
        std::fs::write(folder.join(name), text + "\n").with_context(|| format!("could not write {name}"))?;
    }
    Ok(())
}
