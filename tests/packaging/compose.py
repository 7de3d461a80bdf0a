#!/usr/bin/env python3
"""Starts the cluster of deploy/compose/cluster as its README says, on three machines with a Docker each, and bans; then the
same with deploy/compose/single-host, on the first of them.

    tests/packaging/compose.py FOLDER   needs root, what docker.sh got into FOLDER, portcullis (PORTCULLIS, else
                                        target/debug/portcullis), iptables, ipset, iproute2, curl, logrotate, the package
                                        PyYAML and 3 GiB of memory

The machines are network namespaces: nothing outside of them is changed. The programs are the released ones; the images
around them are made here, because there is no registry: see images.py. Prints one line a test, and ends with 1 when one
failed.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import images
import single_host
from machines import DEADLINE_S, CannotRun, Machine, Namespace, Network, scratch, until

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
PORTCULLIS = Path(os.environ.get("PORTCULLIS") or TARGET / "debug" / "portcullis")
ADDRESSES = {1: "10.0.0.5", 2: "10.0.0.6", 3: "10.0.0.7"}
PROFILES = {1: "nats-1,detect-1,edge-1", 2: "nats-2,detect-2,edge-2", 3: "nats-3,edge-3"}
CLIENT, OTHER = "203.0.113.66", "203.0.113.67"
OFFENCES = 15
"""As many as the built-in rule needs."""
SILENCE_S = 1
"""How long a banned client waits for a connection, which the kernel makes within a fraction of this."""
CAPABILITIES = {"nats": [], "detect": [], "ingest": [], "traefik": ["NET_BIND_SERVICE"], "enforce": ["NET_ADMIN", "NET_RAW"]}
NUMBERS = {"NET_BIND_SERVICE": 10, "NET_ADMIN": 12, "NET_RAW": 13}
USERS = {"nats": 0, "traefik": 0, "enforce": 0, "detect": 10001, "ingest": 10001}
PAGE = "/varz"
"""What every Traefik has, from the NATS server beside it."""
ROUTE = """http:
  routers: { figures: { rule: "Path(`/varz`)", service: nats } }
  services: { nats: { loadBalancer: { servers: [{ url: "http://127.0.0.1:8222" }] } } }
