//! Where back ends beside the firewall are asked what they hold of an address. Each answers in its own time; one that is
//! busy is waited for a moment, and then it is said that it does not answer.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::api::{BackendHold, HoldState};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

/// How long a back end may take: less than whoever asks the host waits.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Questions that wait for one back end.
const QUESTIONS_MAX: usize = 64;

/// One question.
#[derive(Debug)]
pub(crate) struct Inquiry {
    /// Of whom.
    pub(crate) address: IpAddr,
    /// Where the answer goes; names of node and back end are added there.
    pub(crate) reply: oneshot::Sender<BackendHold>,
}

impl Inquiry {
    /// Gives the answer.
    pub(crate) fn answer(self, hold: BackendHold) {
        // Who asked may have gone.
        let _ = self.reply.send(hold);
    }
}

/// One place for all of them; clones are the same place.
#[derive(Clone, Debug, Default)]
pub(crate) struct Desk(Arc<Mutex<BTreeMap<&'static str, mpsc::Sender<Inquiry>>>>);

impl Desk {
    /// From now on the back end `name` is asked, until what is returned is dropped.
    pub(crate) fn open(&self, name: &'static str) -> mpsc::Receiver<Inquiry> {
        let (questions, inquiries) = mpsc::channel(QUESTIONS_MAX);
        self.lock().insert(name, questions);
        inquiries
    }

    /// Asks all of them at once. The answers are by name.
    pub(crate) fn ask(&self, address: IpAddr) -> impl Future<Output = Vec<BackendHold>> + use<> {
        let asked = self.lock().clone();
        async move {
            let mut asking = JoinSet::new();
            for (name, questions) in asked.into_iter().filter(|(_, questions)| !questions.is_closed()) {
                asking.spawn(
                    async move { BackendHold { backend: name.to_owned(), ..inquire(questions, address).await } },
                );
            }
            let mut holds = asking.join_all().await;
            holds.sort_by(|one, other| one.backend.cmp(&other.backend));
            holds
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, mpsc::Sender<Inquiry>>> {
        // Entries are replaced whole, so a panic elsewhere cannot leave one half-written.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn inquire(questions: mpsc::Sender<Inquiry>, address: IpAddr) -> BackendHold {
    let (reply, answer) = oneshot::channel();
    let asked = async {
        questions.send(Inquiry { address, reply }).await.ok()?;
        answer.await.ok()
    };
    let hold = tokio::time::timeout(ANSWER_TIMEOUT, asked).await.ok().flatten();
    hold.unwrap_or_else(|| BackendHold::without(HoldState::Silent, "it is busy and does not answer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_that_is_busy_is_named_and_keeps_nobody_elses_answer_back() {
        let desk = Desk::default();
        let (_busy, mut quick) = (desk.open("busy"), desk.open("quick"));
        drop(desk.open("gone"));
        let same = desk.clone();
        let answers = tokio::spawn(async move { same.ask("192.0.2.1".parse().unwrap()).await });
        let inquiry = quick.recv().await.unwrap();
        assert_eq!(inquiry.address.to_string(), "192.0.2.1");
        inquiry.answer(BackendHold::without(HoldState::NotDue, "not banned"));
        let answers = answers.await.unwrap();
        let told: Vec<_> = answers.iter().map(|hold| (hold.backend.as_str(), hold.state)).collect();
        assert_eq!(told, [("busy", HoldState::Silent), ("quick", HoldState::NotDue)]);
    }
}
