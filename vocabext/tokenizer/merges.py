"""New tokens that BPE makes by itself: merges behind all others.

A merge at the end of the list ranks behind every merge of the base. BPE applies the lowest rank first, and what
a new merge makes takes part in new merges only. So on any text all base merges are done before the first new
one, and undoing the new ones gives the ids of the base: in every context, without looking at it. Nothing is
searched for, and no text is cut. A character that the base spells in bytes needs even less: an entry of its own.

The price is that a token of three pieces needs one of two among the tokens: a merge takes two. Tokens without
such *parts* must be searched for (`vocabext.tokenizer.boundaries`).
"""

from collections.abc import Callable, Container, Sequence
from itertools import pairwise

from vocabext.tokens import NewToken


class MergeChain:
    """Merges for new tokens, each of them between what the base and those before it make.

    Attributes:
        pairs: Key of a new token to the two entries that it is merged from, in the order of their ranks.
        characters: New tokens that are one character, which the base spells in bytes.
    """

    def __init__(
        self, vocabulary: Container[str], symbols: Callable[[Sequence[int]], list[str]],
        accepts: Callable[[NewToken], bool] = lambda _: True,
    ) -> None:
        """Begin with none.

        Args:
            vocabulary: The entries of the base.
            symbols: Turns ids into their entries; characters that the base spells in bytes stay characters.
            accepts: Tells which tokens should be merges at all.
        """
        self._vocabulary = vocabulary
        self._symbols = symbols
        self.accepts = accepts
        self._ranks: dict[tuple[str, str], int] = {}
        self.pairs: dict[str, tuple[str, str]] = {}
        self.characters: set[str] = set()

    def cut(self, token: NewToken) -> list[str]:
        """Return what the merges so far make of a token."""
        symbols = self._symbols(token.run)
        while known := [pair for pair in pairwise(symbols) if pair in self._ranks]:
            at = list(pairwise(symbols)).index(min(known, key=self._ranks.__getitem__))
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        return symbols

    def add(self, token: NewToken) -> bool:
        """Let BPE make a token; returns False, and does nothing, if it should be no merge, or its parts are missing."""
        if not self.accepts(token):
            return False
        if len(token.key) == 1:
            self.characters.add(token.key)
            return True
        symbols = self.cut(token)
        if len(symbols) != 2 or not all(self._is_entry(symbol) for symbol in symbols):
            return False
        self._ranks[symbols[0], symbols[1]] = len(self._ranks)
        self.pairs[token.key] = symbols[0], symbols[1]
        return True

    def add_all(self, tokens: Sequence[NewToken]) -> list[NewToken]:
        """Let BPE make as many tokens as it can, in their order; returns the others."""
        waiting = [token for token in sorted(tokens, key=lambda token: len(token.key) > 1) if not self.add(token)]
        while waiting:
            still = [token for token in waiting if not self.add(token)]
            if len(still) == len(waiting):
                break
            waiting = still
        return waiting

    def _is_entry(self, symbol: str) -> bool:
        return symbol in self._vocabulary or symbol in self.pairs or symbol in self.characters
