#!/usr/bin/env python3
"""Holds deploy/nats against a real nats-server: every role has all of its rights, and nothing beside them.

    tests/nats/accounts.py      needs nats-server 2.12.1 or newer (NATS_SERVER, else PATH) and the package nats-py

A refusal counts only when the server said no and no stream changed. That such a change would be seen is shown first, on a
server with permissions and no accounts, where the same tricks do write.
"""

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import asynccontextmanager
from pathlib import Path

import nats

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "nats"
SERVER = os.environ.get("NATS_SERVER") or shutil.which("nats-server") or "nats-server"
ANSWER_S = 30
"""How long an answer may take before a test fails. No test waits for it to pass."""

BANS = "$KV.portcullis_bans"
NODES = "$KV.portcullis_nodes"
LEASE = "$KV.portcullis_lease"
DUTY = "$KV.portcullis_duty"
SECOND = 10**9


def stream(name, subject, **more):
    """A stream as proto/src/bus/nats/streams.rs makes it."""
    return {"name": name, "subjects": [subject], "storage": "file", "retention": "limits", "discard": "old",
            "max_bytes": -1, "max_msgs_per_subject": -1, "duplicate_window": 120 * SECOND, "allow_direct": True, **more}


def bucket(name, **more):
    """A key-value bucket with a history of 1. No rollup: one header would let a heartbeat empty the whole bucket."""
    return stream(f"KV_{name}", f"$KV.{name}.>", **{"discard": "new", "max_msgs_per_subject": 1, "deny_delete": True,
                                                    "allow_msg_ttl": True, **more})


LEASES = {"allow_direct": False, "max_bytes": 1 << 20, "max_msg_size": 1 << 10}
STREAMS = [
    stream("PORTCULLIS_ACCESS", "portcullis.access.v1.*", discard="new", max_bytes=64 << 20,
           republish={"src": "portcullis.access.v1.>", "dest": "portcullis.log.v1.>"}),
    stream("PORTCULLIS_EVENTS", "portcullis.events.v1.>", max_age=30 * 86_400 * SECOND),
    bucket("portcullis_bans", allow_atomic=True, republish={"src": f"{BANS}.>", "dest": "portcullis.state.v1.>"}),
    bucket("portcullis_nodes", max_age=86_400 * SECOND),
    bucket("portcullis_lease", **LEASES),
    bucket("portcullis_duty", **LEASES),
]
NAMES = [stream["name"] for stream in STREAMS]

READ_BANS, READ_NODES = "$JS.API.DIRECT.GET.KV_portcullis_bans", "$JS.API.DIRECT.GET.KV_portcullis_nodes"
READ_EVENTS = "$JS.API.DIRECT.GET.PORTCULLIS_EVENTS"
READ_DUTIES = "$JS.API.STREAM.MSG.GET.KV_portcullis_duty"
RAW = "portcullis.raw.v1.shop"
# What each user may publish. Of everything else in `everything()` it must be refused.
RIGHTS = {
    "ingest-edge-1": ["portcullis.access.v1.edge-1", f"{NODES}.ingest.edge-1", READ_BANS, READ_NODES],
    "enforce-edge-1": [f"{NODES}.enforce.edge-1", f"{DUTY}.enforce.telegram", f"{DUTY}.told.telegram", READ_BANS,
                       READ_NODES, READ_EVENTS, READ_DUTIES],
    "reader-1": [READ_BANS, READ_EVENTS],
    "shipper-1": [RAW],
}
# What each user may subscribe to, its inbox aside.
SUBSCRIPTIONS = {
    "ingest-edge-1": ["portcullis.state.v1.>", "portcullis.raw.v1.>"],
    "enforce-edge-1": ["portcullis.state.v1.>", "portcullis.events.v1.>", "portcullis.explain.v1.edge-1"],
    "reader-1": ["portcullis.state.v1.ban.>", "portcullis.events.v1.>"],
    "shipper-1": [],
}


def data_subjects():
    """Subjects of the project that carry data, of every family."""
    keys = ("ban.192.0.2.1", "offender.192.0.2.1", "out.1", "detect", "control", "predicate", "lists")
    return [
        *(f"{BANS}.{key}" for key in keys),
        *(f"portcullis.state.v1.{key}" for key in keys),
        *(f"{NODES}.{role}.{node}" for role in ("ingest", "enforce", "detect") for node in ("edge-1", "edge-2")),
        f"{LEASE}.detect", f"{LEASE}.enforce.telegram", f"{LEASE}.told.telegram", f"{DUTY}.detect",
        f"{DUTY}.enforce.telegram", f"{DUTY}.told.telegram", f"{DUTY}.enforce.a.b",
        "portcullis.access.v1.edge-1", "portcullis.access.v1.edge-2", "portcullis.log.v1.edge-1",
        "portcullis.events.v1.ban.forceful-browsing", "portcullis.events.v1.alarm.system",
        "portcullis.api.v1", "portcullis.explain.v1.edge-1", "portcullis.explain.v1.edge-2", RAW,
        "portcullis.raw.v1.other", "portcullis.raw.v1",
    ]


