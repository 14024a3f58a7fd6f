"""What a model loses where it reads new tokens: each use by itself, and whole texts with all tokens merged.

Shape suffixes: P base positions of a window, K positions laid out, U uses of new tokens in a window, R reach + 1
distances, V base ids, D hidden size, N candidates.

*Each use.* The base reads a window in base ids. A use of a new token is a branch off it: the new token instead of its
run, and the next `REACH` base ids. At the token and at each of these, base and branch predict the next piece; what the
use costs is the sum of KL(base || branch) in nats. Both are renormalised over base pieces: output rows are fitted after
tokens are chosen, under a bound of their own, so what they take from base pieces says nothing about a token now. Only
one token is merged at a time, so that no other one can be to blame: where all are merged at once, tokens of a template
always stand together, and no arithmetic tells which of them did the harm.

*Texts.* What `eval` calls reading: the negative log likelihood of all base pieces of a text from a context in which all
new tokens are merged; inner pieces of a token are predicted on a short branch off the merged text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vocabext.choose.text import KeptText, Span
from vocabext.model.branches import Branches
from vocabext.model.frozen import FrozenModel
from vocabext.progress import Progress
from vocabext.tokens import Expansion, Ids

# Positions behind a token in which its cost is looked for: where distillation compares, too.
REACH = 8
# Uses of a token that are measured at most.
USES = 12
# A token counts as if it had been measured so often more, at the mean cost: rare ones come near that.
PRIOR_USES = 2.0
# Uses that go through the model at once, and places through the head.
USES_AT_ONCE = 64
HEAD_PLACES = 128

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """What each candidate costs.

    Attributes:
        uses_N: How many uses of it were measured.
        nats_N: Cost of one use in nats; of a token that was not met, the mean.
        profile_R: Mean cost of a use by distance: at the token, one position behind it, ...
    """

    uses_N: Ids
    nats_N: Floats
    profile_R: Floats


def measure_costs(
    model: FrozenModel, text: KeptText, expansion: Expansion, rows: Sequence[Ids], input_ND: torch.Tensor,
    progress: Progress,
) -> Costs:
    """Measure what uses of each candidate cost, in windows with rare candidates first.

    Args:
        model: The frozen base model.
        text: Text that was neither mined nor distilled from; as much of it is read as its sample has bytes.
        expansion: All candidates.
        rows: What `text.encode` made of the documents with them.
        input_ND: Their input rows.
        progress: Where to report.
    """
    uses_N, nats_N, profile_R = np.zeros(expansion.num_new, np.int64), np.zeros(expansion.num_new), np.zeros(REACH + 1)
    windows = _rare_first(list(text.stems(expansion, rows, text.spans)), expansion)
    read = 0
    with progress("measuring what tokens cost", len(text.sample), "windows") as task:
        for span, stem in windows:
            at_U = np.flatnonzero(expansion.is_new(stem))
            at_U = at_U[uses_N[stem[at_U] - expansion.first_new_id] < USES]
            if not len(at_U) or read >= text.num_bytes:
                continue
            read += span.num_bytes
            cost_UR = cost_of_uses(model, text.base_ids(span), stem, at_U, expansion, input_ND)
            token_U = stem[at_U] - expansion.first_new_id
            np.add.at(uses_N, token_U, 1)
            np.add.at(nats_N, token_U, cost_UR.sum(1))
            profile_R += cost_UR.sum(0)
            task.advance()
    mean = nats_N.sum() / max(1, int(uses_N.sum()))
    return Costs(uses_N, (nats_N + PRIOR_USES * mean) / (uses_N + PRIOR_USES), profile_R / max(1, int(uses_N.sum())))


def _rare_first(windows: list[tuple[Span, Ids]], expansion: Expansion) -> list[tuple[Span, Ids]]:
    counts_N = sum((expansion.counts(stem) for _, stem in windows), np.zeros(expansion.num_new, np.int64))

    def rarity(window: tuple[Span, Ids]) -> float:
        tokens = np.unique(window[1][expansion.is_new(window[1])]) - expansion.first_new_id
        return float((1 / counts_N[tokens]).sum())

    return sorted(windows, key=rarity, reverse=True)


@torch.no_grad()
def cost_of_uses(
    model: FrozenModel, base_ids: Ids, stem: Ids, at_U: Ids, expansion: Expansion, input_ND: torch.Tensor
) -> Floats:
    """Return what uses of new tokens in a window cost at each distance, (U, R), in nats.

    Args:
        model: The frozen base model.
        base_ids: The window.
        stem: The same in expanded ids.
        at_U: Where in `stem` the uses are.
        expansion: The new tokens.
        input_ND: Their input rows.
    """
    states_PD, past = model.hidden_and_past(model.embed(torch.from_numpy(base_ids)[None].to(model.device)))
    edges, parts = expansion.edges(stem), []
    for some_U in np.split(at_U, range(USES_AT_ONCE, len(at_U), USES_AT_ONCE)):
        start_U, end_U = edges[some_U, None], edges[some_U + 1, None]
        # The position of the base that has read the same text.
        partner_UR = end_U - 1 + np.arange(REACH + 1)
        real_U = (partner_UR < len(base_ids)).ravel()
        partner_UR = np.minimum(partner_UR, len(base_ids) - 1)
        ids_UR = np.concatenate((stem[some_U, None], base_ids[partner_UR[:, 1:]]), 1)
        before = np.arange(len(base_ids)) < start_U.repeat(REACH + 1, 0)
        own = np.kron(np.eye(len(some_U), dtype=np.bool_), np.tri(REACH + 1, dtype=np.bool_))
        positions = np.concatenate((np.arange(len(base_ids)), (start_U + np.arange(REACH + 1)).ravel()))
        branches = Branches(torch.from_numpy(positions)[None], torch.from_numpy(np.concatenate((before, own), 1))[None])
        inputs = model.embed(torch.from_numpy(ids_UR.reshape(1, -1)).to(model.device), input_ND.to(model.device),
                             expansion.first_new_id)
        branch_KD = model.hidden(inputs, branches=branches, past=past)[0]
        partner_KD = states_PD[0][torch.from_numpy(partner_UR.ravel()).to(states_PD.device)]
        nats_K = _divergences(model, partner_KD, branch_KD, expansion.first_new_id)
        parts.append((nats_K * real_U).reshape(partner_UR.shape))
    return np.concatenate(parts)


def _divergences(model: FrozenModel, base_KD: torch.Tensor, branch_KD: torch.Tensor, first_new_id: int) -> Floats:
    """Return KL(base || branch) over base pieces at each position, in nats."""
    found = []
    for some in zip(base_KD.split(HEAD_PLACES), branch_KD.split(HEAD_PLACES), strict=True):
        base_KV, branch_KV = (model.log_probabilities(states, first_new_id=first_new_id) for states in some)
        terms_KV = (base_KV.exp() * (base_KV - branch_KV)).masked_fill_(base_KV == -torch.inf, 0.0)
        found.append(terms_KV.sum(1).clamp_(min=0.0).double().cpu())
    return np.asarray(torch.cat(found))


# -- texts --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def base_nats(model: FrozenModel, text: KeptText, first_new_id: int, progress: Progress) -> float:
    """Return the negative log likelihood of the sample of a text under the base."""
    total = 0.0
    with progress("reading with the base", len(text.sample), "windows") as task:
        for span in text.sample:
            ids = text.base_ids(span)
            states_PD = model.hidden(model.embed(torch.from_numpy(ids)[None].to(model.device)))[0]
            total += _nats(model, states_PD, ids, text.num_prefix, first_new_id)
            task.advance()
    return total


@torch.no_grad()
def merged_nats(
    model: FrozenModel, text: KeptText, expansion: Expansion, rows: Sequence[Ids], input_ND: torch.Tensor
) -> float:
    """Return the same from merged context, over the same base pieces."""
    total, input_ND = 0.0, input_ND.to(model.device)
    for span, stem in text.stems(expansion, rows, text.sample):
        ids_K, parents, partner_P = lay_out(stem, expansion)
        inputs = model.embed(torch.from_numpy(ids_K)[None].to(model.device), input_ND, expansion.first_new_id)
        branches = Branches.of(parents) if len(ids_K) > len(stem) else None
        states_PD = model.hidden(inputs, branches=branches)[0][torch.from_numpy(partner_P).to(model.device)]
        total += _nats(model, states_PD, text.base_ids(span), text.num_prefix, expansion.first_new_id)
    return total


def lay_out(stem: Ids, expansion: Expansion) -> tuple[Ids, list[int], Ids]:
    """Lay out a merged window, with a branch off it for the inner pieces of each new token.

    Returns:
        The ids, (K,); the position that each follows, -1 for none; and for each base position of the window the one
        that has read the same text, (P,).
    """
    lengths, edges, pieces = expansion.run_lengths(stem), expansion.edges(stem), expansion.unmerge(stem)
    owner_P = np.repeat(np.arange(len(stem)), lengths)
    depth_P = np.arange(len(pieces)) - edges[owner_P]
    inner_P = depth_P < lengths[owner_P] - 1
    partner_P = np.where(inner_P, len(stem) - 1 + np.cumsum(inner_P), owner_P)
    follows_P = np.where(depth_P == 0, owner_P - 1, np.roll(partner_P, 1))
    return (np.concatenate((stem, pieces[inner_P])), [*range(-1, len(stem) - 1), *follows_P[inner_P].tolist()],
            partner_P)


def _nats(model: FrozenModel, states_PD: torch.Tensor, ids: Ids, num_prefix: int, first_new_id: int) -> float:
    first, total = max(1, num_prefix), 0.0
    targets = torch.from_numpy(ids[first:])
    for states, wanted in zip(states_PD[first - 1 : -1].split(HEAD_PLACES), targets.split(HEAD_PLACES), strict=True):
        logs = model.log_probabilities(states, first_new_id=first_new_id)
        total -= float(logs.gather(1, wanted[:, None].to(logs.device)).double().sum())
    return total
