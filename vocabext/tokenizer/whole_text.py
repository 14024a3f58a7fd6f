"""BPE that sees the whole text, with marks for spaces: Llama 2, Mistral, Gemma, tokens across spaces.

BPE may merge across any place, so a new string is cut out only where no merge could have crossed its
edges; `vocabext.boundaries` proves where that is and writes it as assertions around a prefix tree.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from vocabext.boundaries import MergeTable, prefix_tree, whole_text_guards
from vocabext.errors import TokenizerError
from vocabext.records import NewToken
from vocabext.tokenizer.bpe import BpeScheme, merges_of
from vocabext.tokenizer.scheme import SPACE_MARK, is_byte_token, split_step, steps_of, with_new_entries


class WholeTextScheme(BpeScheme):
    """A BPE tokenizer with a space mark whose text is not split."""

    name = "whole text"
    description = "BPE on the whole text with a space mark: words and phrases can be added"

    def __init__(self, backend: Tokenizer, spec: dict[str, Any]) -> None:
        """Look at the model's way with unknown characters."""
        super().__init__(backend, spec)
        self.byte_fallback = bool(spec["model"].get("byte_fallback"))
        self.prepends = backend.normalizer is not None and backend.normalizer.normalize_str("x")[0] == SPACE_MARK

    def normalize(self, text: str) -> str:
        """Return what the normalizer makes of a text, with spaces for the marks."""
        if self.backend.normalizer is None:
            return text
        normal = str(self.backend.normalizer.normalize_str(text))
        return normal[self.prepends :].replace(SPACE_MARK, " ")

    def pieces(self, text: str) -> list[str]:
        """Return the text with marks for spaces: one chunk."""
        return [text.replace(" ", SPACE_MARK)]

    def spelling(self, ids: Sequence[int]) -> bytes:
        """Return the entries of the ids, one after the other; entries that stand for a byte are that byte."""
        tokens = (self.backend.id_to_token(i) or "" for i in ids)
        return b"".join(bytes([int(t[3:5], 16)]) if self.byte_fallback and is_byte_token(t) else t.encode()
                        for t in tokens)

    def key_text(self, key: str) -> str:
        """Return the text that an entry stands for."""
        return key.replace(SPACE_MARK, " ")

    def check(self, text: str, pieces: list[str], run: tuple[int, ...]) -> None:
        """Refuse what a token cannot consist of."""
        if not text.strip():
            raise TokenizerError(f"{text!r} is only spaces")

    def unit_starts(self, encoding: Encoding) -> npt.NDArray[np.bool_]:
        """A unit begins wherever two tokens do not meet inside a word."""
        ids = np.asarray(encoding.ids, np.int64)
        starts = np.ones(len(ids), np.bool_)
        joins_left, joins_right = self._word_edges
        starts[1:] = ~(joins_right[ids[:-1]] & joins_left[ids[1:]])
        return starts

    @cached_property
    def _word_edges(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """For each id: does it begin, and does it end, with a letter, mark or number?"""
        left, right = np.zeros(self.num_used_ids, np.bool_), np.zeros(self.num_used_ids, np.bool_)
        for token, i in self.vocabulary.items():
            left[i], right[i] = token[:1].isalnum(), token[-1:].isalnum()
        left[self.barrier_ids] = right[self.barrier_ids] = False
        return left, right

    @property
    def unknown_ids(self) -> list[int]:
        """The unknown token, and the bytes of characters outside the vocabulary."""
        fallback = [i for token, i in self.vocabulary.items() if is_byte_token(token)] if self.byte_fallback else []
        return [*super().unknown_ids, *fallback]

    @property
    def drops_unknown(self) -> bool:
        """Whether characters outside the vocabulary vanish instead of becoming a token."""
        falls_back = self.byte_fallback and all(f"<0x{b:02X}>" in self.vocabulary for b in range(256))
        return not falls_back and self.spec["model"].get("unk_token") is None

    def cuts(self, entries: list[str]) -> Iterable[tuple[str, int]]:
        """Any entry can be a chunk: cut between two of its pieces, such that neither side is such an entry."""
        for token in entries:
            ids = self.merge(token)
            yield token, next((cut for cut in range(1, len(token))
                               if token[:cut] not in entries and token[cut:] not in entries
                               and [*self.merge(token[:cut]), *self.merge(token[cut:])] == ids), 0)

    def extended(self, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Return the specification of the tokenizer with the new tokens."""
        spec = copy.deepcopy(self.spec)
        with_new_entries(spec, self.added, tokens, self.num_used_ids)
        steps = list(steps_of(self.spec["pre_tokenizer"]))
        steps += [split_step(self._expression(tokens))] if tokens else []
        steps += [split_step(_protection(self.unreachable))] if self.unreachable else []
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        return spec

    def _expression(self, tokens: Sequence[NewToken]) -> str:
        table = MergeTable(merges_of(self.spec), self.vocabulary)
        ends, starts = whole_text_guards([t.key for t in tokens], table, drops_unknown=self.drops_unknown)
        trees = []
        for first, guard in starts.items():
            trees.append(guard + prefix_tree({key: end for key, end in ends.items() if key[0] == first}))
        return "|".join(trees)


def never_cuts(step: dict[str, Any]) -> bool:
    """Tell whether a step leaves text whole once its spaces are marks."""
    if step["type"] == "Metaspace":
        return not step.get("split", True)
    return step["type"] == "Split" and step["pattern"] == {"String": " "}


def _protection(cuts: Mapping[str, int]) -> str:
    """Return an expression that cuts a chunk in two if, and only if, it spells an unreachable entry."""
    guards: dict[str, set[str]] = {}
    for token, cut in cuts.items():
        guards.setdefault(token[:cut], set()).add(token[cut:])
    heads = {first: rf"(?={prefix_tree(dict.fromkeys(rests, ''))}\z)" for first, rests in guards.items()}
    return r"\A" + prefix_tree(heads)
