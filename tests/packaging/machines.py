"""Machines with a Docker of their own, as far as network namespaces make machines: for compose.py and single_host.py.

Each has an address on one network, its own firewall, and a dockerd with its own folder, processes and mounts. When this
process ends, however it does, all of that ends and is removed.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from waiting import DEADLINE_S, until  # noqa: E402

OURS = f"pc{os.getpid()}"
"""How the names of all that is made here begin."""
NAMESPACES, CGROUPS = Path("/run/netns"), Path("/sys/fs/cgroup")
MEMORY_KIB = 3 << 20
"""What three machines need at most, with their disks."""
CLONE_NEWNS = 0x20000


class CannotRun(Exception):
    """Docker does not run here, for a reason that is not ours."""


def run(*command, **more):
    """What a command printed; it must succeed."""
    ended = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           stdin=subprocess.DEVNULL, check=False, **{"timeout": 3 * DEADLINE_S, **more})
    assert ended.returncode == 0, f"{' '.join(str(word) for word in command)}: {ended.returncode}\n{ended.stdout}"
    return ended.stdout


class Namespace:
    """A network namespace."""

    def __init__(self, name):
        self.name = OURS + name
        run("ip", "netns", "add", self.name)
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *command):
        """Runs a command in it; not through `ip netns exec`, which hides cgroups."""
        return run(*self.enter(), *command)

    def enter(self):
        return ["nsenter", f"--net={NAMESPACES}/{self.name}"]


class Network:
    """One wire with everybody on it."""

    def __init__(self):
        self.switch, self.ports = Namespace("switch"), 0
        self.switch.run("ip", "link", "add", "wire", "type", "bridge")
        self.switch.run("ip", "link", "set", "wire", "up")

    def join(self, namespace, address, route):
        """Gives it the address on its `eth0`; the route is on the wire as well."""
        self.ports += 1
        port = f"port{self.ports}"
        run("ip", "link", "add", "eth0", "netns", namespace.name, "type", "veth", "peer", "name", port, "netns",
            self.switch.name)
        self.switch.run("ip", "link", "set", port, "master", "wire", "up")
        namespace.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        namespace.run("ip", "link", "set", "eth0", "up")
        namespace.run("ip", "route", "add", route, "dev", "eth0")


class Machine:
    """A namespace on the network and a dockerd, whose files are in `folder`; `tools` is what docker.sh got."""

    def __init__(self, number, folder, tools, join):
        self.number, self.folder, self.join = number, folder / f"machine-{number}", join
        self.project = self.folder / "deploy" / "compose" / "cluster"
        self.volatile, self.process = self.folder / "run", None
        plugins = self.folder / "client" / "cli-plugins"
        plugins.parent.mkdir(parents=True)
        plugins.symlink_to(tools / "root" / "usr" / "libexec" / "docker" / "cli-plugins")
        programs = [str(tools / "root" / "usr" / kind) for kind in ("bin", "sbin")]
        self.environment = {
            "PATH": ":".join([*programs, os.environ["PATH"]]),
            "HOME": str(self.folder),
            "DOCKER_HOST": f"unix://{self.volatile}/docker.sock",
            "DOCKER_CONFIG": str(plugins.parent),
            # Without this it would load a profile into the AppArmor of the whole system.
            "container": "test",
        }

    def start(self):
        """Starts it, with a dockerd."""
        self.namespace = Namespace(f"m{self.number}")
        self.join(self.namespace, self.number)
        self.begin_anew()

    def start_docker(self):
        """Starts dockerd, as the first process of a process namespace."""
        config, log = self.volatile / "daemon.json", self.folder / "dockerd.log"
        config.write_text("{}")
        command = ["setpriv", "--pdeathsig", "KILL", *self.namespace.enter(),
                   "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                   "dockerd", "--config-file", config, "--data-root", self.folder / "data",
                   "--exec-root", self.volatile / "docker", "--pidfile", self.volatile / "docker.pid",
                   "--host", self.environment["DOCKER_HOST"], "--cgroup-parent", f"/{OURS}",
                   "--exec-opt", "native.cgroupdriver=cgroupfs"]
        with open(log, "ab") as output:
            self.process = subprocess.Popen([str(word) for word in command], env=self.environment, stdin=subprocess.DEVNULL,
                                            stdout=output, stderr=output)
        end = time.monotonic() + DEADLINE_S
        while subprocess.run(["docker", "version"], env=self.environment, capture_output=True, check=False).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > end:
                raise CannotRun("dockerd does not start: " + log.read_text().strip().rpartition("\n")[2])
            time.sleep(0.05)

    def kill(self):
        """Ends dockerd and all that it started, at once."""
        if self.process and self.process.poll() is None:
            dockerd = Path("/proc") / self.dockerd()
            self.process.kill()
            self.process.wait()
            until("dockerd has ended", lambda: not dockerd.exists())

    def restart_docker(self):
        """Containers end with it, and are started again; the firewall stays as it is."""
        self.kill()
        self.begin_anew()

    def begin_anew(self):
        """Of former lives there is nothing but what is on disk."""
        shutil.rmtree(self.volatile, ignore_errors=True)
        self.volatile.mkdir()
        self.start_docker()

    def reboot(self):
        """As if the power had failed: what was on disk stays."""
        self.kill()
        run("ip", "netns", "delete", self.namespace.name)
        self.start()

    def dockerd(self):
        """Its process, seen from here."""
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().strip()

    def look_inside(self, *command):
        """Runs a command where the processes and mounts of dockerd are."""
        return run("nsenter", f"--target={self.dockerd()}", "--mount", "--pid", *command)

    def docker(self, *words, **more):
        return run("docker", *words, env=self.environment, **more)

    def compose(self, *words):
        """`docker compose`, in the folder that the README beside its file means."""
        return self.docker("compose", *words, cwd=self.project)


@contextlib.contextmanager
def scratch():
    """A folder in memory for the disks of all machines, which nobody else sees. With it goes all that was made here."""
    [available] = [int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line]
    if available < MEMORY_KIB:
        raise CannotRun(f"it needs {MEMORY_KIB >> 10} MiB of memory, and {available >> 10} are free")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        raise CannotRun(f"no namespace for mounts: {os.strerror(ctypes.get_errno())}")
    run("mount", "--make-rprivate", "/")
    folder = Path(tempfile.mkdtemp(prefix="portcullis-"))
    waits, stays_open = os.pipe()
    if (janitor := os.fork()) == 0:
        os.close(stays_open)
        clean_up(waits, folder)
        os._exit(0)
    os.close(waits)
    try:
        run("mount", "-t", "tmpfs", "-o", f"size={MEMORY_KIB}k,mode=700", "tmpfs", folder)
        yield folder
    finally:
        os.close(stays_open)
        os.waitpid(janitor, 0)


def clean_up(waits, folder):
    """Waits until nobody has the other end of the pipe open, which is when the process has ended or asks for it. Then the
    dockerds have ended as well: the kernel kills them with their parent."""
    os.setsid()
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    os.read(waits, 1)
    for namespace in NAMESPACES.glob(f"{OURS}[a-z]*"):
        subprocess.run(["ip", "netns", "delete", namespace.name], check=False)
    subprocess.run(["umount", "--lazy", folder], check=False)
    folder.rmdir()
    until("all cgroups are gone", cgroups_removed)


def cgroups_removed():
    """Whether none is left. One with a process that is ending stays for a moment."""
    cgroups = [hierarchy / OURS for hierarchy in [CGROUPS, *CGROUPS.iterdir()] if (hierarchy / OURS).is_dir()]
    for inner in [inner for cgroup in cgroups for inner, _, _ in os.walk(cgroup, topdown=False)]:
        with contextlib.suppress(OSError):
            Path(inner).rmdir()
    return not any(cgroup.exists() for cgroup in cgroups)
