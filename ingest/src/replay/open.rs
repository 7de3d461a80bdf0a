//! A log as a stream of plain bytes, whatever it is compressed with.

use std::fs::File;
use std::io::{self, BufReader, Chain, Cursor, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::read::MultiGzDecoder;

/// How gzip begins (RFC 1952).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// How a zstd frame begins (RFC 8878).
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The beginning that was looked at, and the rest.
type Whole = Chain<Cursor<Vec<u8>>, Counted>;

/// An opened log.
pub(super) enum OpenLog {
    Plain(Whole),
    Gzip(Box<MultiGzDecoder<Whole>>),
    Zstd(Box<zstd::Decoder<'static, BufReader<Whole>>>),
}

impl OpenLog {
    /// Opens `path`; what is read of it, compressed, is added to `bytes_read`.
    pub(super) fn open(path: &Path, bytes_read: Arc<AtomicU64>) -> io::Result<Self> {
        let mut file = Counted { file: File::open(path)?, bytes_read };
        let mut start = vec![0; ZSTD_MAGIC.len()];
        let length = fill(&mut file, &mut start)?;
        start.truncate(length);
        let (is_gzip, is_zstd) = (start.starts_with(&GZIP_MAGIC), start.starts_with(&ZSTD_MAGIC));
        let whole = Cursor::new(start).chain(file);
        Ok(if is_gzip {
            Self::Gzip(Box::new(MultiGzDecoder::new(whole)))
        } else if is_zstd {
            Self::Zstd(Box::new(zstd::Decoder::new(whole)?))
        } else {
            Self::Plain(whole)
        })
    }

    /// Fills `buffer`, as far as the log goes.
    pub(super) fn read_full(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(reader) => fill(reader, buffer),
            Self::Gzip(reader) => fill(reader, buffer),
            Self::Zstd(reader) => fill(reader, buffer),
        }
    }
}

fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// A file that says how much of it was read.
pub(super) struct Counted {
    file: File,
    bytes_read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.bytes_read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
