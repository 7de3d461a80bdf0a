"""A server that answers as the Telegram Bot API does, and takes webhooks; with the faults that such servers have.

Held against python-telegram-bot in test_notify.py. It keeps everything that it was sent.
"""

import itertools
import json
import re
import threading
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

TOKEN = "110201543:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw"
TEXT_MAX = 4096
TAGS = {"b", "strong", "i", "em", "u", "ins", "s", "strike", "del", "a", "code", "pre", "tg-spoiler", "blockquote"}


class Html(HTMLParser):
    """Telegram's HTML: its tags only, each closed in order, every `<` and `&` escaped."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.wrong = [], "", None
        bare = re.sub(r"&(?:lt|gt|amp|quot|#\d+|#x[0-9a-fA-F]+);", "", text)
        if "&" in bare:
            # Telegram lets it pass; ours always escapes.
            self.wrong = "unescaped &"
        self.feed(text)
        self.close()
        if self.open:
            self.wrong = f"Can't find end tag corresponding to start tag {self.open[-1]}"

    def handle_starttag(self, tag, attrs):
        if tag not in TAGS:
            self.wrong = f'Unsupported start tag "{tag}"'
        self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong = f"Unmatched end tag {tag}"

    def handle_data(self, data):
        self.text += data


class Refusal(Exception):
    """An answer that is not ok."""

    def __init__(self, code, description, **parameters):
        super().__init__(description)
        self.code = code
        self.body = {"ok": False, "error_code": code, "description": description}
        if parameters:
            self.body["parameters"] = parameters


class Fake:
    """One server on a port of the loopback. `faults` come first, one a request: see `Handler.fail`."""

    def __init__(self):
        self.chats = {-100: "supergroup", 42: "private"}
        self.migrated, self.kicked = {}, set()
        self.messages, self.requests, self.faults, self.hook_answers = [], [], [], []
        self.ids = itertools.count(1)
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def texts(self):
        return [message["text"] for message in list(self.messages)]

    def hooks(self, path):
        return [request for request in list(self.requests) if request["path"] == path]

    def call(self, token, method, fields):
        if not re.fullmatch(r"\d+:[A-Za-z0-9_-]+", token):
            raise Refusal(404, "Not Found")
        if token != TOKEN:
            raise Refusal(401, "Unauthorized")
        methods = {"sendmessage": self.send_message, "getchat": self.get_chat, "getme": self.get_me}
        if method.lower() not in methods:
            raise Refusal(404, "Not Found: method not found")
        return methods[method.lower()](fields)

    def get_me(self, _):
        return {"id": 110201543, "is_bot": True, "first_name": "Portcullis", "username": "portcullis_bot"}

    def chat(self, fields):
        try:
            number = int(fields["chat_id"])
        except (KeyError, ValueError):
            raise Refusal(400, "Bad Request: chat not found") from None
        if number in self.migrated:
            raise Refusal(400, "Bad Request: group chat was upgraded to a supergroup chat",
                          migrate_to_chat_id=self.migrated[number])
        if number not in self.chats:
            raise Refusal(400, "Bad Request: chat not found")
        return {"id": number, "type": self.chats[number], "title": "Alarms"}

    def get_chat(self, fields):
        return self.chat(fields) | {"accent_color_id": 0, "max_reaction_count": 11,
                                    "accepted_gift_types": {"unlimited_gifts": True, "limited_gifts": True,
                                                            "unique_gifts": True, "premium_subscription": True,
                                                            "gifts_from_channels": True}}

    def send_message(self, fields):
        chat = self.chat(fields)
        if chat["id"] in self.kicked:
            raise Refusal(403, "Forbidden: bot was kicked from the supergroup chat")
        text = fields.get("text", "")
        if fields.get("parse_mode") == "HTML":
            html = Html(text)
            if html.wrong:
                raise Refusal(400, f"Bad Request: can't parse entities: {html.wrong}")
            text = html.text
        if not text.strip():
            raise Refusal(400, "Bad Request: message text is empty")
        if len(text.encode("utf-16-le")) // 2 > TEXT_MAX:
            raise Refusal(400, "Bad Request: message is too long")
        message = {"message_id": next(self.ids), "date": int(time.time()), "chat": chat, "text": text}
        with self.lock:
            self.messages.append(message | {"fields": fields, "at": time.monotonic()})
        return message


class Handler(BaseHTTPRequestHandler):
    """Requests as both speak them: JSON, or forms as python-telegram-bot has them."""

    fake = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bot = re.fullmatch(r"/bot([^/]*)/(\w+)", self.path)
        if self.fake.faults:
            kind, *value = self.fake.faults.pop(0)
            if kind != "slow":
                return self.fail(kind, *value)
            time.sleep(*value)
        if not bot:
            self.fake.requests.append({"path": self.path, "headers": dict(self.headers.items()), "body": body,
                                       "method": self.command})
            status, headers = self.fake.hook_answers.pop(0) if self.fake.hook_answers else (204, {})
            return self.answer(status, b"", headers)
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        fields = json.loads(body) if is_json else dict(parse_qsl(body.decode(), keep_blank_values=True))
        try:
            self.json(200, {"ok": True, "result": self.fake.call(*bot.groups(), fields)})
        except Refusal as refusal:
            self.json(refusal.code, refusal.body)

    do_PUT = do_POST

    def json(self, status, value):
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fail(self, kind, value=None):
        if kind == "wait":
            refusal = Refusal(429, f"Too Many Requests: retry after {value}", retry_after=value)
            self.json(429, refusal.body)
        elif kind == "gateway":
            self.answer(502, b"<html>502 Bad Gateway</html>", {"Content-Type": "text/html"})
        elif kind == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"ok":tr')
            self.close_connection = True
        elif kind == "garbage":
            self.answer(200, b'{"ok":true', {"Content-Type": "application/json"})
        elif kind == "cut":
            self.close_connection = True
        else:
            raise ValueError(kind)