def stream_requests(stream):
    """Requests that change a stream or its consumers, or read it."""
    config = json.dumps(next(s for s in STREAMS if s["name"] == stream) | {"max_msgs": 1})
    push = {"stream_name": stream, "config": {"deliver_subject": f"{BANS}.ban.192.0.2.1", "ack_policy": "none"}}
    pull = {"stream_name": stream, "config": {"ack_policy": "none"}}
    named = {"stream_name": stream, "config": {"name": "thief", "durable_name": "thief", "ack_policy": "none"}}
    return {
        f"STREAM.CREATE.{stream}": config, f"STREAM.UPDATE.{stream}": config, f"STREAM.DELETE.{stream}": "",
        f"STREAM.PURGE.{stream}": "", f"STREAM.MSG.DELETE.{stream}": '{"seq":1}',
        f"STREAM.SNAPSHOT.{stream}": '{"deliver_subject":"_INBOX.thief"}', f"STREAM.RESTORE.{stream}": "{}",
        f"STREAM.PEER.REMOVE.{stream}": '{"peer":"nats-1"}', f"STREAM.LEADER.STEPDOWN.{stream}": "",
        f"STREAM.INFO.{stream}": "", f"STREAM.MSG.GET.{stream}": '{"seq":1}', f"DIRECT.GET.{stream}": '{"seq":1}',
        f"DIRECT.GET.{stream}.{BANS}.ban.192.0.2.1": "", f"CONSUMER.CREATE.{stream}": json.dumps(push),
        f"CONSUMER.CREATE.{stream}.thief": json.dumps(named), f"CONSUMER.CREATE.{stream}.thief.a.b": json.dumps(pull),
        f"CONSUMER.DURABLE.CREATE.{stream}.thief": json.dumps(named), f"CONSUMER.DELETE.{stream}.worker": "",
        f"CONSUMER.INFO.{stream}.worker": "", f"CONSUMER.LIST.{stream}": "", f"CONSUMER.NAMES.{stream}": "",
        f"CONSUMER.MSG.NEXT.{stream}.worker": "", f"CONSUMER.PAUSE.{stream}.worker": "{}",
        f"CONSUMER.RESET.{stream}.worker": "", f"CONSUMER.LEADER.STEPDOWN.{stream}.worker": "",
    }


def api_requests():
    """Requests to JetStream, with bodies that would work."""
    own = json.dumps({"name": "MINE", "subjects": ["mine.>"]})
    requests = {"INFO": "", "STREAM.LIST": "", "STREAM.NAMES": "", "STREAM.CREATE.MINE": own,
                "META.LEADER.STEPDOWN": "", "ACCOUNT.PURGE.DETECT": "", "SERVER.REMOVE": "{}"}
    for stream in NAMES:
        requests |= stream_requests(stream)
    return {f"$JS.API.{subject}": body for subject, body in requests.items()}


def everything():
    """Every subject worth trying, with a body."""
    acks = ["$JS.ACK.PORTCULLIS_ACCESS.worker.1.1.1.1.0", "$JS.ACK._.x.PORTCULLIS_ACCESS.worker.1.1.1.1.0.x",
            "$JS.FC.PORTCULLIS_ACCESS.worker.x", "$JS.EVENT.ADVISORY.API", "$JSC.CI.x.PORTCULLIS_ACCESS.worker"]
    outside = ["_INBOX.edge-3.x", "_INBOX.edge-2.x", "_R_.x", "$SYS.REQ.SERVER.PING", "$SYS.REQ.CLAIMS.UPDATE",
               "$SYS.REQ.ACCOUNT.DETECT.CONNZ", "$O.bucket.M.x", "$MQTT.msgs.x", "anything.else"]
    detect_api = [subject.replace("$JS.API", "$JS.portcullis.API", 1) for subject in api_requests()]
    return dict.fromkeys([*data_subjects(), *acks, *outside], "forged") | api_requests() | dict.fromkeys(detect_api, "")


