//! Any bytes as a batch from the bus, and as the content of one: no panic, and what is read is a batch that is written
//! and read again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::wire::{decode_batch, encode_batch};

fuzz_target!(|bytes: &[u8]| {
    for bytes in [bytes.to_vec(), framed(bytes)] {
        let Ok(batch) = decode_batch(&bytes) else { continue };
        assert!(batch.is_within_limits());
        let again = decode_batch(&encode_batch(&batch)).expect("what was read can be read again");
        assert!(batch.events().map(|event| format!("{event:?}")).eq(again.events().map(|event| format!("{event:?}"))));
    }
});

/// `content` as a batch of version 1, in a zstd frame (RFC 8878) of one raw block, so that what the fuzzer changes is not
/// behind a compression.
fn framed(content: &[u8]) -> Vec<u8> {
    let content = &content[..content.len().min(128 << 10)];
    let size = content.len() as u32;
    // A single segment, four bytes of content size; the last block, raw.
    let header = [b'P', 1, 0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    let block = (1 | (size << 3)).to_le_bytes();
    [&header[..], &size.to_le_bytes(), &block[..3], content].concat()
}
