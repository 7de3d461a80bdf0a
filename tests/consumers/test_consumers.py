#!/usr/bin/env python3
"""What third parties read and how: the committed schemas hold for real events, and the worked examples in
deploy/consumers miss nothing and tell nothing twice, through restarts of the server and their own.

Needs the packages in tests/requirements.txt, a nats-server (NATS_SERVER or PATH), and npm for the Node example. Prints
`test consumers::NAME ... ok` or `FAILED` for each test and ends with 1 when one failed.
"""

import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import jsonschema

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench import (
    ROOT, SCHEMAS, Consumer, Detect, Server, event, examples, free_port, prepare_node, record, target_of, until,
)

BANS, EVENTS = 1_500, 300


def validator(name: str):
    schema = json.loads((SCHEMAS / name).read_text())
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


@contextlib.asynccontextmanager
async def bus(folder: Path):
    """A server with both streams, and a detector on it."""
    server = Server(folder)
    detect = Detect(server)
    try:
        server.start()
        await detect.connect()
        await detect.create_streams()
        yield server, detect
        await detect.close()
    finally:
        server.kill()


@contextlib.asynccontextmanager
async def running(consumer: Consumer, *args: str):
    await consumer.start(*args)
    try:
        yield consumer
    finally:
        if consumer.process.returncode is None:
            consumer.process.kill()
            await consumer.process.wait()


@contextlib.asynccontextmanager
async def unseen(server: Server, detect: Detect):
    """The server dies and comes back where only the detector finds it; afterwards it is where it was."""
    await detect.close()
    server.kill()
    port = free_port()
    server.start(port)
    await detect.connect(port)
    yield
    await detect.close()
    # In peace: after a crash, 2.15.1 revives a removed key whose marker has timed out (nats-server issue 8505).
    server.kill(signal.SIGTERM)
    server.start()
    await detect.connect()


# What the schemas say.


def real_events_and_records_hold_to_their_schemas():
    for message, file, count in (("event", "event.v1.schema.json", 6), ("banned", "ban-record.v1.schema.json", 3)):
        of = examples(message)
        assert len(of) == count, f"{len(of)} examples of {message}"
        for name, payload in of.items():
            problems = [error.message for error in validator(file).iter_errors(payload)]
            assert not problems, f"{name}: {problems}"


def a_schema_refuses_what_is_never_written_and_allows_new_fields():
    schema = validator("event.v1.schema.json")
    ban = examples("event")["a ban by a rule"]
    alarm = examples("event")["an alarm"]
    assert schema.is_valid(ban | {"added": 1, "data": ban["data"] | {"added": {"x": 1}}})
    for field in ban:
        assert not schema.is_valid({name: value for name, value in ban.items() if name != field}), field
    for field in ban["data"]:
        data = {name: value for name, value in ban["data"].items() if name != field}
        assert not schema.is_valid(ban | {"data": data}), field
    assert not schema.is_valid(ban | {"data": alarm["data"]})
    assert not schema.is_valid(alarm | {"data": ban["data"]})
    for target in ("", "host", "192.0.2.256", "192.0.2.1/32", "192.0.2.1/33", "::1/128", "2001:DB8::1", "01.2.3.4"):
        assert not schema.is_valid(ban | {"data": ban["data"] | {"target": target}}), target
    for target in map(target_of, range(BANS)):
        assert schema.is_valid(ban | {"data": ban["data"] | {"target": target}}), target
    for moment in ("2026-01-08T14:19:15Z", "2026-01-08T14:19:15.980+00:00", 0):
        assert not schema.is_valid(ban | {"time": moment}), moment


def the_asyncapi_document_is_valid_asyncapi():
    folder = prepare_node(Path(__file__).parent, "asyncapi")
    if folder is None:
        return "no npm"
    schema = json.loads((folder / "node_modules/@asyncapi/specs/schemas/3.0.0.json").read_text())
    document = json.loads((SCHEMAS / "asyncapi.json").read_text())
    problems = list(jsonschema.validators.validator_for(schema)(schema).iter_errors(document))
    assert not problems, problems[0].message
    return None


# What every worked example does. Each takes a way to make a consumer, and a folder.


async def fill_bans(detect: Detect) -> dict[str, dict]:
    """1,500 bans, of which some are permanent, 100 were lifted and one is over."""
    bans = {}
    for number in range(BANS):
        made = record(number, None if number % 10 == 0 else 3_600)
        bans[made["target"]] = made
        await detect.put(made)
    for number in range(0, 200, 2):
        await detect.remove(target_of(number))
        del bans[target_of(number)]
    await detect.put(record(BANS, -1))
    return bans


