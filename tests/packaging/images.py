"""Makes the images of the cluster where there is no registry: for compose.py.

Base images and compilers are stand-ins, programs are not: Debian is as mmdebstrap makes it, with a directory of packages for
its mirror; NATS and Traefik are the released programs, by PyPI; the compiler hands out the program that is built already.
`portcullis` is then built as deploy/Dockerfile says, all of it.
"""

import re
import shutil
import tempfile
from pathlib import Path

import yaml

from machines import run

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy" / "compose" / "cluster" / "compose.yaml"

# Takes the place of cargo: it has the one program that is asked for.
CARGO = """#!/bin/sh -e
[ "$*" = "build --release --locked --package deploy" ]
for file in Cargo.toml Cargo.lock proto/src ingest/src detect/src enforce/src deploy/src tests/src; do [ -e "$file" ]; done
install -D /usr/local/bin/portcullis target/release/portcullis
"""
# As in Traefik's image: what begins with a dash is for Traefik.
ENTRYPOINT = """#!/bin/sh
set -e
[ "${1#-}" = "$1" ] || set -- traefik "$@"
exec "$@"
"""


def bases():
    """The images that deploy/Dockerfile begins from: the compiler's, and Debian's."""
    return re.findall(r"^FROM (\S+)", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)


def services():
    """The images that compose.yaml names, and is not built from here."""
    images = {service["image"] for service in yaml.safe_load(COMPOSE.read_text())["services"].values()}
    return sorted(image for image in images if ":" in image)


def make(machine, tools, portcullis):
    """Makes all images on `machine`; the names of those that the cluster needs."""
    compiler, debian = bases()
    nats, traefik = services()
    programs = tools / "programs" / "bin"
    for image, ask in ((nats, "nats-server --version"), (traefik, "traefik version")):
        version = run(programs / ask.split()[0], ask.split()[1])
        assert image.partition(":")[2].strip("v") + "." in version, f"{image} is wanted, requirements.txt has {version}"
    machine.docker("import", tools / "base.tar", debian)
    build(machine, nats, "scratch", {"nats-server": programs / "nats-server"},
          'COPY nats-server /\nENTRYPOINT ["/nats-server"]\nCMD ["--config", "nats-server.conf"]')
    build(machine, traefik, debian, {"traefik": programs / "traefik", "entrypoint.sh": ENTRYPOINT},
          'COPY traefik /usr/local/bin/\nCOPY entrypoint.sh /\nENTRYPOINT ["/entrypoint.sh"]\nCMD ["traefik"]')
    build(machine, compiler, debian, {"portcullis": portcullis, "cargo": CARGO}, "COPY portcullis cargo /usr/local/bin/")
    machine.docker("build", "-f", "deploy/Dockerfile", "-t", "portcullis", ".", cwd=ROOT)
    return [nats, traefik, "portcullis"]


def build(machine, name, base, files, instructions):
    """An image of `files` (each a text, or where it is) on `base`."""
    with tempfile.TemporaryDirectory(dir=machine.folder) as folder:
        for file, content in files.items():
            if isinstance(content, str):
                (Path(folder) / file).write_text(content)
            else:
                shutil.copy(content, Path(folder) / file)
            (Path(folder) / file).chmod(0o755)
        (Path(folder) / "Dockerfile").write_text(f"FROM {base}\n{instructions}\n")
        machine.docker("build", "-t", name, folder)
