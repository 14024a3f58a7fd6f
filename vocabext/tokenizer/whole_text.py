"""BPE that sees the whole text, with marks for spaces: Llama 2, Mistral, Gemma, tokens across spaces.

BPE may merge across any place, so a new string is cut out only where no merge could have crossed its
edges; `vocabext.boundaries` proves where that is and writes it as assertions around a prefix tree.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from vocabext.boundaries import SPACELESS, MergeTable, choice, holds_spaceless, prefix_tree, whole_text_guards
from vocabext.records import NewToken
from vocabext.tokenizer.bpe import BpeScheme, merges_of
from vocabext.tokenizer.scheme import SPACE_MARK, copy_of, is_byte_token, split_step, steps_of, with_new_entries

# A run of letters of a script with spaces, taken whole.
LETTERS = rf"[\p{{L}}&&[^{SPACELESS}]]++"


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
        """Accept what is left: the assertions around a string keep its neighbours away."""

    def unit_starts(self, encoding: Encoding) -> npt.NDArray[np.bool_]:
        """A unit begins wherever two tokens do not meet inside a word, or inside a character."""
        ids = np.asarray(encoding.ids, np.int64)
        starts = np.ones(len(ids), np.bool_)
        joins_left, joins_right, inside = self._edges
        starts[1:] = ~(joins_right[ids[:-1]] & joins_left[ids[1:]]) & ~inside[ids[1:]]
        return starts

    @cached_property
    def _edges(self) -> npt.NDArray[np.bool_]:
        """For each id, (3, V): begins with a letter or number; ends with one; begins inside a character."""
        edges = np.zeros((3, self.num_used_ids), np.bool_)
        for token, i in self.vocabulary.items():
            if self.byte_fallback and is_byte_token(token):
                edges[2, i] = 0x80 <= int(token[3:5], 16) < 0xC0
            else:
                edges[:2, i] = [c.isalnum() and not holds_spaceless(c) for c in (token[:1], token[-1:])]
        edges[:2, self.barrier_ids] = False
        return edges

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
        spec = copy_of(self.spec)
        unreachable = self.unreachable  # also where there are no tokens: looking at it raises an error if need be
        if not tokens:
            return spec
        with_new_entries(spec, self.added, tokens, self.num_used_ids)
        table = MergeTable(merges_of(self.spec), self.vocabulary)
        ends, starts = whole_text_guards([t.key for t in tokens], table, drops_unknown=self.drops_unknown)
        steps = [*steps_of(self.spec["pre_tokenizer"]), split_step(chunk_expression(ends, starts, table))]
        steps += [split_step(_protection(unreachable))] if unreachable else []
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        return spec


def chunk_expression(ends: Mapping[str, str], starts: Mapping[str, str], table: MergeTable) -> str:
    """Return an expression whose matches cover a text: the new strings, and all that is between two of them.

    Trying thousands of strings at every character would make the tokenizer several times slower. So the text
    between is swallowed in steps: inside a run of letters no new string begins, those that begin with a space
    are tried only where one is, and the others only behind the first letters of a word.

    Args:
        ends: New strings, as the model spells them, to the assertion that must hold at their end.
        starts: Their first characters to the assertion in front.
        table: The base merges.
    """
    trees = _trees(ends, starts)
    spaced = trees.pop(SPACE_MARK, "")
    other = choice(trees)
    new = "|".join(filter(None, [spaced, other]))
    unit = rf"(?:{LETTERS}|[^{SPACE_MARK}])"
    inside = f"(?=[^{SPACE_MARK}])(?!{other})" if other else ""
    rest = f"(?:{inside}{unit})*+"
    # Hardly any string without a space stands behind one: a merge would take that space.
    behind = [key for key in ends if key[0] != SPACE_MARK
              and not any(left.endswith(SPACE_MARK) for left in table.hazards(key).left)]  # fmt: skip
    first = choice(_trees({key: ends[key] for key in behind}, starts))
    word = f"{SPACE_MARK}++{f'(?!{first})' if first else ''}{unit}{rest}|{unit}{rest}|{SPACE_MARK}++"
    return f"{new}|(?:{word})(?:(?!{new})(?:{word}))*+"


def _trees(ends: Mapping[str, str], starts: Mapping[str, str]) -> dict[str, str]:
    """Return an expression per first character for the strings that begin with it."""
    groups: dict[str, dict[str, str]] = {}
    for key in sorted(ends):
        groups.setdefault(key[0], {})[key] = ends[key]
    return {first: starts[first] + prefix_tree(group) for first, group in groups.items()}


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
