"""Byte-level BPE on the chunks of a split expression: GPT-2, RoBERTa, Llama 3, Qwen, OLMo, DeepSeek, tekken.

A word is a chunk already, so putting it into the vocabulary is enough. A phrase is several chunks: a
prefix tree of the phrases becomes the first alternative of the split expression. Where the splitting
takes several steps, or leaves gaps, the tree is a step of its own in front of them, with a guard on
its left side too, and the later steps leave its matches whole.

In scripts without spaces a chunk is a whole run of words. There new words are merges behind those of the base
(`merges.py`); a splitting step searches only for words whose parts are no tokens (`inner.py`).
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
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
    word_starts,
)
from vocabext.tokens import NewToken

# The split expression that is built into the ByteLevel pre-tokenizer (GPT-2's).
BYTE_LEVEL_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Characters of every sort that a split expression may fail to match.
GAP_PROBE = ("a Bc 12 ½ ² x_y 'd ’s !? -- € 😀 é e\u0301 \u0301 中文 ไทย שלום ـع "
             "\t \n\n \r\n \u00a0 \u3000 \u200d \x00 \ue000  x ")
# Endings such as 's or 'll, which split expressions list by their letters.
CONTRACTION = re.compile("['’][A-Za-z]{1,2}$")
# How many chunks at either end of a phrase the text next to it can change.
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
            TokenizerError: If the tokenizer does not split text.
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
        # Where marks go behind a cut, and several steps cut, a step in front that cuts phrases out would move marks.
        self.marks_chunks = SPACE_IN_FRONT in self.steps
        if self.marks_chunks and self.splitting == SEVERAL_STEPS:
            self.splitting = OPAQUE
        self.description = DESCRIPTIONS[EXTENDED if self.extended_before else self.splitting]
        self._bad_following = cache(self._bad_following)  # type: ignore[method-assign]
        self._left_guard = cache(self._left_guard)  # type: ignore[method-assign]

    # -- text to chunks -------------------------------------------------------------------------------------------

    def normalize(self, text: str) -> str:
        """Return what the normalizer, and the marks in front of each part, make of a text inside a longer one."""
        text = super().normalize(text)
        if not self._mark and self.splitting != OPAQUE:
            return text
        chunks = self.chunks(text)  # a step that cannot be extended may drop spaces around a word
        return "".join(map(self.key_text, chunks)) if self._mark or len(chunks) == 1 else text

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
        """The character that stands for a space when the model sees the text; empty if there is none."""
        return next((step["replacement"] for step in self.steps if step["type"] == "Metaspace"), "")

    def encode_units(self, texts: Sequence[str]) -> list[Units]:
        """Encode many texts; a unit also begins at each character of a script without spaces."""
        encodings = encode_with_places(self.backend, texts)
        return [Units(np.asarray(e.ids, np.int64), self.unit_starts(e) | _spaceless_starts(e, text))
                for e, text in zip(encodings, texts, strict=True)]

    def unit_starts(self, encoding: Encoding) -> npt.NDArray[np.bool_]:
        """Tell where a chunk begins."""
        return word_starts(encoding)

    def cuts(self, entries: list[str]) -> Iterable[tuple[str, int]]:
        """Yield the entries that a chunk can spell; none can be cut, since the model looks chunks up as they are."""
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
        """The guard behind phrases with each kind of ending; None where no guard is narrow enough."""
        return right_guards(self.split)

    def check(self, text: str, chunks: list[str], run: tuple[int, ...]) -> None:
        """Search for neighbours that change how the base cuts a phrase. No neighbour can cut a single chunk."""
        if len(chunks) > 1:
            self._phrase_guards(text)

    @cached_property
    def _listed_phrase(self) -> str | None:
        """An entry of several words that the splitting lists, as an extension by vocabext does; None if it lists none.

        Such an entry is one chunk, and several with another letter at its end: a rule would treat all letters alike.
        """
        texts = (self.key_text(key) for key in self.vocabulary)
        several = (text for text in texts if not text[1:].isalpha() and not CONTRACTION.search(text))
        return next((text for text in several if (other := _with_another_end(text)) and len(self.split(text)) == 1
                     and len(self.split(other)) > 1), None)

    def _phrase_guards(self, text: str) -> tuple[str, str]:
        """Return the assertions on the left and on the right of a phrase.

        Raises:
            TokenizerError: If no assertions keep its cuts.
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
        if (bad := self._bad_following("".join(parts[-EDGE:]))) is not None:
            raise TokenizerError(f"{text!r} is cut differently when {bad!r} follows")
        if self.splitting == ONE_EXPRESSION:
            return "", guard.expression
        if (left := self._left_guard("".join(parts[: EDGE + 1]))) is None:
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
        """Tell for pairs of ids whether the guard behind the first accepts the second; -1 is the end of a text."""
        ends, accepted = self._phrase_edges
        return np.asarray(accepted[ends[last_ids], next_ids])

    @cached_property
    def _phrase_edges(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return the kind of ending of each id, (U,), and whether each of K kinds accepts each follower, (K, U + 1)."""
        kinds = list(self.guards)
        ends = np.zeros(self.first_new_id, np.int64)
        accepted = np.zeros((len(kinds), self.first_new_id + 1), np.bool_)
        for token, i in self.vocabulary.items():
            text = self.key_text(token) or token
            ends[i] = kinds.index(ending(text))
            # Behind a single space stands another chunk, mostly a word.
            accepted[:, i] = [g is not None and g.accepts(text + "x" * (text == " ")) for g in self.guards.values()]
        accepted[:, -1] = [g is not None and g.accepts("") for g in self.guards.values()]
        # One more kind: inside a run of letters without spaces a word may end anywhere, as far as a pair of ids tells.
        kinds.append("spaceless")
        free = np.zeros(self.first_new_id + 1, np.bool_)
        for token, i in self.vocabulary.items():
            free[i], tail = edges_of(token)
            ends[i] = kinds.index("spaceless") if tail else ends[i]
        return ends, np.vstack((accepted, accepted[kinds.index(WORD)] | free))

    # -- the extension --------------------------------------------------------------------------------------------

    def extended(self, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Return the specification of the tokenizer with the new tokens."""
        if self.unreachable:  # the property raises an error where an entry cannot be cut; `cuts` can cut none
            raise TokenizerError(f"the vocabulary entry {next(iter(self.unreachable))!r} cannot be reached by merges; "
                                 "this tokenizer cannot be extended safely")
        spec = copy_of(self.spec)
        with_new_entries(spec, self.added, tokens, self.first_new_id)
        spec["model"]["ignore_merges"] = True  # BPE looks a whole chunk up before it merges anything
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
        return MergeChain(self.vocabulary, self.entries,
                          lambda token: is_inner(token.token) and len(self.chunks(token.token)) == 1)

    @cached_property
    def mergeable_ids(self) -> npt.NDArray[np.bool_]:
        """Tell for each id whether it has letters of scripts without spaces, or parts of them, at an end, (U,)."""
        mergeable = np.zeros(self.first_new_id, np.bool_)
        for token, i in self.vocabulary.items():
            mergeable[i] = any(edges_of(token))
        mergeable[self.barrier_ids] = False
        return mergeable

    @property
    def spelling_ids(self) -> npt.NDArray[np.bool_]:
        """The same ids if a splitting step can search for such characters, otherwise none."""
        return self.mergeable_ids & self._can_search

    def searched(self, tokens: Sequence[NewToken]) -> list[NewToken]:
        """Return the words that a splitting step searches for inside runs of letters; no other token needs that."""
        return super().searched(tokens) if self._can_search else []

    @cached_property
    def _can_search(self) -> bool:
        """Whether a step that cuts words out of chunks leaves all other ids as they are."""
        return self.steps[-1]["type"] == "ByteLevel" and self._looks_up_only_merges

    def is_never_merged(self, character: str) -> bool:
        """Tell whether a character has three pieces or more: two of them are no text, so no token can be its part."""
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
        """Whether the model, where it looks up a part of a chunk, finds only what merges would make of it."""
        if not self.spec["model"].get("ignore_merges"):
            return True  # `unreachable` has looked at every entry that can be a chunk
        spec = copy_of(self.spec)
        spec["model"]["ignore_merges"] = False
        model = Tokenizer.from_str(json.dumps(spec)).model
        return all([piece.id for piece in model.tokenize(token)] == [i]
                   for token, i in self.vocabulary.items() if token not in self.taken_out)


def _with_another_end(text: str) -> str | None:
    """Return a text with another letter, or line break, at its end; None if it ends in something else."""
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
    """Tell whether the matches of a step leave no gaps, in which a phrase could match at any place."""
    if step["type"] == "ByteLevel":
        return True  # the one that is built in
    return not pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "removed").pre_tokenize_str(GAP_PROBE)