class Server:
    """A nats-server with the configuration in `folder`, on a free port of the loopback, its files in `scratch`."""

    def __init__(self, folder, scratch, text=None):
        self.scratch = Path(scratch)
        # A later key replaces an earlier one; a server without routes needs no others.
        self.text = text or f'include "{os.path.relpath(folder, scratch)}/portcullis.conf"\ncluster {{}}\n'

    def __enter__(self):
        config = self.scratch / "server.conf"
        store = self.scratch / "jetstream"
        config.write_text(f'{self.text}\nlisten: "127.0.0.1:-1"\nhttp: "127.0.0.1:-1"\n'
                          f'jetstream {{ store_dir: "{store}", max_file_store: 8GB }}\n')
        self.process = subprocess.Popen([SERVER, "-c", config], stderr=subprocess.PIPE, text=True)
        said = []
        for line in self.process.stderr:
            said.append(line)
            if listening := re.search(r"client connections on (\S+)", line):
                self.url = f"nats://{listening[1]}"
            if "Server is ready" in line:
                # The pipe must never fill.
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return self
        raise RuntimeError("nats-server did not start:\n" + "".join(said))

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    @asynccontextmanager
    async def connect(self, user, password=None):
        """A connection of `user`, with its inbox as users/*.conf expects it; `errors` holds what the server refused."""
        errors = []

        async def keep(error):
            errors.append(str(error))

        node = re.sub("^(ingest|detect|enforce)-", "", user)
        connection = await nats.connect(self.url, user=user, password=password or user, inbox_prefix=f"_INBOX.{node}",
                                        error_cb=keep, allow_reconnect=False, connect_timeout=ANSWER_S)
        connection.errors = errors
        try:
            yield connection
        finally:
            await connection.close()


async def settle(connection):
    """Returns when the server has handled all that was sent, and what it refused is known. Once more than it seems to
    need: nats-py writes the first PING ahead of what still waits to be written."""
    await connection.flush(ANSWER_S)
    await connection.flush(ANSWER_S)


async def ask(connection, subject, body=b"", headers=None):
    """Asks and returns the JSON answer."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return json.loads((await connection.request(subject, body, timeout=ANSWER_S, headers=headers)).data)


async def until(look, holds):
    """Looks again and again until it holds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + ANSWER_S
    while not holds(seen := await look()):
        assert loop.time() < end, f"still {seen}"


async def store(connection, subject, body=b"x", headers=None):
    """Writes and returns the sequence."""
    answer = await ask(connection, subject, body, headers)
    assert "error" not in answer, f"{subject}: {answer}"
    return answer["seq"]


async def create_streams(detect):
    for stream in STREAMS:
        answer = await ask(detect, f"$JS.API.STREAM.CREATE.{stream['name']}", stream)
        assert "error" not in answer, answer


async def seed(detect):
    """Something in every stream, and a consumer that could be stolen from."""
    for subject in data_subjects():
        if subject.startswith(("$KV.", "portcullis.access", "portcullis.events")):
            await store(detect, subject)
    worker = {"stream_name": "PORTCULLIS_ACCESS", "config": {"durable_name": "worker", "ack_policy": "explicit"}}
    assert "error" not in await ask(detect, "$JS.API.CONSUMER.CREATE.PORTCULLIS_ACCESS.worker", worker)


async def state(detect):
    """All that a write could change, once everything sent before is done: a write that cannot succeed passes through
    each stream's queue first."""
    seen = {}
    for stream in STREAMS:
        fence = {"Nats-Expected-Last-Sequence": str(1 << 60)}
        refused = await ask(detect, stream["subjects"][0].rstrip("*>") + "fence", b"", fence)
        assert "error" in refused, refused
        info = await ask(detect, f"$JS.API.STREAM.INFO.{stream['name']}", {"subjects_filter": ">"})
        at = info["state"]
        seen[stream["name"]] = {"config": info["config"], "last_seq": at["last_seq"], "messages": at["messages"],
                                "subjects": at["subjects"], "consumers": at["consumer_count"]}
    seen["streams"] = sorted((await ask(detect, "$JS.API.STREAM.NAMES"))["streams"])
    return seen


def changes(before, after):
    return [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]


async def is_refused(connection, answers, subject, body):
    """Publishes, and tells whether the server refused it: by permission, or for want of anybody who listens."""
    connection.errors.clear()
    await connection.publish(subject, body.encode(), reply=answers.subject)
    await settle(connection)
    if connection.errors:
        return True
    heard = [await answers.next_msg() for _ in range(answers.pending_msgs)]
    return [(message.headers or {}).get("Status") for message in heard] == ["503"]


