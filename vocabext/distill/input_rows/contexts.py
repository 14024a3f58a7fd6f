"""What the frozen model makes of a group's snippets, once: the states to match, and the past of each token.

Shape suffixes: S snippets, P positions before the token, T positions from the token on, W texts, U teacher positions,
H heads, K size of a head, D hidden size.

Teacher and student read the same ids before the token. The teacher's keys and values of these positions are
kept, once per text, so that a training step computes the positions from the token on and nothing else. That is
exact, and used, where

- keys and values are all that a layer needs of earlier text (`FrozenModel.takes_branches`),
- on the longest snippets the states are those of the plain way (`sharing_is_exact` tries it),
- and they fit into the memory set aside for them (`memory.py`).

Otherwise the student runs over the whole snippet, which gives the same result at a higher price.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vocabext.distill.input_rows.examples import Examples
from vocabext.model.branches import Branches
from vocabext.model.frozen import TOLERANCE, FrozenModel, Past, relative_difference

# Positions that go through the model at once when nothing is trained.
FORWARD_POSITIONS = {"cpu": 2_048, "cuda": 8_192}
# So many positions that are only read (kept keys and values) count as one that is computed, where a step is cut.
READ_AT_ONCE = 4
# Snippets on which sharing is tried.
PROBES = 4


@dataclass(frozen=True)
class Contexts:
    """What is kept of a group's snippets.

    Attributes:
        target_STD: States to match, in the model's dtype; `width` of them per snippet, padded on the right.
        past: Keys and values from the beginning of each text, (W, H, P, K) per layer, padded on the right; None if not
            kept.
        text_S: Which of these each snippet reads, up to its token.
    """

    target_STD: torch.Tensor
    past: Past | None
    text_S: torch.Tensor

    def take(self, at: torch.Tensor, part: Examples) -> "Contexts":
        """Return what belongs to some of the snippets, one past for each of them, cut to the padding of `part`."""
        before, width = part.before_SP.shape[1], part.ids_ST.shape[1]
        past = None if self.past is None else _Taken(self.past, self.text_S[at], before)
        return Contexts(self.target_STD[at.to(self.target_STD.device), :width], past, torch.arange(len(at)))


class _Taken(Sequence[tuple[torch.Tensor, torch.Tensor]]):
    """The past of some texts, up to a position. A layer's is copied when it is asked for: all at once are large."""

    def __init__(self, past: Past, text_S: torch.Tensor, before: int) -> None:
        self._past, self._text_S, self._before = past, text_S, before

    def __len__(self) -> int:
        return len(self._past)

    def __getitem__(self, number: Any) -> Any:
        keys, values = self._past[number]
        return tuple(one[self._text_S.to(one.device), :, : self._before] for one in (keys, values))


def chunks(length_S: torch.Tensor, at: torch.Tensor, positions: int) -> Iterator[torch.Tensor]:
    """Yield `at` in parts of similar length, none of which has more positions than that, padding included."""
    ordered = at[torch.argsort(length_S[at], stable=True)]
    start, lengths = 0, length_S[ordered].tolist()
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or (stop + 1 - start) * lengths[stop] > positions:
            yield ordered[start:stop]
            start = stop


@torch.no_grad()
def teach(
    model: FrozenModel, examples: Examples, layer: int, *, keep_past: bool,
    advance: Callable[[int], object] = lambda _: None,
) -> Contexts:
    """Run the teacher over all snippets of a group.

    Args:
        model: The frozen model.
        examples: The group's snippets.
        layer: How many layers to run.
        keep_past: Whether to keep keys and values; the caller knows that they fit and are exact.
        advance: Told how many more snippets are read.
    """
    size, width, before_W = len(examples), examples.ids_ST.shape[1], examples.before_W
    target_STD: torch.Tensor | None = None
    kept = _Kept(len(before_W), int(before_W.max()))
    for at in chunks(examples.teacher_length_W, torch.arange(len(before_W)), FORWARD_POSITIONS[model.device.type]):
        part_S = torch.isin(examples.text_S, at).nonzero().flatten()
        part = examples.take(part_S).to(model.device)  # its texts are those of `at`, in rising order
        inputs_WUD = model.embed(part.teacher_WU)
        if keep_past:
            hidden_WUD, found = model.hidden_and_past(inputs_WUD, layer=layer)
            kept.add(found, at.sort().values)
        else:
            hidden_WUD = model.hidden(inputs_WUD, layer=layer)
        if target_STD is None:
            target_STD = hidden_WUD.new_zeros(size, width, hidden_WUD.shape[-1])
        found_STD = hidden_WUD[part.text_S[:, None], part.aligned_ST]
        target_STD[part_S.to(target_STD.device), : part.ids_ST.shape[1]] = found_STD
        advance(len(part_S))
    assert target_STD is not None  # a group holds at least one snippet
    return Contexts(target_STD, tuple(kept.past) if keep_past else None, examples.text_S)


