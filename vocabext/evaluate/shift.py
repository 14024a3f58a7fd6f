"""How far new output rows move the distribution over texts, new tokens counted as the runs that they stand for.

Shape suffixes: S texts, T positions, P places, N new tokens.

A text has many spellings in new tokens. Its probability under the expanded model is the sum over all of them, which a
pass from left to right adds up. States are those of the base's own spelling: that is what output rows do by
themselves, without what input rows lose (which `eval` measures as reading).
"""

import math
from collections.abc import Sequence

import torch

from vocabext.evaluate.decode import matches
from vocabext.model.frozen import FrozenModel
from vocabext.model.run_tree import ROOT, RunTree
from vocabext.tokens import Ids


@torch.no_grad()
def lost_nats(
    model: FrozenModel, texts: Sequence[Ids], starts: Sequence[int], tree: RunTree, output_ND: torch.Tensor, *,
    first_new_id: int, bias_N: torch.Tensor | None = None,
) -> list[float]:
    """Return for each text how much less likely it is than with the base, in nats.

    The mean over texts that the base has written at temperature 1 estimates the divergence of the expanded model's
    texts from the base's, KL(base || expanded).

    Args:
        model: The frozen base model.
        texts: Base ids, prompt included.
        starts: Where each prompt ends.
        tree: The runs.
        output_ND: Output rows of the new tokens.
        first_new_id: Id of the first new token (U).
        bias_N: Entries of the head's bias for the new tokens; None for a head without one.
    """
    return [_lost(model, text, start, tree, output_ND, first_new_id, bias_N)
            for text, start in zip(texts, starts, strict=True)]


def _lost(
    model: FrozenModel, text: Ids, start: int, tree: RunTree, output_ND: torch.Tensor, first_new_id: int,
    bias_N: torch.Tensor | None,
) -> float:
    ids = torch.from_numpy(text.copy()).to(model.device)
    hidden_PD = model.hidden(model.embed(ids[None]))[0][start - 1 : -1]
    logits = model.logits(hidden_PD, first_new_id=first_new_id, new_rows_ND=output_ND.to(model.device),
                          new_bias_N=bias_N).double()
    base_PV, new_logits_PN = logits[:, :first_new_id], logits[:, first_new_id:]
    taken_P = torch.nn.functional.softplus(new_logits_PN.logsumexp(1) - base_PV.logsumexp(1))
    piece_P = torch.log_softmax(base_PV, 1).gather(1, ids[start:, None]).flatten().tolist()
    new_PN = torch.log_softmax(logits, 1)[:, first_new_id:].cpu()
    pieces, taken = text[start:].tolist(), taken_P.tolist()
    # reached[t]: log probability that the spelling has an edge after t pieces, having written these.
    reached = [0.0, *(-math.inf for _ in pieces)]
    over_the_end: list[float] = []
    for at, piece in enumerate(piece_P):
        if reached[at] == -math.inf:
            continue
        reached[at + 1] = _add(reached[at + 1], reached[at] + piece - taken[at])
        for token, length in matches(pieces, at, tree):
            reached[at + length] = _add(reached[at + length], reached[at] + float(new_PN[at, token]))
        over_the_end += [reached[at] + float(new_PN[at, token]) for token in _beginning_with(pieces[at:], tree)]
    total = reached[-1]
    for part in over_the_end:
        total = _add(total, part)
    return sum(piece_P) - total


def _beginning_with(pieces: Sequence[int], tree: RunTree) -> list[int]:
    """Return the tokens whose run begins with these pieces and is longer."""
    node = ROOT
    for piece in pieces:
        node = tree.step(node, piece)
        if node < 0:
            return []
    return tree.below(node)


def _add(one: float, other: float) -> float:
    high, low = max(one, other), min(one, other)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
