"""Unigram tokenizers: T5, XLM-R, ALBERT, Pegasus, XGLM, and SentencePiece models of that type.

A new token gets exactly the sum of the scores of its run. Then no best total changes anywhere, the longest
last entry wins every tie, and the model takes the token where its run lies on the best path. `lattice.py` proves
that, and finds the strings for which it fails. Three things are needed for it:

*Scores become whole numbers.* SentencePiece stores scores with 24 bits; times a power of two they are whole
numbers, whose sums are exact. Whole numbers also survive the file: readers of tokenizer.json get one in
eight of the original fractions wrong in the last bit, again at every reading.

*The score of an unknown character* is the lowest score of the vocabulary less 10, and the sum of a long run
is lower still. So the extension raises every score by a fixed amount per character, which all ways to cut a text have
in common: one amount for characters that are entries, and for the others the amount with which an unknown character
has the score that it has in the base.

*Phrases.* Text is cut at spaces before Unigram sees it. Where no entry crosses a space mark, handing over
several words as one chunk changes nothing, so the words of a phrase stay together.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer, decoders

from vocabext.errors import TokenizerError
from vocabext.tokenizer.boundaries import prefix_tree
from vocabext.tokenizer.scheme import EXTENDED_BEFORE, SPACE_MARK, Scheme, split_step, steps_of, word_starts
from vocabext.tokenizer.unigram.lattice import Lattice
from vocabext.tokenizer.whole_text import at_marks, never_cuts
from vocabext.tokens import NewToken

# How far below the lowest score the tokenizers library puts unknown characters.
UNKNOWN_PENALTY = 10
# Totals are exact for chunks of up to this many characters.
MAX_CHUNK = 2**20
# `exact_scores` rounds to multiples of 2**-24, which changes no score above 1/2 that is stored with 24 bits.
FINEST_SCALE = 2**24
BYTE_LEVEL_SPACE = "\u0120"

WHOLE, AT_MARKS, AT_SPACES, OTHERWISE = "nowhere", "at marks", "at spaces", "otherwise"
DESCRIPTIONS = {
    WHOLE: "Unigram on the whole text: words and phrases can be added",
    AT_MARKS: "Unigram on words with space marks: words and phrases can be added",
    AT_SPACES: "Unigram on words between spaces: words and phrases can be added",
    OTHERWISE: "Unigram behind splitting steps that cannot be extended: words can be added, phrases not",
}
WORD, SIGN, SPACE, NO_SPACES = range(4)
# Scripts that are written without spaces, in which every token is a unit.
SCRIPTS_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO")


class UnigramScheme(Scheme):
    """A Unigram tokenizer.

    Attributes:
        splitting: Where its text is cut.
    """

    name = "unigram"

    def __init__(self, backend: Tokenizer, spec: dict[str, Any]) -> None:
        """Make the scores whole numbers, and look at where the tokenizer cuts text.

        Raises:
            TokenizerError: If sums of the scores would be rounded.
        """
        super().__init__(backend, spec)
        model = spec["model"]
        self._totals = _WholeScores([entry for entry, _ in model["vocab"]], *_on_grid(s for _, s in model["vocab"]))
        self.byte_fallback = bool(model.get("byte_fallback")) and self.has_all_bytes
        steps = list(steps_of(spec["pre_tokenizer"]))
        self.splitting = _splitting(steps)
        self.description = DESCRIPTIONS[self.splitting]
        self.byte_level = any(step["type"] == "ByteLevel" for step in steps)
        self.marks = SPACE_MARK in repr((spec["normalizer"], spec["pre_tokenizer"]))

    # -- text to chunks -------------------------------------------------------------------------------------------

    def _normal(self, text: str) -> str:
        normal = super()._normal(text)
        return normal.replace(SPACE_MARK, " ") if self.marks else normal

    def chunks(self, text: str) -> list[str]:
        """Return the chunks of a text that stands inside a longer one."""
        if self.splitting == WHOLE:
            return [text.replace(" ", SPACE_MARK) if self.marks else text]
        chunks = [chunk for chunk, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)]
        if chunks and text[0] not in (" ", SPACE_MARK) and chunks[0][0] in (SPACE_MARK, BYTE_LEVEL_SPACE):
            chunks[0] = chunks[0][1:]  # put there because this text stands alone
        return chunks

    def merge(self, chunk: str) -> list[int]:
        """Return the ids that the model gives to one chunk.

        Raises:
            TokenizerError: If it has unknown characters.
        """
        try:
            ids = super().merge(chunk)
        except Exception as error:  # what the library raises where there is no unknown token
            raise TokenizerError(f"{chunk!r} has characters that this tokenizer does not know ({error})") from None
        if set(ids) & set(self.unknown_ids):
            raise TokenizerError(f"{chunk!r} has characters that this tokenizer does not know")
        return ids

    def key_text(self, key: str) -> str:
        """Return the text that an entry, or several in a row, stand for; broken bytes become `\ufffd`."""
        if self.byte_level:
            return str(decoders.ByteLevel().decode([key]))
        if self.byte_fallback:
            key = re.sub("(?:<0x[0-9A-F]{2}>)+", lambda found: bytes.fromhex(
                found[0].replace("<0x", "").replace(">", "")).decode(errors="replace"), key)
        return key.replace(SPACE_MARK, " ") if self.marks else key

    # -- what can be a token --------------------------------------------------------------------------------------

    @property
    def unknown_ids(self) -> list[int]:
        """The id of unknown characters."""
        unknown = self.spec["model"].get("unk_id")
        return [] if unknown is None else [unknown]

    def check(self, text: str, chunks: list[str], run: tuple[int, ...]) -> None:
        """Refuse a string that the base cuts differently in some context, and a phrase that cannot stay together."""
        if set(run) & set(self.added.values()):
            raise TokenizerError(f"{text!r} contains an added token once it is normalized")
        key = "".join(chunks)
        if self.key_text(key) != text:
            raise TokenizerError(f"{text!r} becomes {self.key_text(key)!r} when it is split; add that form instead")
        if len(chunks) > 1 or SPACE_MARK in key[1:]:
            self._check_phrase(text, chunks)
        if self.splitting in (AT_MARKS, AT_SPACES) and key[0] == SPACE_MARK:
            return  # a chunk begins here: nothing crosses the left edge
        if crossing := self._lattice.left_tie(key, self._cuts(run)):
            raise TokenizerError(f"{text!r} is cut differently after some texts: {crossing!r} can reach into it")

    def _check_phrase(self, text: str, chunks: list[str]) -> None:
        if self.extended_before:
            raise TokenizerError(f"{text!r} is a phrase, and {EXTENDED_BEFORE}")
        if self.splitting == OTHERWISE:
            raise TokenizerError(f"{text!r} is a phrase, and the splitting of this tokenizer cannot take phrases")
        if self.splitting != WHOLE and not all(chunk[0] == SPACE_MARK for chunk in chunks):
            raise TokenizerError(f"{text!r} is a phrase that does not begin with a space")
        shown = self.splitting == WHOLE and not _has_metaspace(self.spec["decoder"])
        if not shown and (crossing := self._over_marks):
            raise TokenizerError(f"{text!r} is a phrase, and the entry {crossing!r} of this tokenizer crosses spaces")

    @cached_property
    def _over_marks(self) -> str | None:
        """The first entry with a mark inside, which could match across the words of a phrase."""
        return next((entry for entry in self.vocabulary if SPACE_MARK in entry[1:]), None)

    def _cuts(self, run: tuple[int, ...]) -> list[int]:
        """Return where, in characters, the pieces of a run end; bytes of one character count as one piece."""
        cuts, spelled = [], b""
        for i in run:
            spelled += self.spelling([i])
            try:
                cuts.append(len(spelled.decode()))
            except UnicodeDecodeError:
                continue
        return cuts

    @cached_property
    def _lattice(self) -> Lattice:
        return Lattice(self._totals.by_entry, self._totals.unknown)

    # -- mining ---------------------------------------------------------------------------------------------------

    def unit_starts(self, encoding: Encoding) -> npt.NDArray[np.bool_]:
        """Tell where a word, with the mark in front of it, or a run of signs begins."""
        ids, starts = np.asarray(encoding.ids, np.int64), word_starts(encoding)
        first, last, only_mark = self._edges
        joined = (last[ids[:-1]] == first[ids[1:]]) & (first[ids[1:]] < SPACE)
        joined |= only_mark[ids[:-1]] & (first[ids[1:]] != SPACE)
        starts[1:] |= ~joined
        return starts

    @cached_property
    def _edges(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return for each id the sorts of its first and last character, and whether it is only a mark, (U,) each."""
        first, last = np.full(self.first_new_id, NO_SPACES), np.full(self.first_new_id, NO_SPACES)
        only_mark = np.zeros(self.first_new_id, np.bool_)
        barrier = set(self.barrier_ids.tolist())
        for token, i in self.vocabulary.items():
            if token and i not in barrier:
                text = self.key_text(token) if self.byte_of(token) is None else token
                first[i], last[i], only_mark[i] = _sort(text[0]), _sort(text[-1]), text == " "
        return first, last, only_mark

    # -- the extension --------------------------------------------------------------------------------------------

    def extended(self, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Return the specification of the tokenizer with the new tokens."""
        fillers = self._fillers()
        keys = {token.key: self._lattice.floor(token.key) for token in tokens}
        spec = {**self.spec, "model": {**self.spec["model"], "vocab": self._totals.vocabulary(fillers, keys)}}
        phrases = [token for token in tokens if SPACE_MARK in token.key[1:]]
        if phrases:
            spec["decoder"] = _with_inner_marks(self.spec["decoder"])
        # On whole texts only the decoder needs a change. But chunks that come again and again are remembered,
        # which saves half of the time where phrases are frequent.
        joined = [token for token in phrases if token.key[0] == SPACE_MARK]
        if joined and not self._over_marks:
            spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": self._steps_with(joined)}
        return spec

    def _fillers(self) -> list[str]:
        """Return entries for the ids between the last entry of the model and the first new token.

        They are the added tokens, which keep their ids so; an empty string, which matches nothing, fills each hole.
        """
        names = {i: content for content, i in self.added.items()}
        fillers = [names.get(i, "") for i in range(len(self.spec["model"]["vocab"]), self.first_new_id)]
        if short := next((name for name in fillers if len(name) == 1), None):
            raise TokenizerError(f"the added token {short!r} stands outside of the vocabulary and is one character; "
                                 "inside of it, it would be found in plain text")
        return fillers

    def _steps_with(self, phrases: Sequence[NewToken]) -> list[dict[str, Any]]:
        """Return splitting steps that keep each phrase, and the letters right behind it, in one chunk."""
        steps = list(steps_of(self.spec["pre_tokenizer"]))
        if self.splitting == AT_SPACES:
            words = split_step(rf"{_tree(token.token[1:] for token in phrases)}[^\s▁]*+|▁?[^\s▁]++|▁")
            return [{**words, "behavior": "Removed", "invert": True}, {**steps[-1], "split": False}]
        found = f"{_tree(token.key for token in phrases)}[^▁]*+"
        if self.splitting == AT_MARKS:
            return [{**steps[-1], "split": False}, split_step(f"{found}|▁[^▁]*+|[^▁]++")]
        return [*steps, split_step(found)]


def exact_scores(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the specification of a Unigram tokenizer with its scores as whole numbers.

    Where scores have more bits than SentencePiece stores, or were misread, the library rounds totals, and the rounding
    decides between cuts with the same pieces in another order (`----` + `--`). With whole numbers the rule decides: the
    longest last entry.

    Args:
        spec: The content of tokenizer.json; not modified.
    """
    model = spec["model"]
    lowest, scale = min(score for _, score in model["vocab"]), FINEST_SCALE
    while (UNKNOWN_PENALTY - lowest) * scale * MAX_CHUNK > 2**50:
        scale //= 2
    scores = [round(score * scale) for _, score in model["vocab"]]
    whole = _WholeScores([entry for entry, _ in model["vocab"]], scores, scale)
    return {**spec, "model": {**model, "vocab": whole.vocabulary([], {})}}


class _WholeScores:
    """The scores of a model as whole numbers, times `scale`."""

    def __init__(self, entries: Sequence[str], scores: Sequence[int], scale: int) -> None:
        self.entries = entries
        self.scores = scores
        self.by_entry = dict(zip(entries, scores, strict=True))  # the last one counts where entries repeat
        self.unknown = min(scores) - UNKNOWN_PENALTY * scale
        singles = [score for entry, score in self.by_entry.items() if len(entry) == 1]
        if not singles:
            raise TokenizerError("no entry of this Unigram tokenizer is a single character; it cannot be extended")
        per_character = [self.unknown, *(score // len(entry) for entry, score in self.by_entry.items() if entry)]
        worst, best = min(per_character), max(per_character) + 1
        # With this much per character, any two characters are worth more than the lowest score.
        self.known_raise = min(singles) - 2 * worst + 8 * UNKNOWN_PENALTY
        if max(-worst, best, self.known_raise + best) * MAX_CHUNK > 2**53:
            raise TokenizerError(f"the scores of this Unigram tokenizer go down to {min(scores) / scale:g} in steps of "
                                 f"1/{scale}; sums of them are rounded, and the rounding decides between equal cuts; "
                                 "round them in tokenizer.json first")

    def vocabulary(self, fillers: Sequence[str], keys: Mapping[str, int]) -> list[tuple[str, float]]:
        """Return all entries with their raised scores.

        Args:
            fillers: Entries behind those of the base that no text may match.
            keys: New entries behind these, with their scores.
        """
        entries = [*zip(self.entries, self.scores, strict=True), *keys.items()]
        known = {entry for entry, _ in entries if len(entry) == 1}
        # (entry, its score with the raise for known characters, how many characters are unknown)
        raised = [(entry, score + self.known_raise * (len(entry) - (n := sum(c not in known for c in entry))), n)
                  for entry, score in entries]
        lowest = min(score for _, score, unknown in raised if not unknown)
        unknown_raise = lowest - UNKNOWN_PENALTY - self.unknown
        values = [(entry, float(score + unknown_raise * unknown)) for entry, score, unknown in raised]
        if min(value for _, value in values) != lowest:  # what the score of unknown characters is counted from
            raise TokenizerError("the scores of this Unigram tokenizer are too different; it cannot be extended safely")
        at = len(self.entries)
        return [*values[:at], *((filler, float(lowest)) for filler in fillers), *values[at:]]


def _on_grid(scores: Iterable[float]) -> tuple[list[int], int]:
    """Return scores as whole numbers, and the power of two that makes them whole."""
    ratios = [float(score).as_integer_ratio() for score in scores]
    scale = max(denominator for _, denominator in ratios)
    return [numerator * (scale // denominator) for numerator, denominator in ratios], scale


def _splitting(steps: Sequence[dict[str, Any]]) -> str:
    if all(never_cuts(step) for step in steps):
        return WHOLE
    *before, last = steps
    if at_marks(last):
        if not before:
            return AT_MARKS
        if [step["type"] for step in before] == ["WhitespaceSplit"] and last["prepend_scheme"] == "always":
            return AT_SPACES
    return OTHERWISE


def _tree(strings: Iterable[str]) -> str:
    return prefix_tree(dict.fromkeys(strings, ""))


def _sort(character: str) -> int:
    if character == " ":
        return SPACE
    if unicodedata.category(character)[0] not in "LMN":
        return SIGN
    return NO_SPACES if unicodedata.name(character, "").startswith(SCRIPTS_WITHOUT_SPACES) else WORD


def _has_metaspace(decoder: dict[str, Any] | None) -> bool:
    return any(_drops_marks(step) for step in steps_of(decoder, "decoders"))


def _drops_marks(step: dict[str, Any]) -> bool:
    """Tell whether a decoder drops all marks of the first token, not only the one in front."""
    return step["type"] == "Metaspace" and step["prepend_scheme"] != "never"


def _with_inner_marks(decoder: dict[str, Any] | None) -> dict[str, Any] | None:
    """Let a decoder keep the marks inside of a phrase that comes first."""
    if not _has_metaspace(decoder):
        return decoder
    spaces = {"type": "Replace", "pattern": {"Regex": rf"(?!\A){SPACE_MARK}"}, "content": " "}
    steps = [[spaces, step] if _drops_marks(step) else [step] for step in steps_of(decoder, "decoders")]
    return {"type": "Sequence", "decoders": [step for group in steps for step in group]}
