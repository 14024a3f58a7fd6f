"""What the frozen model makes of a group's snippets, once: the states to match, and the past of each token.

Shape suffixes: S snippets, P positions before the token, T positions from the token on, U teacher positions,
H heads, K size of a head, D hidden size.

Teacher and student read the same ids before the token. The teacher's keys and values of these positions are
kept, so that a training step computes the positions from the token on and nothing else. That is exact, and
used, where

- each layer keeps the keys and values of all positions in transformers' own cache, and takes a mask of ours,
- no layer looks back less far than the longest snippet (sliding windows),
- on the longest snippets the states are those of the plain way (`sharing_is_exact` tries it),
- and they fit into the memory set aside for them (`memory.py`).

Otherwise the student runs over the whole snippet, which gives the same result at a higher price.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vocabext.distill.examples import Examples
from vocabext.model import FrozenModel, Past

# Positions that go through the model at once when nothing is trained.
FORWARD_POSITIONS = 8_192
# Snippets on which sharing is tried.
PROBES = 4
# Two ways of adding up the same numbers may differ by this, relative to the states, per dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


@dataclass(frozen=True)
class Contexts:
    """What is kept of a group's snippets.

    Attributes:
        target_STD: States to match, in the model's dtype; `width` of them per snippet, padded on the right.
        past: Keys and values before the token, (S, H, P, K) per layer, padded on the left; None if not kept.
    """

    target_STD: torch.Tensor
    past: Past | None

    def take(self, at: torch.Tensor, part: Examples) -> "Contexts":
        """Return what belongs to some of the snippets, cut to the padding of `part`."""
        before, width = part.before_SP.shape[1], part.ids_ST.shape[1]
        past = None if self.past is None else tuple(
            (_last(keys[at.to(keys.device)], before), _last(values[at.to(values.device)], before))
            for keys, values in self.past)  # fmt: skip
        return Contexts(self.target_STD[at.to(self.target_STD.device), :width], past)


def _last(past_SHPK: torch.Tensor, count: int) -> torch.Tensor:
    return past_SHPK[:, :, past_SHPK.shape[2] - count :]


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
    others_ND: torch.Tensor | None = None, first_new_id: int = 0,
) -> Contexts:  # fmt: skip
    """Run the teacher over all snippets of a group.

    Args:
        model: The frozen model.
        examples: The group's snippets.
        layer: How many layers to run.
        keep_past: Whether to keep keys and values; the caller knows that they fit and are exact.
        others_ND: Rows of all new tokens, for snippets in which others are merged, too: then the student's
            past is not the teacher's, and is computed apart.
        first_new_id: The id of `others_ND[0]`.
    """
    size, width, before = len(examples), examples.ids_ST.shape[1], examples.before_SP.shape[1]
    target_STD: torch.Tensor | None = None
    past: list[tuple[torch.Tensor, torch.Tensor]] = []
    for at in chunks(examples.teacher_length_S, torch.arange(size), FORWARD_POSITIONS):
        part = examples.take(at).to(model.device)
        inputs_SUD = model.embed(part.teacher_SU)
        found: Past = ()
        if keep_past and examples.shared:
            hidden_SUD, found = model.hidden_and_past(inputs_SUD, layer=layer)
        else:
            hidden_SUD = model.hidden(inputs_SUD, layer=layer)
        index = part.aligned_ST.unsqueeze(-1).expand(-1, -1, hidden_SUD.shape[-1])
        if target_STD is None:
            target_STD = hidden_SUD.new_zeros(size, width, hidden_SUD.shape[-1])
        target_STD[at.to(target_STD.device), : part.ids_ST.shape[1]] = hidden_SUD.gather(1, index)
        if keep_past and not examples.shared:
            found = _student_past(model, part, layer, others_ND, first_new_id)
        _keep(past, found, part, at, size, before)
    assert target_STD is not None  # a group holds at least one snippet
    return Contexts(target_STD, tuple(past) if past else None)


def _student_past(
    model: FrozenModel, part: Examples, layer: int, others_ND: torch.Tensor | None, first_new_id: int
) -> Past:
    """Run the student over what it reads before the token, moved to the left."""
    count = part.before_SP.shape[1]
    place = torch.arange(max(count, 1), device=part.before_SP.device) + (count - part.before_S)[:, None]
    ids = torch.nn.functional.pad(part.before_SP, (0, 1)).gather(1, place.clamp(max=count))
    return model.hidden_and_past(model.embed(ids, others_ND, first_new_id), layer=layer)[1]


def _keep(
    past: list[tuple[torch.Tensor, torch.Tensor]], found: Past, part: Examples, at: torch.Tensor, size: int,
    before: int,
) -> None:  # fmt: skip
    """Copy keys and values of the positions before the token to the right end of what is kept."""
    count = part.before_SP.shape[1]
    for number, pair in enumerate(found):
        if number == len(past):
            shapes = [(size, kept.shape[1], before, kept.shape[3]) for kept in pair]
            past.append((pair[0].new_zeros(shapes[0]), pair[1].new_zeros(shapes[1])))
        for kept, all_SHUK in zip(past[number], pair, strict=True):
            place_SP = part.before_S[:, None] - count + torch.arange(count, device=part.before_S.device)
            index = place_SP.clamp(min=0).to(kept.device)[:, None, :, None]
            picked = all_SHUK.gather(2, index.expand(-1, all_SHUK.shape[1], -1, all_SHUK.shape[3]))
            kept[at.to(kept.device), :, before - count :] = picked


def student_states(
    model: FrozenModel, part: Examples, past: Past | None, row_SD: torch.Tensor, layer: int, first_new_id: int,
    others_ND: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the student's states from the token on, (S, T, D); gradients flow into `row_SD`.

    Args:
        model: The frozen model.
        part: The snippets.
        past: Keys and values before the token; None computes these positions, too.
        row_SD: For each snippet the row of its token, float32.
        layer: How many layers to run.
        first_new_id: The id of the first new token.
        others_ND: Rows of all new tokens, for snippets in which others are merged, too.
    """
    if past is not None:
        inputs_STD = _embed(model, part.ids_ST, part.ids_ST[:, :1], row_SD, first_new_id, others_ND)
        count, width = part.before_SP.shape[1], part.ids_ST.shape[1]
        steps_T = torch.arange(width, device=model.device)
        mask = _mask(part.before_S, count, width, model.dtype)
        return model.hidden(inputs_STD, layer=layer, position_ids=part.before_S[:, None] + steps_T, mask=mask,
                            past=past)  # fmt: skip
    ids, at = _joined(part)
    inputs_STD = _embed(model, ids, part.ids_ST[:, :1], row_SD, first_new_id, others_ND)
    hidden_STD = model.hidden(inputs_STD, layer=layer)
    return hidden_STD.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden_STD.shape[-1]))


