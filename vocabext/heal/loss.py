"""How far the healed model's next unit is from the base's, and where that must be changed.

Shape suffixes: Q positions of the base's text, P places (the positions of the expanded text), D hidden size, V base
ids, N new tokens, C places looked at together, F first pieces, E entries.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from vocabext.model.frozen import FrozenModel
from vocabext.model.logit_map import LogitMap

PLACES_AT_ONCE = 64
# Of the ids that the text hardly has, one in this many is looked at in each step, and counts for that many.
RARE_EVERY = 10


@dataclass(frozen=True)
class Head:
    """The output head of the base, and which new token begins with which piece.

    Attributes:
        weight_VD: Its rows of ids in use, or of some of these.
        bias_V: Their biases; None for a head without.
        offset_V: What is added to their logits, for ids that stand for several; None for none.
        new_bias_N: Biases of the new tokens; None for a head without.
        logit_map: From products to logits.
        first_F: The pieces that runs begin with, each once, as rows of `weight_VD`.
        group_N: Which of them each new token begins with.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    offset_V: torch.Tensor | None
    new_bias_N: torch.Tensor | None
    logit_map: LogitMap
    first_F: torch.Tensor
    group_N: torch.Tensor

    @classmethod
    def of(cls, model: FrozenModel, first_N: torch.Tensor, first_new_id: int, new_bias_N: torch.Tensor | None
           ) -> "Head":
        """Take the head of a model."""
        first_F, group_N = torch.unique(first_N, return_inverse=True)
        bias_V, device = model.head_bias_V, model.device
        bias_V = None if bias_V is None else bias_V[:first_new_id].to(device)
        return cls(model.head_VD[:first_new_id].to(device), bias_V, None,
                   None if new_bias_N is None else new_bias_N.to(device, model.dtype), model.logit_map,
                   first_F.to(device), group_N.to(device))

    def thinned(self, often_V: torch.Tensor, generator: torch.Generator) -> "Head":
        """Return the head with all ids that are often in text and a random few of the others, which count for all.

        Two thirds of a vocabulary are never in a domain's text, and next to impossible there. They are not forgotten
        all the same: each is looked at now and then.

        Args:
            often_V: Which ids are in text often; first pieces of runs must be among them.
            generator: Draws the others.
        """
        drawn_V = torch.rand(len(often_V), generator=generator) < 1 / RARE_EVERY
        ids = (often_V | drawn_V).nonzero().flatten().to(self.weight_VD.device)
        often = often_V.to(ids.device)[ids]
        offset = torch.where(often, 0.0, math.log(RARE_EVERY)).to(ids.device)
        return replace(self, weight_VD=self.weight_VD[ids], bias_V=None if self.bias_V is None else self.bias_V[ids],
                       offset_V=offset, first_F=torch.searchsorted(ids, self.first_F))

    def base_logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Return the logits of the base ids, (C, V), float32."""
        return self.logit_map(functional.linear(hidden_CD, self.weight_VD, self.bias_V).float())

    def new_logits(self, hidden_CD: torch.Tensor, output_ND: torch.Tensor) -> torch.Tensor:
        """Return the logits of the new tokens, (C, N), float32."""
        return self.logit_map(functional.linear(hidden_CD, output_ND.to(hidden_CD), self.new_bias_N).float())

    def logits_at(self, hidden_ED: torch.Tensor, ids_E: torch.Tensor) -> torch.Tensor:
        """Return the logit of one base id for each state, (E,), float32."""
        products_E = (hidden_ED * self.weight_VD[ids_E]).sum(1)
        return self.logit_map((products_E if self.bias_V is None else products_E + self.bias_V[ids_E]).float())

    def offset(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """Return logits of base ids with those that stand for several raised; changed in place."""
        return logits_CV if self.offset_V is None else logits_CV.add_(self.offset_V)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Return by how much a logit moves when its product does."""
        scale, cap = self.logit_map.scale, self.logit_map.cap
        return scale if cap is None else scale * (1 - (logits / cap).square())


