//! The committed schemas are those of the types.

use std::path::Path;

#[test]
fn committed_schemas_are_what_the_types_say() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/schema");
    let documents = proto::schema::documents();
    for (name, document) in &documents {
        let committed: Option<serde_json::Value> =
            std::fs::read(folder.join(name)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        assert!(
            committed.as_ref() == Some(document),
            "deploy/schema/{name} is stale; rewrite it: cargo run -p tests --example schema"
        );
    }
    let committed = std::fs::read_dir(&folder).unwrap().count();
    assert_eq!(committed, documents.len(), "a file in deploy/schema that no type describes");
}
