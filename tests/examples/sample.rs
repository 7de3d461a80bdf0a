//! Writes the sample log anew, after `src/sample.rs` has changed.

use std::path::Path;

use anyhow::Context;

fn main() -> anyhow::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/samples");
    std::fs::create_dir_all(&folder).context("could not make deploy/samples")?;
    std::fs::write(folder.join("access.log"), tests::sample::render_json_log())
        .context("could not write access.log")?;
    Ok(())
}
