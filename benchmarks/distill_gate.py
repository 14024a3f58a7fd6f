"""Does shipping fewer tokens ever ship worse ones? Leave tokens out by the rule of `distill --leave-out`, and by lot.

    python benchmarks/distill_gate.py [--keep DIR] [--tokens 500] [-o result.json]

Tokens are mined and distilled once, with the gate open. Then the gate is set to several factors; what it lets through
is a vocabulary of its own, and held-out text is cut by it and read with its rows. The last columns say how many nats
per base piece the model loses against the base, with what the gate ships, and with as many tokens taken out by lot.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distill_reference import ASSETS, heldout_documents, prepare, write
from distill_tables import table, where
from kept import Kept
from machine import describe

from vocabext.distill import distill
from vocabext.distill.input_rows.report import left_out_reasons
from vocabext.evaluate.stage import RowSet, evaluate
from vocabext.files.atomic import write_json
from vocabext.model.frozen import load_model
from vocabext.options import DistillConfig, EvalConfig
from vocabext.tokenizer import extend, load_tokenizer
from vocabext.tokens import NewToken

FACTORS = (0.0, 5.0, 3.0, 2.0, 1.5)


def main(argv: Sequence[str] | None = None) -> None:
    """Set the gate to every factor and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "models" / "biomed-13m", help="folder of the base model")
    parser.add_argument("--corpus", type=Path, default=ASSETS / "corpora" / "medquad.jsonl.gz")
    parser.add_argument("--heldout", type=Path, default=ASSETS / "corpora" / "medquad.heldout.jsonl.gz")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--snippets", type=int, default=25)
    parser.add_argument("--min-count", type=int, default=10)
    parser.add_argument("--rounds", type=int, help="rounds of distill at most")
    parser.add_argument("--max-bytes", type=int, default=60_000, help="held-out text to read, in bytes")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the snippets there")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args(argv)
    base, model = load_tokenizer(arguments.model), load_model(arguments.model, dtype="float32")
    kept = Kept(arguments.keep, {"tokens": arguments.tokens, "snippets": arguments.snippets})
    records = kept.records(lambda: prepare(arguments, base, arguments.tokens))
    heldout = heldout_documents(arguments)
    config = DistillConfig(dtype="float32", leave_out=0.0, rounds=arguments.rounds)
    result = distill(records, model, config, first_new_id=base.first_new_id, prefix_ids=base.prefix_ids)
    errors = [None if r.start_error is None or r.end_error is None else (r.start_error, r.end_error)
              for r in result.reports]

    def measured(ship: Sequence[int]) -> dict[str, float]:
        tokens: list[NewToken] = [records[i].new_token for i in ship]
        rows_ND: torch.Tensor = result.input_ND[list(ship)]
        found: dict[str, Any] = evaluate(heldout, model, base, extend(base, tokens),
                                         [RowSet("mean", rows_ND, rows_ND)],
                                         replace(EvalConfig(), max_bytes=arguments.max_bytes, prompts=0))
        nll = {row["name"]: row["target_nll_nats"] for row in found["rows"]}
        return {"shorter": 1 - 1 / found["shorter"]["ratio"],
                "loss_nats": nll["mean"] - nll["base"]}

    rows = []
    for factor in FACTORS:
        ship = [i for i, reason in enumerate(left_out_reasons(errors, factor)) if reason is None]
        lot = sorted(np.random.default_rng(0).permutation(len(records))[: len(ship)].tolist())
        everything = len(ship) == len(records)
        rule = rows[0]["rule"] if everything and rows else measured(ship)
        rows.append({"factor": factor, "left_out": len(records) - len(ship), "rule": rule,
                     "lot": rule if everything else measured(lot)})
    found = {"machine": describe(model.device), "tokens": len(records), "rounds": arguments.rounds, "rows": rows}
    write(render(found))
    if arguments.output:
        write_json(arguments.output, found)


def render(found: dict[str, Any]) -> str:
    """Return the table of a result."""
    return f"{found['tokens']} tokens, {where(found)}\n\n" + table(
        ("--leave-out", "left out", "shorter", "nats lost", "by lot: shorter", "nats lost"),
        [(f"{row['factor']:g}", str(row["left_out"]), *(text for who in ("rule", "lot") for text in (
            f"{row[who]['shorter']:.2%}", f"{row[who]['loss_nats']:.4f}"))) for row in found["rows"]])


if __name__ == "__main__":
    main()
