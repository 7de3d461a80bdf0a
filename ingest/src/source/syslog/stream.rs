//! One connection over TCP or TLS.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;
use tokio_util::codec::Decoder;

use super::frames::{Frame, Frames};
use super::nodes::Nodes;
use crate::config::NodeFrom;
use crate::parse::syslog::HEADER_BYTES_MAX;
use crate::source::batch::Stopped;
use crate::source::listen::{Connection, Listening};

/// Bytes that are read at a time: a record of TLS.
const READ_BYTES: usize = 16 << 10;
/// How long a message may be waited for once it has begun, over all waits for its sender; less where `idle_timeout` is less.
/// A byte now and then is no reason to keep a place.
const MESSAGE_MAX: Duration = Duration::from_secs(30);

/// Reads until the sender ends, is silent for too long, or the process ends. While there is no room, or the sender has had
/// its share, nothing is read, so that it waits.
pub(super) async fn serve(
    mut connection: Connection,
    listening: Listening,
    node_from: NodeFrom,
) -> Result<(), Stopped> {
    let Listening { config, intake, limits } = &listening;
    let shutdown = intake.shared.shutdown.clone();
    let sender = connection.sender();
    let mut nodes = Nodes::new(intake.clone(), node_from);
    let mut frames = Frames::new(intake.line_bytes_max + HEADER_BYTES_MAX);
    let mut buffer = BytesMut::new();
    let mut waited = Duration::ZERO;
    while !shutdown.is_draining() {
        buffer.reserve(READ_BYTES);
        let ready = tokio::select! {
            biased;
            read = connection.pipe.read_buf(&mut buffer) => Some(read),
            () = std::future::ready(()) => None,
        };
        // All that has come is read before anything is sent on, so that batches are large where there is much.
        let read = match ready {
            Some(read) => read,
            None => {
                nodes.send().await?;
                let is_partial = frames.is_partial(&buffer);
                let idle_timeout = config.idle_timeout;
                let message_max = idle_timeout.min(MESSAGE_MAX);
                let patience = if is_partial { message_max.saturating_sub(waited) } else { idle_timeout };
                let began = intake.shared.clock.raw();
                let read = tokio::select! {
                    biased;
                    () = shutdown.draining() => break,
                    read = connection.pipe.read_buf(&mut buffer) => read,
                    () = tokio::time::sleep(patience) => {
                        tracing::debug!(source = %intake.shared.source, %sender, is_partial, "Silent sender is let go");
                        Ok(0)
                    }
                };
                if is_partial {
                    waited += intake.shared.clock.raw().since(began);
                }
                read
            }
        };
        // A connection that breaks has ended.
        let read = read.unwrap_or(0);
        let mut lines = 0;
        while let Some((message, bytes)) = next(&mut frames, &mut buffer, read == 0) {
            nodes.push(message.as_deref(), bytes, Some(sender));
            (lines, waited) = (lines + 1, Duration::ZERO);
            if nodes.is_full() {
                nodes.send().await?;
            }
        }
        if read == 0 {
            break;
        }
        // Paid for afterwards: what has come is handed over before its sender has to wait.
        let mut share = std::pin::pin!(limits.wait(Some(sender), lines, u32::try_from(read).unwrap_or(u32::MAX)));
        tokio::select! {
            biased;
            () = &mut share => continue,
            () = std::future::ready(()) => nodes.send().await?,
        }
        tokio::select! {
            () = shutdown.draining() => {}
            () = share => {}
        }
    }
    nodes.send().await
}

/// The next message, `None` where it is too long, and its size.
fn next(frames: &mut Frames, buffer: &mut BytesMut, is_end: bool) -> Option<(Option<BytesMut>, usize)> {
    let decoded = if is_end { frames.decode_eof(buffer) } else { frames.decode(buffer) };
    // It fails only by its reader, which it has none of here.
    Some(match decoded.ok()?? {
        Frame::Message(message) => {
            let bytes = message.len();
            (Some(message), bytes)
        }
        Frame::Oversized(bytes) => (None, bytes),
    })
}
