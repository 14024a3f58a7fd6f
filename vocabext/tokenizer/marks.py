"""Spaces that the splitting of byte-level BPE puts in front of a text (`add_prefix_space`).

The first word of a text then has the ids that it has after a space. So has the first word behind an added token,
since added tokens cut a text into sections before the splitting. A text that begins with a space gets no other one.

We make a step of its own of putting the space, or mark, there. Steps of an extension go behind it, and see text with
its mark. Without that step the splitting does what it does to text inside a longer one. A marking step behind a cut
puts a mark in front of each part, wherever the part stands.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from vocabext.tokenizer.scheme import in_sequence

# A step that does what `add_prefix_space` does, and nothing else. (Some readers rebuild a lone `ByteLevel` from the
# settings of tokenizer_config.json; they leave this step alone.)
SPACE_IN_FRONT = {"type": "Metaspace", "replacement": " ", "prepend_scheme": "always", "split": False}


def taken_apart(steps: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the same splitting with a step of its own, `SPACE_IN_FRONT`, for each `add_prefix_space`."""
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
