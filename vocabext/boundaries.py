r"""Where a tokenizer may be cut without changing what it does to the rest of the text.

Two questions, one per way in which tokenizers see text:

*Chunks.* A regex first splits the text, and BPE never looks across a split (GPT-2, Llama 3, Qwen).
Text may be cut wherever the regex cuts it. For a phrase of several chunks that is certain at the
start (matching goes from left to right); at the end it depends on what follows, so a phrase carries
a look-ahead, chosen by its last character.

*Whole text.* BPE sees everything at once (Llama 2, Mistral). Cutting at the edge of a string `s` is
safe unless some merge would have joined the two sides. BPE applies merges in rank order, so this is
decidable per string: replay BPE on `s` alone; the last piece takes a series of values `u` on the
way. A merge `(u, v)` with text `v` to the right can only happen while the last piece is `u`, and only
if its rank is not above that of the merge that `s` itself performs next in that time. Those `v` are
the *hazards* on the right; those on the left mirror them. A look-ahead and a look-behind that refuse
the hazards make the cut exact, whatever stands further away.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

WORD_CHARACTER = r"[\p{L}\p{M}\p{N}]"
# Letters of scripts that put no space between words: Hiragana and Katakana; Han, with its extensions.
SPACELESS_RANGES = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
SPACELESS = "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in SPACELESS_RANGES)
_SPACELESS = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in SPACELESS_RANGES) + "]")
# Alternatives that are tried one after the other; more are divided.
MAX_BRANCHES = 3


def holds_spaceless(text: str) -> bool:
    """Tell whether a text has a letter of a script that puts no space between words."""
    return bool(_SPACELESS.search(text))


@dataclass(frozen=True)
class Hazards:
    """Texts next to a string with which a merge across its edge could happen."""

    left: frozenset[str]
    right: frozenset[str]


class MergeTable:
    """The merges of a BPE model, indexed for the question which of them cross an edge."""

    def __init__(self, merges: Sequence[tuple[str, str]], vocabulary: Mapping[str, int]) -> None:
        """Index the merges.

        Args:
            merges: Pairs in rank order.
            vocabulary: Token to id; a character that is not in it never merges.
        """
        self.ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
        self.vocabulary = vocabulary
        self._hazards: dict[str, Hazards] = {}
        self._by_left: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self._by_right: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for (left, right), rank in self.ranks.items():
            self._by_left[left].append((rank, right))
            self._by_right[right].append((rank, left))

    def hazards(self, text: str) -> Hazards:
        """Return the texts that, standing next to `text`, could be merged with a part of it."""
        if text not in self._hazards:
            self._hazards[text] = self._find(text)
        return self._hazards[text]

    def _find(self, text: str) -> Hazards:
        first_until: dict[str, float] = {}
        last_until: dict[str, float] = {}
        for symbols, next_rank in self._replay(text):
            first_until[symbols[0]] = max(first_until.get(symbols[0], -1), next_rank)
            last_until[symbols[-1]] = max(last_until.get(symbols[-1], -1), next_rank)
        left = {u for v, until in first_until.items() for rank, u in self._by_right[v] if rank <= until}
        right = {v for u, until in last_until.items() for rank, v in self._by_left[u] if rank <= until}
        return Hazards(frozenset(left), frozenset(right))

    def _replay(self, text: str) -> Iterable[tuple[list[str], float]]:
        """Yield every state of BPE on `text`, each with the rank of the merge that it performs next."""
        symbols = list(text)
        while True:
            pairs = list(itertools.pairwise(symbols))
            rank, at = min(((self.ranks.get(pair, math.inf), i) for i, pair in enumerate(pairs)), default=(math.inf, 0))
            yield symbols, rank
            if rank == math.inf:
                return
            symbols = [*symbols[:at], symbols[at] + symbols[at + 1], *symbols[at + 2 :]]


def escape(text: str) -> str:
    """Escape a literal for the Oniguruma regex engine of the tokenizers library."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):X}}}" for c in text)


def character_class(characters: Iterable[str]) -> str:
    """Return a class that matches any of the characters, or an empty string for none."""
    inside = "".join(escape(c) for c in sorted(set(characters)))
    return f"[{inside}]" if inside else ""


