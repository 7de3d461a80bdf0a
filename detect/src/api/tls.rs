//! TLS of the operator API: TLS 1.2 and 1.3, no client certificates. The bearer token says who it is.

use std::path::PathBuf;
use std::sync::Arc;

use proto::secret;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{self, ServerConfig};

use crate::error::ApiFileError;

/// Longest key file in bytes. An RSA key of 8,192 bits takes 6,500.
const KEY_BYTES_MAX: u64 = 64 * 1024;

/// Certificate and key, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, then those that lead to its authority.
    pub cert_file: PathBuf,
    /// Its private key, closed to others.
    pub key_file: PathBuf,
}

impl TlsFiles {
    /// Reads both.
    ///
    /// # Errors
    /// When one cannot be read or used, the key is open to others, or they do not belong together.
    pub(super) fn load(&self) -> Result<Arc<ServerConfig>, ApiFileError> {
        let pem = |path: &PathBuf, source| ApiFileError::Pem { path: path.clone(), source };
        let chain: Result<Vec<CertificateDer<'static>>, pem::Error> =
            CertificateDer::pem_file_iter(&self.cert_file).and_then(Iterator::collect);
        let chain = chain.map_err(|source| pem(&self.cert_file, source))?;
        let key = secret::read_file(&self.key_file, KEY_BYTES_MAX)?;
        let key =
            PrivateKeyDer::from_pem_slice(key.expose().as_bytes()).map_err(|source| pem(&self.key_file, source))?;
        let unusable = |source| ApiFileError::Certificate { path: self.cert_file.clone(), source };
        let mut config = server_config(chain, key).map_err(unusable)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

fn server_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_no_client_auth()
        .with_single_cert(chain, key)
}