async def reply_trick(connection, detect, subject, replies, body="{}"):
    """Publishes what is allowed, with replies that aim the answer at something else. Returns what changed, the allowed
    messages aside."""
    before = await state(detect)
    for reply in replies:
        await connection.publish(subject, body.encode(), reply=reply)
    # Answers leave in order: when this one is here, the others are on their way.
    await connection.request(subject, body.encode(), timeout=ANSWER_S)
    after = await state(detect)
    for stream in STREAMS:
        first = stream["subjects"][0].rstrip("*>")
        if subject.startswith(first):
            was = before[stream["name"]]
            was["last_seq"] += len(replies) + 1
            if stream["name"].startswith("PORTCULLIS"):
                was["messages"] += len(replies) + 1
                was["subjects"][subject] += len(replies) + 1
    return changes(before, after)


async def snapshot(connection, stream, pattern):
    """All last messages under `pattern`, by batched direct reads."""
    answers = await connection.subscribe(connection.new_inbox())
    found, seq = {}, 1
    while True:
        request = {"seq": seq, "batch": 1000, "next_by_subj": pattern}
        await connection.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), reply=answers.subject)
        while not (message := await answers.next_msg(ANSWER_S)).headers.get("Status"):
            found[message.headers["Nats-Subject"]] = message.data
            seq = int(message.headers["Nats-Sequence"]) + 1
        assert message.headers["Status"] in ("204", "404"), message.headers
        if message.headers["Status"] == "404" or message.headers["Nats-Num-Pending"] == "0":
            return found


async def batch(detect, messages, expected):
    """One atomic batch. The first message is `detect`, by compare-and-swap."""
    *head, (last_subject, last_body) = messages
    ident = os.urandom(8).hex()
    for number, (subject, body) in enumerate(head, 1):
        headers = {"Nats-Batch-Id": ident, "Nats-Batch-Sequence": str(number)}
        if number == 1:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected)
        await detect.publish(subject, body, headers=headers)
    commit = {"Nats-Batch-Id": ident, "Nats-Batch-Sequence": str(len(messages)), "Nats-Batch-Commit": "1"}
    return await ask(detect, last_subject, last_body, commit)


# The tests. Each gets a running server with streams and seeds, and the detector's connection.


async def detect_commits_a_batch_and_a_deposed_one_is_refused_whole(server, detect):
    at = await store(detect, f"{BANS}.detect")
    messages = [(f"{BANS}.detect", b"2"), (f"{BANS}.ban.192.0.2.7", b"a"), (f"{BANS}.out.7", b"b")]
    answer = await batch(detect, messages, at)
    assert answer.get("count") == 3, answer
    before = await state(detect)
    answer = await batch(detect, [(f"{BANS}.detect", b"3"), (f"{BANS}.ban.192.0.2.8", b"a")], at)
    assert "error" in answer, answer
    assert not changes(before, await state(detect))


async def detect_consumes_purges_and_forwards_requests_between_detectors(server, detect):
    last = await store(detect, "portcullis.access.v1.edge-1", b"lines")
    pull = await ask(detect, "$JS.API.CONSUMER.CREATE.PORTCULLIS_ACCESS", {
        "stream_name": "PORTCULLIS_ACCESS",
        "config": {"ack_policy": "none", "deliver_policy": "by_start_sequence", "opt_start_seq": last}})
    answers = await detect.subscribe(detect.new_inbox())
    await detect.publish(f"$JS.API.CONSUMER.MSG.NEXT.PORTCULLIS_ACCESS.{pull['name']}", reply=answers.subject)
    message = await answers.next_msg(ANSWER_S)
    assert message.data == b"lines", message.data
    assert "error" not in await ask(detect, f"$JS.API.CONSUMER.DELETE.PORTCULLIS_ACCESS.{pull['name']}")
    assert (await ask(detect, "$JS.API.STREAM.PURGE.PORTCULLIS_ACCESS", {"seq": 2}))["success"]
    async with server.connect("detect-edge-2") as other:
        served = await other.subscribe("portcullis.api.v1")
        await settle(other)
        asked = asyncio.create_task(detect.request("portcullis.api.v1", b"bans", timeout=ANSWER_S))
        await (await served.next_msg(ANSWER_S)).respond(b"none")
        assert (await asked).data == b"none"


async def ingest_delivers_batches_with_acknowledgement(server, detect):
    async with server.connect("ingest-edge-1") as ingest:
        await store(ingest, "portcullis.access.v1.edge-1", b"lines", {"Nats-Msg-Id": "one"})


