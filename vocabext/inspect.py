"""What a model is, as far as its vocabulary is concerned. `inspect` changes nothing and loads no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocabext.checkpoint.folder import Checkpoint, open_checkpoint, resolve_model
from vocabext.checkpoint.manifest import MANIFEST_NAME, expanded_from, has_manifest, read_manifest
from vocabext.checkpoint.vocabulary import quantisation, quantisation_settings
from vocabext.errors import CheckpointError, TokenizerError
from vocabext.model.support import Support, support

if TYPE_CHECKING:
    from vocabext.tokenizer import BaseTokenizer

ROW_STEP = 64  # a matrix grows by multiples of this, or of the largest smaller power of two that divides its rows
SAMPLES = ("The quick brown fox jumps over 2 lazy dogs.\n  It's naïve!", "def f(x):\n\treturn x  # ¿por qué? 漢字")
# Settings of a quantisation that say how many bits a weight has.
BITS_KEYS = ("bits", "num_bits", "weight_bits")


@dataclass(frozen=True)
class RowTensorFacts:
    """A stored tensor with one row per token id.

    Attributes:
        name: Its stored name.
        role: `embedding`, `head`, `head bias`, `per-layer embedding` or `further table`.
        dtype: Its type, as safetensors spells it.
        num_rows: Its rows.
        row_bytes: Size of one row.
    """

    name: str
    role: str
    dtype: str
    num_rows: int
    row_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What `vocabext inspect` says about a model.

    Attributes:
        folder: The model folder.
        architecture: The model class.
        model_type: The type that config.json names.
        text_model_type: The type of the language model inside a wrapper for images or sound; None if there is none.
        num_parameters: Parameters, a tied head counted once.
        weight_bytes: Size of the stored tensors.
        num_shards: Safetensors files.
        dtype: Type of the embedding, as safetensors spells it.
        hidden_size: Width of a row (D).
        tied: Whether the head is the embedding.
        quantisation: How the other weights are quantised; None if they are not.
        vocab_tensors: Stored names of the tensors with one row per token id.
        row_tensors: The same with their sizes.
        num_rows: Rows stored (V).
        num_used_ids: Ids that the tokenizer addresses or a file names (U): the first new id; None if it is unknown.
        num_free_rows: Rows that new tokens can take before the matrix grows; None if `num_used_ids` is.
        row_step: The matrix grows by multiples of so many rows.
        first_reserved_id: The first id that means an image or sound, and cannot be a new token; None if there is none.
        bytes_per_new_row: What a new token costs once the matrix grows, over all vocabulary tensors.
        tokenizer_kind: The kind of its tokenizer; None if it cannot be extended.
        tokenizer_class: The class that transformers makes of it; None if it cannot be loaded.
        tokenizer_warning: How that class cuts text otherwise than tokenizer.json says; None if it does not.
        extension: What can be added to the tokenizer, or why nothing can.
        num_new_tokens: New tokens if this is an expanded checkpoint already, else 0.
        base: What it was expanded from; None if it was not.
        support: What can be done with it, or why not.
        reserved: Ids behind the tokenizer's own that a file names; new tokens go behind them.
        given_rows: Ids of special tokens, or named by a file, that have no row; `patch` gives them a silent one.
        out_of_reach: Ids that a file names and that lie far behind all rows.
    """

    folder: Path
    architecture: str
    model_type: str
    text_model_type: str | None
    num_parameters: int
    weight_bytes: int
    num_shards: int
    dtype: str
    hidden_size: int
    tied: bool
    quantisation: str | None
    vocab_tensors: tuple[str, ...]
    row_tensors: tuple[RowTensorFacts, ...]
    num_rows: int
    num_used_ids: int | None
    num_free_rows: int | None
    row_step: int
    first_reserved_id: int | None
    bytes_per_new_row: int
    tokenizer_kind: str | None
    tokenizer_class: str | None
    tokenizer_warning: str | None
    extension: str
    num_new_tokens: int
    base: str | None
    support: Support
    reserved: dict[int, str]
    given_rows: dict[int, str]
    out_of_reach: dict[int, str]


