"""The whole way, from CPython's documentation to a served, measured model: the embedded one, or the one you name.

    python examples/demo.py [-o FOLDER] [--model FOLDER] [--budget N] [-- OPTIONS OF vocabext run]

Every step is a command that works the same on your own model and corpus; each is printed before it
runs. A second run goes on where the first one stopped.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent


def main() -> None:
    """Run every step and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo-out"), help="folder for all results")
    parser.add_argument("--model", type=Path, default=EXAMPLES / "model", help="model folder (default: the embedded)")
    parser.add_argument("--budget", default="1000", help="new tokens, or 'auto'")
    parser.add_argument("--pairs", default="5", help="rounds of the speed measurement")
    parser.add_argument("--texts", default="6", help="prompts in each round")
    parser.add_argument("run_options", nargs="*", help="further options of `vocabext run`, behind --")
    arguments = parser.parse_args()
    out: Path = arguments.output
    out.mkdir(parents=True, exist_ok=True)
    model, corpus, expanded = arguments.model, out / "corpus", out / "expanded"
    mining, heldout = corpus / "mining.jsonl", corpus / "heldout.jsonl"
    began = time.monotonic()
    if not heldout.is_file():
        step(sys.executable, EXAMPLES / "python_docs.py", "-o", corpus)
    vocabext("run", mining, "--heldout", heldout, "--model", model, "--budget", arguments.budget, "-o", expanded,
             *arguments.run_options)
    vocabext("serve", "lengths", model, expanded, "--corpus", heldout, "-o", out / "lengths.json", "--force")
    vocabext("serve", "bench", model, expanded, "--corpus", heldout, "-o", out / "bench.json", "--force",
             "--pairs", arguments.pairs, "--texts", arguments.texts)
    vocabext("serve", "report", expanded, "-o", out / "report.html", "--force")
    seconds = time.monotonic() - began
    table = summary(expanded, out)
    (out / "summary.md").write_text(table + "\n", encoding="utf-8")
    say(f"\n{table}\n\nreport: {out / 'report.html'}\nmodel:  {expanded}\ndone in {seconds / 60:.1f} minutes")


def vocabext(*arguments: object) -> None:
    """Run a vocabext command."""
    step(sys.executable, "-m", "vocabext", *arguments)


def step(*command: object) -> None:
    """Print a command and run it; stop with its exit code if it fails."""
    shown = shlex.join(str(part) for part in command).replace(f"{sys.executable} -m ", "", 1)
    say(f"\n$ {shown.replace(sys.executable, 'python')}")
    code = subprocess.run([str(part) for part in command], check=False).returncode
    if code:
        sys.exit(code)


def summary(expanded: Path, out: Path) -> str:
    """Return the table of the README, from the artifacts and nothing else."""
    lengths, evaluation, bench = (json.loads(path.read_text(encoding="utf-8")) for path in (
        out / "lengths.json", expanded / "eval.json", out / "bench.json"))
    rows = {row["name"]: row for row in evaluation["rows"]}
    low, high = evaluation["gap_recovered_interval"]
    lines = [
        "| held-out text | base | mean of pieces | distilled |",
        "|---|---|---|---|",
        f"| tokens per document | {lengths['base_tokens_per_document']:.1f} | "
        f"{lengths['expanded_tokens_per_document']:.1f} | {lengths['expanded_tokens_per_document']:.1f} |",
        _row("bits per byte, reading new tokens", rows, "bits_per_byte"),
        _row("bits per byte, writing them too", rows, "bits_per_byte_writing"),
        "",
        f"{lengths['saved_share']:.1%} fewer tokens; {evaluation['gap_recovered']:.1%} of the gap between mean of "
        f"pieces and base recovered (95 % interval {low:.1%} to {high:.1%})",
        "",
        "| vLLM | base | expanded | speed-up (95 % interval) | base / base | expanded is |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_bench_row(point) for point in bench["points"])])


def _row(name: str, rows: dict[str, dict[str, Any]], key: str) -> str:
    return f"| {name} | " + " | ".join(f"{rows[r][key]:.3f}" for r in ("base", "mean", "distilled")) + " |"


def _bench_row(point: dict[str, Any]) -> str:
    name = point["main_metric"]
    metric = point["metrics"][name]
    (low, high), (quiet, loud) = metric["speedup_interval"], metric["noise_interval"]
    return (f"| {point['scenario']}, {name.replace('_', ' ')} | {metric['base']:.4f} | {metric['expanded']:.4f} | "
            f"{metric['speedup']:.3f} ({low:.3f} to {high:.3f}) | {metric['noise']:.3f} ({quiet:.3f} to {loud:.3f}) | "
            f"{metric['verdict']} |")


def say(text: str) -> None:
    """Write to stdout at once, in order with what the commands print."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
