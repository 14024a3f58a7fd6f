"""What the base would write at every place of some text: which runs, and how likely each is.

Shape suffixes: S windows, T positions, P places (real positions of all windows), F branches that are followed,
W positions of all branches of a window, C continuations, D hidden size, V base ids, R records of runs.

A place is a position after which the model predicts. The teacher reads a window once. Where the first piece of a
run is likely, or on top, the piece is appended in a branch that sees the window up to the place (its keys and
values are kept) and itself; where the second is likely then, both are; and so on along the tree of runs. So the
probability of a run is exact wherever it is above a bound, and whether greedy decoding writes all of it is exact
everywhere.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vocabext.model.branches import Branches
from vocabext.model.frozen import FrozenModel, Past
from vocabext.model.run_tree import ROOT, RunTree
from vocabext.tokens import Ids

# Positions of windows, and of branches of one window, that go through the model at once.
WINDOW_POSITIONS = 4_096
BRANCH_POSITIONS = 256
HEAD_PLACES = 128


@dataclass(frozen=True)
class Places:
    """Places and the runs that the base may write there.

    Attributes:
        hidden_PD: Final hidden states, in the model's dtype.
        top_P: The largest base logit.
        top_id_P: The base id that has it.
        normaliser_P: Log of the sum of the exponentials of the base logits.
        window_P: Which window each place is in.
        position_P: Where in it.
        next_P: The base id that the text has there; -1 at its end.
        next_log_p_P: Log probability of this id; 0 at the end.
        place_R: For each run that was found likely, or that greedy decoding writes: the place.
        token_R: The new token.
        log_p_R: Log probability of the whole run there.
        greedy_R: Whether base, decoding greedily, writes all of it.
        num_windows: How many windows were read; some may have no place.
    """

    hidden_PD: torch.Tensor
    top_P: torch.Tensor
    top_id_P: torch.Tensor
    normaliser_P: torch.Tensor
    window_P: torch.Tensor
    position_P: torch.Tensor
    next_P: torch.Tensor
    next_log_p_P: torch.Tensor
    place_R: torch.Tensor
    token_R: torch.Tensor
    log_p_R: torch.Tensor
    greedy_R: torch.Tensor
    num_windows: int

    def __len__(self) -> int:
        """How many places there are."""
        return len(self.top_P)


def concatenate(parts: Sequence[Places]) -> Places:
    """Put places of several batches one after the other; windows are numbered on."""
    windows, places = 0, 0
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in vars(parts[0]) if name != "num_windows"}
    for part in parts:
        for name, column in columns.items():
            column.append(getattr(part, name) + {"window_P": windows, "place_R": places}[name]
                          if name in ("window_P", "place_R") else getattr(part, name))
        windows += part.num_windows
        places += len(part)
    return Places(**{name: torch.cat(column) for name, column in columns.items()}, num_windows=windows)


@torch.no_grad()
def find_places(
    model: FrozenModel, windows: Sequence[Ids], tree: RunTree, *, first_new_id: int, likely: float = 1.0, first: int = 0
) -> Places:
    """Read windows with the base, and follow the runs that it may write.

    Args:
        model: The frozen base model.
        windows: Base ids, prefix included.
        tree: The runs.
        first_new_id: Id of the first new token (U).
        likely: Probability from which a run is followed; 1 follows greedy decoding only.
        first: The first position of each window that is a place.
    """
    order = sorted(range(len(windows)), key=lambda s: len(windows[s]))
    parts: list[Places] = []
    for some in _batches(order, windows):
        parts.append(_read(model, [windows[s] for s in some], tree, first_new_id, likely, first))
    found = concatenate(parts)
    numbers = torch.tensor([s for some in _batches(order, windows) for s in some])
    object.__setattr__(found, "window_P", numbers[found.window_P])
    return found


def _batches(order: Sequence[int], windows: Sequence[Ids]) -> Iterator[list[int]]:
    batch: list[int] = []
    for s in order:
        if batch and (len(batch) + 1) * len(windows[s]) > WINDOW_POSITIONS:
            yield batch
            batch = []
        batch.append(s)
    if batch:
        yield batch


def _read(
    model: FrozenModel, windows: Sequence[Ids], tree: RunTree, first_new_id: int, likely: float, first: int
) -> Places:
    lengths_S = torch.tensor([len(window) for window in windows])
    ids_ST = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(window.copy()) for window in windows], batch_first=True)
    hidden_STD, past = model.hidden_and_past(model.embed(ids_ST.to(model.device)))
    steps_T = torch.arange(ids_ST.shape[1])
    real_ST = (steps_T < lengths_S[:, None]) & (steps_T >= first)
    window_P, position_P = real_ST.nonzero(as_tuple=True)
    hidden_PD = hidden_STD[real_ST.to(model.device)]
    following_ST = torch.cat((ids_ST[:, 1:], ids_ST.new_full((len(windows), 1), -1)), 1)
    following_ST[torch.arange(len(windows)), lengths_S - 1] = -1
    node_P = torch.full((len(window_P),), ROOT)
    start = _Frontier(torch.arange(len(window_P)), node_P, torch.zeros(len(window_P), dtype=torch.float32),
                      torch.ones(len(window_P), dtype=torch.bool))
    next_P = following_ST[window_P, position_P]
    reading = _follow(model, hidden_PD, start, tree, first_new_id, likely, next_P)
    runs, frontier = [reading.ended], reading.going_on
    while len(frontier.place_F):
        branch_FD = _branch_states(model, past, frontier, tree, window_P, position_P, len(windows))
        step = _follow(model, branch_FD, frontier, tree, first_new_id, likely)
        runs.append(step.ended)
        frontier = step.going_on
    ended = [torch.cat(column) for column in zip(*((r.place_F, r.node_F, r.log_p_F, r.greedy_F) for r in runs),
                                                 strict=True)]
    place_R, node_R, log_p_R, greedy_R = ended
    return Places(hidden_PD.cpu(), reading.top_P, reading.top_id_P, reading.normaliser_P, window_P, position_P,
                  next_P, reading.next_log_p_P, place_R, tree.token_of[node_R], log_p_R, greedy_R,
                  len(windows))


@dataclass(frozen=True)
class _Frontier:
    """Beginnings of runs at places."""

    place_F: torch.Tensor
    node_F: torch.Tensor
    log_p_F: torch.Tensor
    greedy_F: torch.Tensor

    def take(self, at: torch.Tensor) -> "_Frontier":
        return _Frontier(self.place_F[at], self.node_F[at], self.log_p_F[at], self.greedy_F[at])


@dataclass(frozen=True)
class _Step:
    top_P: torch.Tensor
    top_id_P: torch.Tensor
    normaliser_P: torch.Tensor
    next_log_p_P: torch.Tensor
    ended: _Frontier
    going_on: _Frontier


def _follow(
    model: FrozenModel, hidden_FD: torch.Tensor, frontier: _Frontier, tree: RunTree, first_new_id: int, likely: float,
    next_F: torch.Tensor | None = None,
) -> _Step:
    """Predict from the end of each branch, and extend it by the pieces that are likely there."""
    tops, ids, normalisers, nexts, found = [], [], [], [], []
    next_F = torch.full((len(hidden_FD),), -1) if next_F is None else next_F
    for at in torch.arange(len(hidden_FD)).split(HEAD_PLACES):
        logits_FV = model.logits(hidden_FD[at.to(hidden_FD.device)], first_new_id=first_new_id).cpu()
        top_F, id_F, normaliser_F = top_and_normaliser(logits_FV)
        parent_C, piece_C, node_C = tree.children(frontier.node_F[at])
        log_p_C = frontier.log_p_F[at][parent_C] + logits_FV[parent_C, piece_C] - normaliser_F[parent_C]
        greedy_C = frontier.greedy_F[at][parent_C] & (id_F[parent_C] == piece_C)
        keep = (log_p_C > math.log(likely)) | greedy_C
        found.append(_Frontier(frontier.place_F[at][parent_C[keep]], node_C[keep], log_p_C[keep], greedy_C[keep]))
        tops.append(top_F)
        ids.append(id_F)
        normalisers.append(normaliser_F)
        nexts.append(log_p_of(next_F[at], logits_FV, normaliser_F))
    every = _Frontier(*(torch.cat([getattr(f, name) for f in found])
                        for name in ("place_F", "node_F", "log_p_F", "greedy_F")))
    return _Step(torch.cat(tops), torch.cat(ids), torch.cat(normalisers), torch.cat(nexts),
                 every.take(tree.token_of[every.node_F] >= 0), every.take(tree.has_children(every.node_F)))


def top_and_normaliser(logits_PV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest logit, its id, and the log of the sum of the exponentials, (P,) each."""
    top_P, id_P = logits_PV.max(1)
    return top_P, id_P, top_P + (logits_PV - top_P[:, None]).exp_().sum(1).log_()


