"""What the two models compute for text without new tokens."""

import math
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from vocabext.checkpoint.folder import Checkpoint
from vocabext.errors import in_one_line, lacks_memory
from vocabext.model.support import check_loads
from vocabext.verify.adapter import refuse_merged
from vocabext.verify.pair import FaultError, NotCheckedError, Pair
from vocabext.verify.plain import prompts

DEVICE = DTYPE = "auto"
MEMORY_FACTOR = 1.2  # what loading takes, in units of the weights
LOADED_AS_NUMBERS = ("F64", "F32", "F16", "BF16")  # what a model computes in another dtype than it is stored in


def same_logits(pair: Pair, load_weights: bool) -> str:
    """Load both models and compare what they compute for text without new tokens.

    Args:
        pair: The checkpoints.
        load_weights: Whether to do it at all.
    """
    refuse_merged(pair)
    if not load_weights:
        raise NotCheckedError("loading the weights was switched off")
    texts = prompts(pair)
    _check_memory(pair)
    num_rows = pair.base.vocab_size
    try:
        check_loads(pair.base_folder, trust_remote_code=pair.trust_remote_code)
        base = _load(pair, new=False)
        before = _logits(base, pair, texts.values())
    except Exception as error:  # a model class raises what it likes; what the base cannot do is no fault of ours
        if lacks_memory(error):
            raise
        raise NotCheckedError(f"the base itself cannot be run on text alone: {in_one_line(error)}") from None
    epsilon = torch.finfo(base.dtype).eps
    repeats = _all_equal(before, _logits(base, pair, texts.values()))
    del base
    model = _load(pair, new=True)
    try:
        after = _logits(model, pair, texts.values())
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if lacks_memory(error):
            raise  # says nothing about the folder
        raise FaultError(f"the base can be run on text, this folder cannot: {in_one_line(error)}") from None
    for text, old, new in zip(texts, before, after, strict=True):
        # A longer head may be multiplied by another kernel, which rounds differently in the last place.
        if not torch.allclose(old, new, rtol=4 * epsilon, atol=4 * epsilon * float(old.abs().max())):
            raise FaultError(f"the logits of {text!r} differ by up to {float((old - new).abs().max()):.3g}")
    if _all_equal(before, after):
        return f"{len(texts)} texts without new tokens, bit-equal"
    if not repeats:
        return f"{len(texts)} texts without new tokens, equal up to rounding; the base does not repeat its bits"
    # Multiplied by the same kernel, they have no excuse.
    _cut_head(model, num_rows)
    for text, old, new in zip(texts, before, _logits(model, pair, texts.values()), strict=True):
        if not torch.equal(old, new):
            raise FaultError(f"the logits of {text!r} are the base's up to rounding, but not to the last bit")
    return f"{len(texts)} texts without new tokens, bit-equal over the base's rows, up to rounding over all"


def _all_equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _check_memory(pair: Pair) -> None:
    """Refuse to begin what would be killed for its memory."""
    needed = int(MEMORY_FACTOR * _loaded_bytes(pair.new))
    if needed > (available := _available_bytes()):
        raise NotCheckedError(f"a loaded model takes {needed:,} bytes of memory, and {available:,} are available")


def _loaded_bytes(checkpoint: Checkpoint) -> int:
    """Return how much memory the weights take in the dtype they are loaded in, which need not be the stored one."""
    from vocabext.model.frozen import pick_device, pick_dtype

    size = pick_dtype(DTYPE, pick_device(DEVICE)).itemsize
    return sum(size * math.prod(info.shape) if info.dtype in LOADED_AS_NUMBERS else info.num_bytes
               for info in checkpoint.tensors.values())


def _available_bytes() -> int:
    """Return how much memory a model may take: a GPU's if there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def _load(pair: Pair, *, new: bool) -> Any:
    from vocabext.model.frozen import load_model

    loaded = load_model(pair.folder if new else pair.base_folder, device=DEVICE, dtype=DTYPE,
                        trust_remote_code=pair.trust_remote_code, complete=False, runs=False)
    for parameter in loaded.model.parameters():
        # Weights that stay in their file lie at any address, and matrix products may round by the address.
        parameter.data = parameter.data.clone()
    return loaded


def _cut_head(loaded: Any, num_rows: int) -> None:
    """Give the output head as many rows as the base's has."""
    head = loaded.model.get_output_embeddings()
    for parameter in head.parameters():
        parameter.data = parameter.data[:num_rows]


@torch.no_grad()
def _logits(loaded: Any, pair: Pair, rows: Any) -> list[torch.Tensor]:
    """Return the logits of base ids after each prompt."""
    end = min(pair.expansion.first_new_id, pair.base.vocab_size)  # some ids may have no row in the base
    inputs = (torch.tensor([ids], dtype=torch.long, device=loaded.device) for ids in rows)
    return [loaded.model(ids).logits[0, :, :end].float().cpu() for ids in inputs]