async def each_role_delivers_heartbeats_and_learns_when_they_were_stored(server, detect):
    for user in ("ingest-edge-1", "enforce-edge-1"):
        role, node = user.split("-", 1)
        subject = f"{NODES}.{role}.{node}"
        async with server.connect(user) as connection:
            sequence = await store(connection, subject, b"alive")
            request = {"seq": 1, "batch": 1, "next_by_subj": subject}
            message = await connection.request(READ_NODES, json.dumps(request).encode(), timeout=ANSWER_S)
            assert message.headers["Nats-Sequence"] == str(sequence), message.headers
            assert message.headers["Nats-Time-Stamp"], message.headers


async def snapshots_of_more_than_a_batch_are_complete_in_every_account(server, detect):
    wanted = {f"{BANS}.ban.10.0.{i // 256}.{i % 256}" for i in range(2345)}
    for subject in wanted:
        await detect.publish(subject, b"ban")
    await state(detect)
    for user in ("ingest-edge-1", "enforce-edge-1", "reader-1"):
        async with server.connect(user) as reader:
            found = await snapshot(reader, "KV_portcullis_bans", f"{BANS}.ban.10.0.>")
            assert found.keys() == wanted, f"{user}: {len(found)} of {len(wanted)}"
            if user == "reader-1":
                events = await snapshot(reader, "PORTCULLIS_EVENTS", "portcullis.events.v1.>")
                assert "portcullis.events.v1.ban.forceful-browsing" in events, events


async def changes_arrive_live_in_every_account(server, detect):
    for user, subjects in SUBSCRIPTIONS.items():
        async with server.connect(user) as reader:
            for subject in (s for s in subjects if ".state." in s or ".events." in s):
                live = await reader.subscribe(subject)
                await settle(reader)
                concrete = subject.replace(">", "192.0.2.9" if ".ban." in subject else "ban.192.0.2.9")
                sent = concrete.replace("portcullis.state.v1", BANS)
                seq = await store(detect, sent, b"new")
                message = await live.next_msg(ANSWER_S)
                assert (message.subject, message.data) == (concrete, b"new"), message
                if ".state." in subject:
                    assert message.headers["Nats-Sequence"] == str(seq), message.headers
                    assert message.headers["Nats-Subject"] == sent, message.headers


async def enforce_answers_what_detect_asks(server, detect):
    async with server.connect("enforce-edge-1") as enforce:
        served = await enforce.subscribe("portcullis.explain.v1.edge-1")
        await settle(enforce)
        asked = asyncio.create_task(detect.request("portcullis.explain.v1.edge-1", b"192.0.2.1", timeout=ANSWER_S))
        message = await served.next_msg(ANSWER_S)
        await message.respond(b"in the set")
        assert (await asked).data == b"in the set"
        await message.respond(b"a second answer")
        await settle(enforce)
        assert enforce.errors, "may answer more than once"


async def enforcers_share_duties_and_positions_and_cannot_touch_detects_lease(server, detect):
    lease, told = f"{DUTY}.enforce.cloudflare", f"{DUTY}.told.cloudflare"
    async with server.connect("enforce-edge-1") as one, server.connect("enforce-edge-2") as other:
        first = {"Nats-TTL": "3s", "Nats-Expected-Last-Subject-Sequence": "0"}
        at = (await ask(one, lease, b"edge-1", first))["seq"]
        assert "error" in await ask(other, lease, b"edge-2", first), "one holds it"
        read = await ask(other, READ_DUTIES, {"last_by_subj": lease})
        assert (read["message"]["seq"], base64.b64decode(read["message"]["data"])) == (at, b"edge-1"), read
        await store(one, told, b"7", {"Nats-Expected-Last-Subject-Sequence": "0"})
        given = {"KV-Operation": "DEL", "Nats-TTL": "3s", "Nats-Expected-Last-Subject-Sequence": str(at)}
        at = await store(one, lease, b"", given)
        await store(other, lease, b"edge-2", {"Nats-TTL": "3s", "Nats-Expected-Last-Subject-Sequence": str(at)})

        async def newest():
            return await ask(one, READ_DUTIES, {"last_by_subj": lease})

        await until(newest, lambda read: "error" in read or not read["message"].get("data"))
        assert await snapshot(one, "PORTCULLIS_EVENTS", "portcullis.events.v1.>"), "events can be read"


