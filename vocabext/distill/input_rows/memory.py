"""How much memory the work needs, known before it starts.

What is kept of a group of tokens grows with the group: the states to match, and the keys and values before the
tokens. A budget bounds it, and with it the size of the groups. Everything else is the model, the new rows with
their optimizer, and what one step computes; none of these grow with the number of snippets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import psutil
import torch

from vocabext.distill.input_rows.contexts import FORWARD_POSITIONS, READ_AT_ONCE
from vocabext.model.frozen import PROBE_POSITIONS, FrozenModel

GIB = 2**30
# Share of the device's memory that may hold what is kept of a group, where no budget is given. Of all of it,
# not of what happens to be free: the same run must make the same groups again.
SHARE = 1 / 8
# Fewer tokens than this per step waste the hardware: then the past is computed in every step instead.
MIN_GROUP = 8


@dataclass(frozen=True)
class MemoryPlan:
    """What the work needs, in bytes.

    Attributes:
        weights_bytes: The model.
        rows_bytes: The new rows of one group, their gradients and momenta, and the sensitive directions.
        states_bytes: The states to match, of one group.
        past_bytes: Keys and values before the tokens, of one group; 0 if they are not kept.
        step_bytes: What one step computes (an estimate).
        group: Tokens that train together.
        keep_past: Whether keys and values are kept.
        writing_bytes: What output rows are made from, and the work itself (an estimate), once all groups are finished;
            beside the model.
    """

    weights_bytes: int
    rows_bytes: int
    states_bytes: int
    past_bytes: int
    step_bytes: int
    group: int
    keep_past: bool
    writing_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Everything that is there while groups are trained."""
        return self.weights_bytes + self.rows_bytes + self.states_bytes + self.past_bytes + self.step_bytes

    def describe(self) -> str:
        """Say it in one line."""
        parts = {"model": self.weights_bytes, "rows": self.rows_bytes, "states to match": self.states_bytes,
                 "text before the tokens": self.past_bytes, "a step": self.step_bytes}
        after = f"; for the output rows, afterwards: {_size(self.writing_bytes)} beside the model"
        return (f"{_size(self.total_bytes)} of memory for {self.group:,} tokens at a time: "
                + ", ".join(f"{name} {_size(count)}" for name, count in parts.items() if count)
                + (after if self.writing_bytes else ""))


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def device_bytes(device: torch.device) -> int:
    """Return how much memory a device has, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def plan_memory(
    model: FrozenModel, *, tokens: int, snippets: int, before: int, width: int, layer: int, positions: int,
    wanted_group: int, budget_bytes: int | None, exact: bool,
    kept_positions: Callable[[int], tuple[int, int]] | None = None,
) -> MemoryPlan:
    """Choose the size of the groups, and whether the past is kept.

    Args:
        model: The frozen model.
        tokens: How many tokens there are.
        snippets: Most snippets of a token.
        before: Positions of the longest text.
        width: Most positions from a token on.
        layer: How many layers run.
        positions: Positions of one forward pass.
        wanted_group: Tokens per group if memory were no matter.
        budget_bytes: Bound for what is kept of a group; None takes a share of the device's memory.
        exact: Whether keeping the past gives the same result (`contexts.sharing_is_exact`).
        kept_positions: For groups of a given size, of how many positions keys and values are kept, and of how many of
            one text at most; None takes every snippet for the longest text.
    """
    item, hidden_size = model.dtype.itemsize, model.embedding_VD.shape[1]
    budget = int(device_bytes(model.device) * SHARE) if budget_bytes is None else budget_bytes
    states, past = snippets * width * hidden_size * item, model.past_bytes(layer)
    counted = cache(kept_positions or (lambda size: (size * snippets * before, before)))

    def kept(size: int, *, with_past: bool) -> int:
        return size * states + (past * counted(size)[0] if with_past else 0)

    def even(size: int) -> int:
        """Return the size, or a smaller one with which no group is much smaller than the others."""
        return -(-tokens // -(-tokens // size))

    keep_past = exact and budget >= kept(min(MIN_GROUP, tokens), with_past=True)
    group = even(max(1, min(wanted_group, tokens)))
    while group > 1 and (needed := kept(group, with_past=keep_past)) > budget:
        group = even(max(1, group // 2, group * budget // needed))
    computed, read = (width, counted(group)[1]) if keep_past else (before, 0)
    at_once = min(max(1, positions // (computed + read // READ_AT_ONCE)), group)
    step = at_once * model.step_bytes(layer, positions=computed, before=read)
    # The teacher reads more at once: it holds the keys and values of all layers, and one layer's inner states.
    teacher = min(FORWARD_POSITIONS[model.device.type], group * snippets * before) * (
        (past if keep_past else 0) + model.step_bytes(layer) // (PROBE_POSITIONS * (layer + 2)))
    return MemoryPlan(
        weights_bytes=model.weight_bytes, rows_bytes=(group * 4 + hidden_size * 3) * hidden_size * 4,
        states_bytes=group * states, past_bytes=past * counted(group)[0] if keep_past else 0,
        step_bytes=max(step, teacher), group=group, keep_past=keep_past,
    )
