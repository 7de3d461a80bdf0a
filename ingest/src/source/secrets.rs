//! What a source that listens reads from files of its own: certificates, and what senders must show.
//!
//! All of them are read together, at start until they are right, and again on SIGHUP: then wrong ones change nothing.

use std::sync::Arc;
use std::time::Duration;

use proto::reload::Reloaded;
use proto::report::Problem;
use proto::tls::{TlsError, TlsFiles};
use tokio_rustls::rustls::ServerConfig;

use super::http::auth::{AuthError, AuthFiles, Logins};
use super::http::chain;
use super::intake::Intake;

/// Wait before files that cannot be used are tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Where they are.
#[derive(Clone, Debug, Default)]
pub(crate) struct SecretFiles {
    /// `None` = without TLS.
    pub(crate) tls: Option<TlsFiles>,
    /// What TLS offers by ALPN; none = anything.
    pub(crate) protocols: &'static [&'static str],
    /// What senders must show.
    pub(crate) auth: AuthFiles,
}

/// What they hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct Secrets {
    pub(crate) tls: Option<Arc<ServerConfig>>,
    pub(crate) logins: Arc<Logins>,
}

/// One of them cannot be used. Never shows what stands in it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretsError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Auth(#[from] AuthError),
}

/// The secrets of a running source.
pub(crate) type Kept = Reloaded<Secrets, SecretsError>;

impl SecretFiles {
    fn is_any(&self) -> bool {
        self.tls.is_some() || self.auth.is_given()
    }

    fn load(&self) -> Result<Secrets, SecretsError> {
        let tls = self.tls.as_ref().map(|files| files.load(self.protocols)).transpose()?;
        Ok(Secrets { tls, logins: Arc::new(Logins::load(&self.auth)?) })
    }

    /// What they hold, as soon as they can be used; `None` at the shutdown.
    pub(crate) async fn open(&self, intake: &Intake) -> Option<Kept> {
        loop {
            let files = self.clone();
            let opened = tokio::task::spawn_blocking(move || Reloaded::new(move || files.load()));
            match opened.await {
                Ok(Ok(kept)) => return Some(kept),
                Ok(Err(error)) => {
                    let text = format!("{}: nobody can send; it is tried again until it is right", chain(&error));
                    intake.set_problems(vec![Problem::degraded(text)]);
                }
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
            tokio::select! {
                () = intake.shared.shutdown.draining() => return None,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    /// Takes over what they hold now, if all of them are right.
    pub(crate) async fn reload(&self, kept: &Kept, intake: &Intake) {
        if !self.is_any() {
            return;
        }
        match kept.reload().await {
            Ok(()) => {
                intake.set_problems(Vec::new());
                tracing::info!(source = %intake.shared.source, "Certificates and secrets of a source read again");
            }
            Err(error) => {
                let text = format!(
                    "{}: certificates and secrets stay as they were until a reload finds all right",
                    chain(&error)
                );
                intake.set_problems(vec![Problem::degraded(text)]);
            }
        }
    }
}
