"""Choosing tokens by what they cost against choosing by savings alone: the curve of savings against loss for both.

    python benchmarks/choose.py CORPUS... --heldout HELDOUT --model biomed-13m --budget 500 --factors 2 3
        [--bytes 100000] [--proper] [--work FOLDER] [--json benchmarks/choose.json] [--docs docs/benchmarks.md]

Candidates are mined once for the largest factor, collected (10 snippets) and distilled in one round, as `run` does.
`savings` ships the first n of them, in the order in which they were mined; `cost` is what `vocabext.choose` takes at
several exchange rates. Tokens are chosen on one document in 20 of the corpus, kept from mining; the curve is measured
on HELDOUT, with the same rows for both rules. At equal savings the loss of `savings` is interpolated between its
points, at equal loss its savings; beyond its points nothing is said. `--proper` distills the two sets that would be
shipped (the budget by savings, and the average exchange rate at the first factor) once more, at the defaults, and
measures these. What is done is kept in FOLDER.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from sections import put_section

from vocabext import __version__
from vocabext.api.model import Model
from vocabext.checkpoint.folder import load_rows
from vocabext.choose.cost import base_nats, merged_nats
from vocabext.choose.stage import choose
from vocabext.choose.text import KeptText
from vocabext.corpus import Document, read_documents
from vocabext.files.atomic import write_json
from vocabext.mine.stage import read_candidates, save_candidates
from vocabext.model.frozen import FrozenModel, load_model
from vocabext.options import ChooseConfig
from vocabext.progress import no_progress
from vocabext.run import RunConfig, is_kept_for_choice
from vocabext.tokenizer import load_tokenizer
from vocabext.tokens import NewToken

HERE = Path(__file__).resolve().parent


def prepare(model: Model, documents: Sequence[Document], wanted: int, work: Path) -> Path:
    """Mine, collect and distill the candidates cheaply; returns the rows."""
    candidates, snippets, rows = work / "candidates.jsonl", work / "snippets.jsonl", work / "rows.safetensors"
    mined = [document for document in documents if not is_kept_for_choice(document)]
    trial = RunConfig(model.name, (), work).trial
    if not candidates.is_file():
        model.mine(iter(mined), budget=wanted).save(candidates)
    if not snippets.is_file():
        options = {"snippets": trial.collect.snippets, "min_snippets": trial.collect.min_snippets}
        model.collect(candidates, iter(mined), **options).save(snippets)
    if not rows.is_file():
        model.distill(snippets, output=rows, epochs=trial.distill.epochs, rounds=trial.distill.rounds,
                      output_rows="mean")
    return rows


def on_curve(point: dict[str, Any], curve: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Compare a point with the curve of the other rule: its loss at equal savings, its savings at equal loss."""
    saved, loss = ([at[key] for at in curve] for key in ("saved_share", "loss_bits_per_byte"))
    equal_savings = equal_loss = None
    if min(saved) <= point["saved_share"] <= max(saved):
        equal_savings = point["loss_bits_per_byte"] / float(np.interp(point["saved_share"], saved, loss))
    rising = np.maximum.accumulate(loss)
    if rising[0] <= point["loss_bits_per_byte"] <= rising[-1]:
        equal_loss = point["saved_share"] / float(np.interp(point["loss_bits_per_byte"], rising, saved))
    return {"loss_at_equal_savings": equal_savings, "savings_at_equal_loss": equal_loss}


