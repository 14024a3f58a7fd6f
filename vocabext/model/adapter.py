"""The adapter: LoRA on every linear layer of the body, by peft.

This is the only importer of `peft`.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from vocabext.errors import MissingExtraError, UsageError, in_one_line
from vocabext.model.frozen import FrozenModel

RATIO = 1.0  # of lora_alpha to the rank


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "heal") from None
    return peft


def require_peft() -> None:
    """Check that peft is installed.

    Raises:
        MissingExtraError: If it is not.
    """
    _peft()


def add_adapter(model: FrozenModel, rank: int, seed: int) -> Any:
    """Put a fresh adapter into a model, which computes as before until it is trained.

    Args:
        model: The model; its linear layers are replaced in place.
        rank: Of the update of each layer.
        seed: Of the first values.

    Returns:
        The peft model around it.

    Raises:
        UsageError: If peft finds nothing in the model that it can adapt.
    """
    peft = _peft()
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=rank, lora_alpha=rank * RATIO, target_modules="all-linear", lora_dropout=0.0,
                               bias="none", task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it takes layers as they lie (GPT-2), and fused experts not at all
            return peft.get_peft_model(model.model, settings)
    except (ValueError, TypeError) as error:
        raise UsageError(f"peft cannot adapt {type(model.model).__name__}: {in_one_line(error)}") from None


def adapter_tensors(adapter: Any) -> dict[str, torch.Tensor]:
    """Return the trained tensors by name."""
    return {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}


def save_adapter(adapter: Any, folder: Path, model_name: str) -> None:
    """Write a plain peft folder.

    Args:
        adapter: The peft model.
        folder: Where; made.
        model_name: The model that it belongs to, for `adapter_config.json`.
    """
    for settings in adapter.peft_config.values():
        settings.base_model_name_or_path = model_name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about rows, which are in the checkpoint
        adapter.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in


def load_adapter(model: FrozenModel, folder: Path) -> Any:
    """Put a saved adapter into a model, switched on.

    Raises:
        UsageError: If it is no adapter of this model.
    """
    peft = _peft()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in `add_adapter`
            found = peft.PeftModel.from_pretrained(model.model, str(folder), is_trainable=False)
    except Exception as error:  # peft and safetensors raise many kinds
        raise UsageError(f"{folder} is no adapter of {type(model.model).__name__}: {in_one_line(error)}") from None
    found.eval().requires_grad_(False)
    return found