def prefix_tree(guards: Mapping[str, str]) -> str:
    """Return a regex that matches the longest of the given strings whose guard holds.

    Args:
        guards: String to a zero-width assertion that must hold at its end (may be empty).
    """
    root: dict[str, dict] = {}  # type: ignore[type-arg]
    for text in guards:
        node = root
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}

    def render(node: dict, prefix: str) -> str:  # type: ignore[type-arg]
        branches = {}
        for character in sorted(c for c in node if c):
            text, child = prefix + character, node[character]
            literal = character
            while len(child) == 1 and "" not in child:  # a chain without a branch is one literal
                (step,) = child
                text, literal, child = text + step, literal + step, child[step]
            branches[character] = escape(literal) + render(child, text)
        if "" not in node:
            return f"(?:{choice(branches)})" if len(branches) > 1 else choice(branches)
        # The string itself comes last, so that a longer one wins.
        return f"(?:{choice(branches)}|{guards[prefix]})" if branches else guards[prefix]

    return render(root, "")


def choice(branches: Mapping[str, str]) -> str:
    """Return alternatives, of which at most one can match: by the first character.

    An expression tries its alternatives one after the other, and at most places of a text dozens in vain.
    So many alternatives are divided, and each part first asks whether the next character is one of its own.

    Args:
        branches: First character to the expression for what begins with it.
    """
    if len(branches) <= MAX_BRANCHES:
        return "|".join(branches.values())
    firsts = list(branches)
    size = math.ceil(len(firsts) / MAX_BRANCHES)
    parts = [firsts[at : at + size] for at in range(0, len(firsts), size)]
    return "|".join(f"(?={character_class(part)})(?:{choice({first: branches[first] for first in part})})"
                    for part in parts)  # fmt: skip


def whole_text_guards(
    keys: Sequence[str], table: MergeTable, *, drops_unknown: bool = False
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the assertions that make a cut around each key exact where BPE sees the whole text.

    Args:
        keys: The new strings, as the BPE model spells them.
        table: The base merges.
        drops_unknown: Whether the model deletes characters that it does not know. Their two
            neighbours then meet and may merge, so a key must not stand next to one.

    Returns:
        The assertion at the end of each key, and the assertion in front of each first character
        (the part of the look-behind that all keys with that character share).
    """
    hazards = {key: table.hazards(key) for key in keys}
    before = {key: {u[-1] for u in hazards[key].left} for key in keys}
    shared: dict[str, set[str]] = {}
    for key in keys:
        shared[key[0]] = shared[key[0]] & before[key] if key[0] in shared else set(before[key])
    known = character_class(t for t in table.vocabulary if len(t) == 1) if drops_unknown else ""
    stays = rf"(?={known}|\z)" if known else ""
    ends = {}
    for key in keys:
        guard = _refuse_following(key, hazards[key].right, known) + _refuse_before(key, before[key] - shared[key[0]])
        ends[key] = guard + stays
    starts = {}
    for first, characters in shared.items():
        # A string that begins inside a word would stand for something else there.
        parts = [character_class(characters), WORD_CHARACTER if _in_word(first) else "", known and f"[^{known}]"]
        refused = "|".join(part for part in parts if part)
        starts[first] = f"(?<!{refused})" if refused else ""
    return ends, starts


def _refuse_following(key: str, hazards: Iterable[str], known: str) -> str:
    # Characters that the model deletes may stand between those of a hazard.
    between = f"[^{known}]*+" if known else ""
    in_word = _in_word(key[-1])
    # WORD_CHARACTER covers the ASCII ones; for others the two Unicode tables might disagree.
    rest = {text for text in hazards if not (in_word and text[0].isascii() and text[0].isalnum())}
    minimal = {text for text in rest if not any(text[:n] in rest for n in range(1, len(text)))}
    singles = character_class(text for text in minimal if len(text) == 1)
    longer = sorted(between.join(map(escape, text)) for text in minimal if len(text) > 1)
    parts = [part for part in (WORD_CHARACTER if in_word else "", singles, *longer) if part]
    return f"(?!{'|'.join(parts)})" if parts else ""


def _in_word(character: str) -> bool:
    """Tell whether a character belongs to a word that only a space or a sign ends."""
    return character.isalnum() and not holds_spaceless(character)


def _refuse_before(key: str, characters: Iterable[str]) -> str:
    forbidden = character_class(characters)
    return f"(?<!{forbidden}{escape(key)})" if forbidden else ""