def properly(
    model: Model, frozen: FrozenModel, tokens: Sequence[NewToken], mined: Sequence[Document], text: KeptText,
    base_loss: float, name: str, work: Path,
) -> dict[str, Any]:
    """Distill a set at the defaults, and measure it."""
    rows, path = work / f"{name}.safetensors", work / f"{name}.jsonl"
    if not rows.is_file():
        header, _ = read_candidates(work / "candidates.jsonl")
        save_candidates(path, tokens, {key: header[key] for key in ("base", "options")})
        model.distill(model.collect(path, iter(mined)), output=rows, output_rows="mean")
    kept, made, header = load_rows(rows)
    expansion, ids = text.encode(kept)
    nats = merged_nats(frozen, text, expansion, ids, made.input_ND)
    return {"name": name, "tokens": len(kept), "saved_share": 1 - sum(map(len, ids)) / text.base_tokens,
            "loss_bits_per_byte": (nats - base_loss) / np.log(2) / text.num_bytes,
            "relative_error": header["relative_error"]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, and write what there is after each factor; returns the JSON document."""
    options.work.mkdir(parents=True, exist_ok=True)
    model, began = Model(options.model), time.monotonic()
    documents = list(read_documents(options.corpus))
    held_out = list(read_documents([options.heldout]))
    path = prepare(model, documents, round(options.budget * max(options.factors)), options.work)
    kept, rows, header = load_rows(path)
    frozen, base = load_model(model.folder, dtype=options.dtype), load_tokenizer(model.folder)
    _, mined = read_candidates(options.work / "candidates.jsonl")
    for_choice = [document for document in documents if is_kept_for_choice(document)]
    config, runs, proper = ChooseConfig(candidates=2.0, choice_bytes=options.bytes), [], []
    found = {"artifact": "choose benchmark", "vocabext_version": __version__, "model": Path(options.model).name,
             "corpus": [Path(source).name for source in options.corpus], "heldout": Path(options.heldout).name,
             "budget": options.budget, "bytes": options.bytes, "trial_relative_error": header["relative_error"],
             "runs": runs, "proper": proper, "machine": describe(frozen.device)}
    for factor in options.factors:
        among = {token.token for token in mined[: round(factor * options.budget)]}
        at = [i for i, token in enumerate(kept) if token.token in among]
        clock = time.process_time()
        choice = choose([kept[i] for i in at], rows.input_ND[at], frozen, base, for_choice, held_out,
                        replace(config, candidates=factor), budget=options.budget)
        points = choice.document["frontier"]
        curve = [point for point in points if point["rule"] == "savings"]
        for point in points:
            if point["rule"] == "cost":
                point |= on_curve(point, curve)
        table = [row for row in choice.document["tokens"] if row["loss_nats"] is not None]
        worst = sorted(table, key=lambda row: -row["loss_nats"] / max(1, row["saved"]))
        costliest = [{key: row[key] for key in ("token", "uses", "loss_nats_per_use", "kept")} for row in worst[:10]]
        runs.append({"factor": factor, "candidates": len(at), "cpu_seconds": time.process_time() - clock,
                     "frontier": points, "chosen": choice.document["chosen"], "costliest": costliest,
                     "unmet": sum(row["measured_uses"] == 0 for row in table)})
        print(f"factor {factor:g}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        write_json(options.json, found)
        if options.proper and factor == options.factors[0]:
            sources = [document for document in documents if not is_kept_for_choice(document)]
            text = KeptText(held_out, base, context=min(config.context, frozen.max_positions - len(base.prefix_ids)),
                            max_bytes=options.bytes)
            loss = base_nats(frozen, text, base.first_new_id, no_progress)
            for name, tokens in (("savings", mined[: options.budget]), ("cost", choice.tokens)):
                proper.append(properly(model, frozen, tokens, sources, text, loss, name, options.work))
    return found


def section(found: dict[str, Any]) -> str:
    """Return the section of docs/benchmarks.md."""
    lines = [
        "## Choosing by cost", "",
        f"{found['model']}, {found['budget']:,} tokens at most from {', '.join(found['corpus'])}, measured on "
        f"{found['bytes']:,} bytes of {found['heldout']}",
        "with the cheap rows of the trial (error "
        f"{found['trial_relative_error']:.0%} of the mean of pieces'). *Loss* is in bits per byte, reading. The last",
        "two columns compare with the curve of savings alone: loss at equal savings, savings at equal loss",
        "(`benchmarks/choose.py`).", "",
        "| candidates | rule | tokens | saved | loss | loss, equal savings | savings, equal loss |",
        "|---|---|---|---|---|---|---|"]
    for number, run in enumerate(found["runs"]):
        for point in run["frontier"]:
            if point["rule"] == "savings" and number:
                continue
            cells = [_times(point.get(key)) for key in ("loss_at_equal_savings", "savings_at_equal_loss")]
            rule = "savings" if point["rule"] == "savings" else "cost, shipped" if point["chosen"] else "cost"
            lines.append(f"| {run['candidates']:,} | {rule} | {point['tokens']:,} | {point['saved_share']:.1%} | "
                         f"{point['loss_bits_per_byte']:.4f} | {' | '.join(cells)} |")
    if found["proper"]:
        lines += ["", "Distilled at the defaults:", "", "| rule | tokens | saved | loss |", "|---|---|---|---|"]
        lines += [f"| {row['name']} | {row['tokens']:,} | {row['saved_share']:.1%} | {row['loss_bits_per_byte']:.4f} |"
                  for row in found["proper"]]
    return "\n".join(lines) + "\n"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="+")
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--budget", type=int, default=500)
    parser.add_argument("--factors", type=float, nargs="+", default=[2.0])
    parser.add_argument("--bytes", type=int, default=100_000, help="text that is read, of each kind")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--proper", action="store_true", help="distill what would be shipped at the defaults, too")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=HERE / "choose.json")
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    found = measure(options)
    write_json(options.json, found)
    if options.docs:
        put_section(options.docs, section(found))


if __name__ == "__main__":
    main()
