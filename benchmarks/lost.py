"""Where rows of new tokens lose what: divergence of next-piece distributions by distance from the last new token.

Held-out text is read with all new tokens merged. At every place that both texts have, the base's prediction from base
context is compared with its prediction from merged context.

Shape suffixes: P places, D hidden size, N new rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from quality import framed_windows

from vocabext.corpus import Document
from vocabext.evaluate.stage import RowSet
from vocabext.model.frozen import FrozenModel
from vocabext.options import EvalConfig
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer

# Places behind the last new token: at it, in the reach of training, and beyond.
BOUNDS = (0, 1, 2, 4, 8, 16, 32)
PLACES_AT_ONCE = 256


@dataclass(frozen=True)
class Lost:
    """What some rows lose on a text, in nats over all places that are compared.

    Attributes:
        divergence_nats: KL(base context || merged context), summed, in the bins of `BOUNDS`.
        nll_nats: Rise of the negative log likelihood of the pieces of the text, in the same bins.
        places: How many places each bin holds.
        token_nats: Divergence at each token and up to the next one, per use.
    """

    divergence_nats: tuple[float, ...]
    nll_nats: tuple[float, ...]
    places: tuple[int, ...]
    token_nats: dict[int, float]

    @property
    def divergence(self) -> float:
        """Mean divergence per place."""
        return sum(self.divergence_nats) / sum(self.places)

    @property
    def nll(self) -> float:
        """Mean rise of the negative log likelihood per place."""
        return sum(self.nll_nats) / sum(self.places)


@torch.no_grad()
def measure_lost(
    heldout: Sequence[Document], model: FrozenModel, base: BaseTokenizer, expanded: ExpandedTokenizer,
    row_sets: Sequence[RowSet], max_bytes: int, context: int = EvalConfig().context,
) -> dict[str, Lost]:
    """Measure sets of rows on held-out text; places before the first new token of a window do not count."""
    first_new_id, device, bins = expanded.first_new_id, model.device, len(BOUNDS)
    kl = {rows.name: np.zeros(bins) for rows in row_sets}
    nll = {rows.name: np.zeros(bins) for rows in row_sets}
    places = np.zeros(bins, np.int64)
    tokens: dict[str, dict[int, list[float]]] = {rows.name: {} for rows in row_sets}
    for framed, first in framed_windows(heldout, base, expanded, context, max_bytes):
        teacher = torch.from_numpy(expanded.expansion.unmerge(framed)).to(device)
        meets = torch.from_numpy(expanded.expansion.last_positions(framed)).to(device)[first:]
        here = meets < len(teacher) - 1  # the last place predicts what the window does not hold
        next_P = teacher[(meets + 1)[here]]
        new = expanded.expansion.is_new(framed)
        order = np.arange(len(framed))
        last = np.maximum.accumulate(np.where(new, order, -1))[first:][here.cpu().numpy()]
        bin_P = np.searchsorted(BOUNDS, (order[first:][here.cpu().numpy()] - last), side="left")
        bin_P = np.minimum(bin_P, bins - 1)
        places += np.bincount(bin_P, minlength=bins)
        base_PD = model.hidden(model.embed(teacher[None]))[0][meets[here]]
        student = torch.from_numpy(framed).to(device)
        for rows in row_sets:
            hidden_TD = model.hidden(model.embed(student[None], rows.input_ND.to(device), first_new_id))[0]
            kl_P, nll_P = _compare(model, base_PD, hidden_TD[first:][here], next_P, first_new_id)
            kl[rows.name] += np.bincount(bin_P, kl_P, minlength=bins)
            nll[rows.name] += np.bincount(bin_P, nll_P, minlength=bins)
            for at in np.unique(last):
                tokens[rows.name].setdefault(int(framed[at]) - first_new_id, []).append(float(kl_P[last == at].sum()))
    return {rows.name: Lost(tuple(kl[rows.name].tolist()), tuple(nll[rows.name].tolist()), tuple(places.tolist()),
                            {token: float(np.mean(nats)) for token, nats in sorted(tokens[rows.name].items())})
            for rows in row_sets}


def _compare(model: FrozenModel, base_PD: torch.Tensor, other_PD: torch.Tensor, next_P: torch.Tensor, first_new_id: int
             ) -> tuple[np.ndarray, np.ndarray]:
    """Return divergence and rise of the loss at each place."""
    kls, rises = [], []
    for at in torch.arange(len(next_P), device=next_P.device).split(PLACES_AT_ONCE):
        base_PV, other_PV = (model.log_probabilities(states[at], first_new_id=first_new_id)
                             for states in (base_PD, other_PD))
        kls.append((base_PV.exp() * (base_PV - other_PV)).sum(1))
        rises.append((base_PV - other_PV).gather(1, next_P[at, None])[:, 0])
    return torch.cat(kls).double().cpu().numpy(), torch.cat(rises).double().cpu().numpy()
