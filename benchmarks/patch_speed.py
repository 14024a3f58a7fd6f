"""Patch, verify and revert a large synthetic checkpoint; compare with `cp -r` and with transformers.

    python benchmarks/patch_speed.py [--gigabytes 10] [--folder DIR] [--ways WAY...] [--turns 3] [-o FILE]
    python benchmarks/patch_speed.py --docs docs/benchmarks.md      writes what benchmarks/patch_speed*.json say

    start         import of torch and transformers, which every command below but cp, read and revert begins with
    cp            cp -r of the base
    copy          vocabext patch --link copy
    link          vocabext patch --link auto
    transformers  from_pretrained, add_tokens, resize_token_embeddings, save_pretrained
    read          cat of all files of the folder that `copy` made: reading it once
    verify        vocabext verify of that folder, without loading the weights: reads base and folder
    verify-link   the same for the folder that `link` made
    revert        vocabext revert --link copy of the folder that `copy` made

Each way is a process of its own, start of Python included (its modules are compiled once before). Before each,
what is dirty goes to disk and the files that it reads leave the cache; after each, the file system is synced, and
timed: cp leaves that to whoever comes next, patch and revert do it themselves. The ways take turns. Of the peak
memory, `anonymous` is what a process cannot give back (sampled), `resident` counts mapped files as well. New rows
are not computed by transformers (mean_resizing=False), which would take it longer. With --folder, the base stays
there for another call.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import describe
from patch_tables import WAYS, section, table
from sections import put_section
from synthetic_checkpoint import write_checkpoint, write_rows

from vocabext.checkpoint.folder import open_checkpoint
from vocabext.files.atomic import write_json

GB = 10**9
LOOK_SECONDS = 0.02
VOCABEXT = (sys.executable, "-m", "vocabext")
IMPORTS = ("import transformers.models.llama.modeling_llama, transformers.generation, vocabext.patch.stage, "
           "vocabext.verify.stage")
RESIZE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabext.checkpoint.folder import open_rows
from pathlib import Path
base, rows, output, shard = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
tokenizer.add_tokens([token.token for token in open_rows(Path(rows)).tokens])
model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
model.save_pretrained(output, max_shard_size=int(shard))
tokenizer.save_pretrained(output)
"""
RESULTS = Path(__file__).parent


def main() -> None:
    """Measure all ways, or write down what was measured."""
    arguments = _parse()
    if arguments.docs:
        results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("patch_speed*.json"))]
        put_section(arguments.docs, section(results))
        return
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(folder, arguments)
        runs: list[dict[str, Any]] = []
        for turn in range(arguments.turns):
            for way in arguments.ways:
                runs.append({"way": way, "turn": turn, **bench.run(way)})
                print(json.dumps(runs[-1]), flush=True)
        bench.clean_up()
        found = {"machine": describe_disk(folder), "checkpoint": bench.facts(), "runs": runs}
    if arguments.output:
        write_json(arguments.output, found)
    print(table(found))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10, help="size of the base")
    parser.add_argument("--shard-gigabytes", type=float, default=1, help="size of a shard")
    parser.add_argument("--tokens", type=int, default=1_000, help="how many new tokens")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; default: a temporary folder")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--turns", type=int, default=3, help="how often each way is measured")
    parser.add_argument("--docs", type=Path, help="measure nothing, write the section of this Markdown file anew")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    return parser.parse_args()


def describe_disk(folder: Path) -> dict[str, object]:
    """Return what a reader must know about the machine.

    Args:
        folder: Where the checkpoints lie.
    """
    import torch

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = _lines("/proc/cpuinfo")
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    mounts = [line.split() for line in _lines("/proc/mounts")]
    inside = [fields for fields in mounts if folder.resolve().is_relative_to(fields[1])]
    kind = max(inside, key=lambda fields: len(fields[1]))[2] if inside else "an unknown file system"
    return {**describe(torch.device("cpu")), "memory_bytes": pages, "processor": processor or platform.machine(),
            "file_system": kind, "transformers": version("transformers")}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


