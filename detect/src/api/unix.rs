//! The operator API on a unix socket.
//!
//! Who may connect is decided twice: by the socket's mode (0660, group `portcullis` where it exists) and by the peer's
//! credentials. Whoever may connect may do everything.

use std::path::{Path, PathBuf};

use axum::Router;
use axum::extract::Request;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Gid, Group, Pid, Uid, User};
use proto::shutdown::Shutdown;
use tokio::net::{UnixListener, UnixStream};

use super::Refused;
use crate::error::DetectError;

/// Group whose members may use the socket.
pub const GROUP: &str = "portcullis";

/// The listening socket; its file is removed when dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    file: SocketFile,
}

#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A socket that somebody has removed already is as good.
        let _gone = std::fs::remove_file(&self.0);
    }
}

impl Socket {
    /// Listens at `path`, made with the mode and group it has to have before anybody can connect.
    ///
    /// # Errors
    /// When another process listens there, or the socket cannot be made.
    pub fn bind(path: &Path) -> Result<Self, DetectError> {
        let failed = |source| DetectError::Listen { path: path.to_owned(), source };
        if is_served(path) {
            let text = "another portcullis listens here";
            return Err(failed(std::io::Error::new(std::io::ErrorKind::AddrInUse, text)));
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        let staged = path.with_extension(format!("{}.tmp", std::process::id()));
        let _gone = std::fs::remove_file(&staged);
        let listener = UnixListener::bind(&staged).map_err(failed)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o660);
        std::fs::set_permissions(&staged, mode).map_err(failed)?;
        if let Some(group) = portcullis_group()
            && let Err(error) = std::os::unix::fs::chown(&staged, None, Some(group.as_raw()))
        {
            tracing::warn!(%error, group = GROUP, "Socket cannot be given to the group");
        }
        std::fs::rename(&staged, path).map_err(failed)?;
        Ok(Self { listener, file: SocketFile(path.to_owned()) })
    }
}

/// Whether a process that is alive listens at `path`. After a kill the socket may be open for some milliseconds more, in a
/// program that the dead one was just starting.
fn is_served(path: &Path) -> bool {
    let Ok(stream) = std::os::unix::net::UnixStream::connect(path) else { return false };
    let Ok(listener) = getsockopt(&stream, sockopt::PeerCredentials) else { return true };
    // 0 stands for a process of another container.
    listener.pid() == 0 || kill(Pid::from_raw(listener.pid()), None) != Err(Errno::ESRCH)
}

fn portcullis_group() -> Option<Gid> {
    Group::from_name(GROUP).ok().flatten().map(|group| group.gid)
}

/// Serves `api` until the shutdown.
///
/// # Errors
/// When the socket fails.
pub async fn run(socket: Socket, api: Router, shutdown: Shutdown) -> Result<(), DetectError> {
    let app = api.layer(middleware::from_fn(check_peer));
    let Socket { listener, file } = socket;
    let served = axum::serve(listener, app.into_make_service_with_connect_info::<Peer>())
        .with_graceful_shutdown(async move { shutdown.draining().await })
        .await
        .map_err(DetectError::Serve);
    drop(file);
    served
}

/// Credentials of a connection.
#[derive(Clone, Copy, Debug)]
struct Peer {
    allowed: bool,
    uid: Option<u32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self::of(stream.io())
    }
}

impl Peer {
    fn of(stream: &UnixStream) -> Self {
        let Ok(cred) = stream.peer_cred() else { return Self { allowed: false, uid: None } };
        let allowed = may_operate(Uid::from_raw(cred.uid()), Gid::from_raw(cred.gid()));
        Self { allowed, uid: Some(cred.uid()) }
    }
}

/// Root, the user we run as, and members of the group.
fn may_operate(uid: Uid, gid: Gid) -> bool {
    if uid.is_root() || uid == Uid::effective() {
        return true;
    }
    let Some(group) = portcullis_group() else { return false };
    let member = || {
        let user = User::from_uid(uid).ok().flatten()?;
        let name = std::ffi::CString::new(user.name).ok()?;
        nix::unistd::getgrouplist(&name, user.gid).ok().map(|groups| groups.contains(&group))
    };
    gid == group || member().unwrap_or(false)
}

async fn check_peer(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    if peer.allowed {
        return next.run(request).await;
    }
    tracing::warn!(uid = peer.uid, "Operator API refused a user");
    let text = format!("only root, the service's user and members of the group {GROUP} may do this");
    Refused(StatusCode::FORBIDDEN, text).into_response()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[tokio::test]
    async fn the_socket_is_closed_to_others_and_taken_by_one_process_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/api.sock");
        let socket = Socket::bind(&path).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o660);
        assert_eq!(metadata.uid(), Uid::effective().as_raw());
        assert!(matches!(Socket::bind(&path), Err(DetectError::Listen { .. })));
        drop(socket);
        // What a killed process left behind is replaced.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Socket::bind(&path).unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_a_dead_process_has_left_open_in_another_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let leave = "import socket, subprocess, sys\n\
                     listener = socket.socket(socket.AF_UNIX)\n\
                     listener.bind(sys.argv[1])\n\
                     listener.listen()\n\
                     print(subprocess.Popen(['sleep', '60'], stdout=2, pass_fds=[listener.fileno()]).pid)";
        let left = std::process::Command::new("python3")
            .args(["-c", leave])
            .arg(&path)
            .stderr(std::process::Stdio::null())
            .output()
            .unwrap();
        let heir: i32 = String::from_utf8(left.stdout).unwrap().trim().parse().unwrap();
        assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
        let bound = Socket::bind(&path);
        kill(Pid::from_raw(heir), nix::sys::signal::Signal::SIGKILL).unwrap();
        bound.unwrap();
    }

    #[test]
    fn only_root_ourselves_and_the_group_may_operate() {
        let nobody = (Uid::from_raw(65_534), Gid::from_raw(65_534));
        assert!(may_operate(Uid::from_raw(0), nobody.1));
        assert!(may_operate(Uid::effective(), nobody.1));
        assert_eq!(may_operate(nobody.0, nobody.1), Uid::effective() == nobody.0);
    }
}
