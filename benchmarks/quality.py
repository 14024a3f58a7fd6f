"""How good rows of new tokens are on held-out text.

The hidden error is the mean squared error of last-layer hidden states on held-out documents with all new tokens
merged, against those of the base text, whatever layer was trained: from the first new token of a window on, since
nothing before it can differ. The rest is what `vocabext eval` measures.

Shape suffixes: T positions, D hidden size, N new rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vocabext.corpus import Document
from vocabext.evaluate.stage import RowSet, evaluate
from vocabext.model.frozen import FrozenModel
from vocabext.options import EvalConfig
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer
from vocabext.tokens import Ids


@dataclass(frozen=True)
class Quality:
    """How good some rows are.

    Attributes:
        hidden_error: Mean squared error of last-layer hidden states, per element.
        relative_error: The same, divided by the mean square of what they should be.
        nll_nats: Negative log likelihood of the base pieces of the text, per piece.
        gap_recovered: Which share of the way from mean-of-pieces rows to the base this is; None if there is no gap.
        bits_per_byte: Of reading.
        bits_per_byte_writing: Of writing, the new tokens included.
    """

    hidden_error: float
    relative_error: float
    nll_nats: float
    gap_recovered: float | None
    bits_per_byte: float
    bits_per_byte_writing: float


def measure(
    heldout: Sequence[Document], model: FrozenModel, base: BaseTokenizer, expanded: ExpandedTokenizer,
    row_sets: Sequence[RowSet], max_bytes: int,
) -> dict[str, Quality]:
    """Measure the base and some sets of rows.

    Args:
        heldout: Text that no token was mined or distilled from.
        model: The base model.
        base: Its tokenizer.
        expanded: The extended one.
        row_sets: Rows under their names; the first are those that the gap begins at.
        max_bytes: How much to read.
    """
    found: Any = evaluate(heldout, model, base, expanded, row_sets, EvalConfig(max_bytes=max_bytes, prompts=0))
    errors = {"base": (0.0, 0.0), **hidden_errors(heldout, model, base, expanded, row_sets, max_bytes)}
    nll = {row["name"]: float(row["target_nll_nats"]) for row in found["rows"]}
    start = nll[row_sets[0].name]
    gap = start - nll["base"]
    return {name: Quality(*errors[name], nll[name], (start - nll[name]) / gap if gap > 0 else None,
                          row["bits_per_byte"], row["bits_per_byte_writing"])
            for row in found["rows"] for name in [row["name"]]}


@torch.no_grad()
def hidden_errors(
    heldout: Sequence[Document], model: FrozenModel, base: BaseTokenizer, expanded: ExpandedTokenizer,
    row_sets: Sequence[RowSet], max_bytes: int,
) -> dict[str, tuple[float, float]]:
    """Return the mean squared error of last-layer hidden states with all new tokens merged, for each set of rows.

    Returns:
        The error per element, and the same divided by the mean square of what it should be.
    """
    context, device = EvalConfig().context, model.device
    errors, scale, count = dict.fromkeys((rows.name for rows in row_sets), 0.0), 0.0, 0
    rows_ND = {rows.name: rows.input_ND.to(device) for rows in row_sets}
    for framed, first in framed_windows(heldout, base, expanded, context, max_bytes):
        teacher = torch.from_numpy(expanded.expansion.unmerge(framed)).to(device)
        meets = torch.from_numpy(expanded.expansion.last_positions(framed)).to(device)
        target_TD = model.hidden(model.embed(teacher[None]))[0][meets[first:]].double()
        student = torch.from_numpy(framed).to(device)
        scale, count = scale + float(target_TD.square().sum()), count + target_TD.numel()
        for name, new_ND in rows_ND.items():
            hidden_TD = model.hidden(model.embed(student[None], new_ND, expanded.first_new_id))[0][first:]
            errors[name] += float((hidden_TD.double() - target_TD).square().sum())
    if not count:
        raise SystemExit("no new token occurs in the held-out text; give other text to --heldout, or more --tokens")
    return {name: (error / count, error / scale) for name, error in errors.items()}


def framed_windows(
    heldout: Sequence[Document], base: BaseTokenizer, expanded: ExpandedTokenizer, context: int, max_bytes: int
) -> Iterator[tuple[Ids, int]]:
    """Yield windows of at most `context` base ids that hold a new token, and where the first of these stands."""
    prefix, size = np.asarray(base.prefix_ids, np.int64), 0
    for document in heldout:
        if size >= max_bytes:
            return
        size += len(document.text.encode())
        ids = np.asarray(expanded.encode(document.text), np.int64)
        edges, start = expanded.expansion.edges(ids), 0
        while start < len(ids):
            stop = max(start + 1, int(np.searchsorted(edges, edges[start] + context, side="right")) - 1)
            framed = np.concatenate((prefix, ids[start:stop]))
            new = expanded.expansion.is_new(framed)
            if new.any():
                yield framed, int(new.argmax())
            start = stop
