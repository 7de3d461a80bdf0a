#!/usr/bin/env python3
"""Runs every role of Portcullis over a real nats-server under exactly what deploy/nats allows.

    tests/nats/accounts_live.py     needs portcullis (PORTCULLIS, else target/debug/portcullis), nats-server 2.12.1 or newer
                                    (NATS_SERVER, else PATH) and the package nats-py

Two detectors, two hosts that read logs, one that enforces without changing its firewall; each with a user and a password
file of its own, given as the systemd units give them. Prints one line a test, and ends with 1 when one failed.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accounts import CONFIG, NODES, Server, ask, passwords, settle  # noqa: E402
from waiting import DEADLINE_S, until  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHIPPERS = ROOT / "deploy" / "shippers"
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
PORTCULLIS = os.environ.get("PORTCULLIS") or str(TARGET / "debug" / "portcullis")
CLIENT, OTHER, SHIPPED, PACKED = "203.0.113.66", "203.0.113.67", "203.0.113.68", "203.0.113.69"
RAW = "portcullis.raw.v1.shop"
OFFENCES = 15
"""As many as the built-in rule needs."""
REFUSALS = ("Permissions Violation", "permissions violation", "Authorization Violation", "panicked")


def offence(client):
    """A line of Traefik's log: a request for what is not there, just now."""
    now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
    return json.dumps({"ClientAddr": f"{client}:40000", "ClientHost": client, "DownstreamStatus": 404, "OriginStatus": 404,
                       "RequestMethod": "GET", "RequestPath": "/wp-login.php", "RequestHost": "shop.example.net",
                       "StartUTC": now, "level": "info", "msg": "", "time": now}) + "\n"


class Role:
    """One role of one node, as `user` of the bus."""

    def __init__(self, cluster, role, node, user=None, password=None, dry_run=True):
        self.role, self.node, folder = role, node, cluster.folder / f"{role}-{node}-{user or 'own'}"
        self.log, self.access_log, self.socket = folder / "log", folder / "access.log", folder / "api.sock"
        folder.mkdir()
        self.access_log.touch()
        user = user or f"{role}-{node}"
        secret = folder / "secret"
        secret.write_text(f"{password or user}\n")
        secret.chmod(0o400)
        environment = os.environ | {
            "PORTCULLIS__NODE": node,
            "PORTCULLIS__STATE_DIR": str(folder / "state"),
            "PORTCULLIS__BUS__USER": user,
            "PORTCULLIS__BUS__PASSWORD_FILE": str(secret),
            "PORTCULLIS__API__SOCKET": str(self.socket),
            "PORTCULLIS__INGEST__SOURCES__TRAEFIK__INCLUDE": json.dumps([str(self.access_log)]),
        }
        command = [PORTCULLIS, role, "-c", cluster.config, *(["--dry-run"] if role == "enforce" and dry_run else [])]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def says(self, *words):
        """The first line of its log with all of these words."""
        assert self.process.poll() is None, f"{self.role} of {self.node} has ended:\n{self.log.read_text()}"
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line for line in lines if all(word in line for word in words)), None)

    def offend(self, client, times):
        with open(self.access_log, "a") as log:
            log.writelines(offence(client) for _ in range(times))

    def stop(self):
        self.process.terminate()
        self.process.wait(DEADLINE_S)

    def kill(self):
        self.process.kill()
        self.process.wait()


class Cluster:
    """The server, and the roles on it."""

    def __init__(self, server, folder):
        self.server, self.folder, self.roles = server, folder, []
        self.config = folder / "portcullis.toml"
        self.config.write_text(f'[bus]\nkind = "nats"\nurls = ["{server.url}"]\n[ingest.sources.traefik]\ntype = "file"\n'
                               '[ingest.sources.shop]\ntype = "nats"\n')

    def start(self, *role, **more):
        self.roles.append(Role(self, *role, **more))
        return self.roles[-1]

    def kill(self):
        for role in self.roles:
            role.kill()

    def of(self, role, node):
        return next(one for one in self.roles if (one.role, one.node) == (role, node))

    def verb(self, *words, through="edge-1"):
        """Exit code and the objects that it printed."""
        command = [PORTCULLIS, *words, "--json", "--socket", self.of("detect", through).socket]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
        return ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()], ended.stderr

    def shipped_lines(self):
        """Lines of the NATS source, by node."""
        _, printed, _ = self.verb("status")
        return {node["node"]: source["lines"] for status in printed for node in status["nodes"]
                for source in node["sources"] if source["kind"] == "nats"}

    def backend(self, node, name):
        """What a back end of an enforcing host says of itself."""
        _, printed, _ = self.verb("status")
        return next((backend["detail"] for status in printed for known in status["nodes"] for backend in known["backends"]
                     if (known["role"], known["node"], backend["name"]) == ("enforce", node, name)), None)

    def nodes(self):
        """Role and node of everybody that `status` knows."""
        _, printed, _ = self.verb("status")
        return {(node["role"], node["node"]) for status in printed for node in status["nodes"]}


