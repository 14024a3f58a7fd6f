"""How much faster biomed-13m reads and writes with 1,000 new tokens, under vLLM, against what its lengths predict.

    python benchmarks/serve_biomed.py -o FOLDER [--expanded FOLDER] [--json benchmarks/serve_biomed.json]

Every step is a command of the command line, printed before it runs: expand (few rounds; how good the rows are does
not matter for speed), `serve lengths`, `serve bench`, `serve predict`. The machine should be idle. A second run goes
on where the first one stopped. The target: prefill at least 0.8 of the speed-up that the length ratio predicts.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizer_lengths import ASSETS

from vocabext.files.atomic import write_json

TARGET_SHARE = 0.8
KEPT = ("base", "expanded", "corpus", "device", "state", "context_tokens", "server_flags", "options", "method",
        "points", "tokenize_agreement", "answers_below_wanted", "failures", "dropped_runs", "resumed", "provenance")
LENGTHS = ("documents", "characters", "saved_share", "saved_share_interval", "base_tokens_per_1000_characters",
           "expanded_tokens_per_1000_characters", "saved_share_percentiles", "invariant", "megabytes_per_second")


def main() -> None:
    """Run all steps, and write what the published table is made from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for all results")
    parser.add_argument("--expanded", type=Path, help="an expanded biomed-13m that is there already")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--pairs", default="5")
    arguments = parser.parse_args()
    out: Path = arguments.output
    out.mkdir(parents=True, exist_ok=True)
    base, corpora = ASSETS / "models" / "biomed-13m", ASSETS / "corpora"
    heldout, expanded = corpora / "medquad.heldout.jsonl.gz", arguments.expanded or out / "expanded"
    if not expanded.is_dir():
        vocabext("run", corpora / "medquad.jsonl.gz", "--heldout", heldout, "--model", base, "--budget", 1000,
                 "--rounds", 1, "--snippets", 8, "-o", expanded)
    lengths, bench, predicted = (out / f"{name}.json" for name in ("lengths", "bench", "predict"))
    vocabext("serve", "lengths", base, expanded, "--corpus", heldout, "-o", lengths, "--force")
    if not is_complete(bench):
        vocabext("serve", "bench", base, expanded, "--corpus", heldout, "-o", bench, "--pairs", arguments.pairs,
                 "--texts", 4, "--output-characters", 128, "--concurrency", 1, "--concurrency", 4,
                 "--target-ttft-seconds", 1)
    vocabext("serve", "predict", base, expanded, "--lengths", lengths, "--bench", bench, "--device", "h100",
             "-o", predicted, "--force")
    result = condense(*(json.loads(path.read_text(encoding="utf-8")) for path in (lengths, bench, predicted)))
    if arguments.json:
        write_json(arguments.json, result)
    share = result["prefill_share_of_length_ratio"]
    print(f"prefill reaches {share['value']:.2f} ({share['interval'][0]:.2f} to {share['interval'][1]:.2f}) of what "
          f"the length ratio predicts; the target is {TARGET_SHARE}")
    sys.exit(0 if share["value"] >= TARGET_SHARE else 3)


def is_complete(bench: Path) -> bool:
    """Tell whether a bench.json is there and whole."""
    return bench.is_file() and json.loads(bench.read_text(encoding="utf-8")).get("state") == "complete"


def condense(lengths: dict[str, Any], bench: dict[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    """Keep what the table and a reader need: everything but single runs, answers and paths of this machine."""
    kept = {name: bench[name] for name in KEPT}
    for name in ("base", "expanded"):
        kept[name] = Path(kept[name]).name
    kept["corpus"] = [Path(path).name for path in kept["corpus"]]
    kept["provenance"] = {**kept["provenance"], "command": "python benchmarks/serve_biomed.py"}
    main = next(row for row in predicted["measured"] if row["point"] == "prefill x1")
    return {
        "lengths": {name: lengths[name] for name in LENGTHS}, "bench": kept,
        "predicted": {name: predicted[name] for name in ("device", "options", "loads", "memory", "notes")},
        "measured_beside_lengths": predicted["measured"],
        "prefill_share_of_length_ratio": {"value": main["share_of_length_ratio"], "interval": main["share_interval"]},
    }


def vocabext(*arguments: object) -> None:
    """Print a command and run it; stop with its exit code if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"$ {shlex.join(['vocabext', *words])}", flush=True)
    code = subprocess.run([sys.executable, "-m", "vocabext", *words], check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
