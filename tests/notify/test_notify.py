#!/usr/bin/env python3
"""Telegram and webhooks, end to end: the built binary, a server that answers as theirs do, and NATS with its accounts.

    tests/notify/test_notify.py     needs portcullis (PORTCULLIS, else target/debug/portcullis), nats-server 2.12.1 or newer
                                    (NATS_SERVER, else PATH) and what tests/requirements.txt names

No firewall is touched: the back end is "none". Prints one line a test, and ends with 1 when one failed.
"""

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import telegram
from telegram.request import HTTPXRequest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nats"))

from accounts import CONFIG, Server, passwords  # noqa: E402
from accounts_live import OFFENCES, PORTCULLIS, Cluster, offence, until  # noqa: E402
from fake import TOKEN, Fake  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "deploy" / "notify.md").read_text()
SCHEMA = json.loads((ROOT / "deploy" / "schema" / "event.v1.schema.json").read_text())
HOOK_SECRET, HOOK_PATH = "s3cret-of-the-hook", "/hook/s3cret-path"
SECRETS = (TOKEN, TOKEN.split(":")[1], HOOK_SECRET, HOOK_PATH, "s3cret-token")


class Service:
    """`portcullis run` in a folder of its own; one after the other in the same folder go on from each other."""

    running = []

    @classmethod
    def end_all(cls):
        """Ends what a failed test has left running."""
        for process in cls.running:
            process.kill()
            process.wait()

    def __init__(self, folder, config):
        self.folder, self.log, self.access_log = folder, folder / "log", folder / "access.log"
        self.socket = folder / "api.sock"
        self.access_log.touch()
        (folder / "token").write_text(f"{TOKEN}\n")
        (folder / "token").chmod(0o600)
        (folder / "secret").write_text(HOOK_SECRET)
        (folder / "secret").chmod(0o600)
        config = (f'node = "edge-1"\nstate_dir = "{folder}/state"\napi.socket = "{self.socket}"\n'
                  f'[ingest.sources.traefik]\ntype = "file"\ninclude = ["{self.access_log}"]\n'
                  '[telemetry]\nlog_level = "trace"\n[enforce.firewall]\nbackend = "none"\n' + config)
        (folder / "portcullis.toml").write_text(config)
        self.start()

    def start(self, *options):
        command = [PORTCULLIS, "run", *options, "-c", self.folder / "portcullis.toml"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.running.append(self.process)
        until("it answers", lambda: self.socket.exists() and self.verb("bans")[0] == 0)

    def verb(self, *words):
        command = [PORTCULLIS, *words, "--json", "--socket", self.socket]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return ended.returncode, ended.stdout, ended.stderr

    def offend(self, *clients):
        with open(self.access_log, "a") as log:
            log.writelines(offence(client) for client in clients for _ in range(OFFENCES))

    def report(self, name):
        """What `status` says of a notifier: its detail, and its problems."""
        status = json.loads(self.verb("status")[1])
        [node] = [node for node in status["nodes"] if node["role"] == "enforce"]
        [backend] = [backend for backend in node["backends"] if backend["name"] == name] or [{"detail": []}]
        problems = [problem["text"] for problem in node["problems"] if problem["text"].startswith(f"{name}: ")]
        return "; ".join(backend["detail"]), problems

    def stop(self):
        self.process.terminate()
        assert self.process.wait(30) == 0, self.log.read_text()

    def kill(self):
        self.process.kill()
        self.process.wait()


def telegram_config(fake, folder, more=""):
    return (f'[enforce.telegram]\nbot_token_file = "{folder}/token"\nchat_id = "-100"\napi_url = "{fake.url}"\n'
            f'events = ["banned", "unbanned", "started", "stopped"]\n{more}')


def count(fake, word):
    return sum(word in text for text in fake.texts())


def never_a_secret(service):
    """In nothing that anybody but their owner reads, however much is logged."""
    assert " TRACE " in service.log.read_text(errors="replace")
    seen = {"log": service.log.read_text(errors="replace"), "status": "".join(service.verb("status")[1:])}
    seen["arguments"] = Path(f"/proc/{service.process.pid}/cmdline").read_text()
    for file in (service.folder / "state").glob("notify-*"):
        seen[file.name] = file.read_text(errors="replace")
    for where, text in seen.items():
        shown = [secret for secret in SECRETS if secret in text]
        assert not shown, f"{where} shows {shown}: {text[-3000:]}"


# The tests. Each gets a fake and an empty folder.


def the_fake_answers_as_the_client_of_others_expects(fake, _):
    async def run():
        async with telegram.Bot(TOKEN, base_url=f"{fake.url}/bot") as bot:
            assert (await bot.get_me()).username == "portcullis_bot"
            message = await bot.send_message(-100, "<b>bold</b> &amp; more", parse_mode="HTML")
            assert (message.text, message.chat.id) == ("bold & more", -100), message
            assert (await bot.get_chat(-100)).title == "Alarms"

            async def refused(kind, chat=-100, text="x", **more):
                try:
                    await bot.send_message(chat, text, **more)
                except telegram.error.TelegramError as error:
                    assert type(error) is kind, repr(error)
                    return error
                raise AssertionError(f"no {kind}")

            for text in ("<b>x", "<script>x</script>", "a & b"):
                await refused(telegram.error.BadRequest, text=text, parse_mode="HTML")
            await refused(telegram.error.BadRequest, text="x" * 4097)
            await refused(telegram.error.BadRequest, chat=7)
            fake.migrated[-5] = -100
            assert (await refused(telegram.error.ChatMigrated, chat=-5)).new_chat_id == -100
            fake.kicked.add(-100)
            await refused(telegram.error.Forbidden)
            fake.faults = [("wait", 17)]
            wait = (await refused(telegram.error.RetryAfter)).retry_after
            assert getattr(wait, "total_seconds", lambda: wait)() == 17, wait
            fake.faults = [("gateway",)]
            await refused(telegram.error.NetworkError)
        for token, kind in (("1:wrong", telegram.error.InvalidToken), ("no-token", telegram.error.InvalidToken)):
            bot = telegram.Bot(token, base_url=f"{fake.url}/bot", request=HTTPXRequest())
            try:
                await bot.initialize()
            except kind:
                continue
            raise AssertionError(token)

    asyncio.run(run())


def a_ban_is_told_once_whatever_telegram_does_and_not_again_after_a_restart(fake, folder):
    fake.faults = [("wait", 1)]
    service = Service(folder, telegram_config(fake, folder).replace("-100", "42"))
    until("the start is told", lambda: count(fake, "Portcullis started on edge-1") == 1)
    fake.faults = [("half",), ("gateway",), ("slow", 1)]
    service.offend("203.0.113.7")
    until("the ban is told", lambda: count(fake, "Banned 203.0.113.7") == 1)
    [text] = [text for text in fake.texts() if "203.0.113.7" in text]
    assert "rule forceful-browsing" in text and "/wp-login.php" in text and "shop.example.net" in text, text
    service.verb("unban", "203.0.113.7")
    until("its end is told", lambda: count(fake, "Unbanned 203.0.113.7") == 1)
    never_a_secret(service)
    service.stop()
    service.start()
    until("the second start is told", lambda: count(fake, "Portcullis started") == 2)
    service.kill()
    order = [re.search(r"Banned|started|stopped|Unbanned", text)[0] for text in fake.texts()]
    assert order == ["started", "Banned", "Unbanned", "stopped", "started"], order


def what_a_killed_process_had_not_told_is_told_by_the_next_and_once(fake, folder):
    only_bans = telegram_config(fake, folder).replace('"unbanned", "started", "stopped"', "")
    service = Service(folder, only_bans.replace("-100", "42"))
    fake.faults = [("cut",)] * 1000
    service.offend("203.0.113.8", "203.0.113.9")
    kept = folder / "state" / "notify-telegram.json"
    until("both are kept", lambda: kept.exists() and all(c in kept.read_text() for c in ("203.0.113.8", "203.0.113.9")))
    assert kept.stat().st_mode & 0o777 == 0o600
    until("status says so", lambda: any("not delivered" in problem for problem in service.report("telegram")[1]))
    assert service.verb("status")[0] == 1, "degraded"
    never_a_secret(service)
    service.kill()
    fake.faults = []
    service.start()
    until("both are told", lambda: len(fake.messages) == 2)
    until("nothing waits", lambda: " 0 wait" in service.report("telegram")[0])
    service.kill()
    service.start()
    service.offend("203.0.113.10")
    until("the next is told", lambda: len(fake.messages) == 3)
    service.stop()
    told = [re.search(r"Banned (\S+)", text)[1] for text in fake.texts()]
    assert told == ["203.0.113.8", "203.0.113.9", "203.0.113.10"], told


def many_bans_are_few_messages_and_all_are_counted(fake, folder):
    service = Service(folder, telegram_config(fake, folder).replace('"unbanned", "started", "stopped"', '"stopped"').replace("-100", "42"))
    clients = [f"203.0.{113 + n // 200}.{n % 200 + 1}" for n in range(300)]
    service.offend(*clients)
    until("all are banned", lambda: service.verb("bans")[1].count("forceful-browsing") == len(clients))
    until("the first five are told", lambda: len(fake.messages) == 5)
    until("the rest waits", lambda: f" {len(clients) - 5} wait" in service.report("telegram")[0])
    service.stop()
    assert len(fake.messages) == 6, fake.texts()
    text = fake.texts()[-1]
    assert f"{len(clients) - 4} events: {len(clients) - 5} x banned, 1 x stopped" in text, text
    assert f"Rules: {len(clients) - 5} x forceful-browsing" in text and "shop.example.net" in text, text
    pauses = [later["at"] - former["at"] for former, later in zip(fake.messages, fake.messages[1:])]
    assert min(pauses) > 0.9, f"one a second in a chat: {pauses}"


def what_only_a_person_can_mend_is_said_and_then_delivered(fake, folder):
    fake.kicked.add(-100)
    fake.migrated[-5] = -100
    text = '[enforce.telegram.templates]\nbanned = "<b>{target}"\n'
    service = Service(folder, telegram_config(fake, folder, text).replace("-100", "-5"))
    until("the bot may not write", lambda: any("may not write to chat" in problem
                                               for problem in service.report("telegram")[1]))
    fake.kicked.clear()
    until("the start is told", lambda: count(fake, "Portcullis started") == 1)
    assert any('set chat_id to "-100"' in problem for problem in service.report("telegram")[1])
    service.verb("ban", "203.0.113.7", "--reason", "<i>")
    until("the text is told without markup", lambda: "203.0.113.7" in fake.texts())
    until("status says so", lambda: any("HTML of a template" in problem for problem in service.report("telegram")[1]))
    service.stop()


def webhooks_get_signed_cloud_events(fake, folder):
    hook = (f'[enforce.webhooks.siem]\nurl = "{fake.url}{HOOK_PATH}"\nsecret_file = "{folder}/secret"\n'
            'token = "s3cret-token"\nheaders = { X-Tenant = "edge" }\n'
            # That messages wait or are refused are alarms of their own.
            'events = ["banned", "started", "stopped"]\n')
    fake.hook_answers = [(500, {}), (429, {"Retry-After": "0"}), (503, {"Retry-After": "0"}), (204, {}), (404, {})]
    service = Service(folder, hook)
    until("the delay is said", lambda: any("answers 503" in problem for problem in service.report("webhook-siem")[1]))
    assert len(fake.hooks(HOOK_PATH)) == 3, "waits of none are not taken at their word"
    until("the start is posted", lambda: len(fake.hooks(HOOK_PATH)) == 4)
    bodies = {request["body"] for request in fake.hooks(HOOK_PATH)}
    assert len(bodies) == 1, "the same each time"
    assert json.loads(bodies.pop())["type"] == "io.portcullis.started.v1"
    service.offend("203.0.113.7")
    until("the refusal is said", lambda: any("answers 404" in problem for problem in service.report("webhook-siem")[1]))
    never_a_secret(service)
    service.offend("203.0.113.8")
    until("the next is posted", lambda: len(fake.hooks(HOOK_PATH)) == 6)
    until("all is well again", lambda: service.report("webhook-siem")[1] == [])
    service.stop()
    scope = {}
    exec(re.search(r"```python\n(.*?)```", DOCS, re.S)[1], scope)  # The example is what users copy.
    kinds = []
    for request in fake.hooks(HOOK_PATH):
        headers = {name.lower(): value for name, value in request["headers"].items()}
        signature, event = headers["x-portcullis-signature"], json.loads(request["body"])
        assert scope["is_genuine"](signature, request["body"], HOOK_SECRET.encode()), headers
        assert not scope["is_genuine"](signature, request["body"] + b" ", HOOK_SECRET.encode())
        assert not scope["is_genuine"](signature, request["body"], HOOK_SECRET.encode(), -1), "old"
        assert (headers["content-type"], headers["x-tenant"]) == ("application/cloudevents+json", "edge"), headers
        assert headers["authorization"] == "Bearer s3cret-token"
        kinds.append(event["type"].split(".")[2])
        if kinds[-1] == "ban":
            jsonschema.validate(event, SCHEMA)
    assert kinds == ["started"] * 4 + ["ban", "ban", "stopped"], kinds


def the_examples_are_what_each_service_takes(fake, folder):
    """The documentation's own sections, with the addresses and files of this test."""
    secrets = folder / "secrets"
    secrets.mkdir()
    for name, secret in {"telegram": TOKEN, "siem": HOOK_SECRET, "siem-token": "x", "ntfy": "x", "gotify": "x",
                         "discord": "https://discord.com/api/webhooks/1/x", "slack": "https://hooks.slack.com/x"}.items():
        (secrets / name).write_text(secret)
        (secrets / name).chmod(0o600)
    examples, accepts = {}, {"ntfy": is_ntfy, "discord": is_discord, "slack": is_slack, "gotify": is_gotify,
                             "pushover": is_pushover}
    for number, text in enumerate(re.findall(r"```toml\n(.*?)```", DOCS, re.S)):
        file = folder / f"{number}.toml"
        file.write_text(text.replace("/etc/portcullis/secrets", str(secrets)))
        checked = subprocess.run([PORTCULLIS, "check", "-c", file], capture_output=True, text=True)
        assert checked.returncode == 0, checked
        examples |= tomllib.loads(text)["enforce"].get("webhooks", {})
    config = ""
    for name in accepts:
        example = examples[name]
        (folder / f"url-{name}").write_text(f"{fake.url}/{name}\n")
        (folder / f"url-{name}").chmod(0o600)
        example.pop("url", None)
        example |= {"url_file": str(folder / f"url-{name}"), "events": ["banned", "alarm", "started"]}
        if "token_file" in example:
            example["token_file"] = str(folder / "token")
        config += f"[enforce.webhooks.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n"
                                                          for key, value in example.items())
    service = Service(folder, config)
    reason = 'said "x" & \\ <!channel> @everyone\n' + "ü😀" * 2000
    service.verb("ban", "203.0.113.7", "--reason", reason)
    for name, accept in accepts.items():
        until(f"{name} got both", lambda name=name: len(fake.hooks(f"/{name}")) == 2)
        for request in fake.hooks(f"/{name}"):
            accept(request)
        assert "203.0.113.7" in fake.hooks(f"/{name}")[1]["body"].decode()
    service.stop()


