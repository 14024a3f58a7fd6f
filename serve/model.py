"""What serving asks of a model folder: its tokenizer to count with, its size, and whether it may be served.

`vocabext.tokenizer` takes tokenizers only that can be extended; `Encoder` takes any that encodes. In the config of a
wrapper (vision, audio), `text_config` describes the language model.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vocabext.checkpoint.folder import ADAPTER_CONFIG, read_json
from vocabext.checkpoint.manifest import (
    ADAPTER_FOLDER,
    MANIFEST_NAME,
    ORIGINALS_FOLDER,
    has_manifest,
    read_manifest,
)
from vocabext.checkpoint.served import difference
from vocabext.checkpoint.verdicts import VERIFY_NAME, verified_files
from vocabext.errors import CheckpointError, UsageError
from vocabext.files.atomic import read_object
from vocabext.tokenizer import encode_with_places, encoding, load_hf_tokenizer

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
OTHER_CACHES = ("kv_lora_rank", "ssm_cfg", "mamba_d_state")
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for --max-lora-rank
CACHE_DTYPE_BYTES = 2  # vLLM keeps keys and values in the model's 16-bit type unless told otherwise


class Encoder:
    """Encodes text without the special tokens that frame a prompt."""

    def __init__(self, backend: Any, num_ids: int) -> None:
        """Take over a `tokenizers.Tokenizer`; its padding and truncation are switched off."""
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.num_ids = num_ids

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of many texts, encoded on all cores."""
        with encoding(texts):
            return [found.ids for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def cut(self, text: str) -> list[tuple[str, int]]:
        """Cut a text where its tokens end, into pairs (text, token id).

        A token that is only some of a character's bytes joins the token that completes the character.
        """
        cut = encode_with_places(self.backend, [text])[0]
        parts: list[tuple[str, int]] = []
        position = 0
        for token_id, (_, end) in zip(cut.ids, cut.offsets, strict=True):
            if end > position:
                parts.append((text[position:end], int(token_id)))
                position = end
        if position < len(text):  # a normalizer dropped the end
            parts.append((text[position:], -1))
        return parts


def load_encoder(folder: Path, *, trust_remote_code: bool = False) -> Encoder:
    """Load the effective tokenizer of a model folder.

    Raises:
        TokenizerError: If there is none, or only a slow one.
    """
    hf = load_hf_tokenizer(folder, trust_remote_code=trust_remote_code)
    return Encoder(hf.backend_tokenizer, len(hf))


def read_config(folder: Path) -> dict[str, Any]:
    """Read the language model's config of a model folder."""
    return text_config(read_json(folder / "config.json"))


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that describes the language model."""
    return dict(config.get("text_config") or config)


def context_length(folder: Path) -> int | None:
    """Return how many tokens a model's context holds, None if its config does not say."""
    return _first(read_config(folder), *CONTEXT_NAMES)


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


def card_of(folder: Path, verification: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """Return what a model folder says of itself, as lines of a table; `verification` replaces its verify.json."""
    if not has_manifest(folder):
        return [("vocabulary", "as published (no vocabext.json)")]
    manifest = read_manifest(folder)
    last = manifest.first_new_id + len(manifest.tokens) - 1
    verification = _verification(folder) if verification is None else verification
    verified = "not yet; run: vocabext verify"
    if verification is not None:
        verified = _verified_now(folder, verification) if verification.get("passed") is True else "FAILED"
    # Without its adapter, a healed folder reads and writes its new tokens no better than with rows alone.
    adapter = [("adapter", "in the weights" if manifest.merged else f"{ADAPTER_FOLDER}/, served by `serve start "
                "--adapter` only")] * bool(manifest.adapter)
    return [
        ("base", manifest.base.model),
        ("new tokens", f"{len(manifest.tokens):,} (ids {manifest.first_new_id} to {last})"),
        ("rows made by", manifest.method),
        *adapter,
        ("made", manifest.created),
        ("verified", verified),
    ]


def require_verified(folder: Path, *, check_digests: bool = False) -> None:
    """Refuse an expanded folder that `verify` has not passed as it is now; a base folder has nothing to verify.

    With `check_digests`, the weights are read and their digests compared; else only their sizes.

    Raises:
        CheckpointError: If verify.json is missing, unreadable, made by an older version, says that a check failed, or
            records other files than those of the folder.
    """
    if not has_manifest(folder):
        if (folder / ORIGINALS_FOLDER).is_dir():
            raise CheckpointError(f"{folder} is an expanded model ({ORIGINALS_FOLDER}/) without its {MANIFEST_NAME}; "
                                  "copy the folder again, or pass --unverified to serve it all the same")
        return
    base = read_manifest(folder).base.model
    command = shlex.join(["vocabext", "verify", str(folder), "--against", base])
    advice = f"run: {command}, or pass --unverified to serve it all the same"
    verification = _verification(folder)
    if verification is None:
        raise CheckpointError(f"{folder} is an expanded model that was not verified (no {VERIFY_NAME}); {advice}")
    if verification.get("passed") is not True:
        checks = verification.get("checks")
        failed = [str(check.get("name")) for check in (checks if isinstance(checks, list) else [])
                  if isinstance(check, dict) and check.get("verdict") == "fail"]
        raise CheckpointError(f"{folder} failed verification ({', '.join(failed) or 'see ' + VERIFY_NAME}); {advice}")
    if (recorded := verified_files(verification)) is None:
        raise CheckpointError(f"{VERIFY_NAME} of {folder} was made by an older version, which did not record the files "
                              f"that it verified; {advice}")
    if (odd := difference(folder, recorded, all_digests=check_digests)) is not None:
        raise CheckpointError(f"{folder} is not as it was verified: {odd}; {advice}")


def _verification(folder: Path) -> dict[str, Any] | None:
    document = read_object(folder / VERIFY_NAME) or {}
    return document if document.get("artifact") == "verify" else None


def _verified_now(folder: Path, verification: Mapping[str, Any]) -> str:
    """Say that a folder has passed, and what was changed since then as far as sizes and small files show."""
    recorded = verified_files(verification)
    odd = None if recorded is None else difference(folder, recorded, all_digests=False)
    return "passed" if odd is None else f"passed, but changed since: {odd}"


def adapter_flags(folder: Path, name: str) -> list[str]:
    """Return the flags with which vLLM serves the adapter of a healed folder beside the folder itself.

    Requests choose by the model's name: `name` gets the adapter, the folder's own does not.

    Raises:
        UsageError: If the folder has no adapter, or it holds it in its weights, or vLLM takes none of its rank.
    """
    found = read_manifest(folder) if has_manifest(folder) else None
    if found is not None and found.merged:
        raise UsageError(f"{folder} holds its adapter in its weights; serve it without --adapter")
    if found is None or not found.adapter:
        raise UsageError(f"{folder} has no adapter; make a folder that has one with: vocabext heal {folder}")
    rank = int(read_json(folder / ADAPTER_FOLDER / ADAPTER_CONFIG)["r"])
    if rank > LORA_RANKS[-1]:
        raise UsageError(f"the adapter of {folder} has rank {rank}, and vLLM takes {LORA_RANKS[-1]} at most; heal "
                         "again with a lower --rank, or with --merge")
    most = next(size for size in LORA_RANKS if size >= rank)
    return ["--enable-lora", "--max-lora-rank", str(most), "--lora-modules", f"{name}={folder / ADAPTER_FOLDER}"]
