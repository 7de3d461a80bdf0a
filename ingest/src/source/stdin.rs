//! Standard input, to its end.

use std::io::{self, Read};

use proto::report::Problem;
use tokio::sync::mpsc;

use super::batch::Stopped;
use super::intake::Intake;
use crate::frame::Framer;

/// Bytes that are read at a time.
const READ_BYTES: usize = 64 << 10;

/// Reads until the input or the process ends. A pipe whose reader waits stops its writer, so nothing is lost. When standard
/// input is the `only` source, its end is that of the process.
pub(crate) async fn run(intake: Intake, only: bool) -> Result<(), Stopped> {
    let shutdown = intake.shared.shutdown.clone();
    let mut chunks = read(io::stdin());
    let mut inlet = intake.open(None);
    let mut framer = Framer::new(0, intake.line_bytes_max);
    loop {
        let chunk = tokio::select! {
            biased;
            () = shutdown.draining() => return inlet.send(None).await,
            chunk = chunks.recv() => chunk,
        };
        let Some(chunk) = chunk else { break };
        let mut full = false;
        // A chunk holds few batches' worth, so that what is over a batch's size is little.
        framer.feed(&chunk, |frame| {
            inlet.push(frame.line, (frame.end - frame.start) as usize);
            full |= inlet.is_full();
        });
        if full || chunks.is_empty() {
            inlet.send(None).await?;
        }
    }
    framer.finish(|frame| inlet.push(frame.line, (frame.end - frame.start) as usize));
    inlet.abandon();
    inlet.send(None).await?;
    if only {
        tracing::info!(source = %intake.shared.source, "Standard input has ended, and with it all there is to read");
        shutdown.begin();
    } else {
        intake.set_problems(vec![Problem::warning("standard input has ended, nothing more is read from it")]);
        shutdown.draining().await;
    }
    Ok(())
}

/// What can be read, chunk by chunk. A read from a terminal or an idle pipe cannot be given up, so it has a thread that ends
/// with the process.
fn read(mut input: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, chunks) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let count = match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "Standard input cannot be read");
                    return;
                }
            };
            if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    chunks
}
