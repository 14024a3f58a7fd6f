"""What the two BPE schemes share: where whole chunks are looked up, that must not find what merges never make."""

from abc import abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from vocabext.errors import TokenizerError
from vocabext.tokenizer.scheme import Scheme


class BpeScheme(Scheme):
    """A BPE tokenizer. Where a new token is no merge, `ignore_merges` finds it."""

    @cached_property
    def unreachable(self) -> dict[str, int]:
        """Where to cut the vocabulary entries that merges do not produce.

        With `ignore_merges` such an entry would suddenly be found when a chunk spells it: the text
        `<0x0A>` would become a line break. Cutting it at the given place leaves its ids as they are.

        Raises:
            TokenizerError: If there is one that can be a chunk and cannot be cut.
        """
        if self.spec["model"].get("ignore_merges"):
            return {}  # the base looks them up too
        ids = {**self.vocabulary, **self.added}
        entries = [token for token, i in ids.items() if token and self.merge(token) != [i]]
        cuts = dict(self.cuts(entries))
        if 0 in cuts.values():
            token = next(token for token, cut in cuts.items() if not cut)
            raise TokenizerError(f"the vocabulary entry {token!r} cannot be reached by merges, and would be found "
                                 "in plain text after an extension; this tokenizer cannot be extended safely")
        return cuts

    @cached_property
    def taken_out(self) -> set[str]:
        """Added tokens that are taken out of a text before it is split; others may want to stand alone."""
        return {a["content"] for a in self.spec["added_tokens"] if not a["single_word"]}

    @abstractmethod
    def cuts(self, entries: list[str]) -> Iterable[tuple[str, int]]:
        """Yield the entries that can be a whole chunk, and where to cut them; 0 for nowhere."""


def merges_of(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a BPE model in rank order."""
    return [(m[0], m[1]) for m in (m if isinstance(m, list) else m.split(" ") for m in spec["model"]["merges"])]