async def prints_the_current_ban_set(make, folder: Path):
    async with bus(folder) as (server, detect):
        consumer = make(server)
        assert await consumer.run_once("bans") == [{"change": "synced", "banned": 0}]
        bans = await fill_bans(detect)
        consumer = make(server)
        lines = await consumer.run_once("bans")
        assert consumer.holds() == bans
        assert lines[-1] == {"change": "synced", "banned": len(bans)} and len(lines) == len(bans) + 1
        schema = validator("ban-record.v1.schema.json")
        assert all(schema.is_valid(line["record"]) for line in lines[:-1])
        permanent = {line["target"] for line in lines[:-1] if line["expires_at"] is None}
        assert permanent == {target for target, it in bans.items() if it["bans"][0]["expires_at"] is None}


async def follows_the_ban_set(make, folder: Path):
    async with bus(folder) as (server, detect), running(make(server), "bans") as consumer:
        await until(lambda: consumer.count("synced") == 1, "the first snapshot")
        first, second, third = record(1), record(2), record(3, None)
        for made in (first, second, third):
            await detect.put(made)
        await until(lambda: len(consumer.holds()) == 3, "three bans")
        longer = record(2, 7_200)
        await detect.put(longer)
        await detect.remove(first["target"])
        wanted = {second["target"]: longer, third["target"]: third}
        await until(lambda: consumer.holds() == wanted, "an extension and a removal")
        await detect.put(record(4, 4))
        await until(lambda: consumer.count("banned") == 5, "a short ban")
        await until(lambda: consumer.holds() == wanted, "a ban that ends by itself")
        await detect.remove(target_of(4))
        await detect.put(record(5))
        await until(lambda: target_of(5) in consumer.holds(), "the next ban")
        assert await consumer.stop() == 0, consumer.log
        assert consumer.count("lifted") == 2


async def learns_what_was_banned_and_lifted_while_it_was_cut_off(make, folder: Path):
    async with bus(folder) as (server, detect):
        bans = await fill_bans(detect)
        async with running(make(server), "bans") as consumer:
            await until(lambda: consumer.count("synced") == 1, "the first snapshot")
            gone, added = target_of(1), record(BANS + 1)
            async with unseen(server, detect):
                await detect.remove(gone, marker_seconds=1)
                await detect.put(added)

                # Once its marker is gone too, nothing but a whole snapshot tells that the ban is over.
                async def is_unmarked():
                    state = await detect.api("STREAM.INFO.KV_portcullis_bans", {"subjects_filter": "$KV.*.ban.>"})
                    return f"$KV.portcullis_bans.ban.{gone}" not in state["state"]["subjects"]

                await until(is_unmarked, "the server removes the marker")
            del bans[gone]
            bans[added["target"]] = added
            await until(lambda: consumer.holds() == bans, "what was missed")
            await detect.put(record(BANS + 2))
            await until(lambda: target_of(BANS + 2) in consumer.holds(), "a change after that")
            assert await consumer.stop() == 0, consumer.log
            assert "connected again" in consumer.log


async def tells_each_event_once_over_two_runs(make, folder: Path):
    async with bus(folder) as (server, detect):
        state = str(folder / "state.json")
        told = [event(number) for number in range(EVENTS)]
        for made in told[:200]:
            await detect.tell(made)
        # A detector that takes over may publish again, after the server has forgotten the id.
        await detect.tell(told[17], dedupe=False)
        assert await make(server).run_once("events", "--state", state) == told[:200]
        assert await make(server).run_once("events", "--state", state) == []
        for made in told[200:]:
            await detect.tell(made)
        await detect.tell(told[199], dedupe=False)
        lines = await make(server).run_once("events", "--state", state)
        assert lines == told[200:]
        schema = validator("event.v1.schema.json")
        assert all(schema.is_valid(line) for line in lines)


async def follows_events_without_gap_or_double(make, folder: Path):
    async with bus(folder) as (server, detect):
        state, told, lines = str(folder / "state.json"), [event(number) for number in range(EVENTS)], []
        async with running(make(server), "events", "--state", state) as consumer:
            for made in told[:50]:
                await detect.tell(made)
            await until(lambda: len(consumer.lines) >= 50, "live events")
            # Live again, and refused by the stream: a consumer of live messages alone would tell it twice.
            assert (await detect.tell(told[49]))["duplicate"]
            async with unseen(server, detect):
                for made in told[50:150]:
                    await detect.tell(made)
            await until(lambda: len(consumer.lines) >= 150, "events that were missed")
            await detect.tell(told[150])
            await until(lambda: len(consumer.lines) >= 151, "an event after that")
            assert await consumer.stop() == 0, consumer.log
            lines += consumer.lines
        for made in told[151:200]:
            await detect.tell(made)
        async with running(make(server), "events", "--state", state) as consumer:
            await until(lambda: len(consumer.lines) >= 49, "events between two runs")
            for made in told[200:]:
                await detect.tell(made)
            await until(lambda: len(consumer.lines) >= 149, "the last events")
            assert await consumer.stop() == 0, consumer.log
            lines += consumer.lines
        assert lines == told


