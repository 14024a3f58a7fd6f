"""Which stored tensors have one row per token id, and which of them can be given more.

The model class knows the parameters (`vocabext.checkpoint.architecture`). `find_row_tensors` finds them among the
stored names, which may lack or have other prefixes, and refuses by its name what cannot be extended.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vocabext.checkpoint.architecture import EmbeddingNames, with_inner
from vocabext.checkpoint.shards import TensorInfo
from vocabext.errors import CheckpointError, UnsupportedError

FLOAT_DTYPES = ("F32", "F16", "BF16")
# What stored names of quantised weights have beside or instead of `NAME.weight`: GPTQ and AWQ, compressed-tensors and
# FP8, bitsandbytes, HQQ.
QUANTISED_PARTS = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv",
                   "weight_zero_point", "weight.absmax", "SCB", "W_q")
PACKED_DTYPES = ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
# Files that say how weights are quantised if config.json does not: of GPTQ, AWQ and ModelOpt.
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
EMBEDDING, HEAD, HEAD_BIAS, PER_LAYER, TABLE = (
    "embedding", "head", "head bias", "per-layer embedding", "further table")
# The bias of an output row without a token: its exponential is 0, and every float format can hold it.
SILENT_BIAS = -10_000.0
# vLLM 0.32 multiplies with the embedding in these classes, whatever the config says.
TIED_IN_VLLM = ("Gemma2ForCausalLM", "Gemma3nForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM")
# `verify` fails a new row this many times longer than the longest base row in use: it would win every softmax.
MAX_NORM_RATIO = 3.0


@dataclass(frozen=True)
class RowTensor:
    """A stored tensor with one row per token id.

    Attributes:
        role: `embedding`, `head`, `head bias`, `per-layer embedding` or `further table`.
        parameter: What the model class calls it.
        size_key: The config key that counts its rows.
    """

    role: str
    parameter: str
    size_key: str = "vocab_size"


def find_row_tensors(folder: Path, config: Mapping[str, Any], names: EmbeddingNames,
                     tensors: Mapping[str, TensorInfo]) -> dict[str, RowTensor]:
    """Find every stored tensor with a row per token id.

    Returns:
        The tensors by stored name: embedding, head, head bias, others. A tied model may store its embedding,
        its head, or both.

    Raises:
        CheckpointError: If a tensor is missing, has another shape than config.json implies, is quantised, or has a row
            per token id and no rule for new tokens.
    """
    wanted = [RowTensor(EMBEDDING, names.embedding), RowTensor(HEAD, names.head)]
    wanted += [RowTensor(HEAD_BIAS, names.head_bias)] if names.head_bias is not None else []
    wanted += [RowTensor(PER_LAYER if key == "vocab_size_per_layer_input" else TABLE, name, key)
               for name, key in names.tables.items()]
    found: dict[str, RowTensor] = {}
    for tensor in wanted:
        saved = names.saved.get(tensor.parameter, tensor.parameter)
        _refuse_quantised(saved, tensors)
        name = stored_name(saved, tensors) or stored_name(tensor.parameter, tensors)
        if name is not None:
            found[name] = tensor
    _check_complete(folder, names, {tensor.role for tensor in found.values()})
    for name, tensor in found.items():
        _check_shape(folder, name, tensors[name], tensor, names)
    _refuse_others(config, names, tensors, found)
    return found


def stored_name(parameter: str, tensors: Collection[str]) -> str | None:
    """Find a parameter among stored names, which may lack or have other prefixes (`model.`, `language_model.`).

    Raises:
        CheckpointError: If several names could mean it.
    """
    parts = parameter.split(".")
    for first in range(max(1, len(parts) - 1)):
        if (suffix := ".".join(parts[first:])) in tensors:
            return suffix
    tail = ".".join(parts[-2:])
    found = [name for name in tensors if name == tail or name.endswith(f".{tail}")]
    if len(found) > 1:
        raise CheckpointError(f"{parameter} may be stored as any of {', '.join(sorted(found))}; cannot tell which")
    return found[0] if found else None


def _refuse_quantised(parameter: str, tensors: Collection[str]) -> None:
    module = parameter.rsplit(".", 1)[0]
    # With the name of the module: `layers.0.mlp.up_proj.weight.absmax` is not a part of a head.
    tails = tuple(f"{module.rsplit('.', 1)[-1]}.{part}" for part in QUANTISED_PARTS)
    for name in tensors:
        if name in tails or name.endswith(tuple(f".{tail}" for tail in tails)):
            raise UnsupportedError(
                f"{module} is quantised (there is {name}), and rows cannot be added to quantised tensors; "
                "use a checkpoint whose embedding and head are not quantised"
            )


def _check_complete(folder: Path, names: EmbeddingNames, roles: Collection[str]) -> None:
    if EMBEDDING not in roles and not (names.tied and HEAD in roles):
        raise CheckpointError(f"{folder} stores no {names.embedding}; its weights are of another model")
    if not names.tied and HEAD not in roles:
        raise CheckpointError(
            f"the config of {folder} says that {names.head} is not tied to the embedding, but it is not "
            "stored; its weights are of another model"
        )


def _check_shape(folder: Path, name: str, info: TensorInfo, tensor: RowTensor, names: EmbeddingNames) -> None:
    if info.dtype not in FLOAT_DTYPES:
        raise UnsupportedError(f"{name} is stored as {info.dtype}, {_what_it_is(info.dtype)}; rows can be added to "
                               f"{', '.join(FLOAT_DTYPES)} only, {_way_out(info.dtype)}")
    wanted = names.shapes[tensor.parameter]
    if len(info.shape) == len(wanted) and info.shape[1:] == wanted[1:] and info.shape != wanted:
        raise CheckpointError(
            f"{folder / 'config.json'} says {tensor.size_key} {wanted[0]}, but {name} has {info.shape[0]} rows; "
            "the config belongs to another checkpoint"
        )
    if info.shape != wanted or not info.num_bytes:
        raise CheckpointError(
            f"{name} has shape {list(info.shape)}, but {folder / 'config.json'} describes {list(wanted)}; "
            "the weights are damaged or of another model"
        )


def _what_it_is(dtype: str) -> str:
    """Say what kind of numbers a stored dtype holds."""
    if dtype.startswith(("F4", "F6_", "F8", "I4", "I8", "U4", "U8")):
        return "quantised numbers"
    return {"F64": "numbers of double precision", "C64": "complex numbers", "BOOL": "truth values"}.get(
        dtype, "whole numbers" if dtype[0] in "IU" else "numbers that vocabext does not know")


def _way_out(dtype: str) -> str:
    if _what_it_is(dtype) == "quantised numbers":
        return "use a checkpoint whose embedding and head are not quantised"
    return "convert it to one of these first (transformers: from_pretrained with a dtype, then save_pretrained)"


def _refuse_others(config: Mapping[str, Any], names: EmbeddingNames, tensors: Mapping[str, TensorInfo],
                   found: Mapping[str, RowTensor]) -> None:
    """Refuse tensors that must grow with the vocabulary, and for which there is no rule."""
    odd = [name for parameter in sorted(names.odd) if (name := stored_name(parameter, tensors)) is not None]
    if odd:
        raise CheckpointError(f"{', '.join(odd[:3])} grows with the vocabulary, but not by a row per token, and there "
                              "is no rule for new tokens in it")
    rows = names.shapes[names.embedding][0]
    others = [name for name, info in tensors.items() if info.shape[:1] == (rows,) and name not in found]
    if others:  # the stored parts of a quantised weight do not have its axes
        packed = tuple(name.removesuffix(part) for name in tensors for part in QUANTISED_PARTS
                       if name.endswith(f".{part}"))
        others = [name for name in others
                  if tensors[name].dtype not in PACKED_DTYPES and not name.startswith(packed)]
    if others:
        fixed = {stored_name(parameter, tensors) for parameter in names.fixed}
        others = [name for name in others if name not in fixed]
    if others and rows not in other_dimensions(config):
        raise CheckpointError(
            f"{', '.join(sorted(others)[:3])} also {'has' if len(others) == 1 else 'have'} {rows} rows, as many as the "
            "vocabulary, and there is no rule for new tokens in it"
        )


def quantisation(config: Mapping[str, Any]) -> str | None:
    """Return the method by which a config says that a model is quantised; None if it is not."""
    settings = quantisation_settings(config)
    return None if settings is None else str(settings.get("quant_method") or "an unnamed method")


def quantisation_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a config says about quantisation; None if it says nothing."""
    found = (part.get("quantization_config") for part in with_inner(config))
    return next((settings for settings in found if isinstance(settings, dict)), None)


def other_dimensions(config: Mapping[str, Any]) -> set[int]:
    """Return the sizes of axes that a config implies, apart from the vocabulary.

    A tensor whose first axis has such a size may have as many rows as the vocabulary by accident. The question arises
    only for tensors that the model class does not have under their stored names, such as single experts.
    """
    sizes: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            sizes |= other_dimensions(value)
        elif type(value) is int and not key.startswith("vocab_size") and not key.endswith("_token_id"):
            sizes.add(value)
    hidden, inner, heads = (_count(config, key) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    kv_heads = _count(config, "num_key_value_heads") or heads
    head = _count(config, "head_dim") or (hidden // heads if heads else 0)
    # Some families store projections fused: query+key+value, gate+up.
    return sizes | {heads * head, kv_heads * head, (heads + 2 * kv_heads) * head, 2 * inner, 3 * hidden, 4 * hidden}


def _count(config: Mapping[str, Any], key: str) -> int:
    """Return an entry that is a number; some families have one per layer, in a list."""
    value = config.get(key)
    return value if type(value) is int else 0
