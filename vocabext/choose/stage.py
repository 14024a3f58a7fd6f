"""The stage: measure what candidates cost, choose, and draw the curve of savings against loss.

The loss of a set is what `eval` calls reading: by how many bits per byte the base pieces of a text become less likely
when all tokens of the set are merged in what was read before. Choice and bound are made on text that was kept back from
mining; the curve is measured on other documents, held out from both.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vocabext.choose.cost import base_nats, measure_costs, merged_nats
from vocabext.choose.selection import Counted, Selection
from vocabext.choose.text import KeptText
from vocabext.corpus import Document
from vocabext.errors import UsageError
from vocabext.files.atomic import write_json
from vocabext.files.jsonl import write_jsonl
from vocabext.model.frozen import FrozenModel, check_runs_on_rows
from vocabext.options import ChooseConfig
from vocabext.progress import Progress, no_progress
from vocabext.tokenizer import BaseTokenizer
from vocabext.tokens import Ids, NewToken

CHOICE_NAME = "choice.json"
SAVINGS, COST = "savings", "cost"
# Points of the curve: shares of the budget by savings alone, and multiples of the exchange rate.
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
MULTIPLES = (0.25, 0.5, 1.0, 2.0)
# Where the average rate does not fill the budget.
FILLING = (1.0, 0.7, 0.5, 0.35, 0.25, 0.1, 0.0)
# How often a set is measured to come near the bound, and how near is near enough.
TRIES, NEAR = 10, 0.95


@dataclass(frozen=True)
class ChosenSet:
    """What was chosen.

    Attributes:
        tokens: The tokens to ship, in the order of the candidates.
        document: The content of choice.json.
    """

    tokens: tuple[NewToken, ...]
    document: dict[str, Any]

    def lines(self) -> list[str]:
        """Say what was chosen, in a line or two."""
        found, alone = self.document["chosen"], self.document["by_savings"]
        lines = [f"chosen: {found['tokens']:,} of {self.document['candidates']:,} candidates; on text kept from mining "
                 f"they save {found['saved_share']:.1%} of the tokens and lose {found['loss_bits_per_byte']:.4f} bits "
                 f"per byte, the first {alone['tokens']:,} by savings alone {alone['saved_share']:.1%} and "
                 f"{alone['loss_bits_per_byte']:.4f}, all with the cheap rows of the trial"]
        if not self.document["frontier"]:
            lines.append("no document is held out, so that the curve of savings against loss was not measured; pass "
                         "--heldout")
        return lines


@dataclass
class _Reader:
    """A text, read by the base and from merged context of any set of candidates."""

    model: FrozenModel
    text: KeptText
    tokens: Sequence[NewToken]
    input_ND: torch.Tensor
    first_new_id: int
    progress: Progress

    def __post_init__(self) -> None:
        self._base = base_nats(self.model, self.text, self.first_new_id, self.progress)
        self._known: dict[tuple[int, ...], tuple[float, float]] = {}

    def bits_per_byte(self, nats: float) -> float:
        return nats / math.log(2) / self.text.num_bytes

    def read(self, chosen: Ids) -> tuple[float, float]:
        """Return the share of tokens that a set saves, and the bits per byte that it loses."""
        key = tuple(chosen.tolist())
        if key not in self._known:
            expansion, rows = self.text.encode([self.tokens[i] for i in key])
            nats = merged_nats(self.model, self.text, expansion, rows, self.input_ND[chosen])
            saved = 1 - sum(map(len, rows)) / self.text.base_tokens
            self._known[key] = (saved, self.bits_per_byte(nats - self._base))
        return self._known[key]


def choose(
    tokens: Sequence[NewToken], input_ND: torch.Tensor, model: FrozenModel, base: BaseTokenizer,
    documents: Iterable[Document], held_out: Iterable[Document], config: ChooseConfig, *, budget: int,
    unfit: Mapping[str, str] | None = None, progress: Progress = no_progress,
) -> ChosenSet:
    """Choose the tokens that save most for what they cost.

    Args:
        tokens: The candidates, best first by what they save.
        input_ND: An input row for each, distilled cheaply.
        model: The frozen base model.
        base: Its tokenizer.
        documents: Text that was neither mined nor distilled from: costs are measured and counted on it.
        held_out: Other text that was neither; the curve is measured on it. Without any, there is no curve.
        config: The bound, and how much text is read.
        budget: Most tokens to ship.
        unfit: Tokens that were mined and got no row, with the reason.
        progress: Where to report.

    Raises:
        UsageError: If the model cannot be run on rows, if there are fewer candidates than the budget, or if no token
            costs as little as the bound allows.
        CorpusError: If there is no text.
    """
    check_runs_on_rows(model.model.config)
    if len(tokens) < budget:
        raise UsageError(f"--budget is {budget}, but there are rows of {len(tokens)} candidates only; mine more, or "
                         f"lower --budget to {len(tokens)}")
    context = min(config.context, model.max_positions - len(base.prefix_ids))
    text = KeptText(documents, base, context=context, max_bytes=config.choice_bytes)
    expansion, rows = text.encode(tokens)
    costs = measure_costs(model, text, expansion, rows, input_ND, progress)
    selection = Selection(base, tokens, text, costs)
    reader = _Reader(model, text, tokens, input_ND, base.first_new_id, progress)
    alone = selection.by_savings(budget)
    if alone.saved <= 0:
        raise UsageError("the candidates save nothing on the text that was kept from mining; give more text")
    rate = alone.saved / max(alone.nats, 1e-30)
    multiple, chosen = _within(selection, reader, budget, rate, config.max_loss)
    points = _curve(selection, model, base, held_out, config, budget, rate, (multiple, chosen), input_ND, context,
                    progress)
    document = {
        "artifact": "choice", "version": 1, "options": asdict(config), "budget": budget,
        "candidates": len(tokens) + len(unfit or {}), "bytes": text.num_bytes, "base_tokens": text.base_tokens,
        "exchange_rate": multiple * rate, "nats_by_distance": costs.profile_R.tolist(),
        "chosen": _measured(reader, chosen), "by_savings": _measured(reader, alone), "frontier": points,
        "tokens": _table(selection, chosen, multiple * rate, budget, unfit or {}, reader),
    }
    return ChosenSet(tuple(tokens[i] for i in chosen.chosen.tolist()), document)


def _measured(reader: _Reader, found: Counted) -> dict[str, Any]:
    saved, loss = reader.read(found.chosen)
    return {"tokens": len(found.chosen), "saved_share": saved, "loss_bits_per_byte": loss}


def _within(
    selection: Selection, reader: _Reader, budget: int, rate: float, bound: float | None
) -> tuple[float, Counted]:
    """Choose at the lowest exchange rate at which the loss is within the bound.

    Without a bound a token must bring a larger share of the savings than of the loss: the average rate. Where that
    does not fill the budget, the rate is lowered until it is full.

    Returns:
        The rate as a multiple of the average, and the set.
    """
    if bound is None:
        sets = ((multiple, selection.by_cost(budget, multiple * rate)) for multiple in FILLING)
        return next(found for found in sets if len(found[1].chosen) == budget or not found[0])
    best, low, high, multiple = None, 0.0, math.inf, 0.0
    for _ in range(TRIES):
        found = selection.by_cost(budget, multiple * rate)
        loss = reader.read(found.chosen)[1]
        if len(found.chosen) and loss <= bound:
            best, high = (multiple, found), multiple
        elif len(found.chosen):
            low = multiple
        else:
            high = multiple
        if best is not None and (multiple == 0 or loss >= NEAR * bound):
            break
        multiple = max(1.0, 4 * low) if high == math.inf else (low + high) / 2
    if best is None:
        raise UsageError(f"--max-loss is {bound:g} bits per byte, but no set of tokens was found that loses so little; "
                         "raise it, or pass more --candidates")
    return best


def _curve(
    selection: Selection, model: FrozenModel, base: BaseTokenizer, held_out: Iterable[Document], config: ChooseConfig,
    budget: int, rate: float, chosen: tuple[float, Counted], input_ND: torch.Tensor, context: int, progress: Progress,
) -> list[dict[str, Any]]:
    """Measure sets by savings alone and by cost on held-out text."""
    documents = list(held_out)
    if not documents:
        return []
    text = KeptText(documents, base, context=context, max_bytes=config.choice_bytes)
    reader = _Reader(model, text, selection.tokens, input_ND, base.first_new_id, progress)
    sets: list[tuple[str, float | None, Counted]]
    sets = [(SAVINGS, None, selection.by_savings(max(1, round(share * budget)))) for share in SHARES]
    sets += [(COST, m, chosen[1] if m == chosen[0] else selection.by_cost(budget, m * rate))
             for m in sorted({*MULTIPLES, chosen[0]})]
    points = []
    with progress("measuring the curve on held-out text", len(sets), "sets") as task:
        for rule, multiple, found in sets:
            if len(found.chosen):
                points.append({"rule": rule, "exchange_rate": None if multiple is None else multiple * rate,
                               **_measured(reader, found), "chosen": multiple == chosen[0]})
            task.advance()
    return points


def _table(
    selection: Selection, chosen: Counted, rate: float, budget: int, unfit: Mapping[str, str], reader: _Reader
) -> list[dict[str, Any]]:
    """List every candidate: what it saves, what it costs, and what became of it."""
    costs, kept = selection.costs, dict(zip(chosen.chosen.tolist(), chosen.uses.tolist(), strict=True))
    reasons = selection.reasons(chosen, rate, budget)
    table = []
    for i, token in enumerate(selection.tokens):
        uses = kept.get(i, int(selection.together.uses[i]))
        nats = float(costs.nats_N[i])
        table.append({
            "token": token.token, "run": list(token.run), "uses": uses, "saved": uses * (len(token.run) - 1),
            "measured_uses": int(costs.uses_N[i]), "loss_nats_per_use": nats,
            "loss_nats": uses * nats, "kept": i in kept, "why": None if i in kept else reasons[i]})
    return table + [{"token": token, "uses": None, "saved": None, "measured_uses": None, "loss_nats_per_use": None,
                     "loss_nats": None, "kept": False, "why": why} for token, why in unfit.items()]


def write_choice(path: Path, choice: ChosenSet, header: Mapping[str, Any]) -> None:
    """Write the chosen tokens as candidates, and choice.json beside them.

    Args:
        path: The file of candidates.
        choice: What `choose` returned.
        header: The header of the candidates: `base`, `options`, `corpus`, `left_out`.
    """
    write_json(path.with_name(CHOICE_NAME), choice.document)
    write_jsonl(path, "candidates", dict(header), (token.to_json() for token in choice.tokens))