def log_p_of(id_P: torch.Tensor, logits_PV: torch.Tensor, normaliser_P: torch.Tensor) -> torch.Tensor:
    """Return the log probability of an id at each place, (P,); 0 where the id is -1."""
    log_p_P = logits_PV.gather(1, id_P.clamp(min=0)[:, None])[:, 0] - normaliser_P
    return log_p_P.masked_fill(id_P < 0, 0.0)


def _branch_states(
    model: FrozenModel, past: Past, frontier: _Frontier, tree: RunTree, window_P: torch.Tensor,
    position_P: torch.Tensor, num_windows: int,
) -> torch.Tensor:
    """Return the state at the end of each branch, (F, D)."""
    depth = int(tree.depth[frontier.node_F[0]])  # all of them have the same
    window_F = window_P[frontier.place_F]
    # The branches of a window lie one behind the other, in slots.
    order = torch.argsort(window_F, stable=True)
    count_S = torch.bincount(window_F, minlength=num_windows)
    slot_F = torch.empty_like(order)
    slot_F[order] = torch.arange(len(order)) - (count_S.cumsum(0) - count_S)[window_F[order]]
    states_FD = None
    at_once = max(1, BRANCH_POSITIONS // depth)
    for low in range(0, int(count_S.max()), at_once):
        at = ((slot_F >= low) & (slot_F < low + at_once)).nonzero().flatten()
        part_FD = _run_branches(model, past, frontier.take(at), tree, window_F[at], slot_F[at] - low, position_P, depth)
        states_FD = part_FD.new_empty(len(order), part_FD.shape[1]) if states_FD is None else states_FD
        states_FD[at.to(part_FD.device)] = part_FD
    assert states_FD is not None
    return states_FD


def _run_branches(
    model: FrozenModel, past: Past, frontier: _Frontier, tree: RunTree, window_F: torch.Tensor, slot_F: torch.Tensor,
    position_P: torch.Tensor, depth: int,
) -> torch.Tensor:
    windows, row_F = torch.unique(window_F, return_inverse=True)
    slots, length = int(slot_F.max()) + 1, past[0][0].shape[2]
    ids = torch.zeros(len(windows), slots, depth, dtype=torch.long)
    place = torch.zeros(len(windows), slots, dtype=torch.long)
    ids[row_F, slot_F] = tree.path[frontier.node_F, :depth]
    place[row_F, slot_F] = position_P[frontier.place_F]
    steps = torch.arange(depth)
    positions = (place[..., None] + 1 + steps).view(len(windows), -1)
    sees_window = torch.arange(length) <= place.repeat_interleave(depth, 1)[..., None]
    slot_W, step_W = torch.arange(slots).repeat_interleave(depth), steps.repeat(slots)
    sees_branch = (slot_W == slot_W[:, None]) & (step_W <= step_W[:, None])
    sees = torch.cat((sees_window, sees_branch.expand(len(windows), -1, -1)), 2)
    branches = Branches(torch.cat((torch.arange(length).expand(len(windows), -1), positions), 1), sees)
    hidden = model.hidden(
        model.embed(ids.view(len(windows), -1).to(model.device)), branches=branches,
        past=[(keys[windows.to(keys.device)], values[windows.to(values.device)]) for keys, values in past])
    return hidden.view(len(windows), slots, depth, -1)[row_F.to(hidden.device), slot_F.to(hidden.device), -1]
