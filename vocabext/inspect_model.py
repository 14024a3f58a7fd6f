"""What a model is, as far as its vocabulary is concerned: nothing is changed, no weights are loaded."""

from dataclasses import dataclass
from pathlib import Path

from vocabext.checkpoint import DTYPE_BYTES, open_checkpoint, resolve_model
from vocabext.errors import TokenizerError
from vocabext.manifest import MANIFEST_NAME, has_manifest, read_manifest


@dataclass(frozen=True)
class Inspection:
    """What `vocabext inspect` says about a model.

    Attributes:
        folder: The model folder.
        architecture: The model class.
        num_parameters: Parameters, a tied head counted once.
        weight_bytes: Size of the stored tensors.
        num_shards: Safetensors files.
        dtype: Type of the embedding, as safetensors spells it.
        hidden_size: Width of a row (D).
        tied: Whether the head is the embedding.
        vocab_tensors: Stored names of the tensors with one row per token id.
        num_rows: Rows stored (V).
        num_used_ids: Ids the tokenizer addresses (U); None if that cannot be read off.
        num_free_rows: Rows that new tokens can take before the matrix grows; None as above.
        bytes_per_new_row: What a new token costs once the matrix grows, over all vocabulary tensors.
        tokenizer_kind: Its kind; None if it cannot be extended.
        extension: What can be added to the tokenizer, or why nothing can.
        num_new_tokens: New tokens if this is an expanded checkpoint already, else 0.
        base: What it was expanded from; None if it was not.
    """

    folder: Path
    architecture: str
    num_parameters: int
    weight_bytes: int
    num_shards: int
    dtype: str
    hidden_size: int
    tied: bool
    vocab_tensors: tuple[str, ...]
    num_rows: int
    num_used_ids: int | None
    num_free_rows: int | None
    bytes_per_new_row: int
    tokenizer_kind: str | None
    extension: str
    num_new_tokens: int
    base: str | None


def inspect_model(model: str, *, trust_remote_code: bool = False) -> Inspection:
    """Read what a model's headers, config, tokenizer and manifest say.

    Args:
        model: A folder or hub id.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The findings. A tokenizer that cannot be extended is a finding, not an error.

    Raises:
        UsageError: If `model` is neither folder nor hub id.
        CheckpointError: If the folder is damaged or its parts contradict each other.
    """
    from vocabext.tokenizer import load_tokenizer

    folder = resolve_model(model)
    checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    manifest = read_manifest(folder) if has_manifest(folder) else None
    # What an expansion has put into the tokenizer may be of no kind that can be extended again.
    num_used, kind = None if manifest is None else manifest.first_new_id + len(manifest.tokens), None
    try:
        tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
        num_used, kind, extension = tokenizer.num_used_ids, tokenizer.kind, tokenizer.describe()
    except TokenizerError as error:
        extension = f"none: {error}"
    return Inspection(
        folder=folder, architecture=checkpoint.names.architecture, num_parameters=checkpoint.names.num_parameters,
        weight_bytes=checkpoint.weight_bytes, num_shards=len(checkpoint.shards), dtype=checkpoint.dtype,
        hidden_size=checkpoint.hidden_size, tied=checkpoint.tied, vocab_tensors=checkpoint.vocab_tensors,
        num_rows=checkpoint.vocab_size, num_used_ids=num_used,
        num_free_rows=max(0, checkpoint.vocab_size - num_used) if num_used is not None else None,
        bytes_per_new_row=sum(checkpoint.hidden_size * DTYPE_BYTES[checkpoint.tensors[name].dtype]
                              for name in checkpoint.vocab_tensors),
        tokenizer_kind=kind, extension=extension,
        num_new_tokens=len(manifest.tokens) if manifest is not None else 0,
        base=manifest.base.model if manifest is not None else None)


def expanded_note(inspection: Inspection) -> str:
    """Say in a few words whether the model is an expanded checkpoint already."""
    if inspection.base is None:
        return f"no ({MANIFEST_NAME} is absent)"
    return f"yes: {inspection.num_new_tokens:,} new tokens over {inspection.base}"
