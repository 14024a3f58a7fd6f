"""Texts that look like special tokens, of this tokenizer or of others, and must not become new tokens.

A template writes `<s>` or `[PAD]`, a filter cuts it out, a converter gives it a meaning. They would do so to a new
token of that text as well.
"""

import re
import unicodedata
from collections.abc import Collection

# The words between the brackets of special tokens in published models.
NAMES = (
    "s", "pad", "unk", "bos", "eos", "sos", "eot", "eod", "eop", "sop", "cls", "sep", "g?mask", "endoftext",
    "startoftext", "inst", "sys", "tools?", "think", "image", "audio", "video", r"unused[ -]?\d+", r"reserved[ -]?\d+",
    r"control[ -]?\d+", r"extra[ -]?id[ -]?\d+", "suf", "mid", "fim",
)
# The third and fourth: lower-case words, joined by underscores, in brackets; no tag of HTML has an underscore.
SHAPES = (
    r"<\s*[|\uff5c].{0,64}?[|\uff5c]\s*>",
    r"<0x[0-9a-f]{2}>",
    r"</?[a-z]+(?:[_\u2581][a-z0-9]+)+/?>",
    r"\[/?[a-z]+(?:_[a-z0-9]+)+\]",
    rf"<<?\s*/?(?:{'|'.join(NAMES)})\s*/?>>?",
    rf"\[\s*/?(?:{'|'.join(NAMES)})\s*\]",
)


def look_alikes(added: Collection[str]) -> re.Pattern[str]:
    """Return an expression for what looks like a special token.

    Args:
        added: The added tokens of a tokenizer. A text looks like one of them if it differs only in numbers and in the
            case of letters; added tokens without a sign at both ends, such as plain words, do not count.
    """
    marked = (content.strip() for content in added)
    own = {re.sub(r"\d+", r"\\d+", re.escape(text)) for text in marked if len(text) > 2
           and not (text[0].isalnum() or text[-1].isalnum()) and any(map(str.isalnum, text))}
    return re.compile("|".join((*SHAPES, *sorted(own))), re.IGNORECASE | re.DOTALL)


def look_alike(text: str, expression: re.Pattern[str]) -> str | None:
    """Return the part of a text that looks like a special token, also one in wide letters; None if there is none."""
    found = expression.search(text) or expression.search(unicodedata.normalize("NFKC", text))
    return found and found[0]
