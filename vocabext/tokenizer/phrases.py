"""Which neighbours a phrase of several chunks may have, found by trying the real splitting.

The extended splitting hands a phrase over as one chunk, so the base must cut it in the same way whatever stands around
it. Split expressions match from left to right and (those that we accept) never look back, so a phrase that begins
where a chunk begins needs no guard on its left. Text behind a phrase can join its last chunk. A look-ahead keeps
such text away: `right_guards` takes, for each kind of ending, the widest *guard* that holds with all probes.
The probes have a text for each sort of character that split expressions tell apart.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WORD, MARK, SIGN = "a word", "a combining mark", "a sign"
BREAK, BREAKS, SPACE = "a line break", "several line breaks", "a space"
Split = Callable[[str], list[str]]


@dataclass(frozen=True)
class Guard:
    """A condition on what stands next to a phrase.

    Attributes:
        expression: The condition as an assertion, for the regex engine of the tokenizers library.
        accepts: The condition as a function of the neighbouring text, which is empty at the end of a text.
    """

    expression: str
    accepts: Callable[[str], bool]


def ending(text: str) -> str:
    """Tell with which sort of character a text ends."""
    last = text[-1]
    if last in "\r\n":
        return BREAK if last == "\n" and not text[-2:-1].isspace() else BREAKS
    if last.isspace():
        return SPACE
    if unicodedata.category(last)[0] == "M":
        return MARK
    return WORD if last.isalnum() else SIGN


def _in_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


def _is_space(rest: str) -> bool:
    return not rest or rest[0].isspace()


NO_WORD = Guard(r"(?![\p{L}\p{M}\p{N}'’])", lambda rest: not rest or not (_in_word(rest[0]) or rest[0] in "'’"))
ANY_SPACE = Guard(r"(?=\s|\z)", _is_space)
PLAIN_SPACE = Guard(r"(?= |\z)", lambda rest: not rest or rest[0] == " ")
NO_BREAK = Guard(r"(?![\r\n])", lambda rest: not rest or rest[0] not in "\r\n")
NO_SPACE = Guard(r"(?=\S|\z)", lambda rest: not rest or not rest[0].isspace())
ONE_SPACE = Guard(r"(?= \S)", lambda rest: rest[:1] == " " and rest[1:2].strip() != "")
# From wide to narrow. A narrow guard costs savings, never correctness.
RIGHT = {
    WORD: (NO_WORD, ANY_SPACE, PLAIN_SPACE),
    MARK: (NO_WORD, ANY_SPACE, PLAIN_SPACE),
    SIGN: (Guard(r"(?=[\p{L}\p{N}\s]|\z)", lambda rest: _is_space(rest) or rest[0].isalnum()),
           Guard(r"(?=[\p{N}\s]|\z)", lambda rest: _is_space(rest) or rest[0].isnumeric()),
           Guard(r"(?=[\p{N} ]|\z)", lambda rest: not rest or rest[0] == " " or rest[0].isnumeric()),
           PLAIN_SPACE),
    BREAK: (NO_BREAK, NO_SPACE, ONE_SPACE),
    BREAKS: (NO_BREAK, NO_SPACE, ONE_SPACE),
    SPACE: (ONE_SPACE, Guard(r"(?= [A-Za-z])", lambda rest: re.match(" [A-Za-z]", rest) is not None)),
}
LEFT = (
    Guard("", lambda before: True),
    Guard(r"(?<!\s)", lambda before: not before[-1:].isspace()),
    Guard(r"(?<![^\s\p{L}\p{M}\p{N}])", lambda before: not before or before[-1].isspace() or _in_word(before[-1])),
    Guard(r"(?<![^\p{L}\p{M}\p{N}])", lambda before: not before or _in_word(before[-1])),
    Guard(r"(?<![^\p{L}\p{N}])", lambda before: not before or before[-1].isalnum()),
    Guard(r"(?<![^\n])", lambda before: not before or before[-1] == "\n"),
)
SIGNS = ".,;:!?()[]{}<>-/\\*&%$#@=+|~^`'\"_—“”’…"
FOLLOWING = (
    "", " ", " x", " X", "  x", " 1", " .", "   ", " \n", "\n", "\n\n", "\r\n", "\nx", "\n x", "\n    x", "\t", "\tx",
    "\n\n  x", "\u3000x", "\u00a0x", "€", "😀", "\u200dx", "\x00", "x", "X", "xX", "Xx", "é", "中", "中x", "ا",
    "1", "12", "1234", "½", "\u0301", "\u0301x", "'s", "’s", "'", " 's", " 中", " €", " \u0301", "ไทย", "ไ",
    # An apostrophe at the end of a phrase may begin a contraction.
    *(letters + rest for ending in ("s", "t", "re", "ve", "m", "ll", "d") for letters in (ending, ending.upper())
      for rest in ("", "x")),
    *(sign + rest for sign in SIGNS for rest in ("", "x", " x", "\n")),
)
PRECEDING = ("", "x", "X", "1", "12", "x ", "x  ", "1 ", " ", "  ", "\n", "x\n", "\n\n", "\n ", "\t", ". ", ".  ", "é",
             "中", "中 ", "😀", "😀 ", "\u00a0", "\u3000", "x'", "x's", "ไ",
             "\u0301", "x\u0301", "\u093f", "ก\u0e34", "\u200d", "\x00", "½", "€", "x\u0301 ", *SIGNS,
             *("x" + sign for sign in SIGNS))
SAMPLES = {
    WORD: (" of the", "a b", " x-ray", " naïve café", " 中 文"),
    MARK: ("e\u0301te\u0301", " ที่ ที่", " नमस्ते दुनिया ि"),
    SIGN: (" a,", "self.x(", " (x)", " e.g.", "a/b/", " x =", ' "a"'),
    BREAK: ("a\n", "x:\n", " a.b\n"),
    BREAKS: (" x.\n\n", " end;\r\n", "x \n", "a\n  \n"),
    SPACE: ("x:\n       ", " a  ", "\n\n    x\n   "),
}


def right_guards(split: Split) -> dict[str, Guard | None]:
    """Choose for each kind of ending the widest guard under which sample phrases keep their cuts.

    Returns:
        A guard per ending; None where no guard is narrow enough.
    """
    return {end: next((g for g in guards if all(bad_following(t, split, g) is None for t in SAMPLES[end])), None)
            for end, guards in RIGHT.items()}


def bad_following(text: str, split: Split, guard: Guard) -> str | None:
    """Return a text that the guard accepts, and that behind `text` changes the cuts of it; None if there is none."""
    chunks = split(text)
    return next((after for after in FOLLOWING
                 if guard.accepts(after) and split(text + after)[: len(chunks)] != chunks), None)


def cut_in_front(split: Split) -> dict[str, list[str]]:
    """Return the texts that `left_guard` tries in front of every phrase, each with its chunks."""
    return {before: split(before) for before in PRECEDING}


def left_guard(text: str, split: Split, edge: int, preceding: Mapping[str, list[str]] | None = None) -> Guard | None:
    """Choose the widest guard on the left under which the text before a phrase, and the phrase, keep their cuts.

    Args:
        text: The phrase, or its beginning.
        split: The splitting of the tokenizer.
        edge: How many of the phrase's first chunks to compare.
        preceding: What `cut_in_front(split)` returns: a caller with many phrases passes it.

    Returns:
        The guard; None where no guard is narrow enough.
    """
    chunks = split(text)[:edge]
    bad = [before for before, cut in (preceding or cut_in_front(split)).items()
           if split(before + text)[: len(cut) + edge] != [*cut, *chunks]]
    return next((guard for guard in LEFT if not any(guard.accepts(before) for before in bad)), None)