def inspect_model(model: str, *, trust_remote_code: bool = False) -> Inspection:
    """Read what a model's headers, config, tokenizer and manifest say.

    Args:
        model: A folder or hub id.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The findings. A tokenizer that cannot be extended is a finding, not an error.

    Raises:
        UsageError: If `model` is neither folder nor hub id.
        CheckpointError: If the folder is damaged, or its parts contradict each other.
        UnsupportedError: If models of its kind cannot get new rows.
    """
    from vocabext.tokenizer import given_rows, load_tokenizer

    folder = resolve_model(model)
    checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    manifest = read_manifest(folder) if has_manifest(folder) else None
    # `load_tokenizer` may refuse the tokenizer of an expanded checkpoint, so its manifest says how many ids it has.
    num_used_ids, kind = None if manifest is None else manifest.first_new_id + len(manifest.tokens), None
    class_name = warning = no_tokenizer = None
    reserved: dict[int, str] = {}
    given: dict[int, str] = {}
    out_of_reach: dict[int, str] = {}
    try:
        tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
        num_used_ids, kind, extension = tokenizer.first_new_id, tokenizer.kind, tokenizer.describe()
        class_name, warning = type(tokenizer.hf).__name__, _tokenizer_warning(folder, tokenizer)
        reserved, out_of_reach = tokenizer.reserved, tokenizer.named.out_of_reach(tokenizer.num_own_ids)
        given = given_rows(tokenizer, checkpoint.vocab_size)
    except (TokenizerError, CheckpointError) as error:
        extension, no_tokenizer = f"none: {error}", str(error)
    if (said := expanded_from(folder)) is not None:
        extension, no_tokenizer = f"none: {said}", said
    rows = _row_tensors(checkpoint)
    inner = checkpoint.config.get("text_config")
    return Inspection(
        folder=folder, architecture=checkpoint.names.architecture,
        model_type=str(checkpoint.config.get("model_type") or "not named"),
        text_model_type=str(inner.get("model_type") or "not named") if isinstance(inner, dict) else None,
        num_parameters=checkpoint.names.num_parameters, weight_bytes=checkpoint.weight_bytes,
        num_shards=len(checkpoint.shards), dtype=checkpoint.dtype, hidden_size=checkpoint.hidden_size,
        tied=checkpoint.tied, quantisation=_quantisation(checkpoint.config),
        vocab_tensors=tuple(row.name for row in rows), row_tensors=rows,
        num_rows=checkpoint.vocab_size, num_used_ids=num_used_ids,
        num_free_rows=max(0, checkpoint.vocab_size - num_used_ids) if num_used_ids is not None else None,
        row_step=min(ROW_STEP, checkpoint.vocab_size & -checkpoint.vocab_size),
        first_reserved_id=checkpoint.names.first_reserved_id,
        bytes_per_new_row=sum(row.row_bytes for row in rows), tokenizer_kind=kind, tokenizer_class=class_name,
        tokenizer_warning=warning, extension=extension,
        num_new_tokens=len(manifest.tokens) if manifest is not None else 0,
        base=manifest.base.model if manifest is not None else None,
        support=support(checkpoint, num_used_ids, trust_remote_code=trust_remote_code, no_tokenizer=no_tokenizer),
        reserved=reserved, given_rows=given, out_of_reach=out_of_reach)


def _row_tensors(checkpoint: Checkpoint) -> tuple[RowTensorFacts, ...]:
    found = ((name, tensor.role, checkpoint.tensors[name]) for name, tensor in checkpoint.row_tensors.items())
    return tuple(RowTensorFacts(name, role, info.dtype, info.shape[0], info.row_bytes) for name, role, info in found)


def _quantisation(config: Mapping[str, Any]) -> str | None:
    """Return by which method, and to how many bits, a model is quantised; None if it is not."""
    bits = next(iter(_bits(quantisation_settings(config) or {})), None)
    return f"{quantisation(config)}, {bits} bits" if bits else quantisation(config)


def _bits(settings: Mapping[str, Any]) -> list[int]:
    """Return the numbers of bits that settings name, the outermost first."""
    found = [settings[key] for key in BITS_KEYS if isinstance(settings.get(key), int)]
    return found + [bits for value in settings.values() if isinstance(value, dict) for bits in _bits(value)]


def _tokenizer_warning(folder: Path, tokenizer: "BaseTokenizer") -> str | None:
    """Say how the tokenizer that transformers loads differs from tokenizer.json; None if it does not.

    Model classes rebuild the tokenizer from code of their own. A class that the file was not made for reads text
    wrongly, and everything built on it would be wrong.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    written = type(tokenizer.backend).from_file(str(path))
    written.no_padding()
    written.no_truncation()
    name = type(tokenizer.hf).__name__
    for text in SAMPLES:
        effective, meant = tokenizer.encode(text), written.encode(text, add_special_tokens=False).ids
        if effective == meant:
            continue
        read, kept = tokenizer.decode(effective), written.decode(meant, skip_special_tokens=False)
        if read.strip() != text and kept.strip() == text:
            return (f"the class {name}, which tokenizer_config.json or the model type names, breaks tokenizer.json: "
                    f"{text!r} comes back as {read!r}; set tokenizer_class to PreTrainedTokenizerFast first")
        return (f"transformers cuts text otherwise as {name} than tokenizer.json says: {text!r} is {len(effective)} "
                f"tokens instead of {len(meant)}; vocabext goes by transformers, as vLLM does")
    return None


def expanded_note(inspection: Inspection) -> str:
    """Say in a few words whether the model is an expanded checkpoint."""
    if inspection.base is None:
        return f"no ({MANIFEST_NAME} is absent)"
    return f"yes: {inspection.num_new_tokens:,} new tokens over {inspection.base}"