"""


class Cluster:
    """Three machines and two clients."""

    def __init__(self, folder, tools):
        self.folder, self.tools, self.network = folder, tools, Network()
        self.machines = {number: Machine(number, folder, tools, self.join) for number in ADDRESSES}
        self.clients = {address: Namespace(f"c{number}") for number, address in enumerate((CLIENT, OTHER))}
        for address, client in self.clients.items():
            self.network.join(client, address, "10.0.0.0/24")

    def join(self, namespace, number):
        self.network.join(namespace, ADDRESSES[number], "203.0.113.0/24")

    def containers(self):
        """What `docker inspect` says of each container of all machines, by service."""
        found = {}
        for machine in self.machines.values():
            ids = machine.docker("ps", "--all", "--quiet").split()
            for container in json.loads(machine.docker("inspect", *ids)) if ids else []:
                labels = container["Config"]["Labels"]
                found[labels.get("com.docker.compose.service", container["Name"])] = machine, container
        return found

    def verb(self, *words, through=1):
        """Exit code and the objects that it printed."""
        machine = self.machines[through]
        command = ["docker", "compose", "exec", "-T", f"detect-{through}", "portcullis", *words, "--json"]
        ended = subprocess.run(command, env=machine.environment, cwd=machine.project, capture_output=True, text=True,
                               timeout=DEADLINE_S, check=False)
        return ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()], ended.stderr

    def until_status_is_good(self):
        said = []

        def good():
            said[:] = self.verb("status")
            return said[0] == 0
        try:
            until("status is good", good)
        except AssertionError as error:
            raise AssertionError(f"{error}: {said}") from None

    def signal(self, service, name):
        """As the README says: after `docker compose kill` Docker would not start it again, not even after a reboot."""
        self.machines[int(service[-1])].compose("exec", "-T", service, "sh", "-c", f"kill -{name} 1")

    def get(self, client, number, path, *headers):
        """The status that the client gets from the Traefik of a machine; 0 for silence."""
        ask = ["curl", *(word for header in headers for word in ("--header", header)), "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--connect-timeout", SILENCE_S,
               "--max-time", DEADLINE_S, f"http://{ADDRESSES[number]}{path}"]
        ended = subprocess.run([str(word) for word in [*self.clients[client].enter(), *ask]], capture_output=True, text=True,
                               check=False)
        return int(ended.stdout)

    def offend(self, client, number, names):
        """Asks the Traefik of a machine for what is not there."""
        for name in names:
            assert self.get(client, number, f"/missing-{name}") == 404

    def banned(self, client):
        """The machines whose kernel has the client."""
        return [number for number, machine in self.machines.items()
                if re.search(rf"^add portcullis-v4 {re.escape(client)} ", machine.namespace.run("ipset", "save"), re.MULTILINE)]


# The tests, in this order; each goes on from where the one before it stopped.


def the_image_is_built_as_the_dockerfile_says(cluster):
    first = cluster.machines[1]
    names = images.make(first, cluster.tools, PORTCULLIS)
    [image] = json.loads(first.docker("image", "inspect", "portcullis"))
    assert (image["Config"]["User"], image["Config"]["Entrypoint"]) == ("10001:10001", ["portcullis"]), image["Config"]
    assert first.docker("run", "--rm", "portcullis", "--version").startswith("portcullis ")
    archive = cluster.folder / "images.tar"
    first.docker("save", "--output", archive, *names)
    for machine in list(cluster.machines.values())[1:]:
        machine.docker("load", "--input", archive)
    archive.unlink()


def every_container_starts_and_status_finds_nothing_wrong(cluster):
    values = {name: "p" + secrets.token_hex(24) for name in variables()}
    values |= {f"NATS_ROUTE_{number}": f"nats://route:{values['NATS_ROUTE_PASSWORD']}@{address}:6222"
               for number, address in ADDRESSES.items()}
    for number, machine in cluster.machines.items():
        configure(machine, number, values)
    for machine in cluster.machines.values():
        machine.compose("up", "-d")
    cluster.until_status_is_good()
    wanted = {(role, f"edge-{number}") for number in ADDRESSES for role in ("ingest", "enforce")}
    wanted |= {("detect", "edge-1"), ("detect", "edge-2")}

    def complete():
        code, [status], _ = cluster.verb("status", through=2)
        return code == 0 and {(node["role"], node["node"]) for node in status["nodes"]} == wanted
    until("status knows every role", complete)
    nothing_was_restarted(cluster)


def containers_have_their_rights_and_no_others(cluster):
    for service, (machine, container) in cluster.containers().items():
        kind = service.partition("-")[0]
        status = machine.look_inside("cat", f"/proc/{container['State']['Pid']}/status")
        said = dict(line.split(":\t", 1) for line in status.splitlines())
        assert said["NoNewPrivs"] == "1", service
        assert set(said["Uid"].split()) == set(said["Gid"].split()) == {str(USERS[kind])}, (service, said["Uid"], said["Gid"])
        bounds = sum(1 << NUMBERS[name] for name in CAPABILITIES[kind])
        assert int(said["CapBnd"], 16) == bounds, (service, said["CapBnd"])
        assert int(said["CapEff"], 16) == (bounds if USERS[kind] == 0 else 0), (service, said["CapEff"])
        mounts = machine.look_inside("cat", f"/proc/{container['State']['Pid']}/mounts").splitlines()
        [root] = [fields for fields in map(str.split, mounts) if fields[1] == "/"]
        assert "ro" in root[3].split(","), (service, root)


def requests_to_one_machine_ban_on_all(cluster):
    assert cluster.get(OTHER, 3, PAGE) == 200
    assert [cluster.get(CLIENT, number, PAGE) for number in ADDRESSES] == [200, 200, 200]
    cluster.offend(CLIENT, 3, range(OFFENCES))
    until("all kernels have it", lambda: cluster.banned(CLIENT) == list(ADDRESSES))
    assert [cluster.get(CLIENT, number, PAGE) for number in ADDRESSES] == [0, 0, 0]
    assert [cluster.get(OTHER, number, PAGE) for number in ADDRESSES] == [200, 200, 200]
    code, [answer], error = cluster.verb("explain", CLIENT)
    assert code == 0 and {held["node"] for held in answer["backends"]} == {"edge-1", "edge-2", "edge-3"}, (answer, error)


def bans_outlive_enforce(cluster):
    """At every moment."""
    first, done = cluster.machines[1], threading.Event()

    def look():
        seen = []
        while not done.is_set():
            seen.append(1 in cluster.banned(CLIENT))
        return seen

    with ThreadPoolExecutor() as pool:
        looking = pool.submit(look)
        try:
            first.compose("restart", "enforce-1")
            first.compose("stop", "enforce-1")
            assert cluster.get(CLIENT, 1, PAGE) == 0
            first.compose("start", "enforce-1")
            cluster.until_status_is_good()
        finally:
            done.set()
        assert all(looking.result())


def unban_reaches_all(cluster):
    code, _, error = cluster.verb("unban", CLIENT, through=2)
    assert code == 0, error
    until("no kernel has it", lambda: not cluster.banned(CLIENT))
    assert [cluster.get(CLIENT, number, PAGE) for number in ADDRESSES] == [200, 200, 200]


def a_log_that_is_renamed_loses_no_line(cluster):
    third, log = cluster.machines[3], "/var/log/traefik/access.log"
    cluster.offend(CLIENT, 3, range(0, 5))
    third.compose("exec", "-T", "traefik-3", "mv", log, f"{log}.1")
    cluster.offend(CLIENT, 3, range(5, 10))
    cluster.signal("traefik-3", "USR1")
    until("Traefik has a new log", lambda: "access.log\n" in third.compose("exec", "-T", "traefik-3", "ls", "/var/log/traefik"))
    cluster.offend(CLIENT, 3, range(10, OFFENCES))
    until("all kernels have it", lambda: cluster.banned(CLIENT) == list(ADDRESSES))


def bans_are_back_after_a_reboot(cluster):
    """With the last set, before NATS is there; a signal keeps no container from being started again."""
    third = cluster.machines[3]
    kept = third.folder / "data" / "volumes" / "portcullis_enforce" / "_data" / "enforce.json"
    until("the set is on disk", lambda: CLIENT in kept.read_text())
    third.reboot()
    until("the kernel has it", lambda: cluster.banned(CLIENT) == list(ADDRESSES))
    cluster.until_status_is_good()
    until("Traefik is there", lambda: cluster.get(OTHER, 3, PAGE) == 200)
    starts = re.findall("Enforcing backend.* bans=([0-9]+)", third.compose("logs", "enforce-3"))
    assert starts == ["0", "1"], starts
    # Its processes are other ones than before, and not a second host of that name.
    for number in (1, 2):
        assert "calls itself" not in cluster.machines[number].compose("logs", f"detect-{number}")
    nothing_was_restarted(cluster)


def an_edited_configuration_is_taken_over_by_a_signal(cluster):
    for number in (1, 2):
        machine = cluster.machines[number]
        config = machine.project / "portcullis" / "portcullis.toml"
        text = config.read_text()
        assert "never_ban = []" in text, text
        # As editors do: a new file in place of the old one.
        config.with_suffix(".new").write_text(text.replace("never_ban = []", f'never_ban = ["{CLIENT}"]'))
        config.with_suffix(".new").rename(config)
        cluster.signal(f"detect-{number}", "HUP")
    until("no kernel has it", lambda: not cluster.banned(CLIENT))
    cluster.until_status_is_good()


def teardown_leaves_nothing(cluster):
    for number, machine in cluster.machines.items():
        assert "portcullis" in machine.namespace.run("ipset", "save")
        machine.compose("stop", f"enforce-{number}")
        machine.compose("run", "--rm", f"enforce-{number}", "enforce", "--teardown")
        left = machine.namespace.run("ipset", "save") + "".join(
            machine.namespace.run(program) for program in ("iptables-save", "ip6tables-save"))
        assert "portcullis" not in left.lower(), left


def nothing_was_restarted(cluster):
    for service, (machine, container) in cluster.containers().items():
        assert container["State"]["Running"] and container["RestartCount"] == 0, (
            f"{service}: {container['State']}\n{machine.docker('logs', '--tail', '30', container['Id'])}")


TESTS = [
    the_image_is_built_as_the_dockerfile_says,
    every_container_starts_and_status_finds_nothing_wrong,
    containers_have_their_rights_and_no_others,
    requests_to_one_machine_ban_on_all,
    bans_outlive_enforce,
    unban_reaches_all,
    a_log_that_is_renamed_loses_no_line,
    bans_are_back_after_a_reboot,
    an_edited_configuration_is_taken_over_by_a_signal,
    nothing_was_restarted,
    teardown_leaves_nothing,
]


def variables():
    """Each variable of the NATS configuration but the server's name."""
    text = "".join(file.read_text() for file in (ROOT / "deploy" / "nats").rglob("*.conf"))
    return set(re.findall(r"\$(NATS_[A-Z0-9_]+)", text)) - {"NATS_NAME"}


