"""What the new tokens mean: arithmetic on token ids, without a tokenizer.

A new token is a name for a fixed run of base ids. `unmerge` replaces every new id by its run, so
that for every text `x` of a correctly extended tokenizer

    unmerge(encode_expanded(x)) == encode_base(x)

`merge` is the way back. Its caller says where: the same base ids are one new token in one text and several
pieces in another (`" ureter"` and the beginning of `" ureteral"`), because a tokenizer merges within its
chunks, and the text, not the ids, says where these end.

Distillation, verification and measurements rest on this. Each operation is one pass of numpy over the ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NewToken:
    """A new token: a name for a fixed run of base token ids.

    Attributes:
        token: The text it stands for, such as `" cardiomyopathy"`.
        key: Its spelling in the tokenizer's vocabulary, such as `"Ġcardiomyopathy"`.
        run: The base token ids it replaces, at least two.
        count: How often the expanded tokenizer uses it in the mining corpus.
        saved: How many tokens it saves there, beside the tokens chosen before it.
        sections: How many sections of that corpus (documents, or parts of long ones) have it.
    """

    token: str
    key: str
    run: tuple[int, ...]
    count: int = 0
    saved: int = 0
    sections: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        return {"token": self.token, "key": self.key, "run": list(self.run), "count": self.count, "saved": self.saved,
                "sections": self.sections}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "NewToken":
        """Read a record back; ignores fields that it does not know.

        Raises:
            ValueError: If a field is missing or of another kind; says which.
        """
        if not isinstance(row, dict):
            raise ValueError(f"{row!r:.60} is no JSON object")
        for name in ("token", "key", "run"):
            if name not in row:
                raise ValueError(f"{name!r} is missing")
            if name != "run" and not isinstance(row[name], str):
                raise ValueError(f"{name!r} is {row[name]!r:.60}, not text")
        if not _are_ids(row["run"]) or len(row["run"]) < 2:
            raise ValueError(f"'run' is {row['run']!r:.60}, not a list of at least two token ids")
        numbers = {name: int(row.get(name, 0)) for name in ("count", "saved", "sections")}
        return cls(row["token"], row["key"], tuple(row["run"]), **numbers)


@dataclass(frozen=True)
class TokenSnippets:
    """The snippets of one new token.

    Attributes:
        new_token: The token.
        snippets: Windows of *expanded* ids; `snippets[i]` has the token at `positions[i]`.
        positions: Index of the token inside each snippet.
        occurrences: How often the token occurs in the corpus that `collect` sampled.
        num_generated: How many of the snippets the model itself wrote.
        num_inside: How many show the token where the text has a longer new token that is merged from it.
    """

    new_token: NewToken
    snippets: tuple[tuple[int, ...], ...] = ()
    positions: tuple[int, ...] = ()
    occurrences: int = 0
    num_generated: int = 0
    num_inside: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        return {**self.new_token.to_json(), "occurrences": self.occurrences, "num_generated": self.num_generated,
                "num_inside": self.num_inside, "positions": list(self.positions),
                "snippets": [list(s) for s in self.snippets]}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "TokenSnippets":
        """Read a record back; a plain `NewToken` line reads as a token without snippets.

        Raises:
            ValueError: If a field is missing or of another kind; says which.
        """
        token, snippets, positions = NewToken.from_json(row), row.get("snippets", []), row.get("positions", [])
        if not isinstance(snippets, list) or not all(map(_are_ids, snippets)):
            raise ValueError("'snippets' is not a list of lists of token ids")
        if not _are_ids(positions) or len(positions) != len(snippets):
            raise ValueError(f"'positions' is not a list of {len(snippets)} places, one for each snippet")
        return cls(token, tuple(map(tuple, snippets)), tuple(positions), int(row.get("occurrences", 0)),
                   int(row.get("num_generated", 0)), int(row.get("num_inside", 0)))


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


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
        # Entry 0 is for ids that stay: its length is 1, and `unmerge` fills in the id itself.
        self._lengths = np.concatenate((np.ones(1, np.int64), lengths))
        self._starts = np.concatenate((np.zeros(2, np.int64), np.cumsum(lengths)))[: len(lengths) + 1]
        self._runs = np.fromiter((i for t in self.tokens for i in t.run), np.int64, int(lengths.sum()))

    @property
    def num_new(self) -> int:
        """How many new tokens there are."""
        return len(self.tokens)

    @property
    def end_id(self) -> int:
        """One more than the id of the last new token."""
        return self.first_new_id + len(self.tokens)

    def is_new(self, ids: Sequence[int] | Ids) -> npt.NDArray[np.bool_]:
        """Tell which of the expanded ids are new tokens."""
        return np.asarray(np.asarray(ids, np.int64) >= self.first_new_id)

    def counts(self, ids: Sequence[int] | Ids) -> Ids:
        """Return how often each new token is among the expanded ids, shape (N,)."""
        slots = self._slots(np.asarray(ids, np.int64))
        return np.bincount(slots, minlength=self.num_new + 1)[1:].astype(np.int64, copy=False)

    def run_lengths(self, ids: Sequence[int] | Ids, *, keep: Sequence[int] | Ids = ()) -> Ids:
        """Return how many ids each of the expanded ids becomes in `unmerge(ids, keep=keep)`; 1 for a base id."""
        return self._lengths[self._slots(np.asarray(ids, np.int64), keep)]

    def edges(self, ids: Sequence[int] | Ids, *, keep: Sequence[int] | Ids = ()) -> Ids:
        """Return where the runs begin and end: id `i` is `unmerge(ids, keep=keep)[edges[i]:edges[i + 1]]`.

        Args:
            ids: Expanded ids, shape (T,).
            keep: New ids that stay as they are.

        Returns:
            Rising places in the unmerged ids, shape (T + 1,): the first is 0, the last their number.
        """
        lengths = self.run_lengths(ids, keep=keep)
        edges = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=edges[1:])
        return edges

    def last_positions(self, ids: Sequence[int] | Ids) -> Ids:
        """Return, for each expanded id, the index of the last base id of its run in `unmerge(ids)`.

        At that index a model has read the same text as at the expanded id.
        """
        return self.edges(ids)[1:] - 1

    def unmerge(self, ids: Sequence[int] | Ids, *, keep: Sequence[int] | Ids = ()) -> Ids:
        """Replace every new id by its run of base ids.

        Args:
            ids: Expanded ids.
            keep: New ids that stay as they are.

        Returns:
            Base ids (and those of `keep`), at least as many as `ids`.

        Raises:
            ValueError: If an id is beyond the last new token.
        """
        ids = np.asarray(ids, np.int64)
        slots = self._slots(ids, keep)
        at = np.flatnonzero(slots)
        ends = np.cumsum(self._lengths[slots])
        out = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
        out[ends - 1] = ids  # right for ids that stay; the runs overwrite the others
        lengths = self._lengths[slots[at]]
        out[_ranges(ends[at] - lengths, lengths)] = self._runs[_ranges(self._starts[slots[at]], lengths)]
        return out

    def unmerge_batch(self, rows: Sequence[Sequence[int] | Ids], *, keep: Sequence[int] | Ids = ()) -> list[Ids]:
        """Unmerge many sequences at once: if they are short, several times as fast as one by one.

        Args:
            rows: Expanded ids of each sequence.
            keep: New ids that stay as they are.

        Raises:
            ValueError: If an id is beyond the last new token.
        """
        bounds = np.cumsum([0, *map(len, rows)])
        flat = _flat(rows, int(bounds[-1]))
        cuts = self.edges(flat, keep=keep)[bounds].tolist()
        out = self.unmerge(flat, keep=keep)
        return [out[start:stop] for start, stop in pairwise(cuts)]

    def merge(self, ids: Sequence[int] | Ids, positions: Sequence[int] | Ids, new_ids: Sequence[int] | Ids) -> Ids:
        """Replace the runs that begin at some positions by their new ids: the inverse of `unmerge`.

        It never searches for runs, since ids do not say where a new token occurs: only the expanded
        tokenizer knows, from the text. For every `x`, with `at = np.flatnonzero(is_new(x))`,

            merge(unmerge(x), edges(x)[at], x[at]) == x

        Args:
            ids: Base ids; new ids outside of the runs stay as they are.
            positions: Where runs begin in `ids`, rising.
            new_ids: The new id for each of these positions.

        Raises:
            ValueError: If the ids at a position are not the run of its new id, or if positions are
                not rising, or runs overlap or lie outside of `ids`.
        """
        ids, positions = np.asarray(ids, np.int64), np.asarray(positions, np.int64)
        new_ids = np.asarray(new_ids, np.int64)
        lengths = self._check_positions(len(ids), positions, new_ids)
        places = _ranges(positions, lengths)
        wrong = ids[places] != self.unmerge(new_ids)
        if wrong.any():
            at = int(np.searchsorted(np.cumsum(lengths), wrong.argmax(), side="right"))
            start, stop = int(positions[at]), int(positions[at] + lengths[at])
            raise ValueError(f"the ids at position {start} are {ids[start:stop].tolist()}, but the run of the new id "
                             f"{new_ids[at]} is {list(self.tokens[int(new_ids[at]) - self.first_new_id].run)}")
        stays = np.ones(len(ids), np.bool_)
        stays[places] = False
        stays[positions] = True
        out = ids.copy()
        out[positions] = new_ids
        return out[stays]

    def _check_positions(self, num_ids: int, positions: Ids, new_ids: Ids) -> Ids:
        """Return the length of the run at each position; raise an error if the runs do not fit side by side."""
        if len(positions) != len(new_ids):
            raise ValueError(f"there are {len(positions)} positions for {len(new_ids)} new ids; each needs its own")
        if len(new_ids) and int(new_ids.min()) < self.first_new_id:
            raise ValueError(f"id {int(new_ids.min())} is a base id, the first new one is {self.first_new_id}")
        lengths = self.run_lengths(new_ids)
        if not len(positions):
            return lengths
        ends = positions + lengths
        crossing = np.flatnonzero(positions[1:] < ends[:-1])
        if len(crossing):
            at = int(crossing[0])
            raise ValueError(f"position {positions[at + 1]} comes before the end {ends[at]} of the run at position "
                             f"{positions[at]}; positions must be rising, and runs must not overlap")
        if positions[0] < 0 or ends[-1] > num_ids:
            raise ValueError(f"the runs go from position {positions[0]} to {ends[-1]}, but there are {num_ids} ids")
        return lengths

    def _slots(self, ids: Ids, keep: Sequence[int] | Ids = ()) -> Ids:
        """Return the entry of the tables that replaces each id; 0 for ids that stay."""
        slots = np.maximum(ids - (self.first_new_id - 1), 0)
        if len(slots) and int(slots.max()) > self.num_new:
            raise ValueError(f"id {int(ids.max())} is beyond the last new token {self.end_id - 1}")
        if len(keep):
            kept = np.asarray(keep, np.int64)
            odd = kept[(kept < self.first_new_id) | (kept >= self.end_id)]
            if len(odd):
                raise ValueError(f"id {odd[0]} cannot be kept merged; the new tokens are {self.first_new_id} "
                                 f"to {self.end_id - 1}")
            entries = np.arange(self.num_new + 1)
            entries[kept - (self.first_new_id - 1)] = 0
            slots = entries[slots]
        return slots


def _ranges(starts: Ids, lengths: Ids) -> Ids:
    """Return `starts[0], starts[0] + 1, ...` for `lengths[0]` numbers, then the same for the next start."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def _flat(rows: Sequence[Sequence[int] | Ids], total: int) -> Ids:
    if any(isinstance(row, np.ndarray) for row in rows):
        return np.concatenate([np.asarray(row, np.int64) for row in rows])
    return np.fromiter(chain.from_iterable(rows), np.int64, total)  # half the time that it takes for lists
