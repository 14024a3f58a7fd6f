"""What a model's config says about its size: context, cache of keys and values.

A wrapper (vision, audio) keeps the language model's own config in `text_config`; that one counts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vocabext.checkpoint.folder import read_json

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
OTHER_CACHES = ("kv_lora_rank", "ssm_cfg", "mamba_d_state")
CACHE_DTYPE_BYTES = 2  # vLLM keeps keys and values in the model's 16-bit type unless told otherwise


def read_config(folder: Path) -> dict[str, Any]:
    """Read the language model's config of a model folder."""
    return text_config(read_json(folder / "config.json"))


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that describes the language model."""
    return dict(config.get("text_config") or config)


def context_length(folder: Path) -> int | None:
    """Return how many tokens a model's context holds, None if its config does not say."""
    config = read_config(folder)
    return next((int(config[name]) for name in CONTEXT_NAMES if isinstance(config.get(name), int)), None)


def num_layers(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers, None if the config does not say."""
    return _first(config, "num_hidden_layers", "n_layer", "num_layers")


def attention_width(config: Mapping[str, Any]) -> int | None:
    """Return heads times head size: the width of queries, None if the config does not say."""
    hidden, heads = _first(config, "hidden_size", "n_embd"), _first(config, "num_attention_heads", "n_head")
    if hidden is None or not heads:
        return None
    return heads * int(config.get("head_dim") or hidden // heads)


def cache_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Return the bytes of keys and values that one token occupies in a 16-bit cache.

    Returns:
        None for a config without plain attention: compressed, linear or mixed caches are not guessed.
    """
    config = text_config(config)
    layers, width, heads = num_layers(config), attention_width(config), _first(config, "num_attention_heads", "n_head")
    if not layers or not width or not heads or any(name in config for name in OTHER_CACHES):
        return None
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        return None
    cached = int(config.get("num_key_value_heads") or heads)
    return 2 * layers * cached * (width // heads) * CACHE_DTYPE_BYTES


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)
