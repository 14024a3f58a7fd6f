"""Distill the same tokens with several settings and print what each costs and recovers.

    python examples/python_docs.py -o corpus
    python benchmarks/distill_sweep.py corpus [--tokens 60] [--model examples/model]

Prints one line per setting: seconds, how many snippets a token was shown on average, held-out error as a share
of the mean-of-pieces error, share of the gap recovered, nats that all new rows take from base tokens, bits per
byte of reading and of writing, and after how many characters greedy text leaves base's. Settings run one after
the other on the same snippets.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from vocabext.checkpoint.rows import mean_rows
from vocabext.collect import collect
from vocabext.corpus import read_documents
from vocabext.distill import distill
from vocabext.evaluate.stage import RowSet, evaluate
from vocabext.mine.stage import mine
from vocabext.model.frozen import load_model
from vocabext.options import CollectConfig, DistillConfig, EvalConfig, MineConfig
from vocabext.tokenizer import extend, load_tokenizer

SETTINGS: list[dict[str, Any]] = [
    {"rounds": 1},
    {"rounds": 2},
    {"epochs": 2},
    {},
    {"epochs": 8},
    {"learning_rate": 0.1},
    {"learning_rate": 0.4},
    {"reach": 4},
    {"reach": 16},
    {"reach": None},
    {"target_layer": "0.75"},
    {"target_layer": "0.5"},
    {"silence": 0.0},
    {"dtype": "bfloat16"},
]
HEADER = ("setting", "seconds", "shown", "error", "gap recovered", "nats taken", "reading", "writing", "characters")


def main() -> None:
    """Run every setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with mining.jsonl and heldout.jsonl")
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parents[1] / "examples" / "model")
    parser.add_argument("--tokens", type=int, default=60, help="new tokens")
    parser.add_argument("--max-bytes", type=int, default=60_000, help="held-out text to read, in bytes")
    arguments = parser.parse_args()
    base = load_tokenizer(arguments.model)
    models = {number: load_model(arguments.model, dtype=number) for number in ("auto", "bfloat16")}
    model = models["auto"]
    mining, heldout = (list(read_documents([str(arguments.corpus / f"{side}.jsonl")]))
                       for side in ("mining", "heldout"))
    tokens = mine(mining, base, MineConfig(budget=arguments.tokens)).tokens
    records = collect(mining, base, tokens, CollectConfig())
    expanded, mean = extend(base, tokens), mean_rows(model.embedding_VD, tokens)
    write("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for setting in SETTINGS:
        began = time.monotonic()
        config = DistillConfig(**setting)
        result = distill(records, models[config.dtype], config, first_new_id=base.first_new_id,
                         prefix_ids=base.prefix_ids)
        seconds = time.monotonic() - began
        found: dict[str, Any] = evaluate(
            heldout, model, base, expanded,
            [RowSet("mean", mean, mean), RowSet("distilled", result.input_ND, result.input_ND)],
            EvalConfig(max_bytes=arguments.max_bytes, prompts=8),
        )
        row = found["rows"][-1]
        name = ", ".join(f"{key} {value}" for key, value in setting.items()) or "defaults"
        taken = "" if result.taken_nats is None else f"{result.taken_nats:.3f}"
        shown = sum(report.shown for report in result.reports) / len(result.reports)
        write(f"| {name} | {seconds:.1f} | {shown:.0f} | {result.relative_error:.2f} | "
              f"{found['gap_recovered']:.3f} | {taken} | {row['bits_per_byte']:.4f} | "
              f"{row['bits_per_byte_writing']:.4f} | {row['greedy_common_characters'] or 0:.0f} |")


def write(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
