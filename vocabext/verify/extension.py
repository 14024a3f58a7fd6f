"""The tokenizer that transformers loads, part by part, against the extension made anew from the base.

A fault that shows in one text of a million does not depend on luck here: the same tokens are added to
the base once more, and what comes out must be what the folder gives, down to flags and expressions.
"""

import json
from typing import Any

from vocabext import __version__
from vocabext.tokenizer import extend
from vocabext.tokenizer.scheme import OURS
from vocabext.verify.pair import FaultError, NotCheckedError, Pair

# Added tokens come first: a difference there explains others.
PARTS = ("added_tokens", "model", "normalizer", "pre_tokenizer", "post_processor", "decoder")
CONTEXT = 20  # characters shown on each side of a difference
ABSENT = object()


def same_as_extension(pair: Pair) -> str:
    """Compare every part of the tokenizer, and name the first difference."""
    from transformers import PreTrainedTokenizerFast

    hf = pair.new_tokenizer.hf
    if type(hf) is not PreTrainedTokenizerFast:
        raise FaultError(f"transformers loads the tokenizer as {type(hf).__name__}, a class that rebuilds it from its "
                         "own code; in tokenizer_config.json tokenizer_class must be PreTrainedTokenizerFast")
    wanted = json.loads(extend(pair.base_tokenizer, pair.expansion.tokens).backend.to_str())
    found = json.loads(pair.new_tokenizer.backend.to_str())
    if OURS not in json.dumps(found["pre_tokenizer"]):  # a comment in its expression, which 0.2 did not write
        wanted["pre_tokenizer"] = json.loads(json.dumps(wanted["pre_tokenizer"]).replace(OURS, ""))
    odd = [part for part in PARTS if wanted[part] != found[part]]
    if odd and pair.manifest.vocabext_version != __version__ and _same_tokens_otherwise(wanted, found, pair):
        raise NotCheckedError(f"made by vocabext {pair.manifest.vocabext_version}, which adds the same tokens in "
                              f"another way than {__version__}; what that does to text is checked below")
    if odd:
        also = f"; differences in {', '.join(odd[1:])}, too" if odd[1:] else ""
        raise FaultError(_describe(odd[0], wanted[odd[0]], found[odd[0]]) + also)
    return f"{len(PARTS)} parts are the base's, extended by {pair.expansion.num_new:,} tokens"


def _same_tokens_otherwise(wanted: dict[str, Any], found: dict[str, Any], pair: Pair) -> bool:
    """Tell whether two extensions differ only in how text gets to the same entries, behind the same base merges."""
    if any(wanted[part] != found[part] for part in PARTS if part not in ("model", "pre_tokenizer")):
        return False
    ways = ("merges", "ignore_merges")
    models = [{key: value for key, value in spec["model"].items() if key not in ways} for spec in (wanted, found)]
    base = json.loads(pair.base_tokenizer.backend.to_str())["model"].get("merges", [])
    return models[0] == models[1] and found["model"].get("merges", [])[: len(base)] == base


def _describe(part: str, wanted: Any, found: Any) -> str:
    if part == "added_tokens":
        return _describe_added(wanted, found)
    return _difference(wanted, found, part) or f"{part} differs in the order of its fields"


def _describe_added(wanted: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    """Say which added token is too many, missing, or has another id or flag."""
    before, after = ({token["content"]: token for token in tokens} for tokens in (wanted, found))
    for content in [c for c in after if c not in before]:
        return f"{content!r} (id {after[content]['id']}) is an added token, which matches inside longer words"
    for content in [c for c in before if c not in after]:
        return f"the added token {content!r} (id {before[content]['id']}) is missing"
    for content, token in before.items():
        if difference := _difference(token, after[content], "its"):
            return f"the added token {content!r} differs: {difference}"
    return "the added tokens come in another order"


def _difference(wanted: Any, found: Any, path: str) -> str | None:
    """Say where two JSON values differ first, what is there, and what should be; None if they are equal."""
    if wanted == found:
        return None
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.get("type") == found.get("type"):
        return _difference_of_dicts(wanted, found, path)
    if isinstance(wanted, list) and isinstance(found, list):
        return _difference_of_lists(wanted, found, path)
    if isinstance(wanted, str) and isinstance(found, str):
        return _difference_of_texts(wanted, found, path)
    return f"{path} is {_show(found)}, it should be {_show(wanted)}"


def _difference_of_dicts(wanted: dict[str, Any], found: dict[str, Any], path: str) -> str | None:
    # Settings say more than entries: `ignore_merges` comes before the vocabulary.
    keys = sorted(wanted.keys() | found.keys(), key=lambda key: (isinstance(wanted.get(key), dict | list), key))
    template = {"its": "{} {}", "model.vocab": "{}[{!r}]"}.get(path, "{}.{}")
    parts = (_difference(wanted.get(key, ABSENT), found.get(key, ABSENT), template.format(path, key)) for key in keys)
    return next((part for part in parts if part), None)


def _difference_of_lists(wanted: list[Any], found: list[Any], path: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), min(len(wanted), len(found)))
    there, here = (items[at] if at < len(items) else ABSENT for items in (wanted, found))
    alike = isinstance(there, dict) and isinstance(here, dict) and there.keys() == here.keys()
    said = _difference(there, here, f"{path}[{at}]") if alike else None
    counts = "" if len(wanted) == len(found) else f" ({len(found):,} instead of {len(wanted):,})"
    return (said or f"{path}[{at}] is {_show(here)}, it should be {_show(there)}") + counts


def _difference_of_texts(wanted: str, found: str, path: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), min(len(wanted), len(found)))
    start, stop = max(0, at - CONTEXT), at + CONTEXT
    here, there = (f"{'…' * (start > 0)}{text[start:stop]}{'…' * (stop < len(text))}" for text in (found, wanted))
    where = f" from character {at} on" if start else ""
    return f'{path}{where} is "{here}", it should be "{there}"'


def _show(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 4 * CONTEXT else f"{text[: 4 * CONTEXT]}…"
