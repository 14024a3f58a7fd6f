"""Choosing tokens by what they cost against choosing by savings alone: the curve of savings against loss for both.

    python benchmarks/choose.py CORPUS... --heldout HELDOUT --model biomed-13m --budget 500 --factors 2 3
        [--bytes 100000] [--heldout-bytes 60000] [--proper] --work FOLDER
        [--json benchmarks/choose.json] [--docs docs/benchmarks.md]

Candidates are mined once for the largest factor, collected (10 snippets) and distilled in one round, as `run` does.
`savings` ships the first n of them, in the order in which they were mined; `cost` is what `vocabext.choose` takes at
several exchange rates. Tokens are chosen on one document in 20 of the corpus, kept from mining; the curve is measured
on HELDOUT, with the same rows for both rules. At equal savings the loss of `savings` is interpolated between its
points, at equal loss its savings; beyond its points nothing is said. `--proper` distills the two sets that would be
shipped (the budget by savings, and the average exchange rate at the first factor) once more, at the defaults, and
measures these. Rates are multiples of the average: tokens saved per nat lost of the first 500. What is done is kept in
FOLDER, so that it can be measured in several sittings.
"""

import argparse
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import Kept
from machine import describe
from sections import put_section

from vocabext import __version__
from vocabext.api.model import Model
from vocabext.checkpoint.folder import load_rows
from vocabext.choose.cost import Costs, base_nats, measure_costs, merged_nats
from vocabext.choose.selection import Selection
from vocabext.choose.text import KeptText
from vocabext.corpus import Document, read_documents
from vocabext.files.atomic import write_json
from vocabext.mine.stage import read_candidates, save_candidates
from vocabext.model.frozen import load_model
from vocabext.options import ChooseConfig
from vocabext.progress import no_progress
from vocabext.run import RunConfig, is_kept_for_choice
from vocabext.tokenizer import load_tokenizer
from vocabext.tokens import NewToken

HERE = Path(__file__).resolve().parent
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
MULTIPLES = (1.0, 0.5, 0.25, 2.0)


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


