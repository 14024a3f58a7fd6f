"""A stand-in for vLLM's server: `fake_server.py PORT MODE [SECONDS]`.

MODE: healthy (ready after SECONDS), hangs (never ready), dies (an error like vLLM's), dies-later (ready,
then gone after SECONDS), stubborn (ignores SIGTERM), crowd (healthy, with a child process in its group).
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, MODE = int(sys.argv[1]), sys.argv[2]
SECONDS = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
STARTED = time.monotonic()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        ready = MODE != "hangs" and (MODE == "dies-later" or time.monotonic() - STARTED >= SECONDS)
        self._answer(200 if ready else 503, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = [ord(c) for c in body["prompt"]]
        self._answer(200, {"tokens": tokens[:-1] if body["prompt"].startswith("odd") else tokens})

    def _answer(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


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
