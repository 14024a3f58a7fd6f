"""Patch and verify a large synthetic checkpoint; print times against `cp -r`, peak memory, bytes written.

    python benchmarks/patch_speed.py [--gigabytes 10] [--folder DIR] [--ways WAY...] [--turns 3] [-o FILE]

    cp            cp -r of the base, then sync of the file system: time until cp returns, and until the disk has it
    copy          vocabext patch --link copy
    link          vocabext patch --link auto
    transformers  from_pretrained, add_tokens, resize_token_embeddings, save_pretrained, then sync
    read          cat of all files of the folder that `copy` made: reading it once
    verify        vocabext verify of that folder, without loading the weights
    verify-link   the same for the folder that `link` made

Each way is a process of its own, start of Python included (its modules are compiled once before). Before each,
what is dirty goes to disk and the files that it reads leave the cache. The ways take turns. Of the peak memory,
`anonymous` is what a process cannot give back (sampled), `resident` counts mapped files as well. New rows are not
computed by transformers (mean_resizing=False), which would take it longer. With --folder, the base stays there for
another call, and the results of calls with the same -o come together in one file.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from machine import describe
from synthetic_checkpoint import write_checkpoint, write_rows

from vocabext.records import read_json_or, write_json

GB, MIB = 10**9, 2**20
LOOK_SECONDS = 0.02
VOCABEXT = (sys.executable, "-m", "vocabext")
IMPORTS = "import transformers.models.llama.modeling_llama, transformers.generation, vocabext.patch, vocabext.verify"
RESIZE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabext.checkpoint import open_rows
from pathlib import Path
base, rows, output, shard = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
tokenizer.add_tokens([token.token for token in open_rows(Path(rows)).tokens])
model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
model.save_pretrained(output, max_shard_size=int(shard))
tokenizer.save_pretrained(output)
"""
WAYS = ("cp", "copy", "link", "transformers", "read", "verify", "verify-link")


def main() -> None:
    """Measure all ways."""
    arguments = _parse()
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(folder, arguments)
        runs: list[dict[str, Any]] = []
        for turn in range(arguments.turns):
            for way in arguments.ways:
                runs.append({"way": way, "turn": turn, **bench.run(way)})
                print(json.dumps(runs[-1]), flush=True)
        bench.clean_up()
        known = read_json_or(arguments.output, {}) if arguments.output else {}
        kept = [run for run in known.get("runs", []) if run["way"] not in arguments.ways]
        found = {"machine": describe_disk(), "checkpoint": bench.facts(), "runs": [*kept, *runs]}
    if arguments.output:
        write_json(arguments.output, found)
    for line in table(found["runs"]):
        print(line)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10, help="size of the base")
    parser.add_argument("--shard-gigabytes", type=float, default=1, help="size of a shard")
    parser.add_argument("--tokens", type=int, default=1_000, help="how many new tokens")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; default: a temporary folder")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--turns", type=int, default=3, help="how often each way is measured")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    return parser.parse_args()


def describe_disk() -> dict[str, object]:
    """Return what a reader must know about the machine."""
    import torch

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {**describe(torch.device("cpu")), "memory_bytes": pages}


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
        self._remove(output)
        commands: dict[str, Sequence[str | Path]] = {
            "cp": ("cp", "-r", self.base, output),
            "copy": (*VOCABEXT, "patch", self.rows, "--model", self.base, "-o", output, "--link", "copy", "--json"),
            "link": (*VOCABEXT, "patch", self.rows, "--model", self.base, "-o", output, "--json"),
            "transformers": (sys.executable, "-c", RESIZE, self.base, self.rows, output,
                             str(int(self._arguments.shard_gigabytes * GB))),
            "read": ("cat", *sorted(path for path in self._made["copy"].rglob("*") if path.is_file())),
            "verify": (*VOCABEXT, "verify", self._made["copy"], "--against", self.base, "--skip-weights", "--json"),
            "verify-link": (*VOCABEXT, "verify", self._made["link"], "--against", self.base, "--skip-weights",
                            "--json"),
        }  # fmt: skip
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
            if not {"verify", "verify-link", "read"}.isdisjoint(self._arguments.ways) or path == self.output:
                self._remove(path)

    def facts(self) -> dict[str, Any]:
        """Return what the base is."""
        shards = sorted(self.base.glob("*.safetensors"))
        config = json.loads((self.base / "config.json").read_text())
        return {"bytes": sum(path.stat().st_size for path in shards), "shards": len(shards),
                "new_tokens": self._arguments.tokens,
                **{key: config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}}  # fmt: skip

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
                                   env=environment)  # fmt: skip
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
            "peak_resident_bytes": peak["VmHWM"], "peak_anonymous_bytes": peak["RssAnon"]}  # fmt: skip


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


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table of medians.

    Args:
        runs: What `Bench.run` returned, with the way.
    """
    by_way = {way: [run for run in runs if run["way"] == way] for way in WAYS}

    def median(way: str, key: str, more: str | None = None) -> float:
        return statistics.median(run[key] + (run[more] if more else 0) for run in by_way[way])

    lines = ["| way | seconds (all turns) | with sync | x cp | x cp with sync | peak memory: anonymous | resident |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for way in (way for way in WAYS if by_way[way]):
        seconds, synced = median(way, "wall_seconds"), median(way, "wall_seconds", "sync_seconds")
        ratios = ["", ""]
        if by_way["cp"] and not way.startswith(("verify", "read")):
            ratios = [f"{seconds / median('cp', 'wall_seconds'):.2f}",
                      f"{synced / median('cp', 'wall_seconds', 'sync_seconds'):.2f}"]  # fmt: skip
        turns = ", ".join(f"{run['wall_seconds']:.1f}" for run in by_way[way])
        lines.append(f"| {way} | {seconds:.1f} ({turns}) | {synced:.1f} | {ratios[0]} | {ratios[1]} "
                     f"| {median(way, 'peak_anonymous_bytes') / MIB:,.0f} MiB "
                     f"| {median(way, 'peak_resident_bytes') / MIB:,.0f} MiB |")  # fmt: skip
    return lines


if __name__ == "__main__":
    main()
