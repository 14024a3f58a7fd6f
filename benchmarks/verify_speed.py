"""How long each check of `verify` takes, beside its floor: encoding the corpus once, reading the files once.

    python benchmarks/verify_speed.py --model MODEL --corpus CORPUS [--tokens 1000] [--folder DIR] [--turns 3] [-o FILE]
    python benchmarks/verify_speed.py --docs docs/benchmarks.md      writes what benchmarks/verify_speed.json says

The expanded folder has tokens that are mined from the corpus, with the mean of their pieces as rows. With --folder it
stays there for another call. In each turn, in one process and one after the other: each tokenizer encodes all documents
in batches and does nothing else; the weights of both folders are read and thrown away; `verify` runs with --full. So
the first turn alone pays for modules that are imported late; the table has medians.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import describe
from sections import put_section

from vocabext.checkpoint.manifest import read_manifest
from vocabext.checkpoint.verdicts import FAIL, Verification
from vocabext.corpus import Document, read_documents
from vocabext.files.atomic import write_json
from vocabext.files.ranges import Extent
from vocabext.verify.behaviour import BATCH
from vocabext.verify.pair import Pair
from vocabext.verify.sample import batches
from vocabext.verify.stage import verify

RESULT = Path(__file__).with_suffix(".json")
VOCABEXT = (sys.executable, "-m", "vocabext")
ENCODE_BASE, ENCODE_EXPANDED, READ = "encode with the base", "encode with the expanded tokenizer", "read both folders"
FLOORS = (ENCODE_BASE, ENCODE_EXPANDED, READ)
Times = dict[str, dict[str, float]]


def main() -> None:
    """Measure, or write down what was measured."""
    arguments = _parse()
    if arguments.docs:
        put_section(arguments.docs, section())
        return
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        expanded = _expanded(folder, arguments)
        documents = list(read_documents([arguments.corpus]))
        found = {"machine": {**describe(torch.device("cpu")), "processor": platform.machine(),
                             **{name: version(name) for name in ("tokenizers", "transformers")}},
                 **_facts(arguments, expanded, documents),
                 "turns": [_turn(expanded, arguments.model, documents) for _ in range(arguments.turns)]}
    if arguments.output:
        write_json(arguments.output, found)
    print(table(found))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the base: a folder or hub id")
    parser.add_argument("--corpus", help="what is mined and encoded")
    parser.add_argument("--tokens", type=int, default=1_000, help="how many new tokens")
    parser.add_argument("--folder", type=Path, help="where the expanded folder goes; default: a temporary folder")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--docs", type=Path, help="measure nothing, write the section of this Markdown file anew")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args()
    if not arguments.docs and not (arguments.model and arguments.corpus):
        parser.error("--model and --corpus are needed")
    return arguments


def _expanded(folder: Path, arguments: argparse.Namespace) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokens, rows, expanded = (folder / name for name in ("tokens.jsonl", "rows.safetensors", "expanded"))
    for output, words in ((tokens, ("mine", arguments.corpus, "--budget", str(arguments.tokens))),
                          (rows, ("distill", str(tokens), "--method", "mean")),
                          (expanded, ("patch", str(rows), "--link", "copy"))):
        if not output.exists():
            subprocess.run([*VOCABEXT, *words, "--model", arguments.model, "-o", str(output)], check=True,
                           stdout=subprocess.DEVNULL)
    return expanded


def _facts(arguments: argparse.Namespace, expanded: Path, documents: list[Document]) -> dict[str, Any]:
    return {"model": Path(arguments.model).name, "corpus": Path(arguments.corpus).name, "documents": len(documents),
            "corpus_bytes": sum(len(document.text.encode()) for document in documents),
            "weight_bytes": sum(path.stat().st_size for path in expanded.glob("*.safetensors")),
            "new_tokens": len(read_manifest(expanded).tokens)}


def _turn(expanded: Path, model: str, documents: list[Document]) -> dict[str, Any]:
    pair = Pair(expanded, model, read_manifest(expanded))
    floors: Times = {}
    whole: Times = {}
    texts = list(batches((document.text for document in documents), BATCH))
    for name, tokenizer in ((ENCODE_BASE, pair.base_tokenizer), (ENCODE_EXPANDED, pair.new_tokenizer)):
        with timed(floors, name):
            for batch in texts:
                tokenizer.backend.encode_batch_fast(batch, add_special_tokens=False)
    with timed(floors, READ):
        for path in (*pair.base_folder.glob("*.safetensors"), *expanded.glob("*.safetensors")):
            for _ in Extent.whole(path).chunks():
                pass
    watch = Watch()
    with timed(whole, "verify"):
        result = verify(expanded, model, documents, full=True, progress=watch)
    return {"floors": floors, "verify": whole["verify"], "checks": watch.checks, "verdicts": _verdicts(result)}


def _verdicts(result: Verification) -> dict[str, str]:
    assert result.passed, [check for check in result.checks if check.verdict == FAIL]
    return {check.name: check.verdict for check in result.checks}


@contextmanager
def timed(times: Times, name: str) -> Iterator[None]:
    """Note the wall and processor seconds of a block."""
    wall, cpu = time.monotonic(), time.process_time()
    yield
    times[name] = {"wall_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}


class Watch:
    """Takes the times of the checks, as what `verify` reports its progress to.

    Attributes:
        checks: The times of each check, by its name.
    """

    def __init__(self) -> None:
        self.checks: Times = {}
        self._open = ExitStack()
        self._name = ""

    @contextmanager
    def __call__(self, description: str, /, total: int | None = None, unit: str = "") -> Iterator["Watch"]:
        """Watch one task, the only one of `verify`."""
        with self._open:
            yield self

    def advance(self, amount: int = 1, /) -> None:
        """Close a check; a report of bytes closes nothing."""
        if amount:
            self._open.close()

    def note(self, text: str, /) -> None:
        """Begin the check that is named, unless it is under way."""
        if not self._name or not text.startswith(f"{self._name}, "):
            self._open.close()
            self._name = text
            self._open.enter_context(timed(self.checks, text))


def table(found: dict[str, Any]) -> str:
    """Return medians over the turns: each check that was made, all of `verify`, and the floors."""
    turns = found["turns"]
    made = [name for name in turns[0]["checks"] if turns[0]["verdicts"].get(name) == "pass"]
    rows = [(name, [turn["checks"][name] for turn in turns]) for name in made]
    rows.append(("**all of verify**, behind its imports", [turn["verify"] for turn in turns]))
    rows += [(f"floor: {name}", [turn["floors"][name] for turn in turns]) for name in FLOORS]
    lines = ["| check | seconds | CPU seconds |", "|---|---|---|"]
    lines += [f"| {name} | {_median(times, 'wall_seconds'):.1f} | {_median(times, 'cpu_seconds'):.1f} |"
              for name, times in rows]
    return "\n".join(lines)


def _median(times: list[dict[str, float]], key: str) -> float:
    return statistics.median(entry[key] for entry in times)


def section() -> str:
    """Return the section of docs/benchmarks.md."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    machine = found["machine"]
    return f"""## Verification

`vocabext verify --full` of {found['model']} ({found['weight_bytes'] / 1e6:,.0f} MB) with {found['new_tokens']:,} new
tokens and {found['corpus']} ({found['documents']:,} documents, {found['corpus_bytes'] / 1e6:,.1f} MB), beside what it
cannot avoid: encoding each text once with each tokenizer, and reading the weights once. Median of the turns
({len(found['turns'])}) in one process, on {machine['device']} with {machine['cpus']} cores,
`OMP_NUM_THREADS={machine['threads']}`, a load of {machine['load_average']:.1f}, {machine['date']}.
On a busy machine the CPU seconds are what counts.

{table(found)}

`benchmarks/verify_speed.py` makes the folder, measures, and writes `benchmarks/verify_speed.json`.
"""


if __name__ == "__main__":
    main()
