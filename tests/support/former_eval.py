"""How `eval` computed its numbers window by window and text by text: what the shared passes are compared with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vocabext.evaluate.decode import matches
from vocabext.evaluate.shift import _add, _beginning_with
from vocabext.model.branches import Branches
from vocabext.model.frozen import FrozenModel
from vocabext.model.places import HEAD_PLACES, Places
from vocabext.model.run_tree import RunTree
from vocabext.tokens import Expansion, Ids

_Window = BaseTokenizer = ExpandedTokenizer = RowSet = Rows = Any


@torch.no_grad()
def base_nats(model: FrozenModel, ids: Ids, num_prefix: int, base: BaseTokenizer) -> float:
    """Return the negative log likelihood of base ids from base context."""
    first = max(1, num_prefix)
    inputs = torch.from_numpy(ids).to(model.device)
    hidden_TD = model.hidden(model.embed(inputs[None]))[0]
    logs = model.log_probabilities(hidden_TD[first - 1 : -1], first_new_id=base.first_new_id)
    return -float(logs.gather(1, inputs[first:, None]).sum())


@torch.no_grad()
def expanded_nats(
    model: FrozenModel, window: _Window, expanded: ExpandedTokenizer, base: BaseTokenizer, rows: RowSet
) -> tuple[float, float]:
    """Return nats of the base pieces, and of the expanded ids, both from merged context."""
    layout = _lay_out(window.expanded, max(1, window.num_prefix), expanded)
    ids, positions, visible = (torch.from_numpy(a).to(model.device)
                               for a in (layout.ids, layout.positions, layout.visible))
    inputs_BTD = model.embed(ids[None], rows.input_ND.to(model.device), expanded.first_new_id)
    hidden_TD = model.hidden(inputs_BTD, branches=Branches(positions[None], visible[None]))[0]
    logs = model.log_probabilities(hidden_TD[layout.sources], first_new_id=base.first_new_id)
    reading = -float(logs.gather(1, torch.from_numpy(layout.targets).to(model.device)[:, None]).sum())
    first = max(1, window.num_prefix)
    stem = len(window.expanded)
    logs = model.log_probabilities(hidden_TD[first - 1 : stem - 1], first_new_id=base.first_new_id,
                                   new_rows_ND=rows.output_ND.to(model.device), new_bias_N=rows.bias_N)
    # A new id's column: the base rows in the softmax are exactly the ids below the first new one.
    return reading, -float(logs.gather(1, ids[first:stem, None]).sum())


@dataclass(frozen=True)
class _Layout:
    """The merged text (the stem) and, behind it, a branch for the inner pieces of each new token."""

    ids: Ids
    positions: Ids
    visible: npt.NDArray[np.bool_]  # (T, T)
    sources: Ids  # positions that predict
    targets: Ids  # the base piece that each predicts


def _lay_out(stem: Ids, first: int, expanded: ExpandedTokenizer) -> _Layout:
    """Lay out the stem and its branches.

    Args:
        stem: Expanded ids of the window.
        first: Index of the first id that is predicted.
        expanded: The tokenizer.
    """
    expansion, predicted = expanded.expansion, stem[first:]
    pieces, edges = expansion.unmerge(predicted), expansion.edges(predicted)
    # Each piece belongs to an id of the stem, and is predicted from where the one before it was read.
    owners = np.repeat(np.arange(first, len(stem)), np.diff(edges))
    depths = np.arange(len(pieces)) - np.repeat(edges[:-1], np.diff(edges))
    on_branch = np.ones(len(pieces), np.bool_)
    on_branch[edges[1:] - 1] = False  # what follows the last piece is predicted from the new token itself
    read_at = len(stem) - 1 + np.cumsum(on_branch)
    sources = np.where(depths == 0, owners - 1, np.concatenate(([0], read_at[:-1])))
    ids = np.concatenate((stem, pieces[on_branch]))
    positions = np.concatenate((np.arange(len(stem)), (owners + depths)[on_branch]))
    parent, order = np.concatenate((np.full(len(stem), -1), owners[on_branch])), np.arange(len(ids))
    on_stem = parent < 0
    # The stem sees its own past; a branch sees the stem before its token, and its own past.
    past = order <= order[:, None]
    seen_by_branch = (on_stem & (order < parent[:, None])) | ((parent == parent[:, None]) & past)
    visible = np.where(on_stem[:, None], on_stem & past, seen_by_branch)
    return _Layout(ids, positions, visible, sources, pieces)


@torch.no_grad()
def as_read(places: Places, model: FrozenModel, merged: Sequence[Ids], expansion: Expansion, rows: Rows) -> Places:
    """Return those places that are there in merged text, too, with the states and logits found there.

    What deserves to be written there stays as it is: base's own continuation of its own text.

    Args:
        places: Places of the unmerged windows.
        model: The frozen base model.
        merged: The windows in expanded ids.
        expansion: The new tokens.
        rows: Rows of the new tokens.
    """
    input_ND, states, keys = rows.input_ND.to(model.device), [], []
    longest = max(int(expansion.run_lengths(ids).sum()) for ids in merged)
    for window, ids in enumerate(merged):
        inputs = torch.from_numpy(ids.copy()).to(model.device)[None]
        states.append(model.hidden(model.embed(inputs, input_ND, expansion.first_new_id))[0])
        keys.append(window * longest + torch.from_numpy(expansion.last_positions(ids)))
    state_PD, key_P = torch.cat(states), torch.cat(keys)
    wanted_P = places.window_P * longest + places.position_P
    kept = torch.isin(wanted_P, key_P).nonzero().flatten()
    hidden_PD = state_PD[torch.searchsorted(key_P, wanted_P[kept]).to(state_PD.device)]
    logits = [model.logits(some_PD, first_new_id=expansion.first_new_id) for some_PD in hidden_PD.split(HEAD_PLACES)]
    tops = [some_PV.max(1) for some_PV in logits]
    still_R = torch.isin(places.place_R, kept)
    return replace(
        places, hidden_PD=hidden_PD.cpu(), top_P=torch.cat([top.values for top in tops]).cpu(),
        top_id_P=torch.cat([top.indices for top in tops]).cpu(),
        normaliser_P=torch.cat([some_PV.logsumexp(1) for some_PV in logits]).cpu(), window_P=places.window_P[kept],
        position_P=places.position_P[kept], next_P=places.next_P[kept],
        place_R=torch.searchsorted(kept, places.place_R[still_R]), token_R=places.token_R[still_R],
        log_p_R=places.log_p_R[still_R], greedy_R=places.greedy_R[still_R])


@torch.no_grad()
def text_nats(model: FrozenModel, prompt: Ids, pieces: Sequence[int], first_new_id: int) -> float:
    """Return how unlikely the base finds a continuation of a prompt."""
    ids = torch.from_numpy(np.concatenate((prompt, pieces)))
    hidden_PD = model.hidden(model.embed(ids[None]))[0][len(prompt) - 1 : -1]
    logs = model.log_probabilities(hidden_PD, first_new_id=first_new_id)
    return -float(logs.gather(1, ids[len(prompt) :, None]).sum())


@torch.no_grad()
def former_lost(
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


