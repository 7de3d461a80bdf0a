#!/usr/bin/env python3
"""Follows Portcullis over NATS: who is banned now, and what happened.

    consumer.py bans   [--once]                 the ban set, then every change of it
    consumer.py events [--once] [--state FILE]  every event kept, then every new one; goes on where FILE says it stopped

One JSON object a line on stdout, everything else on stderr. The connection comes from the environment: see README.md.
To do something of your own, change `on_banned`, `on_lifted` and `on_event` below; nothing else needs to change.

How it misses nothing: a live message is at most once, so it only rings a bell. What happened is always read from the
stream, in order, from the last position that was handled. A read goes by direct get, which needs no consumer and no
right to create one. It is repeated when the bell rings, when the connection came back, and now and then in any case.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

BATCH_MAX = 1_000
# A batch whose next message takes longer is asked for again.
READ_TIMEOUT_SECONDS = 5
RETRY_SECONDS = 1
# With --once; a follower waits for its server as long as it takes.
CONNECT_TIMEOUT_SECONDS = 10
# Reads without being rung for: what a lost live message can delay a change at most.
POLL_SECONDS = 10
# The whole ban set is compared anew, for whatever nobody thought of.
RESYNC_SECONDS = 600
# How long a live message may be ahead of the stream, which stores it on several servers first.
ANNOUNCED_SECONDS = 5
# An event may be stored twice when a detector takes over from another; both have the same id.
RECENT_IDS_MAX = 1_000
# A replica may lag behind what was read from another one; after that many attempts its answer counts.
STALE_READS_MAX = 5

log = logging.getLogger("portcullis-consumer")


def on_banned(target: str, expires_at: str | None, record: dict) -> None:
    """`target` is banned until `expires_at` (None = for good); takes the place of what was said of it before."""
    emit({"change": "banned", "target": target, "expires_at": expires_at, "record": record})


def on_lifted(target: str) -> None:
    """`target` is not banned any more."""
    emit({"change": "lifted", "target": target})


def on_event(event: dict) -> None:
    """Something happened. Called again for the same event only when the process died before its position was saved."""
    emit(event)


def emit(value: dict) -> None:
    # ASCII only: paths and user agents come from strangers.
    print(json.dumps(value, separators=(",", ":")))


class ReadFailed(Exception):
    """A read that is worth repeating."""


@dataclass(frozen=True)
class Stored:
    """A message as a stream keeps it."""

    sequence: int
    time: str
    subject: str
    headers: dict
    data: bytes

    @property
    def is_removal(self) -> bool:
        """Whether it marks a removed key."""
        return "KV-Operation" in self.headers or "Nats-Marker-Reason" in self.headers


class Stream:
    """Reads of one stream, limited to some of its subjects."""

    def __init__(self, nc: Client, name: str, subjects: str) -> None:
        self.nc, self.name, self.subjects = nc, name, subjects

    async def after(self, sequence: int) -> AsyncIterator[list[Stored]]:
        """All messages after `sequence`, in order, in batches."""
        pending = 1
        while pending:
            request = {"seq": sequence + 1, "batch": BATCH_MAX, "next_by_subj": self.subjects}
            batch, pending = await self._get(request)
            if batch:
                yield batch
                sequence = batch[-1].sequence

    async def first_from(self, sequence: int) -> Stored | None:
        """The first message at `sequence` or later."""
        batch, _ = await self._get({"seq": max(sequence, 1), "batch": 1, "next_by_subj": self.subjects})
        return batch[0] if batch else None

    async def last(self) -> Stored | None:
        """The newest message."""
        batch, _ = await self._get({"last_by_subj": self.subjects})
        return batch[0] if batch else None

    async def _get(self, request: dict) -> tuple[list[Stored], int]:
        inbox = self.nc.new_inbox()
        try:
            answers = await self.nc.subscribe(inbox)
            try:
                await self.nc.publish(f"$JS.API.DIRECT.GET.{self.name}", json.dumps(request).encode(), reply=inbox)
                return await self._collect(answers, batched="batch" in request)
            finally:
                await answers.unsubscribe()
        except nats.errors.TimeoutError as error:
            raise ReadFailed(f"{self.name} does not answer") from error
        except (nats.errors.Error, OSError) as error:
            raise ReadFailed(f"{self.name} cannot be read: {type(error).__name__}") from error

    async def _collect(self, answers, batched: bool) -> tuple[list[Stored], int]:
        batch: list[Stored] = []
        while True:
            msg = await answers.next_msg(timeout=READ_TIMEOUT_SECONDS)
            headers = msg.headers or {}
            status = headers.get("Status")
            if status == "404":
                return [], 0
            if status not in (None, "204"):
                raise ReadFailed(f"{self.name} answers with status {status}")
            # Each message names the one before it, so that none is lost on the way unseen.
            if batched and batch and headers.get("Nats-Last-Sequence") != str(batch[-1].sequence):
                raise ReadFailed(f"a part of an answer from {self.name} is missing")
            if status == "204":
                return batch, int(headers.get("Nats-Num-Pending", 0))
            batch.append(stored(msg))
            if not batched:
                return batch, 0


def stored(msg: Msg) -> Stored:
    headers = msg.headers or {}
    try:
        return Stored(
            int(headers["Nats-Sequence"]), headers["Nats-Time-Stamp"], headers["Nats-Subject"], headers, msg.data
        )
    except (KeyError, ValueError) as error:
        raise ReadFailed("an answer without sequence, time or subject") from error


@dataclass
class Bell:
    """Tells the loop that there is something to read."""

    rung: asyncio.Event = field(default_factory=asyncio.Event)
    stopping: bool = False
    resync: bool = True

    def stop(self) -> None:
        self.stopping = True
        self.rung.set()

    def ask_resync(self) -> None:
        self.resync = True
        self.rung.set()

    async def wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.rung.wait(), seconds)
        except asyncio.TimeoutError:
            pass
        self.rung.clear()


class Bans:
    """The ban set, kept equal to the bucket."""

    def __init__(self, nc: Client, prefix: str) -> None:
        self.stream = Stream(nc, f"KV_{prefix}_bans", f"$KV.{prefix}_bans.ban.>")
        self.live = f"{prefix}.state.v1.ban.>"
        self.key_prefix = f"$KV.{prefix}_bans.ban."
        # Target to (end as seconds since the epoch, record).
        self.bans: dict[str, tuple[float, dict]] = {}
        self.position = 0
        self.announced_position = 0
        self.stale_reads = 0
        self.synced_at = 0.0

    def announce(self, msg: Msg) -> None:
        self.announced_position = max(self.announced_position, int((msg.headers or {}).get("Nats-Sequence", 0)))

    def is_behind(self) -> bool:
        return self.position < self.announced_position

    def forget_announced(self) -> None:
        self.announced_position = self.position

    async def resync(self) -> None:
        """Takes the whole set and tells what differs, so that a removal that was never seen is seen now."""
        now, position, found = time.time(), 0, {}
        async for batch in self.stream.after(0):
            for message in batch:
                target, ban = self._decode(message)
                found.pop(target, None)
                if ban is not None and ban[0] > now:
                    found[target] = ban
            position = batch[-1].sequence
        if position < self.position and self.stale_reads < STALE_READS_MAX:
            self.stale_reads += 1
            raise ReadFailed("a server that lags behind has answered")
        self.stale_reads = 0
        for target in self.bans.keys() - found.keys():
            self._lift(target)
        for target, ban in found.items():
            self._ban(target, ban)
        self.position = position
        self.synced_at = time.monotonic()
        emit({"change": "synced", "banned": len(self.bans)})

    async def read(self) -> None:
        async for batch in self.stream.after(self.position):
            now = time.time()
            for message in batch:
                target, ban = self._decode(message)
                if ban is not None and ban[0] > now:
                    self._ban(target, ban)
                else:
                    self._lift(target)
            self.position = batch[-1].sequence

    def tick(self, bell: Bell) -> None:
        """A ban ends by itself, also while nobody can tell us so."""
        now = time.time()
        for target in [target for target, (end, _) in self.bans.items() if end <= now]:
            self._lift(target)
        if time.monotonic() - self.synced_at >= RESYNC_SECONDS:
            bell.ask_resync()

    def _ban(self, target: str, ban: tuple[float, dict]) -> None:
        if self.bans.get(target) != ban:
            self.bans[target] = ban
            on_banned(target, latest_end(ban[1]), ban[1])

    def _lift(self, target: str) -> None:
        if self.bans.pop(target, None) is not None:
            on_lifted(target)

    def _decode(self, message: Stored) -> tuple[str, tuple[float, dict] | None]:
        target = message.subject.removeprefix(self.key_prefix).replace("_", ":")
        if message.is_removal or not message.data:
            return target, None
        try:
            record = json.loads(message.data)
            end = latest_end(record)
            seconds = float("inf") if end is None else datetime.fromisoformat(end.replace("Z", "+00:00")).timestamp()
        except (ValueError, KeyError, TypeError):
            log.warning("record of %s at %d cannot be read", ascii(target), message.sequence)
            return target, None
        return target, (seconds, record)


def latest_end(record: dict) -> str | None:
    """When the last of a record's bans ends; None = never. Times sort as text: all are UTC with milliseconds."""
    ends = [ban["expires_at"] for ban in record["bans"]]
    return None if None in ends else max(ends)