def _embed(
    model: FrozenModel, ids: torch.Tensor, own_S1: torch.Tensor, row_SD: torch.Tensor, first_new_id: int,
    others_ND: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    own = ids == own_S1
    inputs = model.embed(ids.masked_fill(own, 0), others_ND, first_new_id)
    return torch.where(own.unsqueeze(-1), model.scaled(row_SD).unsqueeze(1), inputs)


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


def _mask(before_S: torch.Tensor, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return which keys each position reads: what is really before the token, and what is not after itself."""
    place = torch.arange(count + width, device=before_S.device)
    step_T1 = torch.arange(width, device=before_S.device)[:, None]
    read = (place >= count - before_S[:, None, None]) & (place <= count + step_T1)
    return torch.zeros((), dtype=dtype, device=before_S.device).where(read, torch.finfo(dtype).min)[:, None]


@torch.no_grad()
def sharing_is_exact(model: FrozenModel, examples: Examples, layer: int, first_new_id: int) -> bool:
    """Tell whether the kept past gives the states of the plain way, tried on the longest snippets."""
    window = model.sliding_window(layer)
    longest = int((examples.before_S + examples.length_S).max())
    if model.offloaded or (window is not None and longest > window):
        return False
    at = torch.argsort(examples.before_S + examples.length_S, descending=True)[:PROBES]
    some = examples.take(at).to(model.device)
    row_SD = model.embedding_VD[:1].float().expand(len(at), -1)
    try:
        contexts = teach(model, some, layer, keep_past=True)
        if contexts.past is None or len(contexts.past) != layer:
            return False
        shared, plain = (student_states(model, some, past, row_SD, layer, first_new_id).float()
                         for past in (contexts.past, None))  # fmt: skip
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # a model that has no such cache, or takes no such mask, says so in many ways
    width = some.ids_ST.shape[1]
    counted_ST = (torch.arange(width, device=model.device) < some.length_S[:, None])[..., None]
    difference = ((shared - plain) * counted_ST).square().sum() / (plain * counted_ST).square().sum()
    return bool(difference.sqrt() < TOLERANCE[model.dtype])
