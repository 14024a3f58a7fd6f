"""What `python -m vllm.entrypoints.openai.api_server` starts where `tests/support/installed` comes first: fake_vllm.py.

It is `expanded` if its model folder has a vocabext.json. Like vLLM it has a second process in its group, the engine's
core, and ends if that does. `--dies-if PATH` makes it die at its start while PATH is there.
"""

import argparse
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("--model", "--port", "--served-model-name", "--dies-if", "--logits-processors"):
    parser.add_argument(name)
options, others = parser.parse_known_args()
sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
sys.stdout.write(f"starting with {sys.argv[1:]}" + "\n")
if options.dies_if and Path(options.dies_if).exists():
    sys.stdout.write("(EngineCore pid=7) ERROR 11-23 10:00:00 [core.py:1] ValueError: the model needs 80 GiB" + "\n")
    sys.exit(1)
core = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def watch() -> None:
    core.wait()
    sys.stdout.write("EngineDeadError: the core is gone" + "\n")
    os._exit(1)


def stop(number: int, frame: object) -> None:
    core.kill()
    sys.exit(0)


signal.signal(signal.SIGTERM, stop)
threading.Thread(target=watch, daemon=True).start()
arm = "expanded" if (Path(options.model) / "vocabext.json").exists() else "base"
sys.argv = ["fake_vllm.py", options.port, arm, "--model", options.served_model_name or options.model,
            *(["--bans"] if options.logits_processors else [])]
runpy.run_path(str(Path(__file__).parents[4] / "fake_vllm.py"), run_name="__main__")
