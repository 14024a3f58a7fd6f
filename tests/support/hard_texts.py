"""Strings that people want as tokens, and texts that hurt tokenizers."""

from collections.abc import Iterable

from vocabext.errors import TokenizerError
from vocabext.tokenizer import BaseTokenizer
from vocabext.tokens import NewToken

# What people want as tokens, by what is special about it.
WANTED = {
    "words": [" cardiac", " ureteral", " heartbeats"],
    "words without a space": ["cardiac", "heartbeat"],
    "capitalised words": [" Cardiac", "CARDIAC", "iPhones"],
    "phrases": ["signs and", " signs and symptoms", "Signs and symptoms", "... and", "½ cup", "№ 5"],
    "phrases with punctuation": ["mg/dL", " mg/dL", "e.g.", " (e.g.", "it's not", " the patient's", "don't know"],
    "numbers with units": [" 5 mg", "5 mg", " 10 mm Hg", "10 mm Hg", " 37.5 °C"],
    "code": ["self.assertEqual(", " self.assertEqual(", "i += 1", "===", "/*", "://"],
    "indentation": ["    return", "        self.", "\treturn", "):\n", "---\n", "\n        ", "\r\n"],
    "Cyrillic": [" сердечный", "сердечный приступ"],
    "Greek": [" καρδιακή", "οξεία καρδιακή"],
    "Arabic": [" القلبية", " مرض القلب"],
    "Hebrew": [" הלבבות", "שלום עולם"],
    "Devanagari": [" हृदय", "स्थिति", "हृदय रोग"],
    "Thai": ["โรคหัวใจ"],
    "Han": ["心脏病", "心臓病の"],
    "Hangul": [" 심장병", "심장 질환"],
    "emoji": ["👩\u200d⚕️", " 👨\u200d👩\u200d👧", "🫀🫀"],
    "combining characters": [" naïve cafés", " cafe\u0301s", "e\u0301te\u0301", "x\u0323\u0307y", "a\u200db\u200dc",
                             "ﬁbrillation"],
}
ALL_WANTED = [text for texts in WANTED.values() for text in texts]
FRAGMENTS = [
    *ALL_WANTED, *(t.strip() for t in ALL_WANTED), *(t[:-1] for t in ALL_WANTED), *(t[1:] for t in ALL_WANTED),
    *(f" {t}" for t in ALL_WANTED), *(t.upper() for t in ALL_WANTED),
    "<0x0A>", "<0x", "0A>", "<0xE2>", "<0x00>", "<unk>", "<s", "</s", "▁", "▁▁", "▁the", "Ġ", "Ċ", "Ġthe", "##",
    " ", "  ", "   ", "    ", " " * 9, " " * 70, "\n", "\r\n", "\n\n", "\r", "\t", "\t\t", "\v", "\u0085", "\u00a0",
    "\u3000", "\u2028", "\u200b", "\u200c", "\u200d", "\ufeff", "\u202e", "\u2067", "\u0301", "\u0345", "\ufe0f",
    "\x00", "\x7f", "\ufffd", "\U0001f3fd", "\U0010fffd", "\ue000", "'", "’", "'s", "'S", "'t", "’s", "``", "''", ".",
    ",", "-", "(", ")", "/", "_", "+", "=", ":", "//", "1", "12", "999", "1234", "½", "²", "٣", "५", "A", "É", "ß", "ſ",
    "İ", "ǆ", "ﬁ", "Ａ", "１", "ـ", "ال", "שָׁ", "ि", "्", "ุ", "ไทย", "한", "ᄒ", "ᅡ", "ᆫ", "語", "の", "ー", "👩", "🙂",
    "🇩🇪", "the", " the", "The", "heart", " heart", "s", "ed", "al", "x",
]


def possible(base: BaseTokenizer, wanted: Iterable[str] = ALL_WANTED) -> list[NewToken]:
    """The new tokens that a tokenizer can have."""
    tokens: dict[tuple[int, ...], NewToken] = {}
    for text in wanted:
        try:
            token = base.new_token(text)
        except TokenizerError:
            continue
        tokens.setdefault(token.run, token)
    return list(tokens.values())