class Bench:
    """The base, its rows, and one output at a time.

    Attributes:
        base: The base's folder.
        rows: The rows file.
        output: Where every way but `copy` and `link`, which `verify` looks at, writes.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.base, self.rows, self.output = folder / "base", folder / "rows.safetensors", folder / "output"
        self._made = {way: folder / way for way in ("copy", "link")}
        self._arguments = arguments
        self._environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if not self.rows.is_file():
            shard_bytes = int(arguments.shard_gigabytes * GB)
            write_checkpoint(self.base, num_bytes=int(arguments.gigabytes * GB), shard_bytes=shard_bytes)
            write_rows(self.rows, self.base, arguments.tokens)
        measure([sys.executable, "-c", IMPORTS], self._environment)

    def run(self, way: str) -> dict[str, Any]:
        """Measure one way once."""
        output = self._made.get(way, self.output)
        if way in ("read", "verify", "revert") and not self._made["copy"].exists():
            self.run("copy")
        if way == "verify-link" and not self._made["link"].exists():
            self.run("link")
        self._remove(output)
        commands: dict[str, Sequence[str | Path]] = {
            "start": (sys.executable, "-c", IMPORTS),
            "cp": ("cp", "-r", self.base, output),
            "copy": (*VOCABEXT, "patch", self.rows, "--model", self.base, "-o", output, "--link", "copy", "--json"),
            "link": (*VOCABEXT, "patch", self.rows, "--model", self.base, "-o", output, "--json"),
            "transformers": (sys.executable, "-c", RESIZE, self.base, self.rows, output,
                             str(int(self._arguments.shard_gigabytes * GB))),
            "read": ("cat", *sorted(path for path in self._made["copy"].rglob("*") if path.is_file())),
            "verify": (*VOCABEXT, "verify", self._made["copy"], "--against", self.base, "--skip-weights", "--json"),
            "verify-link": (*VOCABEXT, "verify", self._made["link"], "--against", self.base, "--skip-weights",
                            "--json"),
            "revert": (*VOCABEXT, "revert", self._made["copy"], "-o", output, "--link", "copy", "--json"),
        }
        os.sync()
        for root in (self.base, *self._made.values()):
            evict(root)
        found = measure([str(part) for part in commands[way]], self._environment)
        document = json.loads(found.pop("stdout") or "{}")
        began = time.monotonic()
        os.sync()
        found["sync_seconds"] = time.monotonic() - began
        if way in self._made:
            found |= {key: document[key] for key in ("bytes_written", "folder_bytes", "num_linked", "links", "seconds")}
        if way.startswith("verify"):
            found |= {"seconds": document["seconds"], "passed": document["passed"]}
        self._remove(self.output)
        return found

    def clean_up(self) -> None:
        """Delete what was made, but not the base."""
        for path in (self.output, *self._made.values()):
            self._remove(path)

    def facts(self) -> dict[str, Any]:
        """Return what the base is."""
        shards = sorted(self.base.glob("*.safetensors"))
        config = json.loads((self.base / "config.json").read_text())
        checkpoint = open_checkpoint(self.base)
        rewritten = {checkpoint.tensors[name].file for name in checkpoint.row_tensors}
        return {"bytes": sum(path.stat().st_size for path in shards), "shards": len(shards),
                "rewritten_bytes": sum((self.base / file).stat().st_size for file in rewritten),
                "new_tokens": self._arguments.tokens,
                **{key: config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}}

    @staticmethod
    def _remove(folder: Path) -> None:
        if folder.exists():
            shutil.rmtree(folder)


def evict(folder: Path) -> None:
    """Let the files of a folder leave the cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command; return its output, seconds, processor seconds and peak memory.

    Args:
        command: The command; `cat` writes to nowhere.
        environment: Its environment.
    """
    peak = {"RssAnon": 0, "VmHWM": 0}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL if command[0] == "cat" else out, stderr=errors,
                                   env=environment)
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, stop))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        stop.set()
        watcher.join()
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{errors.read().decode()[-2000:]}")
        out.seek(0)
        stdout = out.read().decode()
    return {"stdout": stdout, "wall_seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_resident_bytes": peak["VmHWM"], "peak_anonymous_bytes": peak["RssAnon"]}


def _watch(pid: int, peak: dict[str, int], stop: threading.Event) -> None:
    while not stop.wait(LOOK_SECONDS):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            key, _, value = line.partition(":")
            if key in peak:
                peak[key] = max(peak[key], 1024 * int(value.split()[0]))


if __name__ == "__main__":
    main()