async def an_enforcer_that_fills_what_it_may_write_leaves_detects_lease_alone(server, detect):
    async with server.connect("enforce-edge-1") as enforce:
        answers = [ask(enforce, f"{DUTY}.told.{number}-{'x' * 40}", b"x" * 900) for number in range(1200)]
        refused = [answer["error"] for answer in await asyncio.gather(*answers) if "error" in answer]
        assert refused and all("maximum bytes" in error["description"] for error in refused), refused[:1]
        large = await ask(enforce, f"{DUTY}.told.telegram", b"x" * 2000)
        assert "message size" in large["error"]["description"], large
        at = await store(detect, f"{LEASE}.detect", b"edge-1", {"Nats-TTL": "3s"})
        again = {"Nats-TTL": "3s", "Nats-Expected-Last-Subject-Sequence": str(at)}
        await store(detect, f"{LEASE}.detect", b"edge-1", again)
        assert (await ask(detect, "$JS.API.STREAM.PURGE.KV_portcullis_duty"))["success"]
        await store(enforce, f"{DUTY}.told.telegram", b"7")


async def every_role_is_refused_all_that_is_not_its_own(server, detect):
    tried = everything()
    assert len(tried) > 250, len(tried)
    for user, rights in RIGHTS.items():
        rights = {*rights, *(right.replace("$JS.API", "$JS.portcullis.API", 1) for right in rights)}
        before = await state(detect)
        async with server.connect(user) as connection:
            answers = await connection.subscribe(connection.new_inbox())
            await settle(connection)
            passed = [subject for subject, body in tried.items()
                      if subject not in rights and not await is_refused(connection, answers, subject, body)]
        assert not passed, f"{user} is not refused: {passed}"
        changed = changes(before, await state(detect))
        assert not changed, f"{user}: {changed}"


async def nobody_listens_to_what_is_not_its_own(server, detect):
    foreign = [*(subject for subject in data_subjects()), ">", "*", "*.>", "_INBOX.>", "_INBOX.*.*", "_INBOX.*.*.*",
               "_INBOX.edge-2.>", "_INBOX.edge-3.>", "_R_.>", "$JS.API.>", "$JS.>", "$SYS.>", "$KV.>",
               "portcullis.>", "portcullis.state.v1.>", "portcullis.explain.v1.>", "portcullis.access.v1.*",
               "portcullis.log.v1.>", "portcullis.raw.v1.>"]
    for user, allowed in SUBSCRIPTIONS.items():
        own = {subject for subject in foreign for right in allowed
               if subject == right or (right.endswith(">") and subject.startswith(right[:-1]))}
        async with server.connect(user) as connection:
            for subject in foreign:
                connection.errors.clear()
                await connection.subscribe(subject)
                await settle(connection)
                assert bool(connection.errors) != (subject in own), f"{user} and {subject}: {connection.errors}"


async def no_answer_can_be_aimed_at_what_is_not_its_own(server, detect):
    replies = [*data_subjects(), *(subject for subject in api_requests()), "_INBOX.edge-2.x", "_INBOX.edge-3.x"]
    for user in ("ingest-edge-1", "enforce-edge-1", "reader-1"):
        async with server.connect(user) as connection:
            for subject in RIGHTS[user]:
                body = '{"seq":1}' if "GET" in subject else "{}" if "$JS" not in subject else ""
                changed = await reply_trick(connection, detect, subject, replies, body)
                assert not changed, f"{user} with {subject}: {changed}"


async def a_header_cannot_make_a_heartbeat_empty_its_bucket(server, detect):
    async with server.connect("ingest-edge-1") as ingest, server.connect("enforce-edge-1") as enforce:
        before = await state(detect)
        rights = ((ingest, "portcullis.access.v1.edge-1"), (ingest, f"{NODES}.ingest.edge-1"),
                  (enforce, f"{NODES}.enforce.edge-1"), (enforce, f"{DUTY}.enforce.telegram"),
                  (enforce, f"{DUTY}.told.telegram"))
        for connection, subject in rights:
            for header in ({"Nats-Rollup": "all"}, {"Nats-Rollup": "sub"}, {"Nats-Schedule": "@every 1s"},
                           {"Nats-Batch-Id": "x", "Nats-Batch-Sequence": "1", "Nats-Batch-Commit": "1"}):
                answer = await ask(connection, subject, b"x", header)
                assert "error" in answer, f"{subject} with {header}: {answer}"
        assert not changes(before, await state(detect))


async def raw_lines_of_a_shipper_go_to_one_ingest_each_and_nowhere_else(server, detect):
    replies = [f"{BANS}.ban.192.0.2.99", f"{NODES}.ingest.edge-1", "portcullis.access.v1.edge-1",
               "$JS.API.STREAM.PURGE.KV_portcullis_bans", "_INBOX.edge-2.x"]
    before = await state(detect)
    async with server.connect("ingest-edge-1") as one, server.connect("ingest-edge-2") as other, \
            server.connect("shipper-1") as shipper:
        members = [await member.subscribe("portcullis.raw.v1.*", "ingest") for member in (one, other)]
        await settle(one)
        await settle(other)
        for number in range(200):
            await shipper.publish(RAW, str(number).encode(), reply=replies[number % len(replies)])
        await settle(shipper)

        async def pending():
            return sum(member.pending_msgs for member in members)

        await until(pending, lambda count: count >= 200)
        heard = [[int((await member.next_msg()).data) for _ in range(member.pending_msgs)] for member in members]
        assert all(heard), "both have a share"
        assert sorted(heard[0] + heard[1]) == list(range(200)), heard
        assert not shipper.errors, shipper.errors
    assert not changes(before, await state(detect))


