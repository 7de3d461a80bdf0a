"""Starts deploy/compose/single-host as its README says, on the first machine of compose.py, after the cluster is gone: a
Traefik whose port Docker publishes, a service that Docker's labels announce, and bans."""

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from machines import DEADLINE_S, run, until

ROOT = Path(__file__).resolve().parents[2]
LOCK = Path("/run/xtables.lock")
CLIENT, OTHER = "203.0.113.66", "203.0.113.67"
OFFENCES = 10
"""As many as its configuration takes."""
PAGE, PORT = "/varz", 8222
"""What every NATS server has."""


def docker_announces_a_service_and_status_finds_nothing_wrong(cluster):
    machine = cluster.machines[1]
    if machine.project.exists():
        machine.compose("down", "--volumes")
    machine.project = machine.folder / "single-host"
    shutil.copytree(ROOT / "deploy" / "compose" / "single-host", machine.project)
    (machine.project / ".env").write_text(f"DOCKER_SOCKET={machine.volatile}/docker.sock\n")
    with lock():
        machine.compose("up", "-d")
    machine.docker("run", "--detach", "--restart", "unless-stopped", "--network", "single-host_default",
                   "--label", "traefik.enable=true", "--label", f"traefik.http.routers.page.rule=Path(`{PAGE}`)",
                   "--label", f"traefik.http.services.page.loadbalancer.server.port={PORT}", "nats:2.12", "-m", str(PORT))
    until("the service answers", lambda: answers(machine))
    assert cluster.get(OTHER, 1, PAGE) == 200
    until("status shows whose request that was", lambda: OTHER in verb(machine, "status"))
    assert "iptables" in verb(machine, "status")


def what_is_switched_off_is_right_when_switched_on(cluster):
    machine = cluster.machines[1]
    config = machine.project / "portcullis" / "portcullis.toml"
    text = config.read_text()
    switched_on = re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE)
    assert switched_on != text
    other = machine.project / "portcullis" / "all.toml"
    other.write_text(switched_on)
    secrets = machine.project / "secrets"
    secrets.mkdir(mode=0o700)
    for name, secret in (("cloudflare", "c" * 40), ("telegram", "123456:" + "t" * 35)):
        (secrets / name).write_text(f"{secret}\n")
        (secrets / name).chmod(0o600)
    try:
        machine.compose("run", "--rm", "--volume", f"{secrets}:/run/secrets:ro", "portcullis", "check", "-c",
                        "/etc/portcullis/all.toml")
    finally:
        other.unlink()


def a_client_of_a_published_port_is_banned(cluster):
    assert cluster.get(CLIENT, 1, PAGE) == 200
    cluster.offend(CLIENT, 1, range(OFFENCES))
    until("it is silent", lambda: cluster.get(CLIENT, 1, PAGE) == 0)
    assert cluster.get(OTHER, 1, PAGE) == 200
    assert "raw/PREROUTING" in verb(cluster.machines[1], "explain", CLIENT)


def a_restart_and_a_reboot_free_nobody(cluster):
    machine = cluster.machines[1]
    machine.compose("restart", "portcullis")
    assert cluster.get(CLIENT, 1, PAGE) == 0
    kept = machine.folder / "data" / "volumes" / "single-host_state" / "_data" / "enforce.json"
    until("the set is on disk", lambda: CLIENT in kept.read_text())
    with lock():
        machine.reboot()
        for client in cluster.clients.values():
            # The machine has another wire address now.
            client.run("ip", "neigh", "flush", "all")
        until("the service answers", lambda: answers(machine))
        until("others are served", lambda: cluster.get(OTHER, 1, PAGE) == 200)
        until("it is silent", lambda: cluster.get(CLIENT, 1, PAGE) == 0)


def a_restart_of_docker_frees_nobody(cluster):
    """Docker makes its own rules anew."""
    machine = cluster.machines[1]
    with lock():
        machine.restart_docker()
        until("the service answers", lambda: answers(machine))
    assert cluster.get(CLIENT, 1, PAGE) == 0
    assert cluster.get(OTHER, 1, PAGE) == 200
    until("status finds nothing wrong", lambda: verb_code(machine, "status") == 0)


def another_back_end_takes_over_beside_docker(cluster):
    machine = cluster.machines[1]
    config = machine.project / "portcullis" / "portcullis.toml"
    text = config.read_text()
    section = "[enforce.firewall]\n"
    assert section in text
    config.write_text(text.replace(section, section + 'backend = "nftables"\n'))
    try:
        machine.compose("restart", "portcullis")
        until("only nftables has it", lambda: CLIENT in machine.namespace.run("nft", "list", "ruleset", "inet")
              and "portcullis" not in machine.namespace.run("ipset", "save"))
        assert cluster.get(CLIENT, 1, PAGE) == 0
        assert cluster.get(OTHER, 1, PAGE) == 200
    finally:
        config.write_text(text)
    machine.compose("restart", "portcullis")
    until("only iptables has it", lambda: CLIENT in machine.namespace.run("ipset", "save")
          and "portcullis" not in machine.namespace.run("nft", "list", "ruleset", "inet"))
    assert cluster.get(CLIENT, 1, PAGE) == 0


