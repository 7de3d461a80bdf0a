#!/usr/bin/env python3
"""A stand-in for Cloudflare's API: IP access rules, lists with their bulk operations, and what tells whether a list is used.

Answers as https://developers.cloudflare.com/api/ says, and fails as it may: too many calls, servers in trouble, slow, cut
and broken answers, refusals with status 200. tests/cloudflare/official.py holds it against the official client. Listens at
the address that is its argument, else on loopback; prints its port, and ends when standard input does. `POST /_fake` changes
how it behaves and what is there, `GET /_fake` tells.
"""

import base64
import collections
import copy
import http.server
import ipaddress
import json
import math
import random
import re
import sys
import threading
import time
import urllib.parse

MODES = ["block", "challenge", "whitelist", "js_challenge", "managed_challenge"]
NOW = "2026-01-08T14:19:15.980000Z"
RULES = re.compile(r"/(user|zones/[0-9a-f]{32}|accounts/[0-9a-f]{32})/firewall/access_rules/rules(?:/(\w+))?")
LISTS = re.compile(r"/accounts/([0-9a-f]{32})/rules/lists(?:/(\w+))?(/items)?")
OPERATION = re.compile(r"/accounts/([0-9a-f]{32})/rules/lists/bulk_operations/(\w+)")
ENTRY_POINT = re.compile(
    r"/((?:zones|accounts)/[0-9a-f]{32})/rulesets/phases/http_request_firewall_custom/entrypoint")