def as_json(request, required, optional):
    assert request["method"] == "POST" and request["headers"]["content-type"] == "application/json", request
    body = json.loads(request["body"])
    assert required <= body.keys() <= required | optional, body
    return body


def is_ntfy(request):
    """https://docs.ntfy.sh/publish/#publish-as-json: messages of at most 4,096 bytes, longer ones become attachments."""
    body = as_json(request, {"topic"}, {"message", "title", "tags", "priority", "click", "markdown", "icon", "actions"})
    assert re.fullmatch(r"[-_A-Za-z0-9]{1,64}", body["topic"]) and all(isinstance(tag, str) for tag in body["tags"])
    assert 0 < len(body["message"].encode()) <= 4096 and "\n" not in body["title"], body


def is_discord(request):
    """https://docs.discord.com/developers/resources/webhook#execute-webhook"""
    body = as_json(request, set(), {"content", "embeds", "allowed_mentions", "username"})
    assert body.get("content") or body["embeds"]
    assert body["allowed_mentions"] == {"parse": []}, "nobody is mentioned"
    for embed in body["embeds"]:
        assert 0 < len(embed["title"]) <= 256 and 0 < len(embed["description"]) <= 4096, embed


def is_slack(request):
    """https://docs.slack.dev/reference/block-kit/blocks/section-block/"""
    body = as_json(request, {"text"}, {"blocks"})
    for block in body["blocks"]:
        assert block["type"] == "section" and block["text"]["type"] == "plain_text", block
        assert 1 <= len(block["text"]["text"]) <= 3000, block
    assert "<" not in body["text"], "nobody is mentioned"


