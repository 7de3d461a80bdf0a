"""What the tests of the consumers run on: a nats-server, the part of a detector, and a consumer as a process."""

import asyncio
import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import nats
import nats.errors

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "deploy" / "schema"
DEADLINE_SECONDS = 60
DETECT_PASSWORD, READER_PASSWORD = "detect-secret-1f9a", "reader-secret-77c2"

EXPORTS = [
    ("service", "$JS.API.DIRECT.GET.KV_portcullis_bans", "response_type: stream"),
    ("service", "$JS.API.DIRECT.GET.PORTCULLIS_EVENTS", "response_type: stream"),
    ("stream", "portcullis.events.v1.>", ""),
    ("stream", "portcullis.state.v1.ban.>", ""),
]


async def until(condition, what: str):
    """Waits for a state, looking often; the result of `condition` once it is true."""
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        result = condition()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return result
        await asyncio.sleep(0.02)
    raise AssertionError(f"never happened: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """One nats-server with an account that owns the streams and one that may only read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.process = None

    def start(self, port: int | None = None) -> None:
        """On another port nobody who knows the usual one is there to see what happens."""
        listen = port or self.port
        config = self.folder / f"server-{listen}.conf"
        exports = "\n".join(f'{{{kind}: "{subject}"\n{more}}}' for kind, subject, more in EXPORTS)
        imports = "\n".join(f'{{{kind}: {{account: DETECT, subject: "{subject}"}}}}' for kind, subject, _ in EXPORTS)
        config.write_text(
            f'listen: "127.0.0.1:{listen}"\njetstream {{ store_dir: "{self.folder}/data" }}\n'
            f"accounts {{\nDETECT {{ jetstream: enabled\nusers: [{{user: detect, password: {DETECT_PASSWORD}}}]\n"
            f"exports: [\n{exports}\n] }}\n"
            f"READERS {{ users: [{{user: reader, password: {READER_PASSWORD}}}]\nimports: [\n{imports}\n] }}\n}}\n"
        )
        log = open(self.folder / "server.log", "ab")
        binary = os.environ.get("NATS_SERVER", "nats-server")
        self.process = subprocess.Popen([binary, "-c", str(config)], stdout=log, stderr=log)

    def kill(self, with_signal: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(with_signal)
            self.process.wait()
            self.process = None


class Detect:
    """Writes what a detector writes."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.nc = None

    async def connect(self, port: int | None = None) -> None:
        url = f"nats://127.0.0.1:{port or self.server.port}"

        async def attempt():
            try:
                self.nc = await nats.connect(
                    url, user="detect", password=DETECT_PASSWORD, allow_reconnect=False, reconnect_time_wait=0, error_cb=quiet
                )
                await self.api("INFO", {})
                return True
            except (OSError, nats.errors.Error):
                return False

        await until(attempt, "the server answers")

    async def close(self) -> None:
        await self.nc.close()

    async def api(self, what: str, body: dict) -> dict:
        answer = json.loads((await self.nc.request(f"$JS.API.{what}", json.dumps(body).encode(), timeout=5)).data)
        assert "error" not in answer, f"{what}: {answer['error']}"
        return answer

    async def create_streams(self) -> None:
        bucket = {
            "name": "KV_portcullis_bans",
            "subjects": ["$KV.portcullis_bans.>"],
            "max_msgs_per_subject": 1,
            "allow_direct": True,
            "allow_msg_ttl": True,
            "allow_atomic": True,
            "allow_rollup_hdrs": True,
            "deny_delete": True,
            "discard": "new",
            "republish": {"src": "$KV.portcullis_bans.>", "dest": "portcullis.state.v1.>"},
        }
        await self.create(bucket)
        await self.create_events()

    async def create_events(self) -> None:
        await self.create(
            {
                "name": "PORTCULLIS_EVENTS",
                "subjects": ["portcullis.events.v1.>"],
                "allow_direct": True,
                "max_age": 30 * 86_400 * 10**9,
            }
        )

    async def create(self, stream: dict) -> None:
        await self.api(f"STREAM.CREATE.{stream['name']}", {"storage": "file", "retention": "limits"} | stream)

    async def publish(self, subject: str, data: bytes, headers: dict | None = None) -> dict:
        answer = json.loads((await self.nc.request(subject, data, timeout=5, headers=headers)).data)
        assert "error" not in answer, f"{subject}: {answer}"
        return answer

    async def put(self, record: dict) -> None:
        await self.publish(ban_key(record["target"]), json.dumps(record).encode())

    async def remove(self, target: str, marker_seconds: int = 3_600) -> None:
        await self.publish(ban_key(target), b"", {"KV-Operation": "DEL", "Nats-TTL": str(marker_seconds)})

    async def tell(self, event: dict, dedupe: bool = True) -> dict:
        kind = event["type"].split(".")[2]
        rule = event["data"].get("rule", "system")
        headers = {"Nats-Msg-Id": event["id"]} if dedupe else None
        return await self.publish(f"portcullis.events.v1.{kind}.{rule}", json.dumps(event).encode(), headers)


async def quiet(_: Exception) -> None:
    """A refused attempt is tried again."""


def ban_key(target: str) -> str:
    return "$KV.portcullis_bans.ban." + target.replace(":", "_")


def examples(message: str) -> dict:
    """The examples of the AsyncAPI document: made by the constructors that make real events."""
    document = json.loads((SCHEMAS / "asyncapi.json").read_text())
    return {it["name"]: it["payload"] for it in document["components"]["messages"][message]["examples"]}


def target_of(number: int) -> str:
    """Addresses and networks of both families, each in its canonical text."""
    high, low = divmod(number, 256)
    forms = (f"203.0.{high}.{low}", f"10.{high}.{low}.0/24", f"2001:db8:{number + 1:x}::/64", f"2001:db8::{number + 1:x}")
    return forms[number % 4]


def record(number: int, seconds: float | None = 3_600) -> dict:
    """A record as detect writes it, with a ban that ends in `seconds`."""
    made = copy.deepcopy(examples("banned")["one ban" if seconds is not None else "a permanent ban"])
    made["target"] = made["bans"][0]["target"] = target_of(number)
    if seconds is not None:
        end = datetime.now(timezone.utc) + timedelta(seconds=seconds)
        made["bans"][0]["expires_at"] = end.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return made


def event(number: int) -> dict:
    """An event as detect publishes it."""
    kinds = list(examples("event").values())
    made = copy.deepcopy(kinds[number % len(kinds)])
    made["id"] = f"{made['id']}/{number}"
    return made


class Consumer:
    """A consumer as a process; its lines are read as they come."""

    def __init__(self, command: list[str], server: Server, password: str = READER_PASSWORD) -> None:
        self.command = command
        self.env = os.environ | {
            "NATS_URL": f"nats://127.0.0.1:{server.port}",
            "NATS_USER": "reader",
            "NATS_PASSWORD": password,
        }
        self.lines: list[dict] = []
        self.log = ""

    async def start(self, *args: str) -> None:
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(
            *self.command, *args, env=self.env, stdout=pipe, stderr=pipe, limit=2**22
        )
        self.readers = [asyncio.create_task(self._read_lines()), asyncio.create_task(self._read_log())]

    async def _read_lines(self) -> None:
        async for line in self.process.stdout:
            self.lines.append(json.loads(line))

    async def _read_log(self) -> None:
        async for line in self.process.stderr:
            self.log += line.decode()

    async def end(self) -> int:
        """Waits until it has ended by itself."""
        code = await asyncio.wait_for(self.process.wait(), DEADLINE_SECONDS)
        await asyncio.gather(*self.readers)
        for secret in (READER_PASSWORD, DETECT_PASSWORD):
            assert secret not in self.log, "a password in the log"
        return code

    async def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> int:
        if self.process.returncode is None:
            self.process.send_signal(with_signal)
        return await self.end()

    async def run_once(self, *args: str) -> list[dict]:
        await self.start(*args, "--once")
        code = await self.end()
        assert code == 0, f"exit {code}: {self.log}"
        return self.lines

    def holds(self) -> dict[str, dict]:
        """The ban set that its lines add up to; a change that changes nothing is a mistake."""
        bans: dict[str, dict] = {}
        for line in self.lines:
            if line["change"] == "banned":
                assert bans.get(line["target"]) != line["record"], f"told twice: {line['target']}"
                bans[line["target"]] = line["record"]
            elif line["change"] == "lifted":
                assert bans.pop(line["target"], None) is not None, f"lifted and was not banned: {line['target']}"
        return bans

    def count(self, change: str) -> int:
        return sum(line.get("change") == change for line in self.lines)


def prepare_node(source: Path, name: str) -> Path | None:
    """The packages of `source/package-lock.json` in a folder under target/, with what else `source` holds beside them;
    None where there is no npm."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        return None
    folder = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "consumers" / name
    folder.mkdir(parents=True, exist_ok=True)
    lock = (source / "package-lock.json").read_text()
    stamp = folder / "installed"
    for file in source.iterdir():
        if file.is_file():
            shutil.copy(file, folder / file.name)
    if not stamp.exists() or stamp.read_text() != lock:
        subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True)
        stamp.write_text(lock)
    return folder