async def a_shipper_without_a_login_may_send_raw_lines_where_that_is_switched_on(server, detect):
    reader, writer = await asyncio.open_connection(*server.url.removeprefix("nats://").split(":"))
    # As Fluent Bit does.
    connect = b'CONNECT {"verbose":false,"pedantic":false,"ssl_required":false,"name":"fluent-bit","lang":"c"}\r\n'
    async with server.connect("ingest-edge-1") as ingest:
        lines = await ingest.subscribe(RAW, "ingest")
        await settle(ingest)
        writer.write(connect + f"PUB {RAW} 3\r\n[7]\r\nPUB portcullis.access.v1.edge-1 1\r\nx\r\nPING\r\n".encode())
        assert (await lines.next_msg(ANSWER_S)).data == b"[7]"
        said = (await asyncio.wait_for(reader.readuntil(b"PONG"), ANSWER_S)).decode()
        assert 'Permissions Violation for Publish to "portcullis.access.v1.edge-1"' in said, said
    writer.close()


async def accounts_hold_even_for_users_without_permissions(server, detect):
    within = {"INGEST": ("portcullis.access", f"{NODES}.ingest"),
              "ENFORCE": (f"{NODES}.enforce", f"{DUTY}.enforce.telegram", f"{DUTY}.told", "portcullis.explain"),
              "THIRD_PARTIES": (), "SHIPPERS": ("portcullis.raw.v1.",)}
    roles = {"INGEST": "ingest-edge-1", "ENFORCE": "enforce-edge-1", "THIRD_PARTIES": "reader-1",
             "SHIPPERS": "shipper-1"}
    for account, prefixes in within.items():
        own = [subject for subject in data_subjects() if subject.startswith(tuple(prefixes) or "-")]
        async with server.connect(f"careless-{account.lower()}") as careless:
            before = await state(detect)
            rights = {*own, *RIGHTS[roles[account]]}
            rights |= {right.replace("$JS.API", "$JS.portcullis.API", 1) for right in rights}
            for subject, body in everything().items():
                if subject not in rights:
                    await careless.publish(subject, body.encode(), reply="_INBOX.careless.x")
            await settle(careless)
            try:
                await careless.request(READ_BANS, b'{"seq":1}', timeout=ANSWER_S)
            except nats.errors.NoRespondersError:
                assert account == "SHIPPERS", account
            changed = changes(before, await state(detect))
            assert not changed, f"{account}: {changed}"


async def a_host_is_added_by_a_reload_without_disturbing_the_others(server, detect):
    users = server.scratch / "nats" / "users" / "ingest.conf"
    text = users.read_text()
    block = text[text.index("  {\n"):text.index("  {\n", text.index("  {\n") + 1)]
    new = block.replace("edge-1", "edge-9").replace("$NATS_INGEST_EDGE_1_PASSWORD", '"ingest-edge-9"')
    users.write_text(text.replace("users: [\n", f"users: [\n{new}", 1))
    async with server.connect("ingest-edge-2") as other:
        server.process.send_signal(signal.SIGHUP)

        async def connect():
            try:
                async with server.connect("ingest-edge-9") as added:
                    # What is asked in the middle of a reload may get no answer.
                    return (await added.request("portcullis.access.v1.edge-9", b"x", timeout=1)).data
            except (nats.errors.Error, OSError):  # The second when the server hangs up first.
                return None

        await until(connect, lambda answer: answer is not None and b"error" not in answer)
        await store(other, "portcullis.access.v1.edge-2")


# Without accounts: what the tests above must be able to see.

PERMISSIONS_ALONE = """
authorization { users: [
  { user: detect-edge-1, password: detect-edge-1 }
  { user: ingest-edge-1, password: ingest-edge-1, permissions {
    publish: ["portcullis.access.v1.edge-1", "$JS.API.CONSUMER.CREATE.PORTCULLIS_ACCESS"]
    subscribe: ["_INBOX.>", "$KV.portcullis_bans.>"] } }
] }
"""


