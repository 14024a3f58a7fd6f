"""Text kept back from mining, in base ids and in the ids of any set of new tokens.

Windows are spans of base ids, so they are the same for every set, and what the base makes of them is computed once. A
new token that crosses the edge of a window is written as its pieces there.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vocabext.corpus import Document
from vocabext.errors import CorpusError
from vocabext.tokenizer import BaseTokenizer, extend
from vocabext.tokens import Expansion, Ids, NewToken


@dataclass(frozen=True)
class Span:
    """A window: base ids `start` to `stop` of a document."""

    document: int
    start: int
    stop: int
    num_bytes: int


class KeptText:
    """Documents that were not mined, and the windows of them that a model reads.

    Attributes:
        spans: All windows, in random order: a corpus is often sorted.
        sample: The first of them, which the model reads.
        num_bytes: How many bytes of UTF-8 the sample has.
        base_tokens: How many base ids all documents have.
    """

    def __init__(self, documents: Iterable[Document], base: BaseTokenizer, *, context: int, max_bytes: int) -> None:
        """Encode the documents and cut windows.

        Args:
            documents: The text; all of it is counted.
            base: The base's tokenizer.
            context: Longest window in base ids, prefix not included.
            max_bytes: How much of the text the model reads, in bytes.

        Raises:
            CorpusError: If there is no text.
        """
        self._base = base
        self._texts = [document.text for document in documents]
        self._rows = [np.asarray(ids, np.int64) for ids in base.encode_batch(self._texts)]
        self.base_tokens = sum(map(len, self._rows))
        self.spans = self._cut(context)
        if not self.spans:
            raise CorpusError("no document that was kept from mining is longer than a token; give more text")
        sizes = np.cumsum([span.num_bytes for span in self.spans])
        self.sample = self.spans[: int(np.searchsorted(sizes, max_bytes)) + 1]
        self.num_bytes = int(sizes[len(self.sample) - 1])

    def _cut(self, context: int) -> list[Span]:
        spans = []
        for number, (text, ids) in enumerate(zip(self._texts, self._rows, strict=True)):
            per_id = len(text.encode()) / max(1, len(ids))
            for start in range(0, len(ids), context):
                stop = min(start + context, len(ids))
                spans += [Span(number, start, stop, round(per_id * (stop - start)))] if stop - start > 1 else []
        return [spans[at] for at in np.random.default_rng(0).permutation(len(spans)).tolist()]

    def base_ids(self, span: Span) -> Ids:
        """Return the base ids of a window, the tokenizer's prefix in front."""
        return np.concatenate((self._prefix, self._rows[span.document][span.start : span.stop]))

    @property
    def num_prefix(self) -> int:
        """How many ids stand in front of each window."""
        return len(self._base.prefix_ids)

    @property
    def _prefix(self) -> Ids:
        return np.asarray(self._base.prefix_ids, np.int64)

    def encode(self, tokens: Sequence[NewToken]) -> tuple[Expansion, list[Ids]]:
        """Return what some new tokens make of every document."""
        if not tokens:
            return Expansion((), self._base.first_new_id), self._rows
        expanded = extend(self._base, tokens)
        return expanded.expansion, [np.asarray(ids, np.int64) for ids in expanded.encode_batch(self._texts)]

    def stems(self, expansion: Expansion, rows: Sequence[Ids], spans: Sequence[Span]) -> Iterator[tuple[Span, Ids]]:
        """Return windows in expanded ids, the tokenizer's prefix in front.

        Args:
            expansion: The new tokens.
            rows: What `encode` returned for them.
            spans: The windows.
        """
        edges: dict[int, Ids] = {}
        for span in spans:
            ids = rows[span.document]
            at = edges.setdefault(span.document, expansion.edges(ids))
            low = int(np.searchsorted(at, span.start))
            high = max(low, int(np.searchsorted(at, span.stop, side="right")) - 1)
            base = self._rows[span.document]
            # Where one token covers the whole window, `at[low]` is beyond its end.
            before, after = min(int(at[low]), span.stop), max(int(at[high]), span.start)
            yield span, np.concatenate((self._prefix, base[span.start : before], ids[low:high],
                                        base[max(before, after) : span.stop]))
