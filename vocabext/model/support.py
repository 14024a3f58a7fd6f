"""What can be done with a model: one answer for every verb, found before any work.

What makes a folder no model that tokens can be added to is found while it is opened (`open_checkpoint`). Here
is what depends on more than the folder's own parts: whether its rows are enough for its tokenizer, and whether
the model can be loaded and run on this machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vocabext.checkpoint.architecture import read_config
from vocabext.checkpoint.folder import (
    ADAPTER_CONFIG,
    INDEX_NAME,
    PICKLE_PATTERNS,
    Checkpoint,
    open_checkpoint,
    read_json,
)
from vocabext.checkpoint.named_ids import MAX_MISSING_ROWS
from vocabext.checkpoint.vocabulary import QUANTISED_FILES, quantisation
from vocabext.errors import CheckpointError, UsageError, in_one_line

WITHOUT_LOADING = "`distill --method mean` and `patch` extend it without loading it"


@dataclass(frozen=True)
class Support:
    """What can be done with a model; where something cannot, why not.

    Attributes:
        patch: Adding tokens and rows: `mine`, `distill --method mean`, `patch`, `verify`.
        run: Running it on rows: `distill`, `eval`.
    """

    patch: str | None
    run: str | None


def check_patchable(folder: Path, first_new_id: int, *, num_new: int = 1, trust_remote_code: bool = False
                    ) -> Checkpoint:
    """Open a model, and refuse one whose vocabulary cannot be extended.

    Args:
        folder: The model folder.
        first_new_id: Id of the first new token (U).
        num_new: New tokens (N).
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        CheckpointError: If it cannot, or the folder is damaged.
    """
    checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    check_room(checkpoint, first_new_id, num_new)
    return checkpoint


def check_room(checkpoint: Checkpoint, first_new_id: int, num_new: int) -> None:
    """Refuse a model that has far fewer rows than its tokenizer has ids, or no ids free for new tokens.

    Args:
        checkpoint: The base.
        first_new_id: Id of the first new token (U).
        num_new: New tokens (N).

    Raises:
        CheckpointError: If so.
    """
    if first_new_id > checkpoint.vocab_size + MAX_MISSING_ROWS:
        raise CheckpointError(
            f"the tokenizer has {first_new_id} ids but the embedding matrix has only {checkpoint.vocab_size} rows; "
            "this tokenizer belongs to another checkpoint"
        )
    reserved, last = checkpoint.names.first_reserved_id, first_new_id + num_new - 1
    if reserved is not None and last >= reserved:
        raise CheckpointError(
            f"{checkpoint.names.architecture} takes ids from {reserved} on for images or sounds, and the new tokens "
            f"would have the ids {first_new_id} to {last}; extend the text-only model of this family"
        )


def holds_weights(folder: Path) -> bool:
    """Tell whether a folder is meant as a model, and not as a tokenizer alone."""
    return any(True for pattern in ("*.safetensors", INDEX_NAME, ADAPTER_CONFIG, *PICKLE_PATTERNS)
               for _ in folder.glob(pattern))


def check_loads(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a model that transformers cannot load here.

    Raises:
        CheckpointError: If its configuration cannot be read.
        UsageError: If it cannot.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    for check in (_check_adapter, _check_index, _check_quantiser):
        check(folder, config)


def check_runs(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a model that cannot be loaded here, or not be run on rows.

    Raises:
        CheckpointError: If its configuration cannot be read.
        UsageError: If it cannot.
    """
    from vocabext.model.frozen import check_folder_runs_on_rows

    check_loads(folder, trust_remote_code=trust_remote_code)
    check_folder_runs_on_rows(folder, trust_remote_code=trust_remote_code)


def support(checkpoint: Checkpoint, first_new_id: int | None, *, trust_remote_code: bool = False,
            no_tokenizer: str | None = None) -> Support:
    """Say what can be done with a model that could be opened.

    Args:
        checkpoint: The model.
        first_new_id: Id of the first new token (U); None if it has none that can be extended.
        trust_remote_code: Whether code that comes with the model may run.
        no_tokenizer: Why its tokenizer cannot be extended, if so.
    """
    patch = no_tokenizer or why_not(lambda: None if first_new_id is None else check_room(checkpoint, first_new_id, 1))
    run = why_not(lambda: check_runs(checkpoint.folder, trust_remote_code=trust_remote_code))
    return Support(patch, patch or run)


def why_not(check: Callable[[], object]) -> str | None:
    """Return with which words a check refuses a model; None if it does not."""
    try:
        check()
    except (CheckpointError, UsageError) as error:
        return str(error)
    return None


# -- what keeps a whole model from being loaded ---------------------------------------------------------------------

def _check_adapter(folder: Path, config: Any) -> None:
    from transformers.utils import is_peft_available

    if (folder / ADAPTER_CONFIG).is_file() and is_peft_available():
        raise UsageError(f"{folder} has an adapter beside the model ({ADAPTER_CONFIG}), which transformers loads with "
                         "it here, where peft is installed, and others do not; merge it, or move it elsewhere")


def _check_index(folder: Path, config: Any) -> None:
    if (folder / INDEX_NAME).is_file() and not isinstance(read_json(folder / INDEX_NAME).get("metadata"), dict):
        raise UsageError(f"{folder / INDEX_NAME} has no metadata, without which transformers loads no shards; add "
                         f'"metadata": {{"total_size": {_stored_bytes(folder)}}} to it; {WITHOUT_LOADING}')


def _stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _check_quantiser(folder: Path, config: Any) -> None:
    from transformers.quantizers.auto import AutoHfQuantizer

    method = quantisation(read_json(folder / "config.json"))
    if method is None:
        described = [name for name in QUANTISED_FILES if (folder / name).is_file()]
        if described:
            raise UsageError(f"{folder} is quantised as {described[0]} says, but its config.json has no "
                             f"quantization_config, by which transformers would load it; {WITHOUT_LOADING}")
        return
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None)
    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # a package or a device that is missing, or a method it does not know
        reason = in_one_line(error)
        raise UsageError(f"{folder} is quantised by {method}, and transformers cannot load it here: {reason}; "
                         f"{WITHOUT_LOADING}") from None
