"""Text that branches: several continuations of one beginning go through a model together.

Shape suffixes: B batch, T inputs, K keys (those of earlier text first, then the inputs), L ends of branches,
U positions of one branch from the beginning of its text, D hidden size.

Each position has a number in its own text, and sees the positions that came before it there. Which of these a layer
really looks at is the model class's own affair: it may look back a window only, or to the beginning of a chunk. So the
class makes its masks itself, as it does for plain text; it is only told the numbers instead of the order in which the
positions happen to lie (`Branches.masks`). A class that goes by that order all the same (ALiBi, states that run on from
one position to the next) gets every branch as a text of its own instead (`unrolled`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# Positions of branches that go through the model at once where each is a text of its own, padding included.
UNROLLED_POSITIONS = 8_192


@dataclass(frozen=True)
class Branches:
    """Where each position is, and what it follows.

    Attributes:
        position_BK: The number of each key in its own text, from 0 on.
        sees_BTK: Which keys come before each input in its text; itself included.
    """

    position_BK: torch.Tensor
    sees_BTK: torch.Tensor

    @classmethod
    def of(cls, parents: Sequence[int]) -> "Branches":
        """Lay out positions, each of which follows another one that lies before it; -1 begins a text."""
        size = len(parents)
        sees_KK, position_K = torch.eye(size, dtype=torch.bool), torch.zeros(size, dtype=torch.long)
        for at, parent in enumerate(parents):
            if parent >= 0:
                sees_KK[at] |= sees_KK[parent]
                position_K[at] = position_K[parent] + 1
        return cls(position_K[None], sees_KK[None])

    def of_inputs(self, count: int) -> "Branches":
        """Return the same for the last `count` positions as inputs, the others being earlier text."""
        return Branches(self.position_BK, self.sees_BTK[:, -count:])

    @property
    def input_positions(self) -> torch.Tensor:
        """The numbers of the inputs, (B, T)."""
        return self.position_BK[:, -self.sees_BTK.shape[1] :]

    @contextmanager
    def masks(self) -> Iterator[None]:
        """Let classes of transformers make their masks for these positions."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        before = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)
        try:
            for name in ("eager", "sdpa"):
                ALL_MASK_ATTENTION_FUNCTIONS[name] = self._maker(ALL_MASK_ATTENTION_FUNCTIONS[name])
            yield
        finally:
            ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.clear()
            ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.update(before)

    def _maker(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap what makes a mask from a rule about two indices: the rule is asked about numbers, among what is seen."""

        def masks(*, mask_function: Callable[..., Any], **options: Any) -> Any:
            device, skipped = options.get("device", "cpu"), options.get("q_offset", 0)
            position_BK, sees_BTK = self.position_BK.to(device), self.sees_BTK.to(device)

            def rule(batch: Any, head: Any, query: Any, key: Any) -> Any:
                seen = sees_BTK[batch, query - skipped, key]
                return mask_function(batch, head, position_BK[batch, query], position_BK[batch, key]) & seen

            return make(mask_function=rule, **{**options, "allow_is_causal_skip": False,
                                               "allow_is_bidirectional_skip": False})

        return masks


def unrolled(forward: Callable[[torch.Tensor], torch.Tensor], inputs_BKD: torch.Tensor, branches: Branches
             ) -> torch.Tensor:
    """Run every branch as a plain text of its own, from its beginning.

    Args:
        forward: From embeddings (L, U, D), padded on the right, to hidden states.
        inputs_BKD: Embeddings of all keys.
        branches: Where they are, and what they follow.

    Returns:
        Hidden states of the inputs (B, T, D).
    """
    sees_BTK = branches.sees_BTK.to(inputs_BKD.device)
    num_batch, num_inputs, num_keys = sees_BTK.shape
    first = num_keys - num_inputs
    # A branch ends where nobody but the position itself sees it.
    batch_L, end_L = (sees_BTK[:, :, first:].sum(1) == 1).nonzero(as_tuple=True)
    sees_LK = sees_BTK[batch_L, end_L]
    position_BK = branches.position_BK.to(inputs_BKD.device).expand(num_batch, -1)
    key_LK = position_BK[batch_L].masked_fill(~sees_LK, num_keys).argsort(dim=1, stable=True)
    length_L = sees_LK.sum(1)
    order = length_L.argsort(dim=0, stable=True)
    states_BTD: torch.Tensor | None = None
    for at in order.split(max(1, UNROLLED_POSITIONS // int(length_L.max()))):
        key_LU = key_LK[at, : int(length_L[at].max())]
        states_LUD = forward(inputs_BKD[batch_L[at, None], key_LU])
        if states_BTD is None:
            states_BTD = states_LUD.new_zeros(num_batch, num_inputs, states_LUD.shape[-1])
        steps_U = torch.arange(key_LU.shape[1], device=key_LU.device)
        line, step = ((steps_U < length_L[at, None]) & (key_LU >= first)).nonzero(as_tuple=True)
        states_BTD[batch_L[at][line], key_LU[line, step] - first] = states_LUD[line, step]
    assert states_BTD is not None
    return states_BTD
