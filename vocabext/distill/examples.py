"""Snippets as padded arrays: what the student reads, what the teacher reads, and which positions meet.

Shape suffixes: S snippets, T student positions, U teacher positions.

The student reads a snippet with its own token merged and every other new token taken apart, so that
each row is an independent problem. Position j of the student lines up with the last base id of its
run in the teacher's text. Positions before the token are equal by causality and carry no information.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vocabext.expansion import Expansion, Ids
from vocabext.records import TokenSnippets

PAD = 0


@dataclass(frozen=True)
class Examples:
    """Snippets of several tokens.

    Attributes:
        student_ST: Ids with the token merged, padded on the right.
        teacher_SU: The same text as base ids, padded on the right.
        aligned_ST: For each student position, the teacher's position that it must match.
        weight_ST: 1 at positions from the token on, divided by their number in the snippet; else 0.
        token_S: Which token (index into the group) each snippet belongs to.
    """

    student_ST: torch.Tensor
    teacher_SU: torch.Tensor
    aligned_ST: torch.Tensor
    weight_ST: torch.Tensor
    token_S: torch.Tensor

    def take(self, at: torch.Tensor) -> "Examples":
        """Return some of the snippets, with padding that none of them needs cut off."""
        width = int((self.weight_ST[at] > 0).any(0).nonzero().max()) + 1
        depth = int(self.aligned_ST[at].max()) + 1
        return Examples(
            self.student_ST[at, :width], self.teacher_SU[at, :depth], self.aligned_ST[at, :width],
            self.weight_ST[at, :width], self.token_S[at],
        )  # fmt: skip

    def to(self, device: torch.device) -> "Examples":
        """Move all arrays to a device."""
        return Examples(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def build_examples(
    records: Sequence[TokenSnippets], expansion: Expansion, tokens: Sequence[int], *, prefix_ids: Sequence[int] = ()
) -> Examples:
    """Lay out the snippets of a group of tokens.

    Args:
        records: The group.
        expansion: The whole expansion that the snippets were made with.
        tokens: Index of each of the group's tokens in the expansion.
        prefix_ids: Ids to put in front of every snippet (such as BOS), as in real use.

    Returns:
        Snippets in which the group's token g has the id `expansion.first_new_id + g`.
    """
    students, teachers, aligned, starts, owners = [], [], [], [], []
    prefix = np.asarray(prefix_ids, np.int64)
    for index, (record, token) in enumerate(zip(records, tokens, strict=True)):
        own = expansion.first_new_id + token
        for snippet, position, student in zip(
            record.snippets, record.positions, expansion.unmerge_batch(record.snippets, keep=[own]), strict=True
        ):
            framed = np.concatenate((prefix, student))
            teachers.append(expansion.unmerge(framed))
            aligned.append(expansion.last_positions(framed))
            students.append(np.where(framed == own, expansion.first_new_id + index, framed))
            starts.append(len(prefix) + int(expansion.edges(snippet[:position], keep=[own])[-1]))
            owners.append(index)
    lengths = np.asarray([len(s) for s in students])
    place = np.arange(lengths.max(initial=1))
    counted = (place >= np.asarray(starts)[:, None]) & (place < lengths[:, None])
    weight = counted / np.maximum(counted.sum(1, keepdims=True), 1)
    return Examples(_pad(students), _pad(teachers), _pad(aligned), torch.from_numpy(weight).float(),
                    torch.tensor(owners))  # fmt: skip


def _pad(rows: Sequence[Ids]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(r) for r in rows], batch_first=True, padding_value=PAD)
