"""An OpenAI-compatible endpoint on loopback that fails in every way an endpoint can, and counts its answers.

The first attempts at a question may fail, at random; the third never does.
"""

import gzip
import json
import random
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
LATER = b"HTTP/1.1 429 No\r\nRetry-After: "
# What an endpoint may write instead of an answer: (bytes, how often the last of them come, seconds between).
HOSTILE = {
    "trickle": ((OK, b"Content-Length: 999999\r\n\r\n", b" "), 10**6, 0.05),
    "trickled head": ((OK, b"X: ", b"x"), 10**6, 0.05),
    "endless continues": ((b"HTTP/1.1 100 Continue\r\n\r\n",), 10**6, 0.05),
    "endless": ((OK, b"\r\n", b"[" * 2**16), 10**6, 0.0),
    "endless error": ((b"HTTP/1.1 500 No\r\n\r\n", b"[" * 2**16), 10**6, 0.0),
    "endless head": ((OK, b"X: " + b"x" * 2**12 + b"\r\n"), 10**6, 0.0),
    "cut": ((OK, b'Content-Length: 999\r\n\r\n{"choices": ['), 1, 0.0),
    "no HTTP": ((b"\x16\x03\x01 what?\r\n\r\n",), 1, 0.0),
    "gzip": ((OK, b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b"[" * 2**20)), 1, 0.0),
    "deep": ((OK, b"\r\n", b'{"a":' * 10**5), 1, 0.0),
    "deep lists": ((OK, b"\r\n", b"[" * 10**5 + b"]" * 10**5), 1, 0.0),
    "NaN": ((OK, b'\r\n{"choices": [{"message": NaN, "text": NaN}]}'), 1, 0.0),
    "not text": ((OK, b'\r\n{"choices": [{"message": {"content": 7}, "text": [7]}]}'), 1, 0.0),
    "no object": ((OK, b"\r\n[3]"), 1, 0.0),
    "strange choices": ((OK, b'\r\n{"choices": {"0": {"text": "x"}}}'), 1, 0.0),
    "not UTF-8": ((OK, b'\r\n{"choices": [{"text": "\xff\xfe"}]}'), 1, 0.0),
    "nothing": ((OK, b"\r\n"), 1, 0.0),
    "no content": ((b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",), 1, 0.0),
    "wait for ever": ((LATER, b"99999999999999999999\r\n\r\n"), 1, 0.0),
    "wait for a strange time": ((LATER, b"Mon, 99 Xyz 99999 99:99:99\r\n\r\n"), 1, 0.0),
}
FAULTS = ("error", "stall", "rate limit", "drop", "not JSON", "no choices", "empty")


class Endpoint(ThreadingHTTPServer):
    """Answers `reply(body)`, a text or the HTTP status of a refusal.

    `faults` are drawn with probability `share` for the first `last_fault` attempts at a question.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reply, faults=FAULTS, share=0.4, stall=1.0, delay=0.0, last_fault=2, redirect=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.faults, self.share = reply, faults, share
        self.stall, self.delay, self.last_fault = stall, delay, last_fault
        self.asked, self.answered, self.failed = Counter(), Counter(), Counter()
        self.lock, self.rng = Lock(), random.Random(5)
        self.redirect = redirect  # (status, URL)
        self.bodies, self.keys, self.status, self.closing = [], [], None, False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that was killed or timed out is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["content-length"]))
        body, server = json.loads(raw), self.server
        with server.lock:
            server.bodies.append({**body, "path": self.path})
            server.keys.append(self.headers["authorization"])
            server.asked[raw] += 1
            faulty = server.asked[raw] <= server.last_fault and server.rng.random() < server.share
            fault = server.rng.choice(server.faults) if faulty else None
            server.failed[fault] += 1
        time.sleep(server.delay)
        if server.redirect:
            status, url = server.redirect
            return self.send(status, b"", [("Location", url + "/chat/completions")])
        if server.status:
            return self.refuse(server.status)
        if fault == "stall":
            time.sleep(server.stall)
        if fault in ("stall", "drop"):
            self.close_connection = True
            return self.connection.close()
        if fault == "error":
            return self.send(500, b"oops")
        if fault == "rate limit":
            return self.send(429, b'{"error": {"message": "slow down"}}', [("Retry-After", "0")])
        if fault in HOSTILE:
            return self.write_hostile(*HOSTILE[fault])
        if fault == "not JSON":
            return self.send(200, b'{"choices": [')
        if fault == "no choices":
            return self.send(200, b'{"object": "chat.completion"}')
        text = "" if fault == "empty" else server.reply(body)
        if isinstance(text, int):
            return self.refuse(text)
        content = {"text": text} if "prompt" in body else {"message": {"content": text}}
        choice = {"index": 0, "finish_reason": "stop", **content}
        if fault is None:
            with server.lock:
                server.answered[raw] += 1
        self.send(200, json.dumps({"object": "x", "choices": [choice]}).encode())

    def refuse(self, status):
        message = f"refused: {self.headers['authorization']}"
        self.send(status, json.dumps({"error": {"message": message}}).encode())

    def write_hostile(self, parts, times, pause):
        self.close_connection = True
        self.wfile.write(b"".join(parts[:-1]))
        for _ in range(times):
            if self.server.closing:
                return
            self.wfile.write(parts[-1])
            self.wfile.flush()
            time.sleep(pause)

    def send(self, status, body, headers=()):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def running(reply, **settings):
    """An Endpoint that answers in a thread of its own."""
    with Endpoint(reply, **settings) as endpoint:
        Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield endpoint
        finally:
            endpoint.closing = True
            endpoint.shutdown()