def is_gotify(request):
    """https://gotify.net/api-docs: POST /message"""
    body = as_json(request, {"message"}, {"title", "priority", "extras"})
    assert isinstance(body["message"], str) and body["message"] and isinstance(body["priority"], int)
    assert request["headers"]["authorization"] == f"Bearer {TOKEN}"


def is_pushover(request):
    """https://pushover.net/api: title of at most 250, message of at most 1,024 characters, cut by the service."""
    from urllib.parse import parse_qs
    assert request["headers"]["content-type"] == "application/x-www-form-urlencoded"
    body = parse_qs(request["body"].decode(), strict_parsing=True)
    assert body.keys() == {"token", "user", "title", "message"} and all(len(v) == 1 for v in body.values()), body


def a_dry_run_tells_nobody_and_says_what_it_would(fake, folder):
    service = Service(folder, telegram_config(fake, folder))
    until("the start is told", lambda: len(fake.messages) == 1)
    service.stop()
    told = len(fake.messages)
    service.start("--dry-run")
    service.offend("203.0.113.7")
    until("it says so", lambda: "Would tell" in service.log.read_text() and "203.0.113.7" in service.log.read_text())
    service.stop()
    assert len(fake.messages) == told, fake.texts()
    (folder / "token").write_text("")
    service.start("--dry-run")
    until("the empty file is named", lambda: any(f"bot_token_file: {folder}/token is empty" in problem
                                                 for problem in service.report("telegram")[1]))
    service.stop()


