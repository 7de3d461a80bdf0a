#!/usr/bin/env python3
"""Holds the systemd units and the Compose file to deploy/nats: every role logs in as a user that NATS knows, with a
password, and Portcullis accepts what it is given.

    tests/packaging/logins.py   needs portcullis (PORTCULLIS, else target/debug/portcullis) and the package PyYAML
"""

import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
PORTCULLIS = os.environ.get("PORTCULLIS") or str(TARGET / "debug" / "portcullis")
ROLES = ("ingest", "detect", "enforce")
ADDRESSES = {"NATS_1": "192.0.2.1", "NATS_2": "192.0.2.2", "NATS_3": "192.0.2.3"}


def users():
    """Every user that deploy/nats knows."""
    texts = (file.read_text() for file in (DEPLOY / "nats" / "users").glob("*.conf"))
    return {user for text in texts for user in re.findall(r"^\s*\{?\s*user: ([a-z0-9-]+)", text, re.MULTILINE)}


def units(folder):
    """Each role's environment as systemd would set it on the host edge-1."""
    for role in ROLES:
        text = (DEPLOY / "systemd" / f"portcullis-{role}.service").read_text()
        environment = dict(re.findall(r"^Environment=(\w+)=(.*)$", text, re.MULTILINE))
        for specifier, value in {"%H": "edge-1", "%d": folder, "%S": folder, "%t": folder}.items():
            environment = {key: text.replace(specifier, str(value)) for key, text in environment.items()}
        yield role, "edge-1", environment


def services(folder):
    """Each role's environment as Compose would set it."""
    compose = yaml.safe_load((DEPLOY / "compose" / "cluster" / "compose.yaml").read_text())
    for service in compose["services"].values():
        if service["image"] != "portcullis":
            continue
        environment = {key: re.sub(r"\$\{(\w+)[^}]*\}", lambda found: ADDRESSES[found[1]], value)
                       for key, value in service["environment"].items()}
        [secret] = service["secrets"]
        assert environment["PORTCULLIS__BUS__PASSWORD_FILE"] == f"/run/secrets/{secret['target']}", service
        assert secret["source"] == environment["PORTCULLIS__BUS__USER"], secret
        file = compose["secrets"][secret["source"]]["file"]
        assert file == f"./secrets/{secret['source']}", file
        [role] = service["command"]
        yield role, environment["PORTCULLIS__NODE"], environment | {"PORTCULLIS__BUS__PASSWORD_FILE": f"{folder}/bus"}


def check(config, environment):
    checked = subprocess.run([PORTCULLIS, "check", "-c", config], env=environment | {"PATH": os.environ["PATH"]},
                             capture_output=True, text=True)
    assert checked.returncode == 0, f"{environment}\n{checked.stdout}{checked.stderr}"


def logs_in(roles, config, folder):
    seen = set()
    for role, node, environment in roles:
        assert environment["PORTCULLIS__BUS__USER"] == f"{role}-{node}", environment
        assert environment["PORTCULLIS__BUS__USER"] in users(), environment
        assert Path(environment["PORTCULLIS__BUS__PASSWORD_FILE"]).parent == Path(folder), environment
        check(config, environment)
        seen.add(role)
    assert seen == set(ROLES), seen


def every_unit_logs_in_as_a_user_that_nats_knows(folder):
    config = Path(folder) / "portcullis.toml"
    config.write_text('[bus]\nkind = "nats"\nurls = ["nats://192.0.2.1:4222"]\nreplicas = 3\n'
                      '[ingest.sources.traefik]\ntype = "file"\ninclude = ["/var/log/traefik/access.log"]\n')
    logs_in(units(folder), config, folder)


def every_service_of_compose_logs_in_as_a_user_that_nats_knows(folder):
    logs_in(services(folder), DEPLOY / "compose" / "cluster" / "portcullis" / "portcullis.toml", folder)


def main():
    failed = False
    for test in (every_unit_logs_in_as_a_user_that_nats_knows, every_service_of_compose_logs_in_as_a_user_that_nats_knows):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "bus").write_text("secret\n")
            try:
                test(folder)
                print(f"test logins::{test.__name__} ... ok", flush=True)
            except Exception:  # Whatever it is, the test failed.
                failed = True
                print(f"test logins::{test.__name__} ... FAILED\n{traceback.format_exc()}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
