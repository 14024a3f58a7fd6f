"""Tensors, rows, config, and what the model computes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vocabext.checks.pair import FaultError, NotCheckedError, Pair

LOGIT_TOKENS = 64
PLAIN_TEXTS = ("The quick brown fox jumps over the lazy dog.", "1, 2, 3; (a) [b] {c}", "In the beginning",
               "    return x + 1\n", "¿Qué tal? Ça va. Привет, 世界!", "A list of things:\n- one\n- two")  # fmt: skip


def untouched_tensors(pair: Pair) -> str:
    """Compare the bytes of all tensors without a row per token."""
    old, new = set(pair.base.tensors), set(pair.new.tensors)
    if old != new:
        raise FaultError(f"missing tensors: {sorted(old - new)[:3]}, unexpected tensors: {sorted(new - old)[:3]}")
    names = sorted(old - set(pair.base.vocab_tensors))
    for name in names:
        a, b = pair.base.tensors[name], pair.new.tensors[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise FaultError(f"{name} is {a.dtype} {list(a.shape)} in the base and {b.dtype} {list(b.shape)} here")
        if pair.base.digest(name) != pair.new.digest(name):
            raise FaultError(f"the bytes of {name} differ from the base")
    return f"{len(names)} tensors, {sum(pair.base.tensors[n].num_bytes for n in names):,} bytes"


def old_rows(pair: Pair) -> str:
    """Compare the bits of all rows that belong to base ids, and of padding behind the new ones."""
    first, end = pair.expansion.first_new_id, pair.expansion.end_id
    kept = 0
    for name in pair.base.vocab_tensors:
        old_VD, new_VD = pair.base.read(name), pair.new.read(name)
        if old_VD.dtype != new_VD.dtype or old_VD.shape[1] != new_VD.shape[1]:
            raise FaultError(f"{name} is {old_VD.dtype} of width {old_VD.shape[1]} in the base, "
                             f"{new_VD.dtype} of width {new_VD.shape[1]} here")
        if len(old_VD) < first:
            raise FaultError(f"{name} has {len(old_VD)} rows in the base, but the new ids begin at {first}")
        if len(new_VD) < max(len(old_VD), end):
            raise FaultError(f"{name} has {len(new_VD)} rows; {max(len(old_VD), end)} are needed")
        for start, stop in ((0, first), (end, len(old_VD))):
            same = _bits(old_VD[start:stop]) == _bits(new_VD[start:stop])
            if not bool(same.all()):
                row = start + int((~same.flatten(1).all(1)).nonzero()[0])
                raise FaultError(f"row {row} of {name} differs from the base")
            kept += max(0, stop - start)
    return f"{kept:,} rows in {', '.join(pair.base.vocab_tensors)}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def new_rows(pair: Pair, max_norm_ratio: float) -> str:
    """Look for new rows that are no numbers, zero, or so long that they would win every softmax.

    Args:
        pair: The checkpoints.
        max_norm_ratio: How many times the length of the longest base row is too long.
    """
    first, end = pair.expansion.first_new_id, pair.expansion.end_id
    worst = 0.0
    for name in pair.new.vocab_tensors:
        matrix_VD = pair.new.read(name).float()
        new_N, old_U = matrix_VD[first:end].norm(dim=1), matrix_VD[:first].norm(dim=1)
        for i, norm in enumerate(new_N.tolist()):
            if not np.isfinite(norm) or norm == 0:
                raise FaultError(f"the row of {pair.expansion.tokens[i].token!r} in {name} has norm {norm}")
        ratio = float(new_N.max() / old_U.max())
        if ratio > max_norm_ratio:
            token = pair.expansion.tokens[int(new_N.argmax())].token
            raise FaultError(f"the row of {token!r} in {name} is {ratio:.1f} times as long as the longest base row")
        worst = max(worst, ratio)
    return f"{pair.expansion.num_new:,} rows, the longest {worst:.2f} times the longest base row"


def config(pair: Pair) -> str:
    """Compare config.json with the base's and with the stored rows."""
    old, new = _flat(pair.base.config), _flat(pair.new.config)
    changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
    wrong = {k for k in changed if k.split(".")[-1] != "vocab_size"}
    if wrong:
        key = min(wrong)
        raise FaultError(f"config.json: {key} is {new.get(key)!r}, in the base {old.get(key)!r}")
    sizes = {k: v for k, v in new.items() if k.split(".")[-1] == "vocab_size"}
    rows = {name: pair.new.tensors[name].shape[0] for name in pair.new.vocab_tensors}
    if len({*sizes.values(), *rows.values()}) != 1:
        raise FaultError(f"config.json says {sizes}, the stored rows are {rows}")
    last = pair.expansion.end_id - 1
    if last >= pair.new.vocab_size:
        raise FaultError(f"the last new id is {last}, but there are only {pair.new.vocab_size} rows")
    return f"vocab_size {pair.new.vocab_size:,} (base {pair.base.vocab_size:,}), last id {last:,}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}


def same_logits(pair: Pair, load_weights: bool) -> str:
    """Load both models and compare what they compute for text without new tokens.

    Args:
        pair: The checkpoints.
        load_weights: Whether to do it at all.
    """
    if not load_weights:
        raise NotCheckedError("loading the weights was switched off")
    prompts = _prompts(pair)
    if not prompts:
        raise NotCheckedError("all plain test sentences contain new tokens")
    (before, epsilon), (after, _) = (_logits(pair, new, list(prompts.values())) for new in (False, True))
    exact = True
    for text, old, new in zip(prompts, before, after, strict=True):
        exact &= torch.equal(old, new)
        # A wider head may be multiplied by another kernel, which rounds differently in the last place.
        if not torch.allclose(old, new, rtol=4 * epsilon, atol=4 * epsilon * float(old.abs().max())):
            raise FaultError(f"the logits of {text!r} differ by up to {float((old - new).abs().max()):.3g}")
    return f"{len(prompts)} texts without new tokens, {'bit-equal' if exact else 'equal up to rounding'}"


def _prompts(pair: Pair) -> dict[str, list[int]]:
    """Return the plain texts that hold no new token, as prompts."""
    prompts = {}
    for text in PLAIN_TEXTS:
        ids = pair.base_tokenizer.encode(text)
        framed = [*pair.base_tokenizer.prefix_ids, *ids][:LOGIT_TOKENS]
        if framed and pair.new_tokenizer.encode(text) == ids:
            prompts[text] = framed
    return prompts


def _logits(pair: Pair, new: bool, prompts: Sequence[list[int]]) -> tuple[list[torch.Tensor], float]:
    """Return the logits of base ids after each prompt, and the precision of the model."""
    from vocabext.model import load_model

    model = load_model(pair.folder if new else pair.base_folder, trust_remote_code=pair.trust_remote_code)
    with torch.no_grad():
        found = [model.model(torch.tensor([ids], device=model.device)).logits[0, :, : pair.expansion.first_new_id]
                 .float().cpu() for ids in prompts]  # fmt: skip
    return found, torch.finfo(model.dtype).eps
