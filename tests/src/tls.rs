//! TLS as a sender speaks it, and the certificates for it, made by openssl.

use std::fs::{Permissions, set_permissions};
use std::net::{IpAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// A connection.
pub type Stream = StreamOwned<ClientConnection, TcpStream>;

/// Writes an authority into `folder`, `ca.crt` and `ca.key`, and certificates of it that are valid for two days: for each
/// `(name, addr)`, `name.crt` and `name.key`.
pub fn certify(folder: &Path, names: &[(&str, &str)]) -> Result<()> {
    let openssl = |words: &str| {
        let output = Command::new("openssl").args(words.split(' ')).current_dir(folder).output();
        let output = output.context("could not start openssl")?;
        ensure!(output.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&output.stderr));
        anyhow::Ok(())
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";
    openssl(&format!("req -x509 {key} -keyout ca.key -out ca.crt -subj /CN=authority"))?;
    for (name, addr) in names {
        openssl(&format!(
            "req -x509 -CA ca.crt -CAkey ca.key {key} -keyout {name}.key -out {name}.crt -subj /CN={addr} \
             -addext subjectAltName=IP:{addr} -addext basicConstraints=critical,CA:FALSE"
        ))?;
        let path = folder.join(format!("{name}.key"));
        set_permissions(&path, Permissions::from_mode(0o600)).context("could not close a key to others")?;
    }
    Ok(())
}

/// A client that trusts the authority in `folder`.
#[derive(Clone, Debug)]
pub struct Client(Arc<ClientConfig>);

impl Client {
    /// Reads `ca.crt`.
    pub fn new(folder: &Path) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(folder.join("ca.crt")).context("could not read ca.crt")?)?;
        let config =
            ClientConfig::builder_with_provider(Arc::new(default_provider())).with_safe_default_protocol_versions()?;
        Ok(Self(Arc::new(config.with_root_certificates(roots).with_no_client_auth())))
    }

    /// What begins a connection with the server at `addr`; nothing is sent yet.
    pub fn greet(&self, addr: IpAddr) -> Result<ClientConnection> {
        Ok(ClientConnection::new(self.0.clone(), addr.into())?)
    }

    /// Shakes hands over `stream`.
    pub fn connect(&self, mut stream: TcpStream) -> Result<Stream> {
        let mut greeting = self.greet(stream.peer_addr()?.ip())?;
        while greeting.is_handshaking() {
            greeting.complete_io(&mut stream).context("could not shake hands")?;
        }
        Ok(StreamOwned::new(greeting, stream))
    }
}