class _Kept:
    """Keys and values of the first positions of all texts, layer by layer.

    Attributes:
        past: They, padded on the right.
    """

    def __init__(self, size: int, before: int) -> None:
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._size, self._before = size, before

    def add(self, found: Past, at: torch.Tensor) -> None:
        """Keep those of some texts."""
        for number, pair in enumerate(found):
            if number == len(self.past):
                shapes = [(self._size, one.shape[1], self._before, one.shape[3]) for one in pair]
                self.past.append((pair[0].new_zeros(shapes[0]), pair[1].new_zeros(shapes[1])))
            for kept, all_WHUK in zip(self.past[number], pair, strict=True):
                count = min(self._before, all_WHUK.shape[2])
                kept[at.to(kept.device), :, :count] = all_WHUK[:, :, :count]


def student_states(
    model: FrozenModel, part: Examples, past: Past | None, row_SD: torch.Tensor, layer: int
) -> torch.Tensor:
    """Return the student's states from the token on, (S, T, D); gradients flow into `row_SD`.

    Args:
        model: The frozen model.
        part: The snippets.
        past: For each snippet keys and values from the beginning of its text; None computes these positions, too.
        row_SD: For each snippet the row of its token, float32.
        layer: How many layers to run.
    """
    if past is not None:
        inputs_STD = _embed(model, part.ids_ST, part.ids_ST[:, :1], row_SD)
        count, width = part.before_SP.shape[1], part.ids_ST.shape[1]
        return model.hidden(inputs_STD, layer=layer, branches=_behind(part.before_S, count, width), past=past)
    ids, at = _joined(part)
    inputs_STD = _embed(model, ids, part.ids_ST[:, :1], row_SD)
    hidden_STD = model.hidden(inputs_STD, layer=layer)
    return hidden_STD.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden_STD.shape[-1]))


def _embed(model: FrozenModel, ids: torch.Tensor, own_S1: torch.Tensor, row_SD: torch.Tensor) -> torch.Tensor:
    own = ids == own_S1
    return torch.where(own.unsqueeze(-1), model.scaled(row_SD).unsqueeze(1), model.embed(ids.masked_fill(own, 0)))


def _joined(part: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the whole texts padded on the right, and where in them the positions from the token on are."""
    count, width = part.before_SP.shape[1], part.ids_ST.shape[1]
    every = torch.cat((part.before_SP, part.ids_ST), 1)
    skipped_S1 = (count - part.before_S)[:, None]
    place = torch.arange(count + width, device=every.device) + skipped_S1
    ids = every.gather(1, place.clamp(max=count + width - 1)).masked_fill(place >= count + width, 0)
    at = part.before_S[:, None] + torch.arange(width, device=every.device)
    return ids[:, : int((part.before_S + part.length_S).max())], at.clamp(
        max=int((part.before_S + part.length_S).max()) - 1)


def _behind(before_S: torch.Tensor, count: int, width: int) -> Branches:
    """Return where positions from the token on are: behind what comes before it, which a kept past is cut to.

    A kept past goes on behind the token, and what stands there is padding.
    """
    place = torch.arange(count + width, device=before_S.device)
    step_T1 = torch.arange(width, device=before_S.device)[:, None]
    sees_STK = (place < before_S[:, None, None]) | ((place >= count) & (place <= count + step_T1))
    return Branches(torch.where(place < count, place, place - count + before_S[:, None]), sees_STK)


@torch.no_grad()
def sharing_is_exact(model: FrozenModel, examples: Examples, layer: int) -> bool:
    """Tell whether the kept past gives the states of the plain way, tried on the longest snippets.

    Args:
        model: The frozen model.
        examples: Some snippets.
        layer: How many layers to run.
    """
    if model.offloaded or not model.takes_branches:
        return False
    at = torch.argsort(examples.before_S + examples.length_S, descending=True)[:PROBES]
    some = examples.take(at).to(model.device)
    row_SD = model.embedding_VD[:1].float().expand(len(at), -1)
    contexts = teach(model, some, layer, keep_past=True)
    if contexts.past is None or len(contexts.past) != layer:
        return False
    own = contexts.take(torch.arange(len(some)), some)
    shared, plain = (student_states(model, some, past, row_SD, layer).float()
                     for past in (own.past, None))
    width = some.ids_ST.shape[1]
    counted_ST = (torch.arange(width, device=model.device) < some.length_S[:, None])[..., None]
    return relative_difference(shared * counted_ST, plain * counted_ST) < TOLERANCE[model.dtype]
