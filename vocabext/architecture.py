"""Which parameters of a model class hold the vocabulary: asked of the class, not guessed from names.

The class is built from `config.json` on the meta device, which allocates no weights: what comes back from
`get_input_embeddings` and `get_output_embeddings` is then looked up among its modules. Whether the two are
tied is read off the same way (they share one parameter), because the default of `tie_word_embeddings`
differs from class to class and many configs do not write it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vocabext.errors import CheckpointError


@dataclass(frozen=True)
class EmbeddingNames:
    """The vocabulary parameters of a model class, by the names the class gives them.

    Attributes:
        architecture: Name of the class, such as `LlamaForCausalLM`.
        embedding: The input embedding's weight.
        head: The output head's weight; None if the class has none.
        head_bias: The output head's bias; None if it has none.
        tied: Whether head and embedding are one parameter.
        num_parameters: Parameters of the whole model, a tied head counted once.
    """

    architecture: str
    embedding: str
    head: str | None
    head_bias: str | None
    tied: bool
    num_parameters: int


def embedding_names(folder: Path, *, trust_remote_code: bool = False) -> EmbeddingNames:
    """Build the model class of `folder` on the meta device and find its vocabulary parameters.

    Args:
        folder: A folder with a config.json; no weights are read.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The names, as in the model's `named_parameters()`.

    Raises:
        CheckpointError: If transformers does not know the architecture, or it has no input embedding.
    """
    model = _meta_model(folder, trust_remote_code=trust_remote_code)
    names = {id(module): name for name, module in model.named_modules()}
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        embedding, head = None, None
    if embedding is None or not hasattr(embedding, "weight") or id(embedding) not in names:
        raise CheckpointError(f"{type(model).__name__} in {folder} has no input embedding to add rows to")
    head_name = names.get(id(head)) if head is not None else None
    return EmbeddingNames(
        architecture=type(model).__name__,
        embedding=f"{names[id(embedding)]}.weight",
        head=f"{head_name}.weight" if head_name is not None else None,
        head_bias=f"{head_name}.bias" if getattr(head, "bias", None) is not None else None,
        tied=head is not None and head.weight is embedding.weight,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _meta_model(folder: Path, *, trust_remote_code: bool) -> Any:
    """Build the class that `architectures` names, or the causal LM of the model type, without weights."""
    # Imported here: --help must not pay for torch and transformers.
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        # A model inside a wrapper (text_config) is no AutoModelForCausalLM; its own class is.
        architectures = getattr(config, "architectures", None) or []
        named: Any = getattr(transformers, architectures[0], None) if architectures else None
        known = named is not None and getattr(named, "config_class", None) is type(config)
        with torch.device("meta"), _Quiet():
            if known and hasattr(named, "_from_config"):
                return named._from_config(config)
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a model class raises on a config it cannot use
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"cannot build the model class that {folder / 'config.json'} describes: {reason}"
        ) from error


class _Quiet:
    """Keep transformers' remarks about a model without weights off the terminal."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("transformers")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
