"""Text that hurts tokenizers.

What breaks an extension is what stands next to a new token: something that merges with it, normalizes
it, splits it elsewhere, or looks like it. So half of the parts of each text are new tokens (whole, cut,
or in another shape), and the other half is drawn from everything that is known to go wrong. Worst of
all is a neighbour that makes a vocabulary entry across the edge: behind `" are rat"` that is `"ed"`.
"""

import random
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from vocabext.tokenizer import BaseTokenizer
from vocabext.tokens import Expansion

SIGNS = "abzAZ019.,;:!?'’\"()[]{}-_/\\<>|@#&*+=%$^~`"
# The last two are how tokenizers write a space; in a text they are characters like others.
SPACES = (" ", " ", " ", "\t", "\n", "\r", "\r\n", "\u00a0", "\u2003", "\u2028", "\u3000", "\u0085", "\u2581",
          "\u0120")
INVISIBLE = ("\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u200e", "\u200f", "\u202e", "\u2066",
             "\u2069", "\ufe0e", "\ufe0f", "\U000e0061", "\ufffd", "\uffff")
COMBINING = ("\u0301", "\u0308", "\u0323", "\u030a", "\u0345", "\u093f", "\u0e34", "\u064b", "\u05b8", "\u20dd",
             "\u3099")
WORDS = ("é", "e\u0301", "ß", "ﬁ", "ı", "İ", "Å", "Ω", "漢字", "한국", "\u1112\u1161\u11ab", "ไทย", "हिन्दी", "Привет",
         "Ж", "سلام", "لا", "שָׁלוֹם", "ـع", "ნ", "½", "²", "Ⅷ", "１２", "٣٤", "€", "中", "'s", "’re", "'LL",
         "naïve")
EMOJI = ("😀", "👍🏽", "👨\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇩🇪", "🇩", "1\ufe0f\u20e3", "❤\ufe0f",
         "🧑🏿\u200d🚀", "☺")
PLANES = (0, 0, 0, 1, 1, 2, 3, 14, 15, 16)
MAX_OVERLAP = 4  # characters of a new token that an entry across its edge begins or ends with
MAX_PARTS, MAX_SPACES, LONG_WORD = 6, 40, 1_500

Draw = Callable[[random.Random], str]


class Adversary:
    """Generates text for one base tokenizer and its new tokens."""

    def __init__(self, base: BaseTokenizer, expansion: Expansion) -> None:
        """Look at what can stand next to each other.

        Args:
            base: The base tokenizer, for its added tokens and its vocabulary.
            expansion: The new tokens.
        """
        self.tokens = [token.token for token in expansion.tokens]
        self.added = list(base.added) or ["<s>"]
        texts = (base.scheme.key_text(key) for key in base.vocabulary)
        self.entries = [text for text in texts if text and "\ufffd" not in text]

    def texts(self, count: int, seed: int) -> Iterator[str]:
        """Yield some texts; the same for the same seed.

        Args:
            count: How many.
            seed: Seed of the choice.
        """
        rng = random.Random(seed)
        draws, weights = zip(*self._draws, strict=True)
        for _ in range(count):
            if rng.random() < 0.01:
                yield self._long_text(rng)
                continue
            others = iter(rng.choices(draws, weights, k=MAX_PARTS))
            parts = [rng.choice(self.tokens) if rng.random() < 0.4 else next(others)(rng)
                     for _ in range(rng.randint(1, MAX_PARTS))]
            yield "".join(_reshape(part, rng) if rng.random() < 0.2 else part for part in parts)

    @cached_property
    def _draws(self) -> list[tuple[Draw, int]]:
        """How to draw each sort of neighbour, and how often."""
        added = self.added
        return [
            (self._across_an_edge, 8), (_one_of(self.entries), 4),
            (lambda rng: "".join(rng.choices(self.entries, k=rng.randint(2, 4))), 4),
            (_one_of(SPACES), 3), (lambda rng: " " * rng.randint(1, MAX_SPACES), 1), (_one_of(SIGNS), 5),
            (_one_of(WORDS), 3), (_one_of(COMBINING), 2), (_one_of(INVISIBLE), 2), (_one_of(EMOJI), 1),
            (_any_character, 2), (lambda rng: chr(rng.choice((rng.randrange(32), rng.randrange(127, 160)))), 1),
            (_one_of(added), 2), (lambda rng: f" {rng.choice(added)} ", 1),
            (lambda rng: f"<0x{rng.randrange(256):02X}>", 1), (_one_of(["<0x0A>", "<0x0a>", "0x0A>", "<0x"]), 1),
        ]

    def _across_an_edge(self, rng: random.Random) -> str:
        """Return a new token and a neighbour that, with its end or its beginning, makes a vocabulary entry."""
        token, overlap = rng.choice(self.tokens), rng.randint(1, MAX_OVERLAP)
        behind, in_front = self._completions
        if rng.random() < 0.5:
            return token + rng.choice(behind.get(token[-overlap:]) or [""])
        return rng.choice(in_front.get(token[:overlap]) or [""]) + token

    @cached_property
    def _completions(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """What completes an end of a new token to a vocabulary entry, and what completes a beginning."""
        lengths = range(1, MAX_OVERLAP + 1)
        ends = {token[-n:] for token in self.tokens for n in lengths}
        beginnings = {token[:n] for token in self.tokens for n in lengths}
        behind, in_front = defaultdict(list), defaultdict(list)
        for entry in self.entries:
            for n in range(1, min(MAX_OVERLAP + 1, len(entry))):
                if entry[:n] in ends:
                    behind[entry[:n]].append(entry[n:])
                if entry[-n:] in beginnings:
                    in_front[entry[-n:]].append(entry[:-n])
        return behind, in_front

    def _long_text(self, rng: random.Random) -> str:
        """Return one very long word, or nothing but spaces."""
        length = rng.randint(1, LONG_WORD)
        words = [rng.choice(self.tokens).replace(" ", "") for _ in range(3)]
        return rng.choice([
            "".join(rng.choices([*words, "a", "é"], k=length // 8)), "".join(rng.choices(words[0] or "a", k=length)),
            rng.choice(SPACES) * (length // 8), " " * length + rng.choice(self.tokens), rng.choice("aA1.é中") * length,
        ])


def _one_of(texts: Sequence[str]) -> Draw:
    return lambda rng: rng.choice(texts)


def _any_character(rng: random.Random) -> str:
    """Draw a code point of any plane, assigned or not; surrogates are no characters."""
    while True:
        character = chr((rng.choice(PLANES) << 16) + rng.randrange(1 << 16))
        if unicodedata.category(character) != "Cs":
            return character


def _reshape(part: str, rng: random.Random) -> str:
    """Return a piece of a text, or the text in another shape."""
    start = rng.randint(0, len(part))
    cut = part[start : rng.randint(start, len(part))]
    decomposed = unicodedata.normalize("NFD", part)
    return rng.choice([cut, part[:start], part.upper(), part.strip(), part.title(), part[::-1], part * 2, decomposed])
