//! Bodies as they travel: `Content-Encoding`, undone piece by piece into a buffer with a limit. Pure.
//!
//! A piece that would grow beyond the limit ends it, so a bomb of any size costs no more than the limit and the fixed memory
//! of its decoder. Whoever decodes charges all of it to [`Held`] first.

use std::io::{self, Write};
use std::sync::Arc;

use flate2::write::MultiGzDecoder;
use flate2::{Decompress, FlushDecompress, Status};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use zstd::stream::raw::{self, InBuffer, Operation, OutBuffer};
use zstd::zstd_safe::DParameter;

/// Bytes that are charged at a time, one permit each: a semaphore counts to 2^61, a request for permits to 2^32.
const UNIT_BYTES: usize = 1 << 10;
/// Decoded bytes that are handed on at a time.
const CHUNK_BYTES: usize = 32 << 10;
/// Memory of an inflater: a window of 32 KiB, its tables, and a chunk.
const INFLATE_BYTES: usize = 128 << 10;
/// Largest window of zstd that is accepted, as a power of 2: 8 MiB, what RFC 8878 wants every decoder to take.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;
/// Memory of a zstd decoder: its window, and as much again for tables and a chunk as any has.
const ZSTD_BYTES: usize = (1 << ZSTD_WINDOW_LOG_MAX) + (512 << 10);

/// How a body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Identity,
    Gzip,
    /// zlib's format, as HTTP means it, or the bare one, as some send it.
    Deflate,
    Zstd,
}

impl Coding {
    /// By its name in `Content-Encoding` or `grpc-encoding`; the error is for the sender.
    pub(super) fn parse(name: &str) -> Result<Self, String> {
        Ok(match name.trim().to_ascii_lowercase().as_str() {
            "" | "identity" => Self::Identity,
            "gzip" | "x-gzip" => Self::Gzip,
            "deflate" => Self::Deflate,
            "zstd" => Self::Zstd,
            other => {
                return Err(format!("the encoding {other:?} is not known here: send gzip, zstd, deflate or none"));
            }
        })
    }

    fn memory_bytes(self) -> usize {
        match self {
            Self::Identity => 0,
            Self::Gzip | Self::Deflate => INFLATE_BYTES,
            Self::Zstd => ZSTD_BYTES,
        }
    }
}

/// Why a body cannot be taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Undecoded {
    /// It is longer than allowed.
    TooLarge,
    /// All memory for bodies is taken.
    NoMemory,
    /// It is not compressed as it says.
    Broken(String),
}

/// Memory that is charged to a budget until this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    budget: Arc<Semaphore>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Held {
    /// A budget of so many bytes.
    pub(super) fn budget(bytes: usize) -> Arc<Semaphore> {
        Arc::new(Semaphore::new(bytes / UNIT_BYTES))
    }

    pub(super) fn nothing(budget: Arc<Semaphore>) -> Self {
        Self { budget, permit: None }
    }

    fn grow(&mut self, bytes: usize) -> Result<(), Undecoded> {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).map_err(|_| Undecoded::NoMemory)?;
        let more = Arc::clone(&self.budget).try_acquire_many_owned(units).map_err(|_| Undecoded::NoMemory)?;
        match &mut self.permit {
            Some(permit) => permit.merge(more),
            None => self.permit = Some(more),
        }
        Ok(())
    }
}

/// A body as far as it has come.
#[derive(Debug)]
pub(super) struct Body {
    bytes: Vec<u8>,
    bytes_max: usize,
    held: Held,
    /// Why no more is taken.
    full: Option<Undecoded>,
}

impl Body {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Leaves nothing here.
    fn take(&mut self) -> Self {
        let held = Held::nothing(Arc::clone(&self.held.budget));
        let empty = Self { bytes: Vec::new(), bytes_max: self.bytes_max, held, full: None };
        std::mem::replace(self, empty)
    }