async def permissions_alone_let_an_acknowledgement_write_a_ban(server, detect):
    async with server.connect("ingest-edge-1") as ingest:
        changed = await reply_trick(ingest, detect, "portcullis.access.v1.edge-1", [f"{BANS}.ban.192.0.2.99"])
        assert [change.split(":")[0] for change in changed] == ["KV_portcullis_bans"], changed


async def permissions_alone_let_a_consumer_write_a_ban(server, detect):
    async with server.connect("ingest-edge-1") as ingest:
        before = await state(detect)
        subject = "$JS.API.CONSUMER.CREATE.PORTCULLIS_ACCESS"
        # A consumer delivers only while somebody listens to this very subject.
        await ingest.subscribe(f"{BANS}.ban.192.0.2.1")
        await settle(ingest)
        answer = await ask(ingest, subject, json.loads(api_requests()[subject]))
        assert "error" not in answer, answer
        was = before["KV_portcullis_bans"]
        await until(lambda: state(detect), lambda now: now["KV_portcullis_bans"] != was)


CONTROLS = [permissions_alone_let_an_acknowledgement_write_a_ban, permissions_alone_let_a_consumer_write_a_ban]
TESTS = [
    detect_commits_a_batch_and_a_deposed_one_is_refused_whole,
    detect_consumes_purges_and_forwards_requests_between_detectors,
    ingest_delivers_batches_with_acknowledgement,
    each_role_delivers_heartbeats_and_learns_when_they_were_stored,
    changes_arrive_live_in_every_account,
    enforce_answers_what_detect_asks,
    enforcers_share_duties_and_positions_and_cannot_touch_detects_lease,
    every_role_is_refused_all_that_is_not_its_own,
    nobody_listens_to_what_is_not_its_own,
    no_answer_can_be_aimed_at_what_is_not_its_own,
    a_header_cannot_make_a_heartbeat_empty_its_bucket,
    an_enforcer_that_fills_what_it_may_write_leaves_detects_lease_alone,
    raw_lines_of_a_shipper_go_to_one_ingest_each_and_nowhere_else,
    snapshots_of_more_than_a_batch_are_complete_in_every_account,
]
EDITED = [accounts_hold_even_for_users_without_permissions,
          a_shipper_without_a_login_may_send_raw_lines_where_that_is_switched_on,
          a_host_is_added_by_a_reload_without_disturbing_the_others]


def passwords():
    """Each variable of the configuration, with the user's name for a password."""
    text = "".join(file.read_text() for file in CONFIG.rglob("*.conf"))
    for name in set(re.findall(r"\$(NATS_[A-Z0-9_]+)", text)):
        os.environ[name] = name.removeprefix("NATS_").removesuffix("_PASSWORD").lower().replace("_", "-")
    for number in (1, 2, 3):
        os.environ[f"NATS_ROUTE_{number}"] = f"nats://route:route@127.0.0.1:{6221 + number}"


def edited(scratch):
    """A copy of the configuration with a user without permissions in each account, and one for those without a login."""
    folder = Path(scratch) / "nats"
    shutil.copytree(CONFIG, folder)
    main = folder / "portcullis.conf"
    main.write_text(main.read_text().replace("# no_auth_user:", "no_auth_user:"))
    for file, account in (("ingest", "ingest"), ("enforce", "enforce"), ("third-parties", "third_parties"),
                          ("shippers", "shippers")):
        users = folder / "users" / f"{file}.conf"
        user = f"users: [\n  {{ user: careless-{account}, password: careless-{account} }}\n"
        users.write_text(users.read_text().replace("users: [\n", user, 1))
    return folder


def report(name, error=None):
    print(f"test accounts::{name} ... {'FAILED' if error else 'ok'}", flush=True)
    if error:
        print(error, file=sys.stderr)
    return not error


async def run(server, tests):
    passed = True
    async with server.connect("detect-edge-1") as detect:
        await create_streams(detect)
        await seed(detect)
        for test in tests:
            try:
                await test(server, detect)
                passed &= report(test.__name__)
            except Exception:  # Whatever it is, the test failed.
                passed &= report(test.__name__, traceback.format_exc())
    return passed


def main():
    passwords()
    checked = subprocess.run([SERVER, "-t", "-c", CONFIG / "portcullis.conf"], capture_output=True, text=True)
    passed = report("the_shipped_configuration_is_valid", checked.returncode and checked.stderr)
    for tests, text in ((CONTROLS, PERMISSIONS_ALONE), (TESTS, None), (EDITED, None)):
        with tempfile.TemporaryDirectory() as scratch:
            folder = edited(scratch) if tests is EDITED else CONFIG
            with Server(folder, scratch, text) as server:
                passed &= asyncio.run(run(server, tests))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
