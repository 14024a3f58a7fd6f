"""Text as windows of expanded ids that are all full, and what the base reads in them.

Shape suffixes: B windows, T expanded ids of a window, L base ids of the longest, Q positions of the base in all
windows, P places.
"""

import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vocabext.corpus import Document
from vocabext.heal.targets import NO_PIECE
from vocabext.tokenizer import ExpandedTokenizer
from vocabext.tokens import Expansion, Ids

DOCUMENTS_AT_ONCE = 256


def sample_documents(documents: Iterable[Document], num_bytes: int, seed: int) -> list[str]:
    """Draw documents at random, in one pass, until they have so many bytes; in random order.

    Args:
        documents: Text of any size.
        num_bytes: How much to keep; less if there is less.
        seed: Of the draw.
    """
    rng, kept, size = random.Random(seed), list[tuple[float, int, str]](), 0
    for number, document in enumerate(documents):
        heapq.heappush(kept, (-rng.random(), number, document.text))
        size += len(document.text.encode())
        while len(kept) > 1 and size - len(kept[0][2].encode()) >= num_bytes:
            size -= len(heapq.heappop(kept)[2].encode())
    return [text for _, _, text in sorted(kept, reverse=True)]


def windows_of(
    texts: Iterable[str], tokenizer: ExpandedTokenizer, prefix: Sequence[int], size: int, count: int
) -> list[Ids]:
    """Cut texts, one behind the other, into windows.

    Args:
        texts: Documents.
        tokenizer: The expanded one.
        prefix: Ids in front of every document and every window.
        size: Expanded ids of a window, its prefix included.
        count: How many windows at most.
    """
    step, windows, rest = size - len(prefix), list[Ids](), np.empty(0, np.int64)
    for ids in _encoded(texts, tokenizer):
        rest = np.concatenate((rest, np.asarray(ids, np.int64), np.asarray(prefix, np.int64)))
        while len(rest) >= step and len(windows) < count:
            windows.append(np.concatenate((np.asarray(prefix, np.int64), rest[:step])))
            rest = rest[step:]
        if len(windows) == count:
            break
    return windows


def _encoded(texts: Iterable[str], tokenizer: ExpandedTokenizer) -> Iterator[list[int]]:
    some: list[str] = []
    for text in texts:
        some.append(text)
        if len(some) == DOCUMENTS_AT_ONCE:
            yield from tokenizer.encode_batch(some)
            some = []
    yield from tokenizer.encode_batch(some)


@dataclass(frozen=True)
class Batch:
    """Windows as healed model and base read them.

    Attributes:
        ids_BT: Expanded ids.
        base_BL: Base ids, padded on the right by one at least.
        real_BL: Where they are base ids, or the one position behind them.
        pieces_Q: The base ids of all windows, `NO_PIECE` behind each.
        position_P: Which of these is the last that each expanded id stands for.
    """

    ids_BT: torch.Tensor
    base_BL: torch.Tensor
    real_BL: torch.Tensor
    pieces_Q: torch.Tensor
    position_P: torch.Tensor

    @classmethod
    def of(cls, windows: Sequence[Ids], expansion: Expansion) -> "Batch":
        """Put windows of one size together."""
        base = [torch.from_numpy(np.append(ids, NO_PIECE)) for ids in expansion.unmerge_batch(windows)]
        starts = np.cumsum([0, *(len(ids) for ids in base[:-1])])
        lengths = torch.tensor([len(ids) for ids in base])
        padded = torch.nn.utils.rnn.pad_sequence(base, batch_first=True)
        return cls(
            torch.from_numpy(np.stack(windows)), padded.clamp(min=0),
            torch.arange(padded.shape[1]) < lengths[:, None], torch.cat(base),
            torch.from_numpy(np.concatenate([start + expansion.last_positions(window)
                                             for start, window in zip(starts, windows, strict=True)])))
