"""How far new output rows move the distribution over texts, new tokens counted as the runs that they stand for.

Shape suffixes: S texts, T positions, P places, N new tokens.

A text has many spellings in new tokens. Its probability under the expanded model is the sum over all of them, which a
pass from left to right adds up. States are those of the base's own spelling: that is what output rows do by
themselves, without what input rows lose (which `eval` measures as reading).
"""

import math
from collections.abc import Sequence

import torch

from vocabext.evaluate.decode import Written, matches
from vocabext.model.frozen import FrozenModel
from vocabext.model.run_tree import ROOT, RunTree


@torch.no_grad()
def lost_nats(
    model: FrozenModel, texts: Sequence[Written], tree: RunTree, output_ND: torch.Tensor,
    bias_N: torch.Tensor | None = None,
) -> list[float]:
    """Return for each text how much less likely it is than with the base, in nats.

    The mean over texts that the base has written at temperature 1 estimates the divergence of the expanded model's
    texts from the base's, KL(base || expanded).

    Args:
        model: The frozen base model.
        texts: What the base has written, or read, in base ids.
        tree: The runs.
        output_ND: Output rows of the new tokens.
        bias_N: Entries of the head's bias for the new tokens; None for a head without one.
    """
    return [_lost(model, text, tree, output_ND, bias_N) for text in texts]


def _lost(
    model: FrozenModel, text: Written, tree: RunTree, output_ND: torch.Tensor, bias_N: torch.Tensor | None
) -> float:
    new_PN = model.new_logits(text.hidden_SD, output_ND.to(model.device), bias_N).double()
    base_P = text.normaliser_S.to(new_PN)
    taken_P = torch.nn.functional.softplus(new_PN.logsumexp(1) - base_P)
    new_PN = (new_PN - (base_P + taken_P)[:, None]).cpu()
    pieces, piece_P, taken = text.pieces, text.log_p_S.double().tolist(), taken_P.tolist()
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
