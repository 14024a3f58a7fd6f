"""BPE that sees the whole text, with marks for spaces: Llama 2, Mistral, Gemma, tokens across spaces.

Where the tokenizer cuts text in front of its marks, BPE sees a whole word.

New tokens are merges behind those of the base (`merges.py`). A splitting step searches for a token whose parts are no
tokens. BPE may merge across any place, so the step cuts the token's string out only where no merge could have crossed
its edges: `vocabext.tokenizer.boundaries` proves where, and writes that as assertions around a prefix tree.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from vocabext.errors import TokenizerError
from vocabext.tokenizer.boundaries import MergeTable, in_word, prefix_tree, whole_text_expression
from vocabext.tokenizer.bpe import BpeScheme, merges_of
from vocabext.tokenizer.merges import MergeChain
from vocabext.tokenizer.scheme import SPACE_MARK, copy_of, in_sequence, split_step, steps_of, with_new_entries
from vocabext.tokens import NewToken


class WholeTextScheme(BpeScheme):
    """A BPE tokenizer with a space mark that does not split text, or splits it only in front of the marks."""

    name = "whole text"
    only_merges = True
    description = "BPE on the whole text with a space mark: words and phrases can be added"

    def __init__(self, backend: Tokenizer, spec: dict[str, Any]) -> None:
        """Look at where the tokenizer cuts text, and what it does with unknown characters."""
        super().__init__(backend, spec)
        self.at_spaces = any(map(at_marks, steps_of(spec["pre_tokenizer"])))
        if self.at_spaces:
            self.description = "BPE on words with a space mark: words can be added, phrases not"
        self.byte_fallback = bool(spec["model"].get("byte_fallback"))
        self.prepends = backend.normalizer is not None and self._normal("x")[0] == SPACE_MARK

    def normalize(self, text: str) -> str:
        """Return what the normalizer makes of a text, with spaces for the marks."""
        if self.backend.normalizer is None:
            return text
        return self._normal(text)[self.prepends :].replace(SPACE_MARK, " ")

    def chunks(self, text: str) -> list[str]:
        """Return the text with marks for spaces: one chunk."""
        return [text.replace(" ", SPACE_MARK)]

    def key_text(self, key: str) -> str:
        """Return the text that an entry stands for."""
        return key.replace(SPACE_MARK, " ")

    def check(self, text: str, chunks: list[str], run: tuple[int, ...]) -> None:
        """Refuse phrases where the tokenizer cuts text at spaces, and bytes in a run where some bytes have no entry.

        In the second case the library puts an unknown character behind the bytes that follow it. All else is safe: a
        merge, or the assertions around a string, keep other text as it is.
        """
        if self.at_spaces and " " in text[1:]:
            raise TokenizerError(f"{text!r} is a phrase, and this tokenizer cuts text at every space")
        if not self._falls_back and any(map(self._is_byte, run)):
            raise TokenizerError(f"{text!r} has characters that are spelled in bytes, and this tokenizer lacks some of "
                                 "these")

    def unit_starts(self, encoding: Encoding) -> npt.NDArray[np.bool_]:
        """A unit begins wherever two tokens do not meet inside a word, or inside a character."""
        ids = np.asarray(encoding.ids, np.int64)
        starts = np.ones(len(ids), np.bool_)
        joins_left, joins_right, inside = self._edges
        starts[1:] = ~(joins_right[ids[:-1]] & joins_left[ids[1:]]) & ~inside[ids[1:]]
        return starts

    @cached_property
    def _edges(self) -> npt.NDArray[np.bool_]:
        """Tell for each id: begins with a letter or number; ends with one; begins inside a character, shape (3, U)."""
        edges = np.zeros((3, self.first_new_id), np.bool_)
        for token, i in self.vocabulary.items():
            if (byte := self.byte_of(token)) is not None:
                edges[2, i] = 0x80 <= byte < 0xC0
            else:
                edges[:2, i] = [bool(c) and in_word(c) for c in (token[:1], token[-1:])]
        edges[:2, self.barrier_ids] = False
        return edges

    @property
    def drops_unknown(self) -> bool:
        """Whether characters outside the vocabulary vanish instead of becoming a token."""
        return not self._falls_back and self.spec["model"].get("unk_token") is None

    @cached_property
    def _falls_back(self) -> bool:
        """Whether the model spells each unknown character in bytes."""
        return self.byte_fallback and self.has_all_bytes

    def cuts(self, entries: list[str]) -> Iterable[tuple[str, int]]:
        """Yield every entry, since each can be a chunk, with a cut between two pieces that leaves no such entry."""
        for token in entries:
            ids = self.merge(token)
            yield token, next((cut for cut in range(1, len(token))
                               if token[:cut] not in entries and token[cut:] not in entries
                               and [*self.merge(token[:cut]), *self.merge(token[cut:])] == ids), 0)

    def chain(self) -> MergeChain:
        """Return an empty chain of merges."""
        return MergeChain(self.vocabulary, self._symbols)

    @cached_property
    def mergeable_ids(self) -> npt.NDArray[np.bool_]:
        """Every id but the barriers and the bytes of characters that take several."""
        mergeable = ~self.spelling_ids
        mergeable[self.barrier_ids] = False
        return mergeable

    @cached_property
    def spelling_ids(self) -> npt.NDArray[np.bool_]:
        """The bytes of characters that take several."""
        return np.asarray([(self.byte_of(entry) or 0) >= 0x80 for entry in self.entries(range(self.first_new_id))])

    def is_never_merged(self, character: str) -> bool:
        """Tell whether one byte spells a character, as `<0x0A>` does a line break: merges join entries, not texts."""
        return character.isascii() and character.replace(" ", SPACE_MARK) not in self.vocabulary

    def _is_byte(self, token_id: int) -> bool:
        return self.byte_of(self.backend.id_to_token(token_id) or "") is not None

    def _symbols(self, ids: Sequence[int]) -> list[str]:
        """Return the entries of ids, with characters in place of the bytes that spell them."""
        symbols: list[str] = []
        for in_bytes, group in groupby(ids, self._is_byte):
            some = list(group)
            symbols += self.spelling(some).decode(errors="replace") if in_bytes else self.entries(some)
        return symbols

    def extended(self, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Return the specification of the tokenizer with the new tokens."""
        spec = copy_of(self.spec)
        if not tokens:
            return spec
        self._check_added()
        with_new_entries(spec, self.added, tokens, self.first_new_id)
        chain = self.chain()
        without_parts = chain.add_all(tokens)
        spec["model"]["merges"] = [*spec["model"]["merges"], *map(list, chain.pairs.values())]
        if without_parts:
            self._search_for([token.key for token in without_parts], spec)
        return spec

    def _check_added(self) -> None:
        """Refuse an added token of one character that plain text may hold.

        The extension makes each added token an entry, or the library would renumber it. BPE finds an entry of one
        character in plain text without any merge.
        """
        for added in self.spec["added_tokens"]:
            taken_out = not added["single_word"] and (added["normalized"] or self.backend.normalizer is None)
            if len(added["content"]) == 1 and added["content"] not in self.vocabulary and not taken_out:
                raise TokenizerError(f"the added token {added['content']!r} is one character, and would be found in "
                                     "plain text after an extension; this tokenizer cannot be extended safely")

    def _search_for(self, keys: Sequence[str], spec: dict[str, Any]) -> None:
        """Change a specification such that it cuts keys out of the text and looks whole chunks up."""
        table = MergeTable(merges_of(self.spec), self.vocabulary)
        steps = list(steps_of(self.spec["pre_tokenizer"]))
        spec["pre_tokenizer"] = in_sequence([*steps, *map(split_step, self._expressions(keys, table))])
        spec["model"]["ignore_merges"] = True

    def _expressions(self, keys: Sequence[str], table: MergeTable) -> Iterator[str]:
        """Yield one expression per splitting step: as few as possible, since each step looks at all chunks again."""
        if not self._marks_start:
            yield whole_text_expression(keys, table, drops_unknown=self.drops_unknown, at_start=True)
        inside, alone = {}, {}
        for entry, cut in self.unreachable.items():
            if safe := safe_cut(entry, self.unreachable, table):
                inside[entry] = safe
            else:
                alone[entry] = cut
        first = rf"\G{_heads(inside, '')}|" if inside else ""
        yield first + whole_text_expression(keys, table, drops_unknown=self.drops_unknown)
        if alone:
            yield r"\A" + _heads(alone, r"\z")

    @property
    def _marks_start(self) -> bool:
        """Whether every text begins with a mark."""
        text = "x" if self.backend.normalizer is None else self._normal("x")
        if self.backend.pre_tokenizer is not None:
            text = self.backend.pre_tokenizer.pre_tokenize_str(text)[0][0]
        return text.startswith(SPACE_MARK)


