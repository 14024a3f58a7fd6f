"""How the real expanded tokenizer spells a corpus, for a set of tokens that changes a little again and again."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vocabext.errors import TokenizerError
from vocabext.mine.counts import BATCH, Array, Encoded, Flags
from vocabext.progress import Progress
from vocabext.tokenizer import BaseTokenizer, extend
from vocabext.tokens import NewToken


class Usage:
    """Where the expanded tokenizer produces which token.

    A token is produced only where its run stands in the base ids. So when tokens go or come, a document is encoded
    again only if it used one that goes, or has the run of one that comes.

    Attributes:
        tokens: The tokens, in token-id order.
        num_tokens: The length of what counts of the corpus, in expanded tokens.
    """

    def __init__(self, texts: Sequence[str], encoded: Encoded, base: BaseTokenizer, progress: Progress) -> None:
        """Begin without tokens.

        Args:
            texts: The documents.
            encoded: The same under the base tokenizer.
            base: That tokenizer.
            progress: Where to report.
        """
        self._texts, self._encoded, self._base, self._progress = texts, encoded, base, progress
        self.tokens: list[NewToken] = []
        self._lengths = np.add.reduceat(encoded.counted, encoded.starts, dtype=np.int64)  # (D,)
        # One entry per occurrence: the index of its token, and the place of its first base id.
        self._token, self._at = np.empty(0, np.int64), np.empty(0, np.int64)

    @property
    def num_tokens(self) -> int:
        """The length of what counts of the corpus, in expanded tokens."""
        return int(self._lengths.sum())

    def update(self, tokens: Sequence[NewToken]) -> list[NewToken]:
        """Exchange the tokens.

        Args:
            tokens: The tokens that are wanted now.

        Returns:
            The same with `count`, how often each occurs, and `sections`, in how many sections.
        """
        number = {token.run: i for i, token in enumerate(tokens)}
        renumbered = np.asarray([number.get(token.run, -1) for token in self.tokens], np.int64)[self._token]
        known = {token.run for token in self.tokens}
        stale = self._holding([token.run for token in tokens if token.run not in known])
        stale[self._documents(self._at[renumbered < 0])] = True
        stays = ~stale[self._documents(self._at)]
        self._token, self._at, self.tokens = renumbered[stays], self._at[stays], list(tokens)
        self._encode(np.flatnonzero(stale & (np.add.reduceat(self._encoded.counted, self._encoded.starts) > 0)))
        return self._counted()

    def _counted(self) -> list[NewToken]:
        size = len(self.tokens)
        counts = np.bincount(self._token, minlength=size).tolist()
        sections = np.searchsorted(self._encoded.section_starts, self._at, side="right")
        pairs = np.unique(self._token + size * sections)
        in_sections = np.bincount(pairs % size, minlength=size).tolist() if size else []
        return [replace(token, count=count, sections=spread)
                for token, count, spread in zip(self.tokens, counts, in_sections, strict=True)]

    def _documents(self, at: Array) -> Array:
        return np.searchsorted(self._encoded.ends, at)

    def _holding(self, runs: Sequence[tuple[int, ...]]) -> Flags:
        """Tell which documents have one of some runs among their base ids, shape (D,)."""
        holding = np.full(len(self._texts), not self.tokens)
        if not self.tokens or not runs:
            return holding
        ids = self._encoded.ids
        firsts = np.zeros(self._base.first_new_id + 1, np.bool_)  # the last entry, index -1, is between documents
        firsts[[run[0] for run in runs]] = True
        places = np.flatnonzero(firsts[ids[:-1]])
        places = places[np.argsort(ids[places], kind="stable")]
        first_ids = ids[places]
        for run in runs:
            at = places[slice(*np.searchsorted(first_ids, (run[0], run[0] + 1)))]
            for offset, token_id in enumerate(run[1:], start=1):
                at = at[at < len(ids) - offset]
                at = at[ids[at + offset] == token_id]
            holding[self._documents(at)] = True
        return holding

    def _encode(self, documents: Array) -> None:
        """Encode some documents, of which no occurrence is known."""
        encoded, expanded = self._encoded, extend(self._base, self.tokens)
        tokens, places = [self._token], [self._at]
        with self._progress("checking on the real tokenizer", len(documents), "documents") as task:
            for batch in (documents[i : i + BATCH] for i in range(0, len(documents), BATCH)):
                rows = expanded.encode_batch([self._texts[i] for i in batch])
                sizes = np.asarray([len(row) for row in rows])
                ids = np.fromiter((i for row in rows for i in row), np.int64, int(sizes.sum()))
                # From places in these documents, one behind the other, to places in the corpus.
                starts, lengths = encoded.starts[batch], encoded.ends[batch] - encoded.starts[batch]
                edges = expanded.expansion.edges(ids)
                if edges[-1] != lengths.sum():
                    raise TokenizerError(f"the expanded tokenizer makes {edges[-1]:,} base ids of texts of which the "
                                         f"base makes {lengths.sum():,}; please report this tokenizer")
                at = edges[:-1] + np.repeat(starts - (np.cumsum(lengths) - lengths), sizes)
                counted = encoded.counted[at]
                self._lengths[batch] = np.bincount(np.repeat(np.arange(len(batch)), sizes), counted, len(batch))
                new = expanded.expansion.is_new(ids) & counted
                tokens.append(ids[new] - expanded.first_new_id)
                places.append(at[new])
                task.advance(len(rows))
        self._token, self._at = np.concatenate(tokens), np.concatenate(places)
