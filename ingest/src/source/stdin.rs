//! Standard input, to its end.

use std::io::{self, Read};

use proto::report::Problem;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::batch::Stopped;
use super::intake::{Inlet, Intake};
use crate::frame::Framer;

/// Bytes that are read at a time.
const READ_BYTES: usize = 64 << 10;

/// Reads until the input or the process ends. A pipe whose reader waits stops its writer, so nothing is lost. When standard
/// input is the `only` source, its end is that of the process.
pub(crate) async fn run(intake: Intake, only: bool) -> Result<(), Stopped> {
    let shutdown = intake.shared.shutdown.clone();
    let mut chunks = read(io::stdin(), Handle::current());
    let mut inlet = intake.open(None);
    let mut framer = Framer::new(0, intake.line_bytes_max);
    loop {
        let chunk = tokio::select! {
            biased;
            () = shutdown.draining() => break,
            chunk = chunks.recv() => chunk,
        };
        let Some(chunk) = chunk else { return end(&intake, (inlet, framer), only).await };
        if feed(&mut framer, &chunk, &mut inlet) || chunks.is_empty() {
            inlet.send(None).await?;
        }
    }
    // What is read already is gone from the pipe.
    if let Ok(chunk) = chunks.try_recv() {
        feed(&mut framer, &chunk, &mut inlet);
    }
    inlet.send(None).await
}

/// The last line may lack its line end.
async fn end(intake: &Intake, (mut inlet, mut framer): (Inlet, Framer), only: bool) -> Result<(), Stopped> {
    framer.finish(|frame| inlet.push(frame.line, (frame.end - frame.start) as usize));
    inlet.abandon();
    inlet.send(None).await?;
    if only {
        tracing::info!(source = %intake.shared.source, "Standard input has ended, and with it all there is to read");
        intake.shared.shutdown.begin();
    } else {
        intake.set_problems(vec![Problem::warning("standard input has ended, nothing more is read from it")]);
        intake.shared.shutdown.draining().await;
    }
    Ok(())
}

/// Returns whether it is time to send. A chunk holds few batches' worth, so that what is over a batch's size is little.
fn feed(framer: &mut Framer, chunk: &[u8], inlet: &mut Inlet) -> bool {
    let mut full = false;
    framer.feed(chunk, |frame| {
        inlet.push(frame.line, (frame.end - frame.start) as usize);
        full |= inlet.is_full();
    });
    full
}

/// What can be read, chunk by chunk, each read only when there is room for it. A read from a terminal or an idle pipe cannot
/// be given up, so it has a thread that ends with the process.
fn read(mut input: impl Read + Send + 'static, handle: Handle) -> mpsc::Receiver<Vec<u8>> {
    let (sender, chunks) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut buffer = vec![0; READ_BYTES];
        while let Ok(room) = handle.block_on(sender.reserve()) {
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => room.send(buffer[..count].to_vec()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!(%error, "Standard input cannot be read");
                    return;
                }
            }
        }
    });
    chunks
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Gives a piece a read; a piece without bytes is an interrupted read.
    struct Pieces(VecDeque<&'static [u8]>);

    impl Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.pop_front() {
                Some(b"") => Err(io::ErrorKind::Interrupted.into()),
                Some(piece) => piece.take(u64::MAX).read(buffer),
                None => Ok(0),
            }
        }
    }

    #[tokio::test]
    async fn an_interrupted_read_is_no_end() {
        let pieces = Pieces([&b"one"[..], b"", b"two"].into());
        let mut chunks = read(pieces, Handle::current());
        assert_eq!(chunks.recv().await.as_deref(), Some(&b"one"[..]));
        assert_eq!(chunks.recv().await.as_deref(), Some(&b"two"[..]));
        assert_eq!(chunks.recv().await, None);
    }
}