async def loses_no_event_when_it_is_killed(make, folder: Path):
    async with bus(folder) as (server, detect):
        state, told, seen = str(folder / "state.json"), [event(number) for number in range(EVENTS)], []
        for start in range(0, EVENTS, 100):
            async with running(make(server), "events", "--state", state) as consumer:
                for made in told[start : start + 100]:
                    await detect.tell(made)
                await until(lambda: told[start + 50] in consumer.lines, "events while it runs")
                await consumer.stop(signal.SIGKILL)
                seen += consumer.lines
        seen += await make(server).run_once("events", "--state", state)
        assert {it["id"] for it in seen} == {it["id"] for it in told}


async def reads_a_stream_that_was_made_anew_from_its_beginning(make, folder: Path):
    async with bus(folder) as (server, detect):
        state, told = str(folder / "state.json"), [event(number) for number in range(40)]
        for made in told[:30]:
            await detect.tell(made)
        async with running(make(server), "events", "--state", state) as consumer:
            await until(lambda: len(consumer.lines) == 30, "the old stream")
            await detect.api("STREAM.DELETE.PORTCULLIS_EVENTS", {})
            await detect.create_events()
            for made in told[30:]:
                await detect.tell(made)
            await until(lambda: len(consumer.lines) >= 40, "the new stream")
            assert await consumer.stop() == 0, consumer.log
        assert consumer.lines == told
        assert "made anew" in consumer.log


async def says_when_events_are_gone_before_it_read_them(make, folder: Path):
    async with bus(folder) as (server, detect):
        state, told = str(folder / "state.json"), [event(number) for number in range(30)]
        for made in told[:10]:
            await detect.tell(made)
        assert len(await make(server).run_once("events", "--state", state)) == 10
        for made in told[10:]:
            await detect.tell(made)
        await detect.api("STREAM.PURGE.PORTCULLIS_EVENTS", {"seq": 21})
        consumer = make(server)
        assert await consumer.run_once("events", "--state", state) == told[20:]
        assert "10 events were removed" in consumer.log, consumer.log


async def keeps_secrets_and_fails_when_it_is_refused(make, folder: Path):
    async with bus(folder) as (server, _):
        consumer = make(server, password="not-the-secret-4e1d")
        await consumer.start("bans", "--once")
        assert await consumer.end() == 1
        assert "not-the-secret" not in consumer.log and consumer.log, consumer.log
        (folder / "state.json").write_text("{}")
        consumer = make(server)
        await consumer.start("events", "--state", str(folder / "state.json"))
        assert await consumer.end() == 1
        assert "state.json" in consumer.log


SCHEMA_TESTS = [
    real_events_and_records_hold_to_their_schemas,
    a_schema_refuses_what_is_never_written_and_allows_new_fields,
    the_asyncapi_document_is_valid_asyncapi,
]
CONSUMER_TESTS = [
    prints_the_current_ban_set,
    follows_the_ban_set,
    learns_what_was_banned_and_lifted_while_it_was_cut_off,
    tells_each_event_once_over_two_runs,
    follows_events_without_gap_or_double,
    loses_no_event_when_it_is_killed,
    reads_a_stream_that_was_made_anew_from_its_beginning,
    says_when_events_are_gone_before_it_read_them,
    keeps_secrets_and_fails_when_it_is_refused,
]


def cases():
    """Every test as name and call."""
    for test in SCHEMA_TESTS:
        yield test.__name__, test
    consumers = ROOT / "deploy" / "consumers"
    commands = {"python": [sys.executable, str(consumers / "python" / "consumer.py")]}
    node = prepare_node(consumers / "node", "node")
    if node is None:
        print("SKIPPED consumers: the Node example needs node and npm")
    else:
        commands["node"] = ["node", str(node / "consumer.mjs")]
    for language, command in commands.items():
        for test in CONSUMER_TESTS:
            yield f"{language}_{test.__name__}", lambda command=command, test=test: in_folder(command, test)


def in_folder(command: list[str], test) -> None:
    with tempfile.TemporaryDirectory(prefix="portcullis-consumers-") as folder:
        asyncio.run(test(lambda server, **more: Consumer(command, server, **more), Path(folder)))


def main() -> int:
    failed = 0
    wanted = sys.argv[1:]
    for name, call in cases():
        if wanted and not any(word in name for word in wanted):
            continue
        try:
            skipped = call()
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"test consumers::{name} ... FAILED", flush=True)
            continue
        print(f"SKIPPED consumers::{name}: {skipped}" if skipped else f"test consumers::{name} ... ok", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
