"""Words of scripts that put no space between them (Chinese, Japanese), inside a chunk of byte-level BPE.

A split expression hands over a whole run of such letters as one chunk, so a word in it is not a chunk.
Inside a chunk BPE sees everything at once, as it does with whole texts, so a new word is a merge (`merges.py`). For a
word whose parts are no tokens the proof for whole texts (`boundaries.py`) applies to bytes: a splitting step cuts the
word out where no merge could cross its edges.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import pre_tokenizers

from vocabext.tokenizer.boundaries import MergeTable, character_class, escape, holds_spaceless, prefix_tree
from vocabext.tokenizer.scheme import split_step

# The alphabet of byte-level BPE: printable bytes are themselves, the others are numbered from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(b): b for b in _PRINTABLE}
_BYTES |= {chr(0x100 + i): b for i, b in enumerate(b for b in range(0x100) if b not in _PRINTABLE)}


def is_inner(text: str) -> bool:
    """Tell whether a text is a word that may stand inside a run of letters."""
    return text.isalpha() and all(holds_spaceless(character) for character in text)


def edges_of(key: str) -> tuple[bool, bool]:
    """Tell whether an entry may begin, and may end, with such a letter, or with a part of one."""
    data = bytes(_BYTES.get(c, 0) for c in key)
    whole = data.decode(errors="ignore")
    lead = data[:1] >= b"\xe3" if not whole or not data.startswith(whole[0].encode()) else holds_spaceless(whole[0])
    tail = data[-1:] >= b"\x80" if not whole or not data.endswith(whole[-1].encode()) else holds_spaceless(whole[-1])
    return lead, tail


def inner_step(words: Sequence[str], whole: Iterable[str], table: MergeTable) -> dict[str, Any] | None:
    """Return the splitting step that cuts words out of the chunks that hold them.

    Args:
        words: The words, each of them `is_inner`.
        whole: Other new tokens (phrases, mixed words), which the step leaves alone where they are a whole chunk.
        table: The merges of the base.

    Returns:
        The step; None if no word can be cut out anywhere.
    """
    guards = {word: guard for word in words if (guard := inner_guard(word, table)) is not None}
    if not guards:
        return None
    kept = [text for text in whole if holds_spaceless(text)]
    stays = rf"\A{prefix_tree(dict.fromkeys(kept, ''))}\z|" if kept else ""
    return split_step(f"{stays}(?={character_class(word[0] for word in guards)}){prefix_tree(guards)}")


def inner_guard(word: str, table: MergeTable) -> str | None:
    """Return the assertions, at the end of a word, under which a cut around it is exact; None if there are none."""
    spelled = str(pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(word)[0][0])
    hazards = table.hazards(spelled)
    before = set()
    for text in map(_bytes, hazards.left):
        if not _ends_whole(text):
            continue  # no text to the left ends inside a character
        if not (whole := text.decode(errors="ignore")):
            return None  # only the end of a character, which thousands of characters share
        before.add(whole[-1])
    after, refused = _refused(map(_bytes, hazards.right)), character_class(before)
    return (f"(?!{after})" if after else "") + (f"(?<!{refused}{escape(word)})" if refused else "")


def _refused(texts: Iterable[bytes]) -> str:
    """Return an expression for text that begins with one of the given texts, which may end inside a character."""
    alternatives: set[str] = set()
    singles: list[str] = []
    for text in texts:
        if 0x80 <= text[0] < 0xC0:
            continue  # no text to the right begins inside a character
        whole = text.decode(errors="ignore")
        rest = text[len(whole.encode()) :]
        if len(whole) == 1 and not rest:
            singles.append(whole)
        else:
            alternatives.add(escape(whole) + (_beginning_with(rest) if rest else ""))
    return "|".join([*([character_class(singles)] if singles else []), *sorted(alternatives)])


def _beginning_with(lead: bytes) -> str:
    """Return a class of the characters whose UTF-8 begins with the given bytes."""
    lowest = {0xE0: 0xA0, 0xF0: 0x90}.get(lead[0], 0x80) if len(lead) == 1 else 0x80
    highest = {0xED: 0x9F, 0xF4: 0x8F}.get(lead[0], 0xBF) if len(lead) == 1 else 0xBF
    missing = (2 if lead[0] < 0xE0 else 3 if lead[0] < 0xF0 else 4) - len(lead)
    first = (lead + bytes([lowest]) + b"\x80" * (missing - 1)).decode()
    last = (lead + bytes([highest]) + b"\xbf" * (missing - 1)).decode()
    return rf"[\x{{{ord(first):X}}}-\x{{{ord(last):X}}}]"


def _ends_whole(text: bytes) -> bool:
    """Tell whether bytes end where a character ends."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    decoder.decode(text)
    return decoder.getstate()[0] == b""


def _bytes(key: str) -> bytes:
    return bytes(_BYTES[c] for c in key)