def another_host_tells_when_the_one_that_told_is_killed_or_stopped(fake, folder):
    with Server(CONFIG, folder) as server:
        cluster = Cluster(server, folder)
        token = folder / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        config = telegram_config(fake, folder).replace('"unbanned", ', "")
        cluster.config.write_text(cluster.config.read_text() + '[enforce.firewall]\nbackend = "none"\n' + config)
        try:
            cluster.start("detect", "edge-1")
            ingest = cluster.start("ingest", "edge-1")
            hosts = [cluster.start("enforce", node, dry_run=False) for node in ("edge-1", "edge-2")]
            until("the first start is told", lambda: count(fake, "Portcullis started") == 1)
            ingest.offend("203.0.113.7", OFFENCES)
            until("the ban is told", lambda: count(fake, "Banned 203.0.113.7") == 1)

            def holder():
                return next(host for host in hosts if host.says("This host tells from now on"))

            first = until("somebody tells", holder)
            first.kill()
            hosts.remove(first)
            other = hosts[0]
            # While nobody tells.
            ingest.offend("203.0.113.8", OFFENCES)
            until("the next ban is told", lambda: count(fake, "Banned 203.0.113.8") == 1)
            back = cluster.start("enforce", first.node, user=f"enforce-{first.node}", dry_run=False)
            until("it sees who tells", lambda: cluster.backend(first.node, "telegram") == [f"told by {other.node}"])
            # In order: nothing is told of it, and the other takes over at once.
            other.stop()
            ingest.offend("203.0.113.9", OFFENCES)
            until("the third ban is told", lambda: count(fake, "Banned 203.0.113.9") == 1)
            back.stop()
            assert count(fake, f"Portcullis stopped on {first.node}") == 1, fake.texts()
            # Nobody is left who could tell.
            ingest.offend("203.0.113.10", OFFENCES)
            until("it is decided", lambda: "203.0.113.10" in json.dumps(cluster.verb("bans")[1]))
            last = cluster.start("enforce", "edge-3", dry_run=False)
            until("it is told", lambda: count(fake, "Banned 203.0.113.10") == 1)
            last.stop()
            for role in cluster.roles:
                log = role.log.read_text()
                assert "Permissions Violation" not in log and "ERROR" not in log and TOKEN not in log, log
        finally:
            cluster.kill()
    order = [re.search(r"Banned \S+|started|stopped", text)[0] for text in fake.texts()]
    assert order == ["started", *(f"Banned 203.0.113.{n}" for n in (7, 8, 9)), "stopped", "started",
                     "Banned 203.0.113.10", "stopped"], order


