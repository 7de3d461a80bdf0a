//! TLS of our listeners: TLS 1.2 and 1.3, from PEM files. And who does the cryptography, of all TLS in the process.

use std::path::PathBuf;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{self, RootCertStore, ServerConfig};

use crate::secret::{self, SecretFileError};

/// Longest key file in bytes. An RSA key of 8,192 bits takes 6,500.
const KEY_BYTES_MAX: u64 = 64 * 1024;

/// Certificate and key, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, then those that lead to its authority.
    pub cert_file: PathBuf,
    /// Its private key, closed to others.
    pub key_file: PathBuf,
    /// Authorities of clients, who must show a certificate of one of them; `None` = no client is asked for any.
    pub client_ca_file: Option<PathBuf>,
}

/// Files that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The key cannot be read.
    #[error(transparent)]
    Secret(#[from] SecretFileError),
    /// A certificate or key cannot be read.
    #[error("cannot read PEM from {}", .path.display())]
    Pem {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// The certificate cannot be used, or the key is not its own.
    #[error("cannot use the certificate {} with its key", .path.display())]
    Certificate {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The authorities of clients cannot be used.
    #[error("cannot use the authorities of clients in {}", .path.display())]
    Authorities {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: VerifierBuilderError,
    },
}

/// Has TLS use ring in this process; needed before any HTTP client is made. Doing it again changes nothing.
pub fn use_ring() {
    let _already = ring::default_provider().install_default();
}

impl TlsFiles {
    /// Reads them. `protocols` are what a client may choose from by ALPN; none = anything.
    ///
    /// # Errors
    /// When one cannot be read or used, the key is open to others, or they do not belong together.
    pub fn load(&self, protocols: &[&str]) -> Result<Arc<ServerConfig>, TlsError> {
        let key = secret::read_file(&self.key_file, KEY_BYTES_MAX)?;
        let key = PrivateKeyDer::from_pem_slice(key.expose().as_bytes())
            .map_err(|source| TlsError::Pem { path: self.key_file.clone(), source })?;
        let unusable = |source| TlsError::Certificate { path: self.cert_file.clone(), source };
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone());
        let builder = builder.with_protocol_versions(&[&TLS13, &TLS12]).map_err(unusable)?;
        let builder = match &self.client_ca_file {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(certificates(path)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                let refused = |source| TlsError::Authorities { path: path.clone(), source };
                builder.with_client_cert_verifier(verifier.map_err(refused)?)
            }
        };
        let mut config = builder.with_single_cert(certificates(&self.cert_file)?, key).map_err(unusable)?;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        Ok(Arc::new(config))
    }
}

fn certificates(path: &PathBuf) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    read.map_err(|source| TlsError::Pem { path: path.clone(), source })
}
