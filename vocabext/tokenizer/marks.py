"""Spaces that the splitting of byte-level BPE puts in front of a text (`add_prefix_space`).

The first word of a text then has the ids that it has after a space; so has the first word behind an added token,
since those cut a text into sections before it is split. Only a space at the beginning is enough to keep the mark away.

Putting the mark there is a step of its own for us. What extends the splitting goes behind it, and looks at a text that
has its mark; without that step the splitting does what it does to text inside a longer one. Behind a step that cuts,
each part of the text gets a mark, wherever it stands.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from vocabext.tokenizer.scheme import in_sequence

# What `add_prefix_space` does, and nothing else. (A reader that rebuilds a lone `ByteLevel` from the settings of
# tokenizer_config.json leaves this one alone.)
SPACE_IN_FRONT = {"type": "Metaspace", "replacement": " ", "prepend_scheme": "always", "split": False}


def taken_apart(steps: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the same splitting in steps of which those of bytes put nothing in front of the text."""
    for step in steps:
        if step.get("add_prefix_space"):
            yield SPACE_IN_FRONT
            yield {**step, "add_prefix_space": False}
        else:
            yield step


def cuts(step: dict[str, Any]) -> bool:
    """Tell whether a step cuts text."""
    if step["type"] == "ByteLevel":
        return bool(step["use_regex"])
    return step["type"] != "Metaspace" or bool(step["split"])


def inside(steps: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield steps that split a text as the given ones split it inside a longer one."""
    has_cut = False
    for step in steps:
        yield step if has_cut and step.get("prepend_scheme") != "first" else unmarked(step)
        has_cut = has_cut or cuts(step)


def unmarked(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step that puts no mark anywhere."""
    return {**step, "prepend_scheme": "never"} if step["type"] == "Metaspace" else step


def pre_tokenizer_of(steps: Sequence[dict[str, Any]]) -> Any:
    """Return the pre-tokenizer that takes the given steps."""
    spec = {"version": "1.0", "added_tokens": [], "pre_tokenizer": in_sequence(steps),
            "model": {"type": "BPE", "vocab": {}, "merges": []}}
    return Tokenizer.from_str(json.dumps(spec)).pre_tokenizer