def an_unbanned_client_is_served(cluster):
    verb(cluster.machines[1], "unban", CLIENT)
    until("it is served", lambda: cluster.get(CLIENT, 1, PAGE) == 200)


def a_rotation_loses_no_line(cluster):
    machine = cluster.machines[1]
    cluster.offend(CLIENT, 1, range(5))
    logs, config, state = machine.project / "logs", machine.project / "logrotate.conf", machine.project / "logrotate.state"
    text = config.read_text()
    assert "/opt/traefik" in text
    config.write_text(text.replace("/opt/traefik", str(machine.project)))
    config.chmod(0o644)
    run("logrotate", "--force", "--state", state, config, env={**os.environ, **machine.environment})
    until("Traefik has a new log", (logs / "access.log").exists)
    cluster.offend(CLIENT, 1, range(5, OFFENCES))
    until("it is silent", lambda: cluster.get(CLIENT, 1, PAGE) == 0)
    verb(machine, "unban", CLIENT)


def a_client_behind_a_proxy_is_refused_before_the_service(cluster):
    """`OTHER` is a proxy here, which says whose requests it sends."""
    machine = cluster.machines[1]
    traefik, portcullis = machine.project / "traefik" / "traefik.yaml", machine.project / "portcullis" / "portcullis.toml"
    before = {path: path.read_text() for path in (traefik, portcullis)}
    trusted, proxies = "      trustedIPs:\n", 'trusted_proxies = ["cloudflare"]'
    assert trusted in before[traefik] and proxies in before[portcullis]
    traefik.write_text(before[traefik].replace(trusted, f"{trusted}        - {OTHER}\n"))
    portcullis.write_text(before[portcullis].replace(proxies, f'trusted_proxies = ["cloudflare", "{OTHER}"]')
                          + f'\n[enforce.forwarded_for]\nenabled = true\nports = ["{PORT}"]\n')
    machine.namespace.run("sysctl", "--write", "net.bridge.bridge-nf-call-iptables=1")
    machine.compose("restart", "traefik", "portcullis")

    def ask(client, path=PAGE):
        return cluster.get(OTHER, 1, path, f"X-Forwarded-For: {client}")

    banned, neighbour = "192.0.2.1", "192.0.2.10"
    until("the service answers", lambda: answers(machine))
    assert ask(banned) == 200
    for number in range(OFFENCES):
        assert ask(banned, f"/missing-{number}") == 404
    until("Traefik cannot reach the service for it", lambda: ask(banned) == 502)
    assert ask(neighbour) == 200
    assert cluster.get(OTHER, 1, PAGE) == 200, "the proxy itself"
    assert "via_proxy" in verb(machine, "explain", banned, "--json")
    until("status finds nothing wrong", lambda: verb_code(machine, "status") == 0)
    verb(machine, "unban", banned)
    until("it is served", lambda: ask(banned) == 200)
    for path, text in before.items():
        path.write_text(text)
    machine.compose("restart", "traefik", "portcullis")
    until("no rule is left between Traefik and the service",
          lambda: "PORTCULLIS-FWD" not in machine.namespace.run("iptables-save"))


def a_teardown_leaves_nothing(cluster):
    machine = cluster.machines[1]
    machine.compose("stop", "portcullis")
    assert "portcullis" in machine.namespace.run("ipset", "save")
    with lock():
        machine.compose("run", "--rm", "portcullis", "enforce", "--teardown")
    left = machine.namespace.run("ipset", "save") + "".join(
        machine.namespace.run(program) for program in ("iptables-save", "ip6tables-save"))
    assert "portcullis" not in left.lower(), left


TESTS = [
    docker_announces_a_service_and_status_finds_nothing_wrong,
    what_is_switched_off_is_right_when_switched_on,
    a_client_of_a_published_port_is_banned,
    a_restart_and_a_reboot_free_nobody,
    a_restart_of_docker_frees_nobody,
    another_back_end_takes_over_beside_docker,
    an_unbanned_client_is_served,
    a_rotation_loses_no_line,
    a_client_behind_a_proxy_is_refused_before_the_service,
    a_teardown_leaves_nothing,
]


def ask(machine, *words):
    command = ["docker", "compose", "exec", "-T", "portcullis", "portcullis", *words]
    return subprocess.run(command, env=machine.environment, cwd=machine.project, capture_output=True, text=True,
                          timeout=DEADLINE_S, check=False)


def verb(machine, *words):
    """What a verb printed, whatever its exit code."""
    return ask(machine, *words).stdout


def verb_code(machine, *words):
    return ask(machine, *words).returncode


def answers(machine):
    """Asked from the host itself, which nobody bans for asking too early."""
    command = ["curl", "--silent", "--fail", "--output", "/dev/null", "--max-time", str(DEADLINE_S),
               f"http://127.0.0.1{PAGE}"]
    return subprocess.run([*machine.namespace.enter(), *command], check=False).returncode == 0


@contextlib.contextmanager
def lock():
    """Step 3 of the README; what was not there before is not there after."""
    was_there = LOCK.exists()
    LOCK.touch(mode=0o600)
    try:
        yield
    finally:
        if not was_there:
            LOCK.unlink(missing_ok=True)