def safe_cut(entry: str, entries: Container[str], table: MergeTable) -> int:
    """Return where a cut in a chunk that begins with an entry is exact, whatever follows; 0 for nowhere."""
    return next((cut for cut in range(1, len(entry)) if entry[:cut] not in entries
                 and not any(text[0] == entry[cut] for text in table.hazards(entry[:cut]).right)), 0)


def never_cuts(step: dict[str, Any]) -> bool:
    """Tell whether a step leaves text whole once its spaces are marks."""
    if step["type"] == "Metaspace":
        return not step.get("split", True)
    return step["type"] == "Split" and step["pattern"] == {"String": " "}


def at_marks(step: dict[str, Any]) -> bool:
    """Tell whether a step cuts text in front of each mark, and nowhere else."""
    return step["type"] == "Metaspace" and step["replacement"] == SPACE_MARK and bool(step.get("split", True))


def _heads(cuts: Mapping[str, int], end: str) -> str:
    """Return an expression for the part of each entry in front of its cut, where the rest and then `end` follow."""
    rests: dict[str, list[str]] = {}
    for entry, cut in cuts.items():
        rests.setdefault(entry[:cut], []).append(entry[cut:])
    return prefix_tree({head: f"(?={prefix_tree(dict.fromkeys(group, end))})" for head, group in rests.items()})
