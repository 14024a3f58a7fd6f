"""Snippets as padded arrays: what the student reads, what the teacher reads, and which positions meet.

Shape suffixes: S snippets, P positions before the token, T positions from the token on, W texts, U teacher positions.

A snippet falls into the part before its token, which no row of the token can change (attention is
causal), and the part from the token on, where the student is compared. Position t of the latter lines
up with the last base id of its run in the teacher's text. Only so many positions behind the token are
laid out: the error lives near it (docs/decisions/distillation-rounds.md).

The student reads its own token merged and every other new token taken apart, so that each row is an
independent problem.

The same text may be a snippet of several tokens (`sharing.py`). The teacher reads it once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vocabext.errors import UsageError
from vocabext.tokens import Expansion, Ids, TokenSnippets

PAD = 0


@dataclass(frozen=True)
class Examples:
    """Snippets of several tokens.

    Attributes:
        before_SP: Ids before the token as the student reads them, padded on the left.
        before_S: How many these are.
        ids_ST: Ids from the token on, padded on the right.
        length_S: How many these are.
        teacher_WU: The texts as base ids, each once, from the beginning to the last position that is compared, padded
            on the right.
        text_S: Which of these texts each snippet is.
        aligned_ST: For each position from the token on, the teacher's position that it must match.
        token_S: Which token (index into the group) each snippet belongs to.
    """

    before_SP: torch.Tensor
    before_S: torch.Tensor
    ids_ST: torch.Tensor
    length_S: torch.Tensor
    teacher_WU: torch.Tensor
    text_S: torch.Tensor
    aligned_ST: torch.Tensor
    token_S: torch.Tensor

    def __len__(self) -> int:
        """How many snippets there are."""
        return len(self.token_S)

    @property
    def teacher_length_W(self) -> torch.Tensor:  # noqa: N802
        """How many base ids of each text the teacher reads."""
        return self._longest_W(self.aligned_ST.max(1).values + 1)

    @property
    def before_W(self) -> torch.Tensor:  # noqa: N802
        """How many positions stand before a token in each text, for the token that stands last."""
        return self._longest_W(self.before_S)

    def _longest_W(self, count_S: torch.Tensor) -> torch.Tensor:  # noqa: N802
        return count_S.new_zeros(len(self.teacher_WU)).scatter_reduce(0, self.text_S, count_S, "amax")

    def take(self, at: torch.Tensor) -> "Examples":
        """Return some of the snippets, with padding that none of them needs cut off."""
        width, depth = int(self.length_S[at].max()), int(self.aligned_ST[at].max()) + 1
        before = self.before_SP.shape[1] - int(self.before_S[at].max())
        texts, text_S = self.text_S[at].unique(return_inverse=True)
        return Examples(
            self.before_SP[at, before:], self.before_S[at], self.ids_ST[at, :width], self.length_S[at],
            self.teacher_WU[texts, :depth], text_S, self.aligned_ST[at, :width], self.token_S[at],
        )

    def to(self, device: torch.device) -> "Examples":
        """Move all arrays to a device."""
        return Examples(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class _Text:
    """One snippet as both sides read it."""

    before: Ids
    ids: Ids
    teacher: Ids
    aligned: Ids

    @property
    def read(self) -> int:
        """How many of the teacher's ids are needed."""
        return int(self.aligned[-1]) + 1


def check_snippets(records: Sequence[TokenSnippets], first_new_id: int, source: object) -> None:
    """Refuse snippets that do not hold their own token, or hold tokens that are not there.

    A file that was cut off at the end of a line reads well: its snippets then hold ids of tokens whose lines are gone.

    Args:
        records: The tokens with their snippets, in token-id order.
        first_new_id: Id of the first token.
        source: What messages call the records.

    Raises:
        UsageError: If a snippet is such a one.
    """
    last = first_new_id + len(records) - 1
    for own, record in enumerate(records, first_new_id):
        token = record.new_token.token
        for snippet, position in zip(record.snippets, record.positions, strict=True):
            if (highest := max(snippet, default=0)) > last:
                raise UsageError(
                    f"{source} is damaged: a snippet of {token!r} holds id {highest}, but its {len(records)} tokens "
                    f"have ids up to {last}; lines are missing, run vocabext collect again")
            if not 0 <= position < len(snippet) or snippet[position] != own:
                found = snippet[position] if 0 <= position < len(snippet) else "nothing"
                raise UsageError(
                    f"{source} is damaged: a snippet of {token!r} has {found} at place {position}, not the token's id "
                    f"{own}; lines are missing or moved, run vocabext collect again")


def build_examples(
    records: Sequence[TokenSnippets], expansion: Expansion, tokens: Sequence[int], *,
    prefix_ids: Sequence[int] = (), reach: int | None = None,
) -> Examples:
    """Lay out the snippets of a group of tokens.

    Args:
        records: The group.
        expansion: The whole expansion that the snippets were made with.
        tokens: Index of each of the group's tokens in the expansion.
        prefix_ids: Ids to put in front of every snippet (such as BOS), as in real use.
        reach: How many positions behind the token are compared; None for all.

    Returns:
        Snippets in which the tokens have the ids that they have in the expansion.
    """
    texts: list[_Text] = []
    owners: list[int] = []
    prefix = np.asarray(prefix_ids, np.int64)
    for index, (record, token) in enumerate(zip(records, tokens, strict=True)):
        own = expansion.first_new_id + token
        students = expansion.unmerge_batch(record.snippets, keep=[own])
        texts += [_lay_out(np.concatenate((prefix, student)), own, expansion, reach) for student in students]
        owners += [index] * len(students)
    counts = [[len(part) for part in column] for column in
              zip(*((text.before, text.ids) for text in texts), strict=True)] or [[], []]
    teacher, text_of = _each_once(texts)
    return Examples(
        _pad([text.before[::-1] for text in texts]).flip(1), torch.tensor(counts[0]), _pad([t.ids for t in texts]),
        torch.tensor(counts[1]), _pad(teacher), torch.tensor(text_of), _pad([t.aligned for t in texts]),
        torch.tensor(owners),
    )


def _each_once(texts: Sequence[_Text]) -> tuple[list[Ids], list[int]]:
    """Return what the teacher reads, each text once and as far as any of its snippets needs it; and who reads what."""
    number: dict[bytes, int] = {}
    longest: list[_Text] = []
    text_of = []
    for text in texts:
        at = number.setdefault(text.teacher.tobytes(), len(longest))
        if at == len(longest):
            longest.append(text)
        elif text.read > longest[at].read:
            longest[at] = text
        text_of.append(at)
    return [text.teacher[: text.read] for text in longest], text_of


def _lay_out(student: Ids, own: int, expansion: Expansion, reach: int | None) -> _Text:
    """Cut a text at the first occurrence of its token: nothing before it depends on the token's row."""
    start = int(np.flatnonzero(student == own)[0])
    stop = len(student) if reach is None else min(len(student), start + 1 + reach)
    teacher, aligned = expansion.unmerge(student), expansion.last_positions(student)[start:stop]
    return _Text(student[:start], student[start:stop], teacher, aligned)


def _pad(rows: Sequence[Ids]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row.copy()) for row in rows], batch_first=True,
                                           padding_value=PAD)