def _first_alternative(steps: list[dict[str, Any]], phrases: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Make the phrases the first alternative of the one expression that splits the text."""
    guards = {text: right for text, (_, right) in phrases.items()}
    # In an expression with named groups, groups without a name get no number, and \1 would refer to nothing.
    plain = any(step["type"] == "Split" and re.search(r"\\[1-9k]", step["pattern"]["Regex"]) for step in steps)
    definitions = Definitions(_written(steps))
    tree = prefix_tree(guards if plain else {text: definitions.call(guard) for text, guard in guards.items()})
    return [new for step in steps for new in _with_alternative(step, definitions.written_out(tree))]


def _written(steps: list[dict[str, Any]]) -> str:
    """Return the expressions of all steps; an earlier extension may have taken names in them."""
    return " ".join(step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split")


def _step_in_front(steps: list[dict[str, Any]], phrases: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Put a step in front that cuts the phrases out, and let every later step leave a chunk that is a phrase."""
    groups: dict[str, dict[str, str]] = {}
    definitions = Definitions(_written(steps))
    for text, (left, right) in phrases.items():
        groups.setdefault(left, {})[text] = definitions.call(right)
    found = "|".join(left + prefix_tree(group) for left, group in groups.items())
    whole = rf"\A{prefix_tree(dict.fromkeys(phrases, ''))}\z"
    return [split_step(definitions.written_out(f"(?:{found})")),
            *(new for step in steps for new in _with_alternative(step, whole))]


def _with_alternative(step: dict[str, Any], alternative: str) -> list[dict[str, Any]]:
    """Give a splitting step a first alternative, if there is one; writes the expression of ByteLevel out."""
    first = f"{alternative}|" if alternative else ""
    if step["type"] == "Split" and first:
        return [{**step, "pattern": {"Regex": OURS + first + step["pattern"]["Regex"]}}]
    if step["type"] == "ByteLevel" and step["use_regex"]:
        return [split_step(first + BYTE_LEVEL_SPLIT), {**step, "use_regex": False}]
    return [step]


def _spaceless_starts(encoding: Encoding, text: str) -> npt.NDArray[np.bool_]:
    """Tell for each token whether a letter of a script without spaces begins there, behind another one, (T,)."""
    starts = np.zeros(len(encoding.ids), np.bool_)
    if not holds_spaceless(text):
        return starts
    inner = np.fromiter((is_inner(character) for character in text), np.bool_, len(text))
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    first, behind = offsets[1:, 0], offsets[:-1, 1]
    whole = first >= behind  # tokens that share a character overlap
    starts[1:] = whole & inner[np.minimum(first, len(text) - 1)] & inner[behind - 1]
    return starts