class Bench:
    """Model, rows, and the two texts; what was measured is kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Read the corpora, and prepare what is not there."""
        self.options, self.model = options, Model(options.model)
        options.work.mkdir(parents=True, exist_ok=True)
        self.documents = list(read_documents(options.corpus))
        rows = prepare(self.model, self.documents, round(options.budget * max(options.factors)), options.work)
        self.tokens, made, self.header = load_rows(rows)
        self.rows_ND = made.input_ND
        _, self.mined = read_candidates(options.work / "candidates.jsonl")
        self.base, self.frozen = load_tokenizer(self.model.folder), load_model(self.model.folder, dtype=options.dtype)
        self.context = min(ChooseConfig().context, self.frozen.max_positions - len(self.base.prefix_ids))
        facts = {"budget": options.budget, "bytes": options.bytes, "heldout_bytes": options.heldout_bytes,
                 "model": str(options.model), "dtype": str(self.frozen.dtype)}
        self.kept = Kept(options.work / "measured", facts)

    @cached_property
    def text(self) -> KeptText:
        """What tokens are chosen on."""
        documents = [document for document in self.documents if is_kept_for_choice(document)]
        return KeptText(documents, self.base, context=self.context, max_bytes=self.options.bytes)

    @cached_property
    def held(self) -> KeptText:
        """What the curve is measured on."""
        return KeptText(read_documents([self.options.heldout]), self.base, context=self.context,
                        max_bytes=self.options.heldout_bytes)

    def point(self, rule: str, tokens: Sequence[NewToken], rows_ND: torch.Tensor, name: str) -> dict[str, Any]:
        """Return what a set saves on held-out text, and what it loses there in bits per byte."""
        def measured() -> dict[str, float]:
            expansion, ids = self.held.encode(tokens)
            began = time.process_time()
            nats = merged_nats(self.frozen, self.held, expansion, ids, rows_ND)
            return {"saved_share": 1 - sum(map(len, ids)) / self.held.base_tokens, "nats": nats,
                    "cpu_seconds": time.process_time() - began}

        base = self.kept.value("base", lambda: base_nats(self.frozen, self.held, self.base.first_new_id, no_progress))
        found = self.kept.value(name, measured)
        return {"rule": rule, "tokens": len(tokens), "saved_share": found["saved_share"], "loss_bits_per_byte":
                (found["nats"] - base) / np.log(2) / self.held.num_bytes}

    def factor(self, factor: float) -> dict[str, Any]:
        """Measure both rules among so many times the budget."""
        among = {token.token for token in self.mined[: round(factor * self.options.budget)]}
        at = [i for i, token in enumerate(self.tokens) if token.token in among]
        tokens, rows_ND = [self.tokens[i] for i in at], self.rows_ND[at]

        def costs() -> dict[str, Any]:
            expansion, ids = self.text.encode(tokens)
            began = time.process_time()
            made = measure_costs(self.frozen, self.text, expansion, ids, rows_ND, no_progress)
            return {"uses_N": made.uses_N.tolist(), "nats_N": made.nats_N.tolist(),
                    "profile_R": made.profile_R.tolist(), "cpu_seconds": time.process_time() - began}

        measured = self.kept.value(f"costs-{factor:g}", costs)
        found = Costs(*(np.asarray(measured[key]) for key in ("uses_N", "nats_N", "profile_R")))
        chooser = _Chooser(self, tokens, found)
        sets = [("savings", share, f"savings-{share}") for share in SHARES]
        sets += [("cost", multiple, f"cost-{factor:g}-{multiple}") for multiple in MULTIPLES]
        points = []
        for rule, much, name in sets:
            chosen = self.kept.value(f"set-{name}", lambda rule=rule, much=much: chooser.take(rule, much))
            points.append({**self.point(rule, [tokens[i] for i in chosen], rows_ND[chosen], name), "of": much})
        curve = [point for point in points if point["rule"] == "savings"]
        points = [point | (on_curve(point, curve) if point["rule"] == "cost" else {}) for point in points]
        return {"factor": factor, "candidates": len(tokens), "frontier": points,
                "cost_cpu_seconds": measured["cpu_seconds"], "nats_by_distance": measured["profile_R"],
                "unmet": int((found.uses_N == 0).sum()), "uses": int(found.uses_N.sum())}

    def proper(self, name: str, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Distill a set at the defaults, and measure it."""
        rows, path = self.options.work / f"{name}.safetensors", self.options.work / f"{name}.jsonl"
        if not rows.is_file():
            header, _ = read_candidates(self.options.work / "candidates.jsonl")
            save_candidates(path, tokens, {key: header[key] for key in ("base", "options")})
            mined = (document for document in self.documents if not is_kept_for_choice(document))
            self.model.distill(self.model.collect(path, mined), output=rows, output_rows="mean")
        shipped, made, header = load_rows(rows)
        return {**self.point(name, shipped, made.input_ND, f"proper-{name}"),
                "relative_error": header["relative_error"]}


class _Chooser:
    """Makes the selection when the first set is not kept: it encodes all kept text."""

    def __init__(self, bench: Bench, tokens: Sequence[NewToken], costs: Costs) -> None:
        self._bench, self._tokens, self._costs = bench, tokens, costs

    @cached_property
    def _selection(self) -> Selection:
        return Selection(self._bench.base, self._tokens, self._bench.text, self._costs)

    def take(self, rule: str, much: float) -> list[int]:
        budget, selection = self._bench.options.budget, self._selection
        if rule == "savings":
            found = selection.by_savings(round(much * budget))
        else:
            alone = selection.by_savings(budget)
            found = selection.by_cost(budget, much * alone.saved / alone.nats)
        return [int(i) for i in found.chosen]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, and write what there is after each factor; returns the JSON document."""
    bench = Bench(options)
    found: dict[str, Any] = {
        "artifact": "choose benchmark", "vocabext_version": __version__, "model": Path(options.model).name,
        "corpus": [Path(source).name for source in options.corpus], "heldout": Path(options.heldout).name,
        "budget": options.budget, "bytes": options.bytes, "heldout_bytes": options.heldout_bytes,
        "trial_relative_error": bench.header["relative_error"], "runs": [], "proper": [],
        "machine": describe(bench.frozen.device)}
    for factor in options.factors:
        found["runs"].append(bench.factor(factor))
        write_json(options.json, found)
    if options.proper:
        by_token = {token.token: token for token in bench.tokens}
        chosen = bench.kept.value(f"set-cost-{options.factors[0]:g}-{MULTIPLES[0]}", lambda: None)
        among = {token.token for token in bench.mined[: round(options.factors[0] * options.budget)]}
        candidates = [token for token in by_token.values() if token.token in among]
        found["proper"] = [bench.proper("savings", candidates[: options.budget]),
                           bench.proper("cost", [candidates[i] for i in chosen])]
        write_json(options.json, found)
    return found


def section(found: dict[str, Any]) -> str:
    """Return the section of docs/benchmarks.md."""
    lines = [
        "## Choosing by cost", "",
        f"{found['model']}, {found['budget']:,} tokens at most from {', '.join(found['corpus'])}, measured on "
        f"{found['heldout_bytes']:,} bytes of {found['heldout']}",
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
            rule = "savings" if point["rule"] == "savings" else f"cost, rate {point['of']:g}"
            lines.append(f"| {run['candidates']:,} | {rule} | {point['tokens']:,} | {point['saved_share']:.1%} | "
                         f"{point['loss_bits_per_byte']:.4f} | {' | '.join(cells)} |")
    if found["proper"]:
        lines += ["", "Distilled at the defaults:", "", "| rule | tokens | saved | loss |", "|---|---|---|---|"]
        lines += [f"| {row['rule']} | {row['tokens']:,} | {row['saved_share']:.1%} | {row['loss_bits_per_byte']:.4f} |"
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
    parser.add_argument("--bytes", type=int, default=100_000, help="kept text that is read to measure costs")
    parser.add_argument("--heldout-bytes", type=int, default=60_000, help="held-out text that is read for each set")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--proper", action="store_true", help="distill what would be shipped at the defaults, too")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=HERE / "choose.json")
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    found = measure(options)
    if options.docs:
        put_section(options.docs, section(found))


if __name__ == "__main__":
    main()