TESTS = [
    the_fake_answers_as_the_client_of_others_expects,
    a_ban_is_told_once_whatever_telegram_does_and_not_again_after_a_restart,
    what_a_killed_process_had_not_told_is_told_by_the_next_and_once,
    many_bans_are_few_messages_and_all_are_counted,
    what_only_a_person_can_mend_is_said_and_then_delivered,
    webhooks_get_signed_cloud_events,
    the_examples_are_what_each_service_takes,
    a_dry_run_tells_nobody_and_says_what_it_would,
    another_host_tells_when_the_one_that_told_is_killed_or_stopped,
]


def run(test):
    """Whether it passed. Tests wait more than they work, so all run at once, each with a server and a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="portcullis-notify-") as folder:
        fake = Fake()
        began = time.monotonic()
        try:
            test(fake, Path(folder))
            print(f"test notify::{test.__name__} ... ok", flush=True)
            return True
        except Exception:  # Whatever it is, the test failed.
            print(f"test notify::{test.__name__} ... FAILED\n{traceback.format_exc()}"
                  f"told: {json.dumps(fake.texts(), indent=1)}", flush=True)
            for log in Path(folder).rglob("log"):
                print(f"--- {log}\n{log.read_text()[-4000:]}", file=sys.stderr)
            return False
        finally:
            fake.close()
            if os.environ.get("TIMES"):
                print(f"    {test.__name__}: {time.monotonic() - began:.1f} s")


def main():
    # The client logs the errors that it is made to meet.
    logging.disable()
    passwords()
    tests = [test for test in TESTS if test.__name__ in sys.argv[1:] or not sys.argv[1:]]
    try:
        with ThreadPoolExecutor(len(tests)) as pool:
            return 0 if all(list(pool.map(run, tests))) else 1
    finally:
        Service.end_all()


if __name__ == "__main__":
    sys.exit(main())
