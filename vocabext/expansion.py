"""What the new tokens mean: arithmetic on token ids, without a tokenizer.

A new token is a name for a fixed run of base ids. `unmerge` replaces every new id by its run, so
that for every text `x` of a correctly extended tokenizer

    unmerge(encode_expanded(x)) == encode_base(x)

Everything downstream leans on this: teacher and student of the distillation, the verification, the
measurements. Position `j` of the expanded ids lines up with the *last* base id of its run.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vocabext.records import NewToken

Ids = npt.NDArray[np.int64]


class Expansion:
    """The new tokens of a vocabulary, numbered upwards from `first_new_id`."""

    def __init__(self, tokens: Sequence[NewToken], first_new_id: int) -> None:
        """Tabulate the runs.

        Args:
            tokens: The new tokens in token-id order.
            first_new_id: The id of `tokens[0]`; every base id is smaller.
        """
        self.tokens = tuple(tokens)
        self.first_new_id = first_new_id
        lengths = np.fromiter((len(t.run) for t in self.tokens), np.int64, len(self.tokens))
        # Entry 0 stands for "a base id": it has length 1 and is filled in by the id itself.
        self._lengths = np.concatenate((np.ones(1, np.int64), lengths))
        self._starts = np.concatenate((np.zeros(2, np.int64), np.cumsum(lengths)))[: len(lengths) + 1]
        self._runs = np.fromiter((i for t in self.tokens for i in t.run), np.int64, int(lengths.sum()))

    @property
    def num_new(self) -> int:
        """How many new tokens there are."""
        return len(self.tokens)

    def is_new(self, ids: Sequence[int] | Ids) -> npt.NDArray[np.bool_]:
        """Tell which of the expanded ids are new tokens."""
        return np.asarray(np.asarray(ids, np.int64) >= self.first_new_id)

    def run_lengths(self, ids: Sequence[int] | Ids) -> Ids:
        """Return how many base ids each of the expanded ids stands for: 1 for a base id."""
        return self._lengths[self._slots(np.asarray(ids, np.int64))]

    def unmerge(self, ids: Sequence[int] | Ids) -> Ids:
        """Replace every new id by its run of base ids.

        Args:
            ids: Expanded ids.

        Returns:
            Base ids, at least as many.
        """
        ids = np.asarray(ids, np.int64)
        slots = self._slots(ids)
        lengths = self._lengths[slots]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        out = np.repeat(ids, lengths)
        new = np.repeat(slots > 0, lengths)
        # Offset of each output element inside its own run, then its place in the table of runs.
        inside = np.arange(total) - np.repeat(ends - lengths, lengths)
        out[new] = self._runs[(np.repeat(self._starts[slots], lengths) + inside)[new]]
        return out

    def last_positions(self, ids: Sequence[int] | Ids) -> Ids:
        """Return, for each expanded id, the index of the last base id of its run in `unmerge(ids)`."""
        return np.cumsum(self.run_lengths(ids)) - 1

    def _slots(self, ids: Ids) -> Ids:
        slots = np.maximum(ids - self.first_new_id + 1, 0)
        if len(slots) and int(slots.max()) > self.num_new:
            raise ValueError(f"id {int(ids.max())} is beyond the last new token {self.first_new_id + self.num_new - 1}")
        return slots