class Events:
    """Every event once, in the order of the stream."""

    def __init__(self, nc: Client, prefix: str, state_file: str | None) -> None:
        self.stream = Stream(nc, f"{prefix}_events".upper(), f"{prefix}.events.v1.>")
        self.live = self.stream.subjects
        self.state_file = state_file
        # Position and time of the last message that was handled, and ids of the newest, oldest first.
        self.position, self.time = 0, ""
        self.recent: dict[str, None] = {}
        self.announced: set[str] = set()
        if state_file is not None:
            self._load(state_file)

    def announce(self, msg: Msg) -> None:
        event_id = id_of(msg.data)
        if event_id is not None and event_id not in self.recent and len(self.announced) < RECENT_IDS_MAX:
            self.announced.add(event_id)

    def is_behind(self) -> bool:
        return bool(self.announced)

    def forget_announced(self) -> None:
        self.announced.clear()

    async def resync(self) -> None:
        """Looks whether the stream is still the one that was read, and whether it still has what comes next."""
        if not self.position:
            return
        last, first = await self.stream.last(), await self.stream.first_from(self.position)
        if last is None:
            return
        is_shorter = last.sequence < self.position and sortable(last.time) > sortable(self.time)
        is_other = first is not None and first.sequence == self.position and first.time != self.time
        if is_shorter or is_other:
            log.warning("the stream was made anew, reading it from its beginning")
            self.position = 0
        elif first is not None and first.sequence > self.position + 1:
            log.warning("%d events were removed before they were read", first.sequence - self.position - 1)

    async def read(self) -> None:
        async for batch in self.stream.after(self.position):
            for message in batch:
                self._take(message)
            self.position, self.time = batch[-1].sequence, batch[-1].time
            sys.stdout.flush()
            self._save()

    def tick(self, bell: Bell) -> None:
        pass

    def _take(self, message: Stored) -> None:
        event_id = id_of(message.data)
        if event_id is None:
            log.warning("event at %d cannot be read", message.sequence)
            return
        self.announced.discard(event_id)
        if event_id in self.recent:
            return
        self.recent[event_id] = None
        if len(self.recent) > RECENT_IDS_MAX:
            del self.recent[next(iter(self.recent))]
        on_event(json.loads(message.data))

    def _load(self, path: str) -> None:
        try:
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
            stream = state["stream"]
            self.position, self.time = int(state["sequence"]), str(state["time"])
            self.recent = dict.fromkeys(state["recent"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no state of this program; remove it to read everything again") from error
        if stream != self.stream.name:
            raise ValueError(f"{path} belongs to the stream {stream}")

    def _save(self) -> None:
        """Replaces the file as a whole, so that a crash leaves the old or the new one."""
        if self.state_file is None:
            return
        state = {"stream": self.stream.name, "sequence": self.position, "time": self.time, "recent": list(self.recent)}
        folder = os.path.dirname(os.path.abspath(self.state_file))
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.state_file)


def id_of(data: bytes) -> str | None:
    try:
        event_id = json.loads(data)["id"]
    except (ValueError, KeyError, TypeError):
        return None
    return event_id if isinstance(event_id, str) else None


def sortable(stamp: str) -> str:
    """The server leaves out trailing zeros of a fraction."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return f"{whole}.{fraction:0<9}"


async def follow(source: Bans | Events, nc: Client, bell: Bell, once: bool) -> None:
    """Keeps `source` up to date until the bell stops it, or once."""

    async def announce(msg: Msg) -> None:
        source.announce(msg)
        bell.rung.set()

    await nc.subscribe(source.live, cb=announce)
    failures, announced_at, read_at = 0, time.monotonic(), float("-inf")
    while not bell.stopping:
        try:
            if bell.resync:
                await source.resync()
                bell.resync = False
            await source.read()
        except ReadFailed as error:
            failures += 1
            if once and failures > STALE_READS_MAX:
                raise
            log.warning("%s; trying again", error)
            bell.resync = True
            await asyncio.sleep(RETRY_SECONDS)
            continue
        sys.stdout.flush()
        failures, read_at = 0, time.monotonic()
        if once:
            return
        # A live message was ahead of the stream: look again, soon and then less often.
        if source.is_behind():
            if read_at - announced_at < ANNOUNCED_SECONDS:
                await asyncio.sleep(min(0.5, 0.005 + (read_at - announced_at) / 4))
                continue
            log.warning("something was announced that the stream does not show")
            source.forget_announced()
            bell.ask_resync()
        while not bell.stopping and time.monotonic() - read_at < POLL_SECONDS:
            await bell.wait(1)
            source.tick(bell)
            sys.stdout.flush()
            if source.is_behind() or bell.resync:
                break
        announced_at = time.monotonic()


async def connect(bell: Bell) -> Client:
    """Connects as the environment says and keeps at it, also before the first success."""
    said: set[str] = set()

    async def on_error(error: Exception) -> None:
        # Once for each outage: what a stranger or a broken network can repeat does not fill the log.
        text = f"{type(error).__name__}: {error}"
        if text not in said:
            said.add(text)
            log.warning("NATS: %s", text)

    async def on_reconnect() -> None:
        said.clear()
        log.info("connected again")
        bell.ask_resync()

    async def on_close() -> None:
        bell.stop()

    options = {
        "servers": os.environ.get("NATS_URL", "nats://127.0.0.1:4222").split(","),
        "user": os.environ.get("NATS_USER"),
        "password": password(),
        "user_credentials": os.environ.get("NATS_CREDS"),
        "nkeys_seed": os.environ.get("NATS_NKEY"),
        "tls": tls(),
    }
    return await nats.connect(
        **{name: value for name, value in options.items() if value is not None},
        name="portcullis-consumer",
        max_reconnect_attempts=-1,
        reconnect_time_wait=RETRY_SECONDS,
        ping_interval=10,
        error_cb=on_error,
        reconnected_cb=on_reconnect,
        closed_cb=on_close,
    )


def password() -> str | None:
    if "NATS_PASSWORD_FILE" in os.environ:
        with open(os.environ["NATS_PASSWORD_FILE"], encoding="utf-8") as file:
            return file.read().strip()
    return os.environ.get("NATS_PASSWORD")


def tls() -> ssl.SSLContext | None:
    """TLS when the server asks for it or the URL says `tls://`; this adds a CA of your own and a client certificate."""
    ca, cert = os.environ.get("NATS_CA"), os.environ.get("NATS_CERT")
    if ca is None and cert is None:
        return None
    context = ssl.create_default_context(cafile=ca)
    if cert is not None:
        context.load_cert_chain(cert, os.environ.get("NATS_KEY"))
    return context


async def run(args: argparse.Namespace) -> int:
    bell = Bell()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, bell.stop)
    connecting = asyncio.ensure_future(connect(bell))
    stopping = asyncio.ensure_future(bell.rung.wait())
    limit = CONNECT_TIMEOUT_SECONDS if args.once else None
    await asyncio.wait({connecting, stopping}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not connecting.done():
        connecting.cancel()
        if bell.stopping:
            return 0
        raise ReadFailed("no connection")
    nc = await connecting
    prefix = os.environ.get("PORTCULLIS_PREFIX", "portcullis")
    source = Bans(nc, prefix) if args.what == "bans" else Events(nc, prefix, args.state)
    log.info("connected, following %s", args.what)
    await follow(source, nc, bell, args.once)
    if nc.is_closed:
        log.error("the connection was closed for good: %s", type(nc.last_error).__name__)
        return 1
    await nc.close()
    return 0


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    parser = argparse.ArgumentParser(description="Follows Portcullis over NATS.")
    kinds = parser.add_subparsers(dest="what", required=True)
    bans = kinds.add_parser("bans", help="the ban set, then every change of it")
    events = kinds.add_parser("events", help="every event kept, then every new one")
    events.add_argument("--state", metavar="FILE", help="where to keep the position between runs")
    for kind in (bans, events):
        kind.add_argument("--once", action="store_true", help="stop when everything that is there was told")
    try:
        return asyncio.run(run(parser.parse_args()))
    except BrokenPipeError:
        # Nobody reads any more, so that Python's own last flush must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ReadFailed, nats.errors.Error, OSError, ValueError) as error:
        log.error("%s: %s", type(error).__name__, error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
