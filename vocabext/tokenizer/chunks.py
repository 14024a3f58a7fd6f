"""Byte-level BPE on the chunks of a split expression: GPT-2, RoBERTa, Llama 3, Qwen, OLMo, DeepSeek, tekken.

A word is a chunk already, so putting it into the vocabulary is enough. A phrase is several chunks: a
prefix tree of the phrases becomes the first alternative of the split expression. Where the splitting
takes several steps, or leaves gaps, the tree is a step of its own in front of them, behind a guard on
its left side too, and the later steps leave its matches whole.

In scripts without spaces a chunk is a whole run of words. There new words are merges behind those of the base
(`merges.py`); only one whose parts are not tokens must be searched for (`inner.py`).
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Regex, Tokenizer, decoders, pre_tokenizers

from vocabext.errors import TokenizerError
from vocabext.tokenizer.boundaries import Definitions, MergeTable, holds_spaceless, prefix_tree
from vocabext.tokenizer.bpe import BpeScheme, merges_of
from vocabext.tokenizer.inner import edges_of, inner_step, is_inner
from vocabext.tokenizer.marks import SPACE_IN_FRONT, cuts, inside, pre_tokenizer_of, taken_apart, unmarked
from vocabext.tokenizer.merges import MergeChain
from vocabext.tokenizer.panics import encode_with_places
from vocabext.tokenizer.phrases import WORD, Guard, bad_following, cut_in_front, ending, left_guard, right_guards
from vocabext.tokenizer.scheme import (
    EXTENDED_BEFORE,
    OURS,
    SUPPORTED,
    Units,
    copy_of,
    split_step,
    steps_of,
    with_new_entries,
)
from vocabext.tokens import NewToken

# The split expression that is built into the ByteLevel pre-tokenizer (GPT-2's).
BYTE_LEVEL_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# One of every sort of character that a split expression may forget.
GAP_PROBE = ("a Bc 12 ½ ² x_y 'd ’s !? -- € 😀 é e\u0301 \u0301 中文 ไทย שלום ـع "
             "\t \n\n \r\n \u00a0 \u3000 \u200d \x00 \ue000  x ")
# What splitting expressions list by its letters, in any language of theirs.
CONTRACTION = re.compile("['’][A-Za-z]{1,2}$")
# How many chunks at either end of a phrase can be changed by what stands next to it.
EDGE = 2

ONE_EXPRESSION, SEVERAL_STEPS, OPAQUE, EXTENDED = "one expression", "several steps", "opaque", "extended"
DESCRIPTIONS = {
    ONE_EXPRESSION: "byte-level BPE on the chunks of one split expression: words and phrases can be added",
    SEVERAL_STEPS: "byte-level BPE on the chunks of several splitting steps: words and phrases can be added",
    OPAQUE: "byte-level BPE behind splitting steps that cannot be extended: words can be added, phrases not",
    EXTENDED: "byte-level BPE whose splitting vocabext has extended already: words can be added, phrases not",
}


class ChunkScheme(BpeScheme):
    """A byte-level BPE tokenizer whose text is split before BPE sees it."""

    name = "chunks"

    def __init__(self, backend: Tokenizer, spec: dict[str, Any]) -> None:
        """Classify the splitting.

        Raises:
            TokenizerError: If the text is not split at all.
        """
        super().__init__(backend, spec)
        steps = list(taken_apart(steps_of(spec["pre_tokenizer"])))
        self.in_front = list(takewhile(SPACE_IN_FRONT.__eq__, steps))
        self.steps = steps[len(self.in_front) :]
        marks = any(step["type"] == "Metaspace" for step in steps)
        self._inside = pre_tokenizer_of(list(inside(steps))) if marks else backend.pre_tokenizer
        self._unmarked = pre_tokenizer_of([unmarked(step) for step in steps]) if marks else backend.pre_tokenizer
        kinds = [step["type"] for step in self.steps]
        splitting = [step for step in self.steps if step != SPACE_IN_FRONT and (
            step["type"] != "ByteLevel" or step["use_regex"])]
        if not any(cuts(step) for step in splitting):
            raise TokenizerError(f"this byte-level tokenizer does not split the text; supported are {SUPPORTED}")
        self.splitting = _splitting_kind(splitting) if kinds[-1] == "ByteLevel" else OPAQUE
        # Marks that are put behind a cut: if several steps cut, a phrase cut out in front would get them a new place.
        self.marks_chunks = SPACE_IN_FRONT in self.steps
        if self.marks_chunks and self.splitting == SEVERAL_STEPS:
            self.splitting = OPAQUE
        self.description = DESCRIPTIONS[EXTENDED if self.extended_before else self.splitting]
        self._bad_following = lru_cache(maxsize=None)(self._bad_following)  # type: ignore[method-assign]
        self._left_guard = lru_cache(maxsize=None)(self._left_guard)  # type: ignore[method-assign]

    # -- text to chunks -------------------------------------------------------------------------------------------

    def normalize(self, text: str) -> str:
        """Return what the normalizer, and the marks in front of each part, make of a text inside a longer one."""
        text = super().normalize(text)
        marked = any(step["type"] == "Metaspace" for step in self.steps)
        if not marked and self.splitting != OPAQUE:
            return text
        chunks = self.chunks(text)  # a step that cannot be extended may drop spaces around a word
        return "".join(map(self.key_text, chunks)) if marked or len(chunks) == 1 else text

    def chunks(self, text: str) -> list[str]:
        """Return the chunks of a text that begins where a chunk begins, in the alphabet of bytes."""
        return [chunk for chunk, _ in self._inside.pre_tokenize_str(text)]

    def split(self, text: str) -> list[str]:
        """Return the chunks of a text, as text."""
        return [text[start:end] for _, (start, end) in self._inside.pre_tokenize_str(text)]

    def key_text(self, key: str) -> str:
        """Return the text that an entry in the alphabet of bytes stands for."""
        text = str(decoders.ByteLevel().decode([key]))
        return text.replace(self._mark, " ") if self._mark else text

    @cached_property
    def _mark(self) -> str:
        """What stands for a space when the model sees the text, where something does."""
        return next((step["replacement"] for step in self.steps if step["type"] == "Metaspace"), "")

    def encode_units(self, texts: Sequence[str]) -> list[Units]:
        """Encode many texts; a unit also begins at any character of a script without spaces."""
        encodings = encode_with_places(self.backend, texts)
        return [Units(np.asarray(e.ids, np.int64), self.unit_starts(e) | _spaceless_starts(e, text))
                for e, text in zip(encodings, texts, strict=True)]

    def unit_starts(self, encoding: Encoding) -> npt.NDArray[np.bool_]:
        """A unit is a chunk."""
        words = np.asarray([-1 if w is None else w for w in encoding.word_ids], np.int64)
        starts = np.ones(len(words), np.bool_)
        starts[1:] = words[1:] != words[:-1]
        return starts

    def cuts(self, entries: list[str]) -> Iterable[tuple[str, int]]:
        """An entry that a chunk can spell cannot be cut: chunks are looked up as they are."""
        for token in entries:
            text = self.key_text(token)
            if token not in self.taken_out and any(len(splitting.pre_tokenize_str(text)) == 1 for splitting in (
                    self._unmarked, self.backend.pre_tokenizer)):
                yield token, 0

    def describe(self) -> str:
        """Say in one sentence what this is and what can be added."""
        if self.splitting == OPAQUE or self._listed_phrase is None:
            return self.description
        return (f"byte-level BPE behind splitting that lists phrases, such as {self._listed_phrase!r}, as an extension "
                "by vocabext does: words can be added, phrases not")

    # -- phrases --------------------------------------------------------------------------------------------------

    @cached_property
    def guards(self) -> Mapping[str, Guard | None]:
        """What may follow a phrase, by its ending."""
        return right_guards(self.split)

    def check(self, text: str, chunks: list[str], run: tuple[int, ...]) -> None:
        """Search for neighbours that change how a phrase is cut. A single chunk has none: it is what it is."""
        if len(chunks) > 1:
            self._phrase_guards(text)

    @cached_property
    def _listed_phrase(self) -> str | None:
        """A phrase that the splitting knows by its letters, as it does once we have extended it; None for none.

        It is one chunk, but with another letter at its end it is several: a rule treats all letters alike.
        """
        texts = (self.key_text(key) for key in self.vocabulary)
        several = (text for text in texts if not text[1:].isalpha() and not CONTRACTION.search(text))
        return next((text for text in several if (other := _with_another_end(text)) and len(self.split(text)) == 1
                     and len(self.split(other)) > 1), None)

    def _phrase_guards(self, text: str) -> tuple[str, str]:
        """Return the assertions on both sides of a phrase.

        Raises:
            TokenizerError: If there are none that keep its cuts.
        """
        if self.extended_before:
            raise TokenizerError(f"{text!r} is a phrase, and {EXTENDED_BEFORE}")
        if self.splitting == OPAQUE:
            raise TokenizerError(f"{text!r} is a phrase, and the splitting of this tokenizer cannot take phrases")
        if self._listed_phrase is not None:
            raise TokenizerError(f"{text!r} is a phrase, and the splitting of this tokenizer lists phrases already, as "
                                 f"it does {self._listed_phrase!r}: one that begins inside {text!r} would be cut apart")
        if any(step["type"] == "Digits" for step in self.steps) and any(c.isnumeric() for c in text):
            raise TokenizerError(f"{text!r} is a phrase with digits, which this tokenizer always cuts apart")
        if self.marks_chunks and not all(self.key_text(chunk).startswith(" ") for chunk in self.chunks(text)):
            raise TokenizerError(f"{text!r} is a phrase with parts that get a space in front of them elsewhere")
        parts, end = self.split(text), ending(text)
        guard = self.guards[end]
        if guard is None:
            raise TokenizerError(f"{text!r} is a phrase that ends in {end}, where its cut depends on what follows")
        bad = self._bad_following("".join(parts[-EDGE:]))
        if bad is not None:
            raise TokenizerError(f"{text!r} is cut differently when {bad!r} follows")
        if self.splitting == ONE_EXPRESSION:
            return "", guard.expression
        left = self._left_guard("".join(parts[: EDGE + 1]))
        if left is None:
            raise TokenizerError(f"{text!r} is a phrase whose first cut depends on what stands before it")
        return left.expression, guard.expression

    def _bad_following(self, tail: str) -> str | None:
        guard = self.guards[ending(tail)]
        assert guard is not None
        return bad_following(tail, self.split, guard)

    def _left_guard(self, head: str) -> Guard | None:
        return left_guard(head, self.split, EDGE, self._preceding)

    @cached_property
    def _preceding(self) -> Mapping[str, list[str]]:
        return cut_in_front(self.split)

    def phrase_may_end(
        self, last_ids: npt.NDArray[np.int64], next_ids: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Tell whether the guard behind the first id of each pair accepts the second; -1 is the end of a text."""
        ends, accepted = self._phrase_edges
        return np.asarray(accepted[ends[last_ids], next_ids])

    @cached_property
    def _phrase_edges(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The kind of ending of each id, shape (V,), and the followers that each kind accepts, shape (4, V + 1)."""
        kinds = list(self.guards)
        ends = np.zeros(self.first_new_id, np.int64)
        accepted = np.zeros((len(kinds), self.first_new_id + 1), np.bool_)
        for token, i in self.vocabulary.items():
            text = self.key_text(token) or token
            ends[i] = kinds.index(ending(text))
            # What follows a single space is in another chunk and mostly a word.
            accepted[:, i] = [g is not None and g.accepts(text + "x" * (text == " ")) for g in self.guards.values()]
        accepted[:, -1] = [g is not None and g.accepts("") for g in self.guards.values()]
        # Inside a run of letters without spaces a word may end anywhere, as far as this table can tell.
        kinds.append("spaceless")
        free = np.zeros(self.first_new_id + 1, np.bool_)
        for token, i in self.vocabulary.items():
            free[i], tail = edges_of(token)
            ends[i] = kinds.index("spaceless") if tail else ends[i]
        return ends, np.vstack((accepted, accepted[kinds.index(WORD)] | free))

    # -- the extension --------------------------------------------------------------------------------------------

    def extended(self, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Return the specification of the tokenizer with the new tokens."""
        if self.unreachable:  # looking at it raises an error where an entry cannot be cut, and none is cut here
            raise TokenizerError(f"the vocabulary entry {next(iter(self.unreachable))!r} cannot be reached by merges; "
                                 "this tokenizer cannot be extended safely")
        spec = copy_of(self.spec)
        with_new_entries(spec, self.added, tokens, self.first_new_id)
        spec["model"]["ignore_merges"] = True  # a whole chunk that is an entry is found before anything is merged
        phrases = {t.token: self._phrase_guards(t.token) for t in tokens if len(self.chunks(t.token)) > 1}
        steps = self.steps
        if phrases:
            steps = (_first_alternative if self.splitting == ONE_EXPRESSION else _step_in_front)(steps, phrases)
        chain = self.chain()
        without_parts = [token.token for token in chain.add_all(tokens) if chain.accepts(token)]
        spec["model"]["merges"] = [*spec["model"]["merges"], *map(list, chain.pairs.values())]
        if without_parts and (step := self._inner_step(without_parts, [t.token for t in tokens])):
            steps = [new for old in steps for new in _with_alternative(old, "")]
            steps = [*steps[:-1], step, steps[-1]]
        if (steps := [*self.in_front, *steps]) != list(steps_of(spec["pre_tokenizer"])):
            spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        return spec

    def chain(self) -> MergeChain:
        """Return an empty chain of merges, for words inside a run of letters without spaces."""
        return MergeChain(self.vocabulary, lambda ids: [self.backend.id_to_token(i) or "" for i in ids],
                          lambda token: is_inner(token.token) and len(self.chunks(token.token)) == 1)

    @cached_property
    def mergeable_ids(self) -> npt.NDArray[np.bool_]:
        """The ids of letters without spaces between words, and of parts of them."""
        mergeable = np.zeros(self.first_new_id, np.bool_)
        for token, i in self.vocabulary.items():
            mergeable[i] = any(edges_of(token))
        mergeable[self.barrier_ids] = False
        return mergeable

    @property
    def spelling_ids(self) -> npt.NDArray[np.bool_]:
        """The same ids, where such a character can be searched for."""
        return self.mergeable_ids & self._can_search

    def searched(self, tokens: Sequence[NewToken]) -> list[NewToken]:
        """Return the words inside runs of letters that are searched for; elsewhere they are found as whole chunks."""
        return super().searched(tokens) if self._can_search else []

    @cached_property
    def _can_search(self) -> bool:
        """Whether a step that cuts words out of chunks changes nothing else."""
        return self.steps[-1]["type"] == "ByteLevel" and self._looks_up_only_merges

    def is_never_merged(self, character: str) -> bool:
        """A character of three pieces: two of them are no text that a token could stand for."""
        return len(self.merge("".join(self.chunks(character)))) > 2

    def _inner_step(self, words: Sequence[str], texts: Sequence[str]) -> dict[str, Any] | None:
        """Return a step that cuts out words, and longer tokens that hold one of them; other tokens stay whole."""
        if not self._can_search:
            return None
        table, wanted = MergeTable(merges_of(self.spec), self.vocabulary), set(words)
        cut_out = [text for text in texts if is_inner(text) and len(self.chunks(text)) == 1 and any(
            text[start:end] in wanted for end in range(1, len(text) + 1) for start in range(end))]
        return inner_step(cut_out, set(texts) - set(cut_out), table)

    @cached_property
    def _looks_up_only_merges(self) -> bool:
        """Whether looking a part of a chunk up finds only what merges would make of it."""
        if not self.spec["model"].get("ignore_merges"):
            return True  # `unreachable` has looked at every entry that can be a chunk
        spec = copy_of(self.spec)
        spec["model"]["ignore_merges"] = False
        model = Tokenizer.from_str(json.dumps(spec)).model
        return all([piece.id for piece in model.tokenize(token)] == [i]
                   for token, i in self.vocabulary.items() if token not in self.taken_out)


def _with_another_end(text: str) -> str | None:
    """Return a text with another character of the same sort at its end, None if its end is of no such sort."""
    last = text[-1]
    other = {"\n": "\r"}.get(last) or (last.islower() and "xq"[last == "x"]) or (last.isupper() and "XQ"[last == "X"])
    return text[:-1] + other if other else None


def _splitting_kind(steps: list[dict[str, Any]]) -> str:
    if any(_looks_back(step) for step in steps):
        return OPAQUE
    if len(steps) == 1 and _gives_all_matches(steps[0]) and _has_no_gaps(steps[0]):
        return ONE_EXPRESSION
    known = all(_gives_all_matches(step) or step["type"] == "Digits" for step in steps)
    return SEVERAL_STEPS if known else OPAQUE


def _gives_all_matches(step: dict[str, Any]) -> bool:
    """Tell whether a step turns every match of an expression into a chunk."""
    if step["type"] == "ByteLevel":
        return True
    return step["type"] == "Split" and "Regex" in step["pattern"] and (
        (step["behavior"] == "Isolated" and not step["invert"]) or (step["behavior"] == "Removed" and step["invert"]))


def _looks_back(step: dict[str, Any]) -> bool:
    return step["type"] == "Split" and bool(re.search(r"\(\?<[=!]|\\[bBAGK]|(^|[|(:])\^", step["pattern"]["Regex"]))


def _has_no_gaps(step: dict[str, Any]) -> bool:
    """Tell whether the chunks follow each other; in a gap a phrase would be matched anywhere."""
    if step["type"] == "ByteLevel":
        return True  # the one that is built in
    return not pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "removed").pre_tokenize_str(GAP_PROBE)


