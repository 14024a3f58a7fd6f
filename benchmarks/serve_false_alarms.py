"""How often `serve bench` says that there is a difference where there is none: base against base, many times.

    python benchmarks/serve_false_alarms.py -o FOLDER [--repetitions 20] [--json benchmarks/serve_false_alarms.json]

One measurement of the embedded example against itself, two servers of the same folder, with five rounds for
every repetition. Each five rounds are then judged as if they were a measurement of their own, for every measure
that `serve bench` has. The target: `no difference` in at least 19 of 20. It is resumable: run it again.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from vocabext.files.atomic import write_json
from vocabext.serve.bench.compare import FASTER, MIN_ROUNDS, NO_DIFFERENCE, SLOWER
from vocabext.serve.bench.journal import Pass
from vocabext.serve.bench.scenarios import Point
from vocabext.serve.bench.summary import summarize

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TARGET_SHARE = 19 / 20


def main() -> None:
    """Measure, judge, and print the table; exit code 3 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the measurement")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "model")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    out: Path = arguments.output
    out.mkdir(parents=True, exist_ok=True)
    corpus, result = out / "corpus" / "heldout.jsonl", out / "bench.json"
    if not corpus.is_file():
        subprocess.run([sys.executable, EXAMPLES / "python_docs.py", "-o", corpus.parent], check=True)
    if not result.is_file() or json.loads(result.read_text(encoding="utf-8"))["state"] != "complete":
        command = [sys.executable, "-m", "vocabext", "serve", "bench", arguments.model, arguments.model,
                   "--corpus", corpus, "-o", result, "--scenario", "mixed", "--texts", "3",
                   "--passage-characters", "900", "--output-characters", "48",
                   "--pairs", str(MIN_ROUNDS * arguments.repetitions)]
        if code := subprocess.run(list(map(str, command)), check=False).returncode:
            sys.exit(code)
    document = json.loads(result.read_text(encoding="utf-8"))
    found = judge(document)
    print(table(found))
    if arguments.json:
        about = {**document["provenance"], "command": "python benchmarks/serve_false_alarms.py"}
        kept = {name: document[name] for name in ("method", "options", "resumed")}
        write_json(arguments.json, {"measures": found, "rounds_per_repetition": MIN_ROUNDS, **kept,
                                    "provenance": about})
    main_measure = found["request_seconds"]
    sys.exit(0 if main_measure[NO_DIFFERENCE] >= TARGET_SHARE * main_measure["repetitions"] else 3)


def judge(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cut the rounds into repetitions of five and count the verdicts of each measure.

    Args:
        document: A bench.json with one point.
    """
    runs = [Pass.from_json(row) for row in document["runs"]]
    (point,) = {run.point for run in runs}
    counts: dict[str, Counter[str]] = {}
    speedups: dict[str, list[float]] = {}
    for start in range(0, max(run.round for run in runs) + 1, MIN_ROUNDS):
        for name, metric in _verdicts(runs, point, start, document["notes"]["prompt_characters"]):
            counts.setdefault(name, Counter())[metric["verdict"]] += 1
            speedups.setdefault(name, []).append(metric["speedup"])
    return {name: {"repetitions": found.total(), "false_alarms": found[FASTER] + found[SLOWER],
                   NO_DIFFERENCE: found[NO_DIFFERENCE], "verdicts": dict(found),
                   "lowest_speedup": min(speedups[name]), "highest_speedup": max(speedups[name])}
            for name, found in counts.items()}


def _verdicts(
    runs: list[Pass], point: Point, start: int, characters: dict[str, list[int]]
) -> list[tuple[str, dict[str, Any]]]:
    here = [run for run in runs if start <= run.round < start + MIN_ROUNDS]
    none = {"ttft_seconds": None, "request_seconds": None}
    found = summarize(here, [point], characters, none, seed=start)
    return [pair for summary in found for pair in summary["metrics"].items()]


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    lines = ["| base against base | repetitions | no difference | false alarms | speed-ups seen |",
             "|---|---|---|---|---|"]
    for name, row in found.items():
        lines.append(f"| {name.replace('_', ' ')} | {row['repetitions']} | {row[NO_DIFFERENCE]} "
                     f"| {row['false_alarms']} | {row['lowest_speedup']:.3f} to "
                     f"{row['highest_speedup']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
