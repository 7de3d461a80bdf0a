//! The tail under observations that no real disk would make: no panic, and lines of a generation join.

#![no_main]

use std::collections::BTreeMap;

use ingest::source::tail::{Command, FileId, Read, Seen, Tail, TailSettings};
use libfuzzer_sys::fuzz_target;
use proto::event::Position;
use proto::time::Timestamp;

fuzz_target!(|input: (bool, u64, Vec<(u8, u8, u16, Vec<u8>)>)| {
    let (skip_existing, offset, steps) = input;
    let known = ingest::source::tail::generation_of(1, b"a");
    let positions = BTreeMap::from([(known, Position { offset, needed: true })]);
    let mut tail = Tail::new(TailSettings { line_bytes_max: 8, skip_existing }, positions);
    let mut now = Timestamp::EPOCH;
    for (what, which, number, data) in steps {
        match what % 4 {
            0 => {
                let seen = |index: u8, inode: u8| Seen {
                    path: format!("log{}", index % 3).into(),
                    id: FileId { dev: 0, inode: u64::from(inode % 5) },
                    size: u64::from(number),
                    modified: now,
                    sibling_of: (inode >= 128).then(|| "log0".into()),
                };
                tail.handle_scan(data.iter().zip(0..4).map(|(inode, index)| seen(index, *inode)).collect(), now);
            }
            1 => {
                let Some(file) = tail.files().nth(usize::from(which) % 4) else { continue };
                let head = data.get(..usize::from(which) / 4).unwrap_or_default();
                let read = Read { data: &data, head, size: u64::from(number) };
                tail.handle_read(file, read, now, &mut |piece| assert!(piece.frame.start < piece.frame.end));
            }
            2 => now = Timestamp::from_secs(i64::from(number) * 1000),
            _ => tail.close_finished(&mut |piece| assert!(piece.frame.start < piece.frame.end)),
        }
        while let Some(command) = tail.poll_command() {
            match command {
                Command::Open { file, .. } if which == 255 => tail.handle_failed(file),
                Command::Open { file, .. } => {
                    tail.handle_opened(file, FileId { dev: 0, inode: u64::from(which % 5) });
                }
                Command::Close { .. } => {}
            }
        }
        let _ = (tail.behind_bytes(), tail.lost_bytes(), tail.needed_missing());
    }
});
