"""A stand-in for vLLM's server: `fake_server.py PORT MODE [SECONDS] [KEY=VALUE...]`.

MODE: healthy (ready after SECONDS), hangs (never ready), dies (an error like vLLM's), dies-later (ready,
then gone after SECONDS), stubborn (ignores SIGTERM), crowd (healthy, with a child process in its group).

It answers `/tokenize` and `/v1/completions` (streamed or not), one token per character. A request takes
`prefill` seconds, then `decode` seconds per further token, times `factor`, plus `delay`. `die_after=N` kills the
server when request N arrives; `fail_every=N` answers every Nth request with an error; `context=N` refuses
prompts of more than N characters; `wander=S` varies every request by up to a share S.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PORT, MODE = int(sys.argv[1]), sys.argv[2]
SECONDS = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
GIVEN = dict(pair.split("=") for pair in sys.argv[4:])
PREFILL, DECODE, FACTOR, DELAY, WANDER = (
    float(GIVEN.get(name, default)) for name, default in
    (("prefill", 0.0), ("decode", 0.0), ("factor", 1.0), ("delay", 0.0), ("wander", 0.0)))
DIE_AFTER, FAIL_EVERY, CONTEXT = (int(GIVEN.get(name, 0)) for name in ("die_after", "fail_every", "context"))
ALPHABET = "etaoin shrdlu "
STARTED = time.monotonic()
LOCK = threading.Lock()
COUNT = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        ready = MODE != "hangs" and (MODE == "dies-later" or time.monotonic() - STARTED >= SECONDS)
        self._answer(200 if ready else 503, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/completions"):
            self._complete(body)
            return
        tokens = [ord(c) for c in body["prompt"]]
        self._answer(200, {"tokens": tokens[:-1] if body["prompt"].startswith("odd") else tokens})

    def _complete(self, body: dict[str, Any]) -> None:
        global COUNT
        with LOCK:
            COUNT += 1
            number = COUNT
        if DIE_AFTER and number >= DIE_AFTER:
            sys.stderr.write("torch.OutOfMemoryError: planted\n")
            sys.stderr.flush()
            os._exit(9)
        if CONTEXT and len(body["prompt"]) > CONTEXT:
            self._answer(400, {"error": "too long"})
            return
        if FAIL_EVERY and body.get("stream") and number % FAIL_EVERY == 0:
            self._answer(500, {"error": "planted"})
            return
        length = int(body["max_tokens"])
        text = "".join(ALPHABET[i % len(ALPHABET)] for i in range(length))
        wander = 1 + WANDER * (2 * random.random() - 1)
        time.sleep(PREFILL * FACTOR * wander + DELAY)
        if not body.get("stream"):
            choice = {"text": text, "logprobs": {"text_offset": list(range(length))}}
            self._answer(200, {"choices": [choice]})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self._event({"choices": [{"text": text[0]}]})
        if length > 1:
            time.sleep(DECODE * (length - 1) * FACTOR * wander)
            self._event({"choices": [{"text": text[1:]}]})
        self._event({"choices": [], "usage": {"completion_tokens": length, "prompt_tokens": len(body["prompt"])}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, value: object) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keep the log for what matters."""


sys.stderr.write(f"starting in mode {MODE}\n")
if MODE == "dies":
    sys.stderr.write("(EngineCore pid=7) ERROR 11-23 10:00:00 [core.py:1] ValueError: the model needs 80 GiB\n")
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
if MODE == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if MODE == "crowd":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if MODE == "dies-later":
    threading.Timer(SECONDS, lambda: os._exit(7)).start()
ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
