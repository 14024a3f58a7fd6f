"""Texts that look like special tokens, of this tokenizer or of others, and must not become plain ones.

Programs, and people, take `<s>` or `[PAD]` for what it is elsewhere: a template writes it, a filter cuts it out, a
converter gives it a meaning. As a plain token with a row of its own it would be all of that by accident.
"""

import re
import unicodedata
from collections.abc import Collection

# What stands between brackets in the special tokens of published models, without the brackets and a slash.
NAMES = (
    "s", "pad", "unk", "bos", "eos", "sos", "eot", "eod", "eop", "sop", "cls", "sep", "g?mask", "endoftext",
    "startoftext", "inst", "sys", "tools?", "think", "image", "audio", "video", r"unused[ -]?\d+", r"reserved[ -]?\d+",
    r"control[ -]?\d+", r"extra[ -]?id[ -]?\d+", "suf", "mid", "fim",
)
# Lower-case words joined by underscores between angle brackets: no tag of HTML is called so. The same in square ones.
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
        added: The added tokens of a tokenizer. What differs from one of them in numbers or in the case of its letters
            only looks like it, where brackets or the like mark it as one: a plain word is no shape.
    """
    marked = (content.strip() for content in added)
    own = {re.sub(r"\d+", r"\\d+", re.escape(text)) for text in marked if len(text) > 2
           and not (text[0].isalnum() or text[-1].isalnum()) and any(map(str.isalnum, text))}
    return re.compile("|".join((*SHAPES, *sorted(own))), re.IGNORECASE | re.DOTALL)


def look_alike(text: str, expression: re.Pattern[str]) -> str | None:
    """Return the part of a text that looks like a special token, also one in wide letters; None if there is none."""
    found = expression.search(text) or expression.search(unicodedata.normalize("NFKC", text))
    return found and found[0]
