"""Which parameters of a model class hold the vocabulary: asked of the class, not guessed from names.

The class is built from `config.json` on the meta device, which allocates no weights: what comes back from
`get_input_embeddings` and `get_output_embeddings` is then looked up among its modules. Whether the two are
tied is read off the same way (they share one parameter), because the default of `tie_word_embeddings`
differs from class to class and many configs do not write it.

Other tables with a row per token id (the per-layer embeddings of Gemma 3n and 4) are found by building the
class once more with a larger vocabulary: what has grown is one. That tells a table from a projection that
happens to have as many rows.
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vocabext.errors import CheckpointError, in_one_line

PROBE_ROWS = 64  # by which the vocabulary is made larger to see what grows


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
        shapes: Shapes of the parameters above and of `tables`, by name.
        saved: The names under which the class saves them, where these differ (`embed_out` for `lm_head`).
        tables: Further tables with a row per token id: name -> the config key that counts their rows.
        fixed: Parameters that have as many rows as the vocabulary by accident; they do not grow with it.
        odd: Parameters that grow with the vocabulary along another axis than the first, or by another number.
        first_reserved_id: Ids from here on mean images or sounds in this class; None if none do.
    """

    architecture: str
    embedding: str
    head: str | None
    head_bias: str | None
    tied: bool
    num_parameters: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    odd: frozenset[str] = frozenset()
    first_reserved_id: int | None = None


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
    config = read_config(folder, trust_remote_code=trust_remote_code)
    model = _meta_model(folder, config, trust_remote_code=trust_remote_code)
    names = {id(module): name for name, module in model.named_modules()}
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        embedding, head = None, None
    if embedding is None or not hasattr(embedding, "weight") or id(embedding) not in names:
        raise CheckpointError(f"{type(model).__name__} in {folder} has no input embedding to add rows to")
    head_name = names.get(id(head)) if head is not None else None
    found = [f"{names[id(embedding)]}.weight", f"{head_name}.weight" if head_name is not None else None,
             f"{head_name}.bias" if getattr(head, "bias", None) is not None else None]
    shapes = _shapes(model)
    tables, fixed, odd = _growing(folder, config, shapes, {name for name in found if name is not None},
                                  trust_remote_code=trust_remote_code)
    known = [name for name in (*found, *tables) if name is not None]
    return EmbeddingNames(
        architecture=type(model).__name__,
        embedding=str(found[0]), head=found[1], head_bias=found[2],
        tied=head is not None and head.weight is embedding.weight,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        shapes={name: shape for name, shape in shapes.items() if name in known}, saved=_saved_names(model, known),
        tables=tables, fixed=frozenset(fixed), odd=frozenset(odd), first_reserved_id=_first_reserved_id(config),
    )


# -- what grows with the vocabulary -------------------------------------------------------------------------------

def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _growing(folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]], known: set[str], *,
             trust_remote_code: bool) -> tuple[dict[str, str], set[str], set[str]]:
    """Return what else grows by a row per token (with its config key), what does not, and what grows otherwise."""
    tables: dict[str, str] = {}
    fixed: set[str] = set()
    odd: set[str] = set()
    for key, count in vocabulary_sizes(config.get_text_config()).items():
        suspects = [name for name, shape in shapes.items() if count in shape and name not in known]
        if not suspects:
            continue  # the common case: nothing to find, nothing to build
        larger = _shapes(_meta_model(folder, _with_size(folder, config, key, count + PROBE_ROWS),
                                     trust_remote_code=trust_remote_code))
        for name in suspects:
            old, new = shapes[name], larger.get(name)
            if new == old:
                fixed.add(name)
            elif new == (old[0] + PROBE_ROWS, *old[1:]):
                tables[name] = key
            else:
                odd.add(name)
    grown = {*tables, *odd}
    return tables, {name for name in fixed if name not in grown}, odd - set(tables)


def _saved_names(model: Any, names: list[str]) -> dict[str, str]:
    """Ask transformers under which names it saves parameters: it renames some on the way from and to the disk."""
    import torch

    try:
        from transformers.core_model_loading import revert_weight_conversion

        with _Quiet():
            saved = {name: next(iter(revert_weight_conversion(model, {name: torch.empty(1)}))) for name in names}
    except Exception:  # not every version has it, and not every class; names are then compared by their ends
        return {}
    return {name: other for name, other in saved.items() if other != name}


def vocabulary_sizes(config: Any) -> dict[str, int]:
    """Return the entries of a config, or of its JSON, that count rows of the vocabulary."""
    entries: Mapping[str, Any] = config if isinstance(config, Mapping) else vars(config)
    return {key: value for key, value in sorted(entries.items()) if key.startswith("vocab_size") and type(value) is int}


def _with_size(folder: Path, config: Any, key: str, size: int) -> Any:
    """Return a config as a loader would read it from a config.json with another number of rows."""
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return type(config).from_dict(with_sizes(document, {key: size}))


def with_sizes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Copy a config with other numbers of rows, wherever they are stated, and with nothing else changed.

    Args:
        config: config.json as it is written.
        sizes: Rows by config key, such as `vocab_size`.
    """
    changed = copy.deepcopy(dict(config))
    nested = changed.get("text_config")
    for key, size in sizes.items():
        if isinstance(nested, dict):
            # A wrapper may leave vocab_size to the default of its class; a new number must be written.
            nested[key] = size
        if key in changed or not isinstance(nested, dict):
            changed[key] = size
    return changed


def with_own_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a config that then says that head and embedding are two matrices."""
    changed = copy.deepcopy(dict(config))
    changed["tie_word_embeddings"] = False
    if isinstance(changed.get("text_config"), dict):
        changed["text_config"]["tie_word_embeddings"] = False
    return changed


def _first_reserved_id(config: Any) -> int | None:
    offsets = [getattr(part, "vocab_offset", None) for part in _parts(config)]
    return min((offset for offset in offsets if type(offset) is int), default=None)


def _parts(config: Any) -> Iterator[Any]:
    for part in vars(config).values():
        if hasattr(part, "model_type"):
            yield part


# -- building the class -------------------------------------------------------------------------------------------

def read_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """Read the configuration of a model folder as transformers does.

    Raises:
        CheckpointError: If it cannot.
    """
    # Imported here and below: --help must not pay for torch and transformers.
    import transformers

    try:
        with _Quiet():
            return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config class raises
        raise _cannot_build(folder, error) from error


def _meta_model(folder: Path, config: Any, *, trust_remote_code: bool) -> Any:
    """Build the class that `architectures` names, or the causal LM of the model type, without weights."""
    import torch
    import transformers

    try:
        # A model inside a wrapper (text_config) is no AutoModelForCausalLM; its own class is.
        architectures = getattr(config, "architectures", None) or []
        named: Any = getattr(transformers, architectures[0], None) if architectures else None
        known = named is not None and getattr(named, "config_class", None) is type(config)
        with torch.device("meta"), _Quiet():
            if known and hasattr(named, "_from_config"):
                return named._from_config(config)
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a model class raises on a config it cannot use
        raise _cannot_build(folder, error) from error


def _cannot_build(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot build the model class that {folder / 'config.json'} describes: "
                           f"{in_one_line(error)}")


class _Quiet:
    """Keep transformers' remarks about a model without weights off the terminal."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("transformers")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