class _FirstPieces(torch.autograd.Function):
    """KL(base || healed) of the first piece, summed over places; the gradient is made on the way.

    The healed model's probability of a piece is its own and that of every new token whose run begins with it.
    """

    @staticmethod
    def forward(ctx: Any, hidden_PD: torch.Tensor, output_ND: torch.Tensor, base_QD: torch.Tensor,
                position_P: torch.Tensor, weight_P: torch.Tensor, head: Head
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normaliser_Q = torch.empty(len(base_QD), device=base_QD.device)
        kl_P = torch.empty(len(hidden_PD), device=hidden_PD.device)
        d_hidden_PD, d_output_ND = torch.zeros_like(hidden_PD), torch.zeros_like(output_ND)
        edges = torch.searchsorted(position_P, torch.arange(0, len(base_QD) + PLACES_AT_ONCE, PLACES_AT_ONCE,
                                                            device=position_P.device)).tolist()
        for number, low in enumerate(range(0, len(base_QD), PLACES_AT_ONCE)):
            teacher_CV = head.offset(head.base_logits(base_QD[low : low + PLACES_AT_ONCE]))
            normaliser_Q[low : low + PLACES_AT_ONCE] = teacher_CV.logsumexp(1)
            at = slice(edges[number], edges[number + 1])
            if at.start == at.stop:
                continue
            rows = position_P[at] - low
            _first_pieces(teacher_CV[rows], normaliser_Q[position_P[at]], hidden_PD[at], output_ND, weight_P[at], head,
                          kl_P[at], d_hidden_PD[at], d_output_ND)
        ctx.save_for_backward(d_hidden_PD, d_output_ND)
        ctx.mark_non_differentiable(normaliser_Q, kl_P)
        return (kl_P * weight_P).sum(), kl_P, normaliser_Q

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden_PD, d_output_ND = ctx.saved_tensors
        return grad * d_hidden_PD, grad * d_output_ND, None, None, None, None


def _first_pieces(
    teacher_CV: torch.Tensor, teacher_norm_C: torch.Tensor, hidden_CD: torch.Tensor, output_ND: torch.Tensor,
    weight_C: torch.Tensor, head: Head, kl_C: torch.Tensor, d_hidden_CD: torch.Tensor, d_output_ND: torch.Tensor,
) -> None:
    """Fill in the divergence at some places, and add up its gradient."""
    base_CV, new_CN = head.base_logits(hidden_CD), head.new_logits(hidden_CD, output_ND)
    new_slope, base_slope = head.slope(new_CN), head.slope(base_CV)
    base_CV = head.offset(base_CV)
    norm_C = torch.logaddexp(base_CV.logsumexp(1), new_CN.logsumexp(1))
    q_CN, q_CF = (new_CN - norm_C[:, None]).exp_(), (base_CV[:, head.first_F] - norm_C[:, None]).exp()
    q_CG = q_CF.index_add(1, head.group_N, q_CN)  # of a first piece, new tokens included
    p_CV = (teacher_CV - teacher_norm_C[:, None]).exp_()
    p_CF = p_CV[:, head.first_F]
    # All ids as if there were no new tokens, then what these add to their first pieces.
    torch.sub((p_CV * (teacher_CV - base_CV)).sum(1), teacher_norm_C - norm_C, out=kl_C)
    kl_C -= (p_CF * (q_CG.clamp(min=1e-30).log() - q_CF.clamp(min=1e-30).log())).sum(1)
    ratio_CF = p_CF / q_CG.clamp(min=1e-30)
    d_CV = (base_CV - norm_C[:, None]).exp_().sub_(p_CV)
    d_CV[:, head.first_F] = q_CF * (1 - ratio_CF)
    d_CN = q_CN * (1 - ratio_CF[:, head.group_N])
    d_CV.mul_(weight_C[:, None]).mul_(base_slope)
    d_CN.mul_(weight_C[:, None]).mul_(new_slope)
    d_CV, d_CN = d_CV.to(hidden_CD), d_CN.to(hidden_CD)
    d_hidden_CD += d_CV @ head.weight_VD + d_CN @ output_ND.to(hidden_CD)
    d_output_ND += (d_CN.T @ hidden_CD).to(d_output_ND)


def first_piece_loss(
    hidden_PD: torch.Tensor, output_ND: torch.Tensor, base_QD: torch.Tensor, position_P: torch.Tensor,
    weight_P: torch.Tensor, head: Head,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weighted sum of KL(base || healed) of the first piece after each place.

    Args:
        hidden_PD: The healed model's final states at the places of expanded text.
        output_ND: Its output rows.
        base_QD: The base's final states at all positions of its text.
        position_P: Which of these has read the same text, rising.
        weight_P: Weight of each place.
        head: The head of both.

    Returns:
        The sum, which can be differentiated by the first two; the divergences (P,); the normaliser of the base's
        logits at all of its positions (Q,).
    """
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _FirstPieces.apply(
        hidden_PD, output_ND, base_QD, position_P, weight_P, head)
    return found


def unit_loss(
    hidden_PD: torch.Tensor, output_ND: torch.Tensor, target_PN: torch.Tensor, first_P: torch.Tensor,
    weight_P: torch.Tensor, head: Head, first_N: torch.Tensor,
) -> torch.Tensor:
    """Return the weighted sum of the divergence of units that begin with the same piece.

    Args:
        hidden_PD: The healed model's final states at places before a first piece of runs.
        output_ND: Its output rows.
        target_PN: How likely each new token is there, given its first piece.
        first_P: That piece.
        weight_P: Weight of each place.
        head: The head.
        first_N: The first piece of each new token.
    """
    new_PN = head.new_logits(hidden_PD, output_ND).masked_fill(first_N != first_P[:, None], -torch.inf)
    piece_P = head.logits_at(hidden_PD, first_P)
    norm_P = torch.logaddexp(new_PN.logsumexp(1), piece_P)
    rest_P = (1 - target_PN.sum(1)).clamp(min=0)
    taken_P = torch.where(target_PN > 0, target_PN * new_PN, torch.zeros_like(new_PN)).sum(1)
    entropy_P = -torch.xlogy(target_PN, target_PN).sum(1) - torch.xlogy(rest_P, rest_P)
    return ((norm_P - taken_P - rest_P * piece_P - entropy_P) * weight_P).sum()
