"""What the two BPE schemes share: a look-up of whole chunks must not find entries that merges never make."""

from abc import abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from vocabext.errors import TokenizerError
from vocabext.tokenizer.scheme import Scheme


class BpeScheme(Scheme):
    """A BPE tokenizer. `ignore_merges`, which looks chunks up, finds the new tokens that are no merges."""

    @cached_property
    def unreachable(self) -> dict[str, int]:
        """The vocabulary entries that merges do not produce, and where to cut each.

        With `ignore_merges` the model would find such an entry where a chunk spells it: the text `<0x0A>` would become
        a line break. A cut at the given place keeps the ids of that text.

        Raises:
            TokenizerError: If one can be a chunk and cannot be cut.
        """
        if self.spec["model"].get("ignore_merges"):
            return {}  # the base looks them up too
        ids = {**self.vocabulary, **self.added}
        cuts = dict(self.cuts([token for token, i in ids.items() if token and self.merge(token) != [i]]))
        if (token := next((token for token, cut in cuts.items() if not cut), None)) is not None:
            raise TokenizerError(f"the vocabulary entry {token!r} cannot be reached by merges, and would be found "
                                 "in plain text after an extension; this tokenizer cannot be extended safely")
        return cuts

    @cached_property
    def taken_out(self) -> set[str]:
        """Added tokens that the library takes out of a text before it splits the text; not those of `single_word`."""
        return {a["content"] for a in self.spec["added_tokens"] if not a["single_word"]}

    @abstractmethod
    def cuts(self, entries: list[str]) -> Iterable[tuple[str, int]]:
        """Yield those of the entries that can be a whole chunk, each with the place to cut it; 0 for nowhere."""


def merges_of(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a BPE model in rank order."""
    return [(m[0], m[1]) for m in (m if isinstance(m, list) else m.split(" ") for m in spec["model"]["merges"])]