# The tests, in this order; each goes on from where the one before it stopped.


def every_role_starts_and_status_finds_nothing_wrong(cluster):
    for role in (("detect", "edge-1"), ("detect", "edge-2"), ("ingest", "edge-1"), ("ingest", "edge-2"),
                 ("enforce", "edge-1")):
        cluster.start(*role)
    until("status is good", lambda: cluster.of("detect", "edge-1").socket.exists() and cluster.verb("status")[0] == 0)
    wanted = {(role.role, role.node) for role in cluster.roles}
    until("status knows every role", lambda: cluster.nodes() == wanted and cluster.verb("status")[0] == 0)


def a_client_spread_over_both_nodes_is_banned_on_the_enforcing_one(cluster):
    cluster.of("ingest", "edge-1").offend(CLIENT, OFFENCES // 2)
    cluster.of("ingest", "edge-2").offend(CLIENT, OFFENCES - OFFENCES // 2)
    until("it would be banned", lambda: cluster.of("enforce", "edge-1").says("Would ban", CLIENT))


def a_client_is_banned_from_lines_that_a_shipper_published(cluster):
    lines = [offence(SHIPPED) for _ in range(OFFENCES)]
    asyncio.run(ship(cluster.server, lines[:-1]))
    until("both hosts have their share", lambda: sum(cluster.shipped_lines().values()) == OFFENCES - 1)
    shares = cluster.shipped_lines()
    assert len(shares) == 2 and all(shares.values()), shares
    _, [answer], _ = cluster.verb("explain", SHIPPED)
    counted = {rule["rule"]: rule["counted"] for rule in answer["rules"]}
    assert counted["forceful-browsing"] == OFFENCES - 1, f"each line counts once: {answer}"
    assert not cluster.of("enforce", "edge-1").says("Would ban", SHIPPED)
    asyncio.run(ship(cluster.server, lines[-1:]))
    until("it would be banned", lambda: cluster.of("enforce", "edge-1").says("Would ban", SHIPPED))


def a_client_is_banned_from_what_fluent_bit_publishes(cluster):
    records = [[time.time(), {"tag": RAW, "log": offence(PACKED).rstrip()}] for _ in range(OFFENCES)]
    asyncio.run(ship(cluster.server, [json.dumps(records)]))
    until("it would be banned", lambda: cluster.of("enforce", "edge-1").says("Would ban", PACKED))


def the_examples_for_shippers_publish_what_a_source_listens_to(cluster):
    sink = tomllib.loads((SHIPPERS / "vector-nats.toml").read_text())["sinks"]["portcullis"]
    user = sink["auth"]["user_password"]["user"]
    assert (sink["type"], sink["subject"], sink["encoding"]["codec"]) == ("nats", RAW, "text"), sink
    assert f"user: {user}," in (CONFIG / "users" / "shippers.conf").read_text(), user
    words = (SHIPPERS / "fluent-bit-nats.conf").read_text().split()
    assert words[words.index("Tag") + 1] == words[words.index("Match") + 1] == RAW, words


def explain_asks_the_enforcing_host(cluster):
    for detector in ("edge-1", "edge-2"):
        code, [answer], _ = cluster.verb("explain", CLIENT, through=detector)
        assert code == 0 and [ban["rule"] for ban in answer["bans"]] == ["forceful-browsing"], answer
        [held] = answer["backends"]
        assert (held["node"], held["backend"]) == ("edge-1", "dry-run") and held["detail"] != "not banned", held


def unban_reaches_the_enforcing_host_also_through_a_standby(cluster):
    for detector in ("edge-1", "edge-2"):
        code, _, error = cluster.verb("ban", OTHER, through=detector)
        assert code == 0, error
        code, _, error = cluster.verb("unban", OTHER, through=detector)
        assert code == 0, error
    code, _, error = cluster.verb("unban", CLIENT, SHIPPED, PACKED, through="edge-2")
    assert code == 0, error
    until("it would be unbanned", lambda: cluster.of("enforce", "edge-1").says("Would unban", CLIENT))
    _, bans, _ = cluster.verb("bans")
    assert not bans, bans


def no_role_asks_for_what_it_may_not_have(cluster):
    for role in cluster.roles:
        refused = [word for word in REFUSALS if role.says(word)]
        assert not refused, f"{role.role} of {role.node}:\n{role.log.read_text()}"


def a_host_with_the_credentials_of_another_is_refused_and_says_so(cluster):
    impostor = cluster.start("ingest", "edge-3", user="ingest-edge-2")
    impostor.offend(OTHER, OFFENCES)
    until("it says that it may not publish", lambda: impostor.says("ERROR", "Permissions Violation", "edge-3"))
    stored = asyncio.run(subjects(cluster.server, "PORTCULLIS_ACCESS"))
    assert stored == {"portcullis.access.v1.edge-1", "portcullis.access.v1.edge-2"}, stored
    assert ("ingest", "edge-3") not in cluster.nodes()
    impostor.kill()


def a_host_with_a_wrong_password_says_so(cluster):
    stranger = cluster.start("ingest", "edge-3", user="ingest-edge-3", password="guessed")
    until("it says that it is not let in", lambda: stranger.says("WARN", "authorization violation"))
    stranger.kill()


def a_heartbeat_that_names_another_host_is_left_out(cluster):
    cluster.of("ingest", "edge-1").stop()
    asyncio.run(forge_heartbeat(cluster.server))
    until("the forged one is read", lambda: ("ingest", "edge-1") not in cluster.nodes())
    assert ("enforce", "edge-3") not in cluster.nodes(), cluster.nodes()


TESTS = [
    every_role_starts_and_status_finds_nothing_wrong,
    a_client_spread_over_both_nodes_is_banned_on_the_enforcing_one,
    a_client_is_banned_from_lines_that_a_shipper_published,
    a_client_is_banned_from_what_fluent_bit_publishes,
    the_examples_for_shippers_publish_what_a_source_listens_to,
    explain_asks_the_enforcing_host,
    unban_reaches_the_enforcing_host_also_through_a_standby,
    no_role_asks_for_what_it_may_not_have,
    a_host_with_the_credentials_of_another_is_refused_and_says_so,
    a_host_with_a_wrong_password_says_so,
    a_heartbeat_that_names_another_host_is_left_out,
]


async def ship(server, messages):
    async with server.connect("shipper-1") as shipper:
        for message in messages:
            await shipper.publish(RAW, message.encode())
        await settle(shipper)
        assert not shipper.errors, shipper.errors


async def subjects(server, stream):
    async with server.connect("detect-edge-1") as detect:
        info = await ask(detect, f"$JS.API.STREAM.INFO.{stream}", {"subjects_filter": ">"})
        return set(info["state"]["subjects"])


async def forge_heartbeat(server):
    """Puts a report of another host, in another role, under the key of edge-1."""
    async with server.connect("detect-edge-1") as detect, server.connect("ingest-edge-1") as ingest:
        read = {"seq": 1, "next_by_subj": f"{NODES}.enforce.edge-1"}
        message = await detect.request("$JS.API.DIRECT.GET.KV_portcullis_nodes", json.dumps(read).encode())
        report = json.loads(message.data) | {"node": "edge-3"}
        answer = await ask(ingest, f"{NODES}.ingest.edge-1", report)
        assert "error" not in answer, answer


def main():
    passwords()
    failed = False
    with tempfile.TemporaryDirectory(prefix="portcullis-live-") as scratch:
        with Server(CONFIG, scratch) as server:
            cluster = Cluster(server, Path(scratch))
            try:
                for test in TESTS:
                    try:
                        test(cluster)
                        print(f"test accounts_live::{test.__name__} ... ok", flush=True)
                    except Exception:  # Whatever it is, the test failed.
                        failed = True
                        print(f"test accounts_live::{test.__name__} ... FAILED\n{traceback.format_exc()}", flush=True)
                        for role in cluster.roles:
                            print(f"--- {role.role} of {role.node}\n{role.log.read_text()[-4000:]}", file=sys.stderr)
                        # What follows would fail for the same reason.
                        break
            finally:
                cluster.kill()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
