r"""Where a tokenizer may be cut without changing what it does to the rest of the text.

There are two ways in which tokenizers see text:

*Chunks.* A regex first splits the text, and BPE never looks across a split (GPT-2, Llama 3, Qwen).
Text may be cut wherever the regex cuts it. For a phrase of several chunks that is certain at the
start (matching goes from left to right); at the end it depends on what follows, so a phrase carries
a look-ahead, chosen by its last character.

*Whole text.* BPE sees everything at once (Llama 2, Mistral). New tokens are merges there, which need no cut
(`vocabext.tokenizer.merges`); a token that cannot be one is cut out. Cutting at the edge of a string `s` is
safe unless some merge would have joined the two sides. BPE applies merges in rank order, so this is
decidable per string: replay BPE on `s` alone, and note every value `u` that the last piece takes on the
way. A merge `(u, v)` with text `v` to the right can only happen while the last piece is `u`, and only
if its rank is not above that of the merge that BPE performs next inside `s` at that time. Those `v` are
the *hazards* on the right; those on the left mirror them. A look-ahead and a look-behind that refuse
the hazards make the cut exact, whatever stands further away.

Characters outside the vocabulary never merge. As bytes, or as the unknown token, they also keep their
neighbours apart, so next to them any cut is exact, and a string may begin, end or consist of them. Where
the model deletes such a character, its neighbours meet and may merge: nothing is cut out there.

The engine tries the expression at every place of a text where one of the strings could begin, so these places must be
few, and a few steps must decide at most of them. A string that begins with a letter begins behind a sign,
a space or a line break, and the expression looks for *those* (`SIGNS`); otherwise the engine would try every
letter. What all strings share is asserted once, at the end; what rarely refuses a place, deep in the tree.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache

from vocabext.tokenizer.scheme import SPACE_MARK

WORD_CHARACTER = r"[\p{L}\p{M}\p{N}]"
# Letters of scripts that put no space between words: Hiragana and Katakana; Han, with its extensions.
SPACELESS_RANGES = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
SPACELESS = "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in SPACELESS_RANGES)
_SPACELESS = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in SPACELESS_RANGES) + "]")
# Letters of Thai and Lao, Myanmar, Khmer, which put no space between words either.
_SOUTH_EAST = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
UNSPACED = SPACELESS + r"\x{E00}-\x{EFF}\x{1000}-\x{109F}\x{1780}-\x{17FF}"
# A word ends where no other letter follows its last one, and no combining mark its last character.
WORD_END = (rf"(?!(?<=[\p{{L}}\p{{M}}\p{{N}}&&[^{UNSPACED}]]){WORD_CHARACTER}"
            rf"|(?<=[{UNSPACED}])\p{{M}})")
# What may stand in front of a word, besides the mark of a space. Only ASCII signs: the engine finds places to try by
# their first byte, and with other signs almost any byte could be the first one.
SIGNS = [chr(c) for c in range(128) if not chr(c).isalnum()]
# This matches nothing, any number of times. The engine finds places to try by what must stand at a known distance
# behind them. Behind this expression distances are unknown, so the engine goes by what stands in front of it.
NO_FURTHER = r"[^\x{0}-\x{10FFFF}]*"
# The engine tries up to so many alternatives one after the other. More are halved, and each half looks at the next
# character first; not where few strings go on, since hardly any text comes there, and nested groups load slowly.
MAX_BRANCHES, MIN_HALVED = 6, 30
# How many expressions get a name.
MAX_DEFINITIONS = 16
# The look-behind comes after so many characters: most places of a text have failed by then.
LOOK_BEHIND_AT = 4


def holds_spaceless(text: str) -> bool:
    """Tell whether a text has a letter of a script that puts no space between words."""
    return bool(_SPACELESS.search(text))


@dataclass(frozen=True)
class Hazards:
    """Texts with which, where they stand next to a string, a merge across its edge could happen."""

    left: frozenset[str]
    right: frozenset[str]


class MergeTable:
    """The merges of a BPE model, indexed by both sides, to find those that could cross the edge of a string."""

    def __init__(self, merges: Sequence[tuple[str, str]], vocabulary: Mapping[str, int]) -> None:
        """Index the merges.

        Args:
            merges: Pairs in rank order.
            vocabulary: Token to id; a character that is not in it never merges.
        """
        self.ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
        self.vocabulary = vocabulary
        self._by_left: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self._by_right: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for (left, right), rank in self.ranks.items():
            self._by_left[left].append((rank, right))
            self._by_right[right].append((rank, left))
        self.hazards = cache(self.hazards)  # type: ignore[method-assign]

    def hazards(self, text: str) -> Hazards:
        """Return the texts that, standing next to `text`, could be merged with a part of it."""
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
    return "".join(c if c.isalnum() or c == SPACE_MARK else rf"\x{{{ord(c):X}}}" for c in text)


def character_class(characters: Iterable[str]) -> str:
    """Return a class that matches any of the characters, or an empty string for none."""
    inside = "".join(escape(c) for c in sorted(set(characters)))
    return f"[{inside}]" if inside else ""


class Definitions:
    """Expressions that are written once and called by name wherever they are needed.

    Reading thousands of copies of a few guards takes most of the time of loading a folder. But every name makes the
    search slower, called or not (docs/decisions/tokenizer-speed.md), so only the expressions that save most get one.
    """

    def __init__(self, written: str = "") -> None:
        """Begin with no expression.

        Args:
            written: The expressions so far, whose names are not used again.
        """
        self._expressions: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._free = (name for i in itertools.count() if f"<{(name := f'x{i}')}>" not in written)

    def call(self, expression: str) -> str:
        """Return a call of an expression; an empty string for an empty one."""
        if not expression:
            return ""
        if expression not in self._names:
            name = self._names[expression] = next(self._free)
            self._expressions[name] = expression
        return rf"\g<{self._names[expression]}>"

    def written_out(self, expression: str) -> str:
        """Return an expression with the definitions of what it calls in front of it."""
        if not self._expressions:
            return expression
        calls = re.compile(r"\\g<(" + "|".join(self._expressions) + ")>")
        counts = Counter(calls.findall("".join((expression, *self._expressions.values()))))
        saved = {name: (count - 1) * len(self._expressions[name]) for name, count in counts.items()}
        kept = sorted(filter(saved.get, saved), key=lambda name: (-saved[name], name))[:MAX_DEFINITIONS]

        def inline(text: str) -> str:
            return calls.sub(lambda m: m[0] if m[1] in kept else inline(self._expressions[m[1]]), text)

        written = "".join(f"(?<{name}>{inline(self._expressions[name])})" for name in kept)
        # The engine skips a group with {0} in one step.
        return (f"(?:{written}){{0}}" if written else "") + inline(expression)


def prefix_tree(guards: Mapping[str, str], refused: Mapping[str, str] | None = None, behind_first: str = "") -> str:
    """Return a regex that matches the longest of the given strings whose guard holds.

    Args:
        guards: String to a zero-width assertion that must hold at its end (may be empty).
        refused: First character to a character class; no match begins behind one of the class.
        behind_first: An expression to put behind the first character of every string.
    """
    root = _Node()
    for text, guard in guards.items():
        node = root
        node.count += 1
        for character in text:
            node = node.children.setdefault(character, _Node())
            node.count += 1
        node.guard = guard
    return _render(root, "", refused or {}, behind_first)


@dataclass
class _Node:
    """A place in a tree of prefixes.

    Attributes:
        children: What follows, by the next character.
        count: How many strings go through it.
        guard: The guard of the string that ends here, if one does.
    """

    children: "dict[str, _Node]" = field(default_factory=dict)
    count: int = 0
    guard: str | None = None


def _render(node: _Node, prefix: str, refused: Mapping[str, str], behind_first: str = "") -> str:
    # First the branches with most strings: most text goes there.
    children = sorted(node.children.items(), key=lambda item: (-item[1].count, item[0]))
    branches = [_branch(character, child, prefix, refused, behind_first) for character, child in children]
    if node.guard is None:
        return f"(?:{_choice(branches)})" if len(branches) > 1 else _choice(branches)
    own = node.guard + (_behind(refused, prefix) if len(prefix) < LOOK_BEHIND_AT else "")
    # The string itself comes last, so that a longer one wins.
    return f"(?:{_choice(branches)}|{own})" if branches else own


def _branch(
    literal: str, node: _Node, prefix: str, refused: Mapping[str, str], behind_first: str
) -> tuple[str, str, int]:
    """Return the first character of a branch, its expression, and how many strings are in it."""
    first, count = literal, node.count
    while len(node.children) == 1 and node.guard is None:  # a chain without a branch is one literal
        ((character, node),) = node.children.items()
        literal += character
    text = prefix + literal
    behind = _behind(refused, text) if len(prefix) < LOOK_BEHIND_AT <= len(text) else ""
    return first, escape(first) + behind_first + escape(literal[1:]) + behind + _render(node, text, refused), count


def _behind(refused: Mapping[str, str], text: str) -> str:
    """Return the assertion, at the end of a text, that a refused character does not stand in front of it."""
    characters = refused.get(text[:1])
    return f"(?<!{characters}{escape(text)})" if characters else ""


def _choice(branches: Sequence[tuple[str, str, int]]) -> str:
    """Join branches with different first characters, the likeliest first, into one expression."""
    total, before, at = sum(count for *_, count in branches), 0, 0
    if len(branches) <= MAX_BRANCHES or total < MIN_HALVED:
        return "|".join(expression for _, expression, _ in branches)
    while at == 0 or (at < len(branches) - 1 and 2 * before + branches[at][2] < total):
        before += branches[at][2]
        at += 1
    return "|".join(f"(?={character_class(first for first, *_ in half)})(?:{_choice(half)})" if len(half) > 1
                    else _choice(half) for half in (branches[:at], branches[at:]))


def whole_text_expression(keys: Sequence[str], table: MergeTable, *, drops_unknown: bool = False,
                          at_start: bool = False) -> str:
    """Return an expression that finds keys where BPE sees the whole text and a cut around them is exact.

    Args:
        keys: The new strings, as the BPE model spells them.
        table: The base merges.
        drops_unknown: Whether the model deletes characters that it does not know. Their two
            neighbours then meet and may merge, so a key must not stand next to one.
        at_start: Whether to find, only at the start of a text, the keys that elsewhere need a sign or space in front.

    Returns:
        The expression; one that never matches if there is nothing to find.
    """
    known = {token for token in table.vocabulary if len(token) == 1} if drops_unknown else None
    unknown = _all_but(known) if known is not None else ""
    definitions = Definitions()
    # `before`: the characters that a key may not stand behind. `shared`: those that all keys with its first character
    # have in common.
    before = {key: {text[-1] for text in table.hazards(key).left} for key in keys}
    shared: dict[str, set[str]] = {}
    for key in keys:
        shared[key[0]] = shared.get(key[0], before[key]) & before[key]
    # Characters that the model deletes may stand between the characters of a hazard.
    between = f"{definitions.call(unknown)}*+" if unknown else ""
    guards = {key: definitions.call(_refuse_following(key, table.hazards(key).right, between))
              + _behind({key[0]: character_class(before[key] - shared[key[0]])}, key) for key in keys}
    words = {key: guard for key, guard in guards.items() if in_word(key[0])}
    first = rf"\A{prefix_tree(words)}" if at_start and words else ""
    found = first if at_start else _anywhere(guards, words, shared, known)
    if not found:
        return r"(?!)"
    front, back = (f"(?<!{unknown})", f"(?!{unknown})") if unknown else ("", "")
    return definitions.written_out(f"{front}(?:{found}){WORD_END}{back}")


def _anywhere(guards: Mapping[str, str], words: Mapping[str, str], shared: Mapping[str, Set[str]],
              known: Set[str] | None) -> str:
    """Join the trees of the keys such that the engine is done with most places of a text, spaces above all, early.

    Args:
        guards: Key to the assertion at its end.
        words: Those of the keys that begin with a letter or number.
        shared: First character of keys to the characters behind which none of them is looked for.
        known: The characters that the model does not delete, if it deletes some.
    """
    refused = {first: character_class(characters) for first, characters in shared.items()}
    spaced = {key: guard for key, guard in guards.items() if key[0] == SPACE_MARK}
    others = {key: guard for key, guard in guards.items() if key not in spaced and key not in words}
    behind_mark = {key: guard for key, guard in words.items() if SPACE_MARK not in shared[key[0]]}
    opening = character_class(c for c in SIGNS if (known is None or c in known)
                              and any(c not in shared[key[0]] for key in words))
    found = []
    if behind_mark and any(key[-1] == SPACE_MARK for key in guards):
        # The mark in front of a word may be the end of the string that was found just before.
        found.append(rf"\G(?<={SPACE_MARK}){prefix_tree(behind_mark)}")
    if others:
        firsts = character_class(key[0] for key in others)
        found.append(f"(?={firsts})(?:{prefix_tree(others, refused, NO_FURTHER)})")
    if opening:
        firsts = character_class(key[0] for key in words)
        found.append(rf"{opening}(?={firsts})\K{NO_FURTHER}{prefix_tree(words, refused)}")
    if spaced:
        found.append(prefix_tree(spaced, refused))
    if behind_mark:
        firsts = character_class(key[0] for key in behind_mark)
        found.append(rf"{SPACE_MARK}{NO_FURTHER}(?={firsts})\K{prefix_tree(behind_mark)}")
    return "|".join(found)


def _all_but(characters: Set[str]) -> str:
    return f"[^{character_class(characters)}]" if characters else r"[\x{0}-\x{10FFFF}]"


def _refuse_following(key: str, hazards: Iterable[str], between: str) -> str:
    # WORD_END covers the ASCII ones; for others the two Unicode tables might disagree.
    rest = {text for text in hazards if not (in_word(key[-1]) and text[0].isascii() and text[0].isalnum())}
    minimal = {text for text in rest if not any(text[:n] in rest for n in range(1, len(text)))}
    singles = character_class(text for text in minimal if len(text) == 1)
    longer = sorted(between.join(map(escape, text)) for text in minimal if len(text) > 1)
    parts = [part for part in (singles, *longer) if part]
    return f"(?!{'|'.join(parts)})" if parts else ""


def in_word(character: str) -> bool:
    """Tell whether a character belongs to a word that only a space or a sign ends."""
    return character.isalnum() and not holds_spaceless(character) and not _SOUTH_EAST.match(character)