    fn append(&mut self, data: &[u8]) -> Result<(), Undecoded> {
        let needed = self.bytes.len() + data.len();
        if needed > self.bytes_max {
            return Err(Undecoded::TooLarge);
        }
        let capacity = self.bytes.capacity();
        if needed > capacity {
            let wanted = needed.max(2 * capacity).max(UNIT_BYTES).min(self.bytes_max);
            self.held.grow(wanted - capacity)?;
            self.bytes.reserve_exact(wanted - self.bytes.len());
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }
}

impl Write for Body {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self.append(data) {
            Ok(()) => Ok(data.len()),
            Err(full) => {
                self.full = Some(full);
                Err(io::ErrorKind::StorageFull.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Undoes the compression of one body.
pub(super) enum Decoder {
    Identity(Body),
    Gzip { gzip: MultiGzDecoder<Body>, begun: bool },
    Deflate { inflate: Option<Decompress>, ended: bool, body: Body },
    Zstd { zstd: raw::Decoder<'static>, ended: bool, body: Body },
}

impl Decoder {
    /// For a body of at most `bytes_max` bytes without its compression.
    pub(super) fn new(coding: Coding, bytes_max: usize, mut held: Held) -> Result<Self, Undecoded> {
        held.grow(coding.memory_bytes())?;
        let body = Body { bytes: Vec::new(), bytes_max, held, full: None };
        Ok(match coding {
            Coding::Identity => Self::Identity(body),
            Coding::Gzip => Self::Gzip { gzip: MultiGzDecoder::new(body), begun: false },
            Coding::Deflate => Self::Deflate { inflate: None, ended: false, body },
            Coding::Zstd => {
                let mut zstd = raw::Decoder::new().map_err(|error| Undecoded::Broken(error.to_string()))?;
                let window = DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX);
                zstd.set_parameter(window).map_err(|error| Undecoded::Broken(error.to_string()))?;
                Self::Zstd { zstd, ended: true, body }
            }
        })
    }

    /// Whether feeding takes time.
    pub(super) fn is_work(&self) -> bool {
        !matches!(self, Self::Identity(_))
    }

    /// Takes the next bytes of the body.
    pub(super) fn feed(&mut self, data: &[u8]) -> Result<(), Undecoded> {
        match self {
            Self::Identity(body) => body.append(data),
            Self::Gzip { gzip, begun } => {
                *begun |= !data.is_empty();
                let written = gzip.write_all(data);
                written.map_err(|error| gzip.get_mut().full.take().unwrap_or(Undecoded::Broken(error.to_string())))
            }
            Self::Deflate { inflate, ended, body } => {
                let inflate = match (inflate, data.first()) {
                    (_, None) => return Ok(()),
                    (Some(inflate), _) => inflate,
                    // The first byte of zlib's format tells its method, which is always 8.
                    (new, Some(first)) => new.insert(Decompress::new(first & 0x0f == 8)),
                };
                feed_deflate(inflate, ended, body, data)
            }
            Self::Zstd { zstd, ended, body } => feed_zstd(zstd, ended, body, data),
        }
    }

    /// The body, when all of it has come.
    pub(super) fn finish(self) -> Result<Body, Undecoded> {
        let cut = || Undecoded::Broken("its end is missing".to_owned());
        match self {
            Self::Identity(body) => Ok(body),
            // Nothing is the gzip of nothing, to us.
            Self::Gzip { mut gzip, begun: false } => Ok(gzip.get_mut().take()),
            Self::Gzip { mut gzip, begun: true } => {
                let ended = gzip.try_finish();
                let full = gzip.get_mut().full.take();
                match (ended, full) {
                    (Ok(()), _) => gzip.finish().map_err(|error| Undecoded::Broken(error.to_string())),
                    (Err(_), Some(full)) => Err(full),
                    (Err(error), None) if error.kind() == io::ErrorKind::UnexpectedEof => Err(cut()),
                    (Err(error), None) => Err(Undecoded::Broken(error.to_string())),
                }
            }
            Self::Deflate { ended, inflate, body } => {
                if ended || inflate.is_none() {
                    Ok(body)
                } else {
                    Err(cut())
                }
            }
            Self::Zstd { ended, body, .. } => {
                if ended {
                    Ok(body)
                } else {
                    Err(cut())
                }
            }
        }
    }
}

fn feed_deflate(inflate: &mut Decompress, ended: &mut bool, body: &mut Body, mut data: &[u8]) -> Result<(), Undecoded> {
    let mut chunk = vec![0; CHUNK_BYTES];
    while !data.is_empty() || !*ended {
        if *ended {
            return Err(Undecoded::Broken("bytes follow its end".to_owned()));
        }
        let (read, written) = (inflate.total_in(), inflate.total_out());
        let status = inflate.decompress(data, &mut chunk, FlushDecompress::None);
        let status = status.map_err(|error| Undecoded::Broken(error.to_string()))?;
        let (read, written) = ((inflate.total_in() - read) as usize, (inflate.total_out() - written) as usize);
        body.append(&chunk[..written])?;
        data = &data[read..];
        *ended = status == Status::StreamEnd;
        if read == 0 && written == 0 && !*ended {
            break;
        }
    }
    Ok(())
}

fn feed_zstd(
    zstd: &mut raw::Decoder<'static>,
    ended: &mut bool,
    body: &mut Body,
    data: &[u8],
) -> Result<(), Undecoded> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut input = InBuffer::around(data);
    loop {
        let mut output = OutBuffer::around(&mut chunk[..]);
        let read = input.pos();
        let hint = zstd.run(&mut input, &mut output).map_err(|error| Undecoded::Broken(error.to_string()))?;
        let written = output.pos();
        body.append(&chunk[..written])?;
        let moved = input.pos() > read || written > 0;
        // The hint is 0 between two frames, where a body may end.
        *ended = if moved { hint == 0 } else { *ended };
        if input.pos() == data.len() && written < CHUNK_BYTES || !moved {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

    use super::*;

    const TEXT: &[u8] = b"one line\nand another\n";

    fn encode(coding: Coding, data: &[u8]) -> Vec<u8> {
        let best = Compression::best();
        match coding {
            Coding::Identity => data.to_owned(),
            Coding::Gzip => {
                let mut gzip = GzEncoder::new(Vec::new(), best);
                gzip.write_all(data).unwrap();
                gzip.finish().unwrap()
            }
            Coding::Deflate => {
                let mut zlib = ZlibEncoder::new(Vec::new(), best);
                zlib.write_all(data).unwrap();
                zlib.finish().unwrap()
            }
            Coding::Zstd => zstd::stream::encode_all(data, 19).unwrap(),
        }
    }

    fn decode(coding: Coding, pieces: &[&[u8]], bytes_max: usize) -> Result<Vec<u8>, Undecoded> {
        let mut decoder = Decoder::new(coding, bytes_max, Held::nothing(Held::budget(64 << 20)))?;
        pieces.iter().try_for_each(|piece| decoder.feed(piece))?;
        decoder.finish().map(|body| body.bytes)
    }

    const ALL: [Coding; 4] = [Coding::Identity, Coding::Gzip, Coding::Deflate, Coding::Zstd];

    #[test]
    fn every_coding_is_undone_however_it_is_cut() {
        for coding in ALL {
            let encoded = encode(coding, TEXT);
            assert_eq!(decode(coding, &[&encoded], 99).unwrap(), TEXT, "{coding:?}");
            let bytes: Vec<&[u8]> = encoded.chunks(1).collect();
            assert_eq!(decode(coding, &bytes, 99).unwrap(), TEXT, "{coding:?}");
            assert_eq!(decode(coding, &[], 99).unwrap(), b"", "{coding:?}");
        }
        let mut bare = DeflateEncoder::new(Vec::new(), Compression::best());
        bare.write_all(TEXT).unwrap();
        assert_eq!(decode(Coding::Deflate, &[&bare.finish().unwrap()], 99).unwrap(), TEXT);
        for coding in [Coding::Gzip, Coding::Zstd] {
            let twice = encode(coding, TEXT).repeat(2);
            assert_eq!(decode(coding, &[&twice], 99).unwrap(), TEXT.repeat(2), "{coding:?} in two members");
        }
    }

    #[test]
    fn what_is_cut_or_broken_is_refused() {
        for coding in [Coding::Gzip, Coding::Deflate, Coding::Zstd] {
            let encoded = encode(coding, &TEXT.repeat(100));
            for length in 1..encoded.len() {
                let decoded = decode(coding, &[&encoded[..length]], 9999);
                assert!(matches!(decoded, Err(Undecoded::Broken(_))), "{coding:?} {length}: {decoded:?}");
            }
            assert!(matches!(decode(coding, &[b"GET / HTTP/1.1"], 99), Err(Undecoded::Broken(_))), "{coding:?}");
        }
    }

    #[test]
    fn the_limit_is_on_what_comes_out() {
        for coding in ALL {
            let encoded = encode(coding, TEXT);
            assert_eq!(decode(coding, &[&encoded], TEXT.len()).unwrap(), TEXT);
            assert_eq!(decode(coding, &[&encoded], TEXT.len() - 1), Err(Undecoded::TooLarge), "{coding:?}");
        }
    }

    #[test]
    fn a_bomb_costs_no_more_than_the_limit() {
        let zeros = vec![0; 64 << 20];
        for coding in [Coding::Gzip, Coding::Deflate, Coding::Zstd] {
            let bomb = encode(coding, &zeros);
            assert!(bomb.len() < zeros.len() / 500, "{coding:?}");
            let budget = Held::budget(64 << 20);
            let mut decoder = Decoder::new(coding, 1 << 20, Held::nothing(budget.clone())).unwrap();
            let fed = bomb.chunks(8192).try_for_each(|piece| decoder.feed(piece));
            assert_eq!(fed, Err(Undecoded::TooLarge), "{coding:?}");
            let held = (64 << 20) - budget.available_permits() * UNIT_BYTES;
            assert!(held <= (1 << 20) + coding.memory_bytes() + UNIT_BYTES, "{coding:?}: {held}");
            drop(decoder);
            assert_eq!(budget.available_permits() * UNIT_BYTES, 64 << 20);
        }
    }

    #[test]
    fn a_window_beyond_the_limit_is_refused() {
        let mut zstd = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        zstd.window_log(27).unwrap();
        zstd.write_all(&[7; 4 << 20]).unwrap();
        let encoded = zstd.finish().unwrap();
        assert!(matches!(decode(Coding::Zstd, &[&encoded], 8 << 20), Err(Undecoded::Broken(_))));
    }

    #[test]
    fn memory_is_charged_before_it_is_taken() {
        let budget = Held::budget(100 << 10);
        let mut first = Decoder::new(Coding::Identity, 1 << 20, Held::nothing(budget.clone())).unwrap();
        first.feed(&[0; 60 << 10]).unwrap();
        let mut second = Decoder::new(Coding::Identity, 1 << 20, Held::nothing(budget.clone())).unwrap();
        assert_eq!(second.feed(&[0; 60 << 10]), Err(Undecoded::NoMemory));
        drop(first);
        second.feed(&[0; 60 << 10]).unwrap();
        assert!(matches!(Decoder::new(Coding::Zstd, 1, Held::nothing(budget)), Err(Undecoded::NoMemory)));
    }
}