class Refusal(Exception):
    def __init__(self, status: int, code: int, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Cloudflare:
    """Everything that is there, and how it behaves."""

    def __init__(self):
        self.lock = threading.RLock()
        self.random = random.Random(1)
        self.settings = {
            "token": "token", "email": "user@example.net", "key": "key",
            # Calls in a window of so many seconds; past it, all are refused for as long.
            "limit": 1200, "window": 300.0,
            # How likely each trouble is, for calls that read or write; before and after it is done.
            "chaos": {},
            "slow": 0.5, "pause": 0.0, "operation": 0.02, "items_max": 10000, "rules_max": 50000,
            # Kinds of places whose rulesets the login may not read, and the plan of all zones.
            "hides_rulesets": [], "plan": "free",
            # Items that a bulk operation fails at, and rules that are refused.
            "bad": [], "sealed": [], "page_max": 1000, "why": "internal error",
        }
        self.rules = collections.defaultdict(dict)
        self.lists = {}
        self.items = collections.defaultdict(dict)
        self.operations = {}
        self.zones = {}
        # Those that the login may see.
        self.accounts = set()
        self.entry_points = {}
        self.calls = collections.deque()
        self.locked_until = 0.0
        self.ids = 0
        self.stats = collections.Counter()
        # Calls of each client's address.
        self.callers = collections.Counter()
        # Notes of what was changed or removed, as they were.
        self.touched = set()

    def new_id(self) -> str:
        self.ids += 1
        return f"{self.ids:032x}"

    # ---- the limit

    def count(self):
        """Refuses the call when there are too many. Returns the headers for all answers."""
        now, window = time.monotonic(), self.settings["window"]
        while self.calls and self.calls[0] <= now - window:
            self.calls.popleft()
        headers = {"Ratelimit-Policy": f'"default";q={self.settings["limit"]};w={round(window)}'}
        if now < self.locked_until:
            self.stats["locked"] += 1
            headers["Retry-After"] = str(max(1, round(self.locked_until - now + 0.5)))
            return False, headers
        self.calls.append(now)
        self.stats["calls"] += 1
        self.stats["most"] = max(self.stats["most"], len(self.calls))
        if len(self.calls) > self.settings["limit"]:
            self.stats["over"] += 1
            self.locked_until = now + window
            headers["Retry-After"] = str(max(1, round(window + 0.5)))
            return False, headers
        left = self.settings["limit"] - len(self.calls)
        resets = max(0, math.ceil(self.calls[0] + window - now))
        headers["Ratelimit"] = f'"default";r={left};t={resets}'
        return True, headers

    # ---- access rules

    def access_rules(self, method, whose, rule_id, query, body):
        rules = self.rules[whose]
        if rule_id is None and method == "GET":
            return self.list_rules(self.inherited(whose) + list(rules.values()), query)
        if rule_id is None and method == "POST":
            return self.create_rule(whose, rules, body), None
        rule = rules.get(rule_id)
        if rule is None:
            raise Refusal(404, 10001, "firewallaccessrules.api.not_found")
        if method == "GET":
            return rule, None
        self.touched.add(rule["notes"])
        if method == "DELETE":
            del rules[rule_id]
            return {"id": rule_id}, None
        if method == "PATCH":
            if body.get("mode", rule["mode"]) not in MODES:
                raise Refusal(400, 10008, "firewallaccessrules.api.invalid_mode")
            rule.update({key: body[key] for key in ("mode", "notes") if key in body})
            return rule, None
        raise Refusal(405, 10000, "method not allowed")

    def inherited(self, whose):
        """Rules that a zone also lists, and that cannot be changed there."""
        kind, _, found = whose.partition("/")
        if kind != "zones":
            return []
        account = self.rules.get(f"accounts/{self.zones.get(found)}", {})
        return list(account.values()) + list(self.rules.get("user", {}).values())

    def create_rule(self, whose, rules, body):
        configuration = body.get("configuration") or {}
        value = written(configuration.get("target"), configuration.get("value"))
        if value is None or body.get("mode") not in MODES or configuration.get("value") in self.settings["bad"]:
            raise Refusal(400, 10002, "firewallaccessrules.api.validation_error")
        same = [rule for rule in rules.values() if rule["configuration"]["value"] == value]
        if same:
            raise Refusal(400, 10009, "firewallaccessrules.api.duplicate_of_existing")
        if len(rules) >= self.settings["rules_max"]:
            raise Refusal(400, 10020, "firewallaccessrules.api.rule_quota_exceeded")
        return self.add_rule(whose, configuration["target"], value, body["mode"], body.get("notes", ""))

    def add_rule(self, whose, target, value, mode, notes):
        rule = {
            "id": self.new_id(), "paused": False, "modified_on": NOW, "created_on": NOW, "allowed_modes": MODES,
            "mode": mode, "notes": notes, "configuration": {"target": target, "value": value},
            "scope": {"id": whose.split("/")[-1], "type": "user" if whose == "user" else "organization"},
        }
        self.rules[whose][rule["id"]] = rule
        return rule

    def list_rules(self, rules, query):
        page, size = number(query, "page", 1), number(query, "per_page", 20)
        if page < 1 or not 5 <= size <= self.settings["page_max"]:
            raise Refusal(400, 10003, "firewallaccessrules.api.invalid_paging")
        tests = []
        if "notes" in query:
            tests.append(lambda rule: query["notes"].lower() in rule["notes"].lower())
        if "mode" in query:
            tests.append(lambda rule: rule["mode"] == query["mode"])
        for key in ("target", "value"):
            wanted = query.get(f"configuration.{key}")
            if wanted is not None:
                tests.append(lambda rule, key=key, wanted=wanted: rule["configuration"][key] == wanted)
        among = any if query.get("match") == "any" and tests else all
        return page_of([rule for rule in rules if among(test(rule) for test in tests)], page, size)

    # ---- lists

    def list_of_items(self, method, account, list_id, items, query, body):
        if account not in self.accounts:
            raise Refusal(403, 10000, "Authentication error")
        if list_id is None:
            return self.all_lists(method, account, body), None
        found = self.lists.get(list_id)
        if found is None or found["account"] != account:
            raise Refusal(404, 10001, "filters.api.not_found")
        if not items:
            return self.one_list(method, list_id, found), None
        if method == "GET":
            return self.page_of_items(list_id, query)
        if list_id in self.settings["sealed"]:
            raise Refusal(403, 10000, "Authentication error")
        if method not in ("POST", "PUT", "DELETE"):
            raise Refusal(405, 10000, "method not allowed")
        if any(self.progress(operation)["status"] in ("pending", "running") for operation in self.operations.values()):
            raise Refusal(429, 10015, "filters.api.pending_bulk_operation")
        if method == "DELETE":
            work = {"remove": [item["id"] for item in (body or {}).get("items", [])]}
        else:
            new = [item["ip"] for item in body]
            if any(item_text(ip) is None for ip in new):
                raise Refusal(400, 10027, "filters.api.invalid_item")
            if len({item_text(ip) for ip in new}) < len(new):
                raise Refusal(400, 10028, "filters.api.duplicate_item_value")
            work = {"add": body, "instead": method == "PUT"}
        operation = {"id": self.new_id(), "list": list_id, "work": work, "began": time.monotonic(), "result": None}
        self.operations[operation["id"]] = operation
        return {"operation_id": operation["id"]}, None

    def all_lists(self, method, account, body):
        if method == "POST":
            if not re.fullmatch(r"[a-z0-9_]{1,50}", body.get("name", "")) or body.get("kind") not in ("ip", "asn"):
                raise Refusal(400, 10011, "filters.api.invalid_list")
            return self.add_list(account, body["name"], body["kind"])
        return [self.shown_list(found) for found in self.lists.values() if found["account"] == account]

    def one_list(self, method, list_id, found):
        if method == "DELETE":
            del self.lists[list_id]
            return {"id": list_id}
        return self.shown_list(found)

    def add_list(self, account, name, kind="ip", list_id=None):
        found = {"id": list_id or self.new_id(), "account": account, "name": name, "kind": kind, "filters": 0}
        self.lists[found["id"]] = found
        return self.shown_list(found)

    def shown_list(self, found):
        return {"id": found["id"], "name": found["name"], "kind": found["kind"], "description": "",
                "num_items": len(self.items[found["id"]]), "num_referencing_filters": found["filters"],
                "created_on": NOW, "modified_on": NOW}

    def page_of_items(self, list_id, query):
        size = number(query, "per_page", 100)
        if not 1 <= size <= min(500, self.settings["page_max"]):
            raise Refusal(400, 10003, "filters.api.invalid_paging")
        search = query.get("search", "")
        found = [item for item in self.items[list_id].values() if item["ip"].startswith(search)]
        start = 0
        if "cursor" in query:
            try:
                start = int(base64.urlsafe_b64decode(query["cursor"]))
            except ValueError:
                raise Refusal(400, 10004, "filters.api.invalid_cursor") from None
        end = start + size
        after = base64.urlsafe_b64encode(str(end).encode()).decode()
        return found[start:end], {"cursors": {"after": after} if end < len(found) else {}}

    def progress(self, operation):
        """How far an operation is: it waits, runs, and is done in one go at its end."""
        ran = (time.monotonic() - operation["began"]) / max(self.settings["operation"], 1e-9)
        if operation["result"] is None and ran >= 1:
            operation["result"] = self.work(operation["list"], operation["work"])
        result = operation["result"]
        shown = {"id": operation["id"]}
        if result is None:
            shown["status"] = "pending" if ran < 0.5 else "running"
        elif result == "":
            shown.update(status="completed", completed=NOW)
        else:
            shown.update(status="failed", error=result, completed=NOW)
        return shown

    def work(self, list_id, work):
        if self.random.random() < self.settings["chaos"].get("operation", 0):
            return self.settings["why"]
        items = self.items[list_id]
        if "remove" in work:
            for item_id in work["remove"]:
                if item_id in items:
                    self.touched.add(items.pop(item_id)["comment"])
            return ""
        if any(item["ip"] in self.settings["bad"] for item in work["add"]):
            return "an item is not valid"
        if work["instead"]:
            self.touched.update(item["comment"] for item in items.values())
            items.clear()
        by_ip = {item["ip"]: item for item in items.values()}
        fresh = [item for item in work["add"] if item_text(item["ip"]) not in by_ip]
        if len(items) + len(fresh) > self.settings["items_max"]:
            return "This list is at the maximum number of items"
        for item in work["add"]:
            ip = item_text(item["ip"])
            if ip in by_ip:
                self.touched.add(by_ip[ip]["comment"])
                by_ip[ip]["comment"] = item.get("comment", "")
            else:
                self.add_item(list_id, ip, item.get("comment", ""))
        return ""

    def add_item(self, list_id, ip, comment):
        item = {"id": self.new_id(), "ip": ip, "comment": comment, "created_on": NOW, "modified_on": NOW}
        self.items[list_id][item["id"]] = item
        return item

    # ---- all of it

    def answer(self, method, path, query, body):
        if match := RULES.fullmatch(path):
            return self.access_rules(method, match[1], match[2], query, body)
        if match := OPERATION.fullmatch(path):
            if match[2] not in self.operations:
                raise Refusal(404, 10001, "filters.api.not_found")
            return self.progress(self.operations[match[2]]), None
        if match := LISTS.fullmatch(path):
            for operation in self.operations.values():
                self.progress(operation)
            return self.list_of_items(method, match[1], match[2], match[3], query, body)
        if path == "/zones" and method == "GET":
            zones = [{"id": zone, "name": f"{zone[:4]}.example", "account": {"id": account, "name": "a"},
                      "plan": {"id": "1" * 32, "legacy_id": self.settings["plan"]}}
                     for zone, account in self.zones.items() if query.get("account.id", account) == account]
            return page_of(zones, number(query, "page", 1), number(query, "per_page", 20))
        if match := ENTRY_POINT.fullmatch(path):
            if match[1].split("/")[0] in self.settings["hides_rulesets"]:
                raise Refusal(403, 10000, "Authentication error")
            rules = self.entry_points.get(match[1])
            if rules is None:
                raise Refusal(404, 10003, "could not find entrypoint ruleset in the http_request_firewall_custom phase")
            return {"id": "0" * 32, "kind": "zone", "name": "default", "phase": "http_request_firewall_custom",
                    "version": "1", "last_updated": NOW, "rules": rules}, None
        raise Refusal(404, 7003, "Could not route to this path, perhaps your object identifier is invalid?")

    def is_known(self, headers):
        if headers.get("Authorization") is not None:
            return headers["Authorization"] == f"Bearer {self.settings['token']}"
        login = (headers.get("X-Auth-Email"), headers.get("X-Auth-Key"))
        return login == (self.settings["email"], self.settings["key"])

    def rolls(self, trouble):
        return self.random.random() < self.settings["chaos"].get(trouble, 0)

    # ---- for the tests

    def control(self, wishes):
        self.settings.update(wishes.get("settings", {}))
        if "seed" in wishes:
            self.random = random.Random(wishes["seed"])
        for rule in wishes.get("rules", []):
            self.add_rule(rule["whose"], rule["target"], written(rule["target"], rule["value"]),
                          rule.get("mode", "block"), rule["notes"])
        for wanted in wishes.get("lists", []):
            self.accounts.add(wanted["account"])
            self.add_list(wanted["account"], wanted["name"], wanted.get("kind", "ip"), wanted.get("id"))
        for item in wishes.get("items", []):
            self.add_item(item["list"], item["ip"], item["comment"])
        for gone in wishes.get("remove_lists", []):
            self.one_list("DELETE", gone, self.lists[gone])
        for gone in wishes.get("remove", []):
            for entries in (*self.rules.values(), *self.items.values()):
                entries.pop(gone, None)
        self.zones.update(wishes.get("zones", {}))
        self.accounts.update(wishes.get("zones", {}).values(), wishes.get("accounts", []))
        self.entry_points.update(wishes.get("entry_points", {}))
        return self.state()

    def state(self):
        for operation in self.operations.values():
            self.progress(operation)
        running = [o["id"] for o in self.operations.values() if o["result"] is None]
        return {"rules": {whose: list(rules.values()) for whose, rules in self.rules.items()},
                "items": {found: list(items.values()) for found, items in self.items.items()},
                "lists": {found["name"]: found["id"] for found in self.lists.values()},
                "stats": dict(self.stats), "touched": sorted(self.touched), "running": running,
                "callers": dict(self.callers)}


def page_of(found, page, size):
    part = found[(page - 1) * size:page * size]
    return part, {"page": page, "per_page": size, "count": len(part), "total_count": len(found),
                  "total_pages": max(1, -(-len(found) // size))}


def number(query, name, default):
    text = query.get(name, str(default))
    if not text.isdigit():
        raise Refusal(400, 10003, f"{name} is not a number")
    return int(text)


def written(target, value):
    """The value of an access rule as it is stored, IPv6 in full; None where it is none."""
    try:
        if target == "ip":
            return str(ipaddress.IPv4Address(value))
        if target == "ip6":
            return ipaddress.IPv6Address(value).exploded
        if target == "ip_range":
            net = ipaddress.ip_network(value)
            fine = net.prefixlen in ((16, 24) if net.version == 4 else (32, 48, 64))
            return net.exploded if fine else None
        if target == "country":
            return value if re.fullmatch("[A-Z]{2}", value) else None
        return None
    except (ValueError, TypeError):
        return None


def item_text(text):
    """An item's address as it is stored; None where it is none."""
    try:
        net = ipaddress.ip_network(text.lower())
    except ValueError:
        return None
    if net.prefixlen < (8 if net.version == 4 else 12):
        return None
    return str(net) if "/" in text else str(net.network_address)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cloudflare = Cloudflare()

    def log_message(self, *_):
        pass

    def handle_any(self):
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        fake, method = self.cloudflare, self.command
        if address.path == "/_fake":
            with fake.lock:
                shown = fake.control(json.loads(raw)) if method == "POST" else fake.state()
                return self.send(200, {}, json.dumps(copy.deepcopy(shown)).encode())
        with fake.lock:
            fake.callers[self.client_address[0]] += 1
            fine, headers = fake.count()
            pause = fake.settings["pause"] + (fake.settings["slow"] if fake.rolls("slow") else 0)
        if pause:
            time.sleep(pause)
        if not fine:
            return self.send(429, headers, refused(10000, "Rate limit exceeded"))
        with fake.lock:
            if not fake.is_known(self.headers):
                # Who says the token back, as a careless program might.
                said = self.headers.get("Authorization", self.headers.get("X-Auth-Key", ""))
                return self.send(403, headers, refused(9109, f"Invalid access token {said}"))
            if fake.rolls("unavailable"):
                return self.send(fake.random.choice([500, 502, 503, 520]), headers, b"<html>oh</html>")
            if fake.rolls("limited"):
                return self.send(429, {**headers, "Retry-After": "1"}, refused(10000, "Rate limit exceeded"))
            if fake.rolls("refused"):
                return self.send(200, headers, refused(1000, "internal error"))
            status = 200
            try:
                result, info = fake.answer(method, address.path, query, json.loads(raw) if raw else {})
                text = json.dumps({"success": True, "errors": [], "messages": [], "result": result,
                                   **({"result_info": info} if info is not None else {})}).encode()
            except Refusal as refusal:
                status, text = refusal.status, refused(refusal.code, refusal.message)
            if fake.rolls("late"):
                return self.send(504, headers, b"")
            if fake.rolls("broken"):
                return self.send(status, headers, text[:len(text) // 2])
            if fake.rolls("cut"):
                return self.send(status, headers, text, cut=True)
        return self.send(status, headers, text)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

    def send(self, status, headers, text, cut=False):
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[:len(text) // 2] if cut else text)
            self.close_connection |= cut
        except OSError:
            self.close_connection = True


def refused(code, message):
    return json.dumps({"success": False, "errors": [{"code": code, "message": message}], "messages": [],
                       "result": None}).encode()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Clients are killed in the middle of requests; anything else is a mistake here."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def start(address="127.0.0.1"):
    """Serves on a free port in this process; returns the port and what is there."""
    server = Server((address, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1], Handler.cloudflare


if __name__ == "__main__":
    print(start(*sys.argv[1:])[0], flush=True)
    sys.stdin.read()