def _first_alternative(steps: list[dict[str, Any]], phrases: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Put the phrases in front of the one expression that splits the text."""
    guards = {text: right for text, (_, right) in phrases.items()}
    # Groups with names leave those without, and backward references to them, without a number.
    plain = any(step["type"] == "Split" and re.search(r"\\[1-9k]", step["pattern"]["Regex"]) for step in steps)
    definitions = Definitions(_written(steps))
    tree = prefix_tree(guards if plain else {text: definitions.call(guard) for text, guard in guards.items()})
    return [new for step in steps for new in _with_alternative(step, definitions.written_out(tree))]


def _written(steps: list[dict[str, Any]]) -> str:
    """Return the expressions of all steps, in which names may be taken: a tokenizer can be extended again."""
    return " ".join(step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split")


def _step_in_front(steps: list[dict[str, Any]], phrases: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Put a step that finds the phrases in front, and let every later step leave a chunk that is one of them."""
    groups: dict[str, dict[str, str]] = {}
    definitions = Definitions(_written(steps))
    for text, (left, right) in phrases.items():
        groups.setdefault(left, {})[text] = definitions.call(right)
    found = "|".join(left + prefix_tree(group) for left, group in groups.items())
    whole = rf"\A{prefix_tree(dict.fromkeys(phrases, ''))}\z"
    return [split_step(definitions.written_out(f"(?:{found})")),
            *(new for step in steps for new in _with_alternative(step, whole))]


def _with_alternative(step: dict[str, Any], alternative: str) -> list[dict[str, Any]]:
    """Give a splitting step a first alternative, if any; GPT-2's built-in expression is written out for it."""
    first = f"{alternative}|" if alternative else ""
    if step["type"] == "Split" and first:
        return [{**step, "pattern": {"Regex": OURS + first + step["pattern"]["Regex"]}}]
    if step["type"] == "ByteLevel" and step["use_regex"]:
        return [split_step(first + BYTE_LEVEL_SPLIT), {**step, "use_regex": False}]
    return [step]


def _spaceless_starts(encoding: Encoding, text: str) -> npt.NDArray[np.bool_]:
    """Tell for each token whether it begins at a character of a script without spaces, behind another one."""
    starts = np.zeros(len(encoding.ids), np.bool_)
    if not holds_spaceless(text):
        return starts
    inner = np.fromiter((is_inner(character) for character in text), np.bool_, len(text))
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    first, behind = offsets[1:, 0], offsets[:-1, 1]
    whole = first >= behind  # tokens that share a character overlap
    starts[1:] = whole & inner[np.minimum(first, len(text) - 1)] & inner[behind - 1]
    return starts
