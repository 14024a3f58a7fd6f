"""Reading: held-out text goes through the model once in base ids, and once for each set of rows.

Shape suffixes: S windows, B windows that go through the model at once, T positions, P positions that predict, D hidden
size, V base ids, N new rows.

Every piece is predicted from base context, and from a context in which all new tokens are merged. The pieces inside a
new token need a context that ends in the middle of it; they get short branches off the merged text, in the same pass.
The logits of that pass serve all measures: reading, writing, and what is on top at the places of the merged text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from vocabext.checkpoint.folder import Rows
from vocabext.model.branches import Branches
from vocabext.model.frozen import FrozenModel
from vocabext.model.places import HEAD_PLACES, Places, log_p_of, top_and_normaliser
from vocabext.tokens import Expansion, Ids

# Positions of merged windows and their branches that go through the model at once, padding included.
POSITIONS_AT_ONCE = 2_048


@dataclass(frozen=True)
class Merged:
    """What rows make of windows.

    Attributes:
        reading_nats_S: Nats of the base pieces of each window.
        writing_nats_S: Nats of its expanded ids.
        places: Those places of the base text that are there in merged text, too, with the states and logits found
            there. What deserves to be written there stays as it is: base's own continuation of its own text.
    """

    reading_nats_S: npt.NDArray[np.float64]
    writing_nats_S: npt.NDArray[np.float64]
    places: Places


@torch.no_grad()
def read_merged(
    model: FrozenModel, stems: Sequence[Ids], first: int, expansion: Expansion, rows: Rows, places: Places
) -> Merged:
    """Read windows in merged ids.

    Args:
        model: The frozen base model.
        stems: Expanded ids of the windows, prefix included.
        first: Index of the first id that is predicted.
        expansion: The new tokens.
        rows: Input and output rows.
        places: Places of the same windows in base ids.
    """
    layouts = [lay_out(stem, first, expansion) for stem in stems]
    longest = max(int(expansion.run_lengths(stem).sum()) for stem in stems)
    parts = [_read(model, [layouts[s] for s in some], first, expansion, rows) for some in _batches(model, layouts)]
    hidden_PD, top_P, top_id_P, normaliser_P, reading_P, writing_P = (
        torch.cat(column) for column in zip(*parts, strict=True))
    order = [s for some in _batches(model, layouts) for s in some]
    window_P = torch.tensor(order).repeat_interleave(torch.tensor([len(layouts[s].ids) - first + 1 for s in order]))
    nats = [np.bincount(window_P.numpy(), -log_p_P.double().cpu().numpy(), len(stems)) for log_p_P in
            (reading_P, writing_P)]
    # The base position that each position of a stem ends at; branches are no places.
    at_P = torch.cat([_ends(layouts[s], stems[s], first, expansion) for s in order])
    key_P = torch.where(at_P < 0, -1, window_P * longest + at_P)
    by_key = key_P.argsort()
    wanted_P = places.window_P * longest + places.position_P
    kept = torch.isin(wanted_P, key_P).nonzero().flatten()
    found = by_key[torch.searchsorted(key_P[by_key], wanted_P[kept])]
    still_R = torch.isin(places.place_R, kept)
    merged = replace(
        places, hidden_PD=hidden_PD[found.to(hidden_PD.device)].cpu(), top_P=top_P[found], top_id_P=top_id_P[found],
        normaliser_P=normaliser_P[found], window_P=places.window_P[kept], position_P=places.position_P[kept],
        next_P=places.next_P[kept], next_log_p_P=places.next_log_p_P[kept],
        place_R=torch.searchsorted(kept, places.place_R[still_R]), token_R=places.token_R[still_R],
        log_p_R=places.log_p_R[still_R], greedy_R=places.greedy_R[still_R])
    return Merged(*nats, merged)


def _ends(layout: "Layout", stem: Ids, first: int, expansion: Expansion) -> torch.Tensor:
    ends = np.full(len(layout.ids), -1)
    ends[: len(stem)] = expansion.last_positions(stem)
    return torch.from_numpy(ends[first - 1 :])


def _batches(model: FrozenModel, layouts: Sequence["Layout"]) -> Iterator[list[int]]:
    """Yield windows of similar length; where each branch is a text of its own, padding would be one, too."""
    batch: list[int] = []
    for s in sorted(range(len(layouts)), key=lambda s: len(layouts[s].ids)):
        if batch and (not model.takes_branches or (len(batch) + 1) * len(layouts[s].ids) > POSITIONS_AT_ONCE):
            yield batch
            batch = []
        batch.append(s)
    if batch:
        yield batch


def _read(model: FrozenModel, layouts: Sequence["Layout"], first: int, expansion: Expansion, rows: Rows
          ) -> tuple[torch.Tensor, ...]:
    """Return for each position from the last of the prefix on, of one window after the other: its state, its top logit,
    its id, its normaliser, and the log probabilities of what it predicts in reading and in writing.
    """  # noqa: D205
    size = max(len(layout.ids) for layout in layouts)
    ids_BT, position_BT = (torch.zeros(len(layouts), size, dtype=torch.long) for _ in range(2))
    visible_BTT = torch.eye(size, dtype=torch.bool).repeat(len(layouts), 1, 1)
    for b, layout in enumerate(layouts):
        count = len(layout.ids)
        ids_BT[b, :count], position_BT[b, :count] = torch.from_numpy(layout.ids), torch.from_numpy(layout.positions)
        visible_BTT[b, :count, :count] = torch.from_numpy(layout.visible)
    inputs_BTD = model.embed(ids_BT.to(model.device), rows.input_ND.to(model.device), expansion.first_new_id)
    hidden_BTD = model.hidden(inputs_BTD, branches=Branches(
        position_BT.to(model.device), visible_BTT.to(model.device)))
    hidden_PD = torch.cat([hidden_BTD[b, first - 1 : len(layout.ids)] for b, layout in enumerate(layouts)])
    reading_P, writing_P = (torch.from_numpy(np.concatenate([getattr(layout, name)[first - 1 :] for layout in layouts]))
                            for name in ("reading", "writing"))
    parts = [_predict(model, hidden_PD[at.to(model.device)], reading_P[at], writing_P[at], expansion.first_new_id, rows)
             for at in torch.arange(len(hidden_PD)).split(HEAD_PLACES)]
    return hidden_PD, *(torch.cat(column) for column in zip(*parts, strict=True))


def _predict(
    model: FrozenModel, hidden_PD: torch.Tensor, reading_P: torch.Tensor, writing_P: torch.Tensor, first_new_id: int,
    rows: Rows,
) -> tuple[torch.Tensor, ...]:
    assert rows.output_ND is not None
    logits_PV = model.logits(hidden_PD, first_new_id=first_new_id).cpu()
    new_PN = model.new_logits(hidden_PD, rows.output_ND, rows.bias_N).cpu()
    top_P, top_id_P, normaliser_P = top_and_normaliser(logits_PV)
    whole_P = torch.logaddexp(normaliser_P, new_PN.logsumexp(1))
    is_new_P = writing_P >= first_new_id
    written_P = torch.where(
        is_new_P, log_p_of(torch.where(is_new_P, writing_P - first_new_id, -1), new_PN, whole_P),
        log_p_of(torch.where(is_new_P, -1, writing_P), logits_PV, whole_P))
    return top_P, top_id_P, normaliser_P, log_p_of(reading_P, logits_PV, normaliser_P), written_P


@dataclass(frozen=True)
class Layout:
    """The merged text (the stem) and, behind it, a branch for the inner pieces of each new token."""

    ids: Ids
    positions: Ids
    visible: npt.NDArray[np.bool_]  # (T, T)
    reading: Ids  # the base piece that each position predicts; -1 for none
    writing: Ids  # the expanded id that each predicts; -1 for none


def lay_out(stem: Ids, first: int, expansion: Expansion) -> Layout:
    """Lay out the stem and its branches.

    Args:
        stem: Expanded ids of the window.
        first: Index of the first id that is predicted.
        expansion: The new tokens.
    """
    predicted = stem[first:]
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
    reading, writing = np.full(len(ids), -1), np.full(len(ids), -1)
    reading[sources], writing[first - 1 : len(stem) - 1] = pieces, predicted
    return Layout(ids, positions, visible, reading, writing)