def configure(machine, number, values):
    """Steps 2 to 5 of the README, in a copy of its folder."""
    shutil.copytree(ROOT / "deploy", machine.folder / "deploy")
    folder = machine.project
    addresses = "".join(f"NATS_{number}={address}\n" for number, address in ADDRESSES.items())
    (folder / ".env").write_text(f"{addresses}COMPOSE_PROFILES={PROFILES[number]}\n")
    (folder / "nats.env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    (folder / "secrets").mkdir()
    for role in ("ingest", "enforce", "detect"):
        if password := values.get(f"NATS_{role.upper()}_EDGE_{number}_PASSWORD"):
            secret = folder / "secrets" / f"{role}-edge-{number}"
            secret.write_text(f"{password}\n")
            secret.chmod(0o400)
            os.chown(secret, USERS[role], USERS[role])
    (folder / "traefik").mkdir()
    (folder / "traefik" / "routes.yaml").write_text(ROUTE)


def tested(cluster, tests):
    """Whether all tests passed."""
    for test in tests:
        name = f"{test.__module__.replace('__main__', 'compose')}::{test.__name__}"
        try:
            test(cluster)
            print(f"test {name} ... ok", flush=True)
        except Exception:  # Whatever it is, the test failed.
            print(f"test {name} ... FAILED\n{traceback.format_exc()}", flush=True)
            for service, (machine, container) in cluster.containers().items():
                log = machine.docker("logs", "--tail", "30", container["Id"])
                print(f"--- {service}: {container['State']['Status']}\n{log}", file=sys.stderr)
            # What follows would fail for the same reason.
            return False
    return True


def main():
    # So that all of `finally` runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    machines = []
    try:
        with scratch() as folder:
            try:
                cluster = Cluster(folder, Path(sys.argv[1]).resolve())
                machines = cluster.machines.values()
                for machine in machines:
                    machine.start()
                return 0 if tested(cluster, [*TESTS, *single_host.TESTS]) else 1
            finally:
                for machine in machines:
                    machine.kill()
    except CannotRun as reason:
        print(f"SKIPPED: the cluster in containers: {reason}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
