"""Which parameters of a model class hold the vocabulary: the class says so, no name is guessed.

`embedding_names` builds the class from `config.json` on the meta device, which allocates no weights, and finds the
modules that `get_input_embeddings` and `get_output_embeddings` return. They are tied if they share one parameter:
`tie_word_embeddings` would not tell, since its default differs from class to class and many configs do not write it.

To find other tables with a row per token id (the per-layer embeddings of Gemma 3n and 4), it builds the class once
more with a larger vocabulary. A table grows; a projection that happens to have as many rows does not.

The class also says what the model is for: only causal language models can be extended. transformers loads the headers
alone into it, and `find_misfit` reports what it would leave at random values, or drop.
"""

import copy
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocabext.errors import CheckpointError, UnsupportedError, in_one_line

if TYPE_CHECKING:
    from vocabext.checkpoint.shards import TensorInfo

PROBE_ROWS = 64  # by which the vocabulary is made larger to see what grows
# Where transformers lists the classes that write text from left to right, with images and sounds or without.
WRITERS = tuple(f"MODEL_FOR_{kind}_MAPPING_NAMES" for kind in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"))
# Where it lists other classes, and what they are; the first list with a class counts.
OTHERS = {
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "a masked language model",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "a sequence classifier",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "a token classifier",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "a model that marks answers in a text",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "a model that chooses among answers",
    "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES": "an encoder",
    "MODEL_MAPPING_NAMES": "a body without an output head",
}
NAMED = 3  # how many tensors a message names
# What a wrapper puts into the names of tensors, how the model was saved, and what to do.
WRAPPINGS = (
    (r"(^|\.)_orig_mod\.", "saved from a compiled model", "save the model that torch.compile was given "
     "(model._orig_mod)"),
    (r"(^|\.)_(fsdp_wrapped|checkpoint_wrapped)_module\.", "saved from a wrapped model", "gather its full state dict, "
     "and save that"),
    (r"^base_model\.model\.|\.lora_|\.base_layer\.|\.modules_to_save\.", "saved with an adapter that is not merged",
     "merge it first (peft: merge_and_unload), and save what that returns"),
    (r"^module\.", "saved from a wrapped model", "save the model inside (model.module)"),
)


@dataclass(frozen=True)
class EmbeddingNames:
    """The vocabulary parameters of a model class, by the names the class gives them.

    Attributes:
        architecture: Name of the class, such as `LlamaForCausalLM`.
        embedding: The input embedding's weight.
        head: The output head's weight.
        head_bias: The output head's bias; None if it has none.
        tied: Whether head and embedding are one parameter.
        num_parameters: Parameters of the whole model, a tied head counted once.
        shapes: Shapes of the parameters above and of `tables`, by name.
        saved: The names under which the class saves them, where these differ (`embed_out` for `lm_head`).
        tables: Further tables with a row per token id: name -> the config key that counts their rows.
        fixed: Parameters that have as many rows as the vocabulary by accident, and do not grow with it.
        odd: Parameters that grow with the vocabulary along another axis than the first, or by another number.
        first_reserved_id: The first of the ids that mean images or sounds in this class; None if there are none.
    """

    architecture: str
    embedding: str
    head: str
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

    Returns:
        The names, as in the model's `named_parameters()`.

    Raises:
        CheckpointError: If transformers does not know the architecture, or it has no input embedding.
        UnsupportedError: If it is no causal language model.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    check_kind(folder, config)
    model = _meta_model(folder, config, trust_remote_code=trust_remote_code)
    names = {id(module): name for name, module in model.named_modules()}
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        embedding, head = None, None
    if embedding is None or not hasattr(embedding, "weight") or id(embedding) not in names:
        raise CheckpointError(f"{type(model).__name__} in {folder} has no input embedding to add rows to")
    if head is None or id(head) not in names:
        raise _unsupported(folder, type(model).__name__, "a model without an output head")
    embedding_name, head_name = f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight"
    head_bias = f"{names[id(head)]}.bias" if getattr(head, "bias", None) is not None else None
    found = [embedding_name, head_name, *([head_bias] if head_bias is not None else [])]
    shapes = _shapes(model)
    tables, fixed, odd = _growing(folder, config, shapes, {*found}, trust_remote_code=trust_remote_code)
    known = [*found, *tables]
    return EmbeddingNames(
        architecture=type(model).__name__,
        embedding=embedding_name, head=head_name, head_bias=head_bias, tied=head.weight is embedding.weight,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        shapes={name: shape for name, shape in shapes.items() if name in known}, saved=_saved_names(model, known),
        tables=tables, fixed=frozenset(fixed), odd=frozenset(odd), first_reserved_id=_first_reserved_id(config),
    )


# -- which models are supported -----------------------------------------------------------------------------------

def check_kind(folder: Path, config: Any) -> None:
    """Refuse a model that does not write text from left to right, and say what it is.

    Raises:
        UnsupportedError: If it is an encoder-decoder, a classifier, an encoder, or a body without a head.
    """
    name = _architecture(folder, config) or type(config).__name__
    if getattr(config, "is_encoder_decoder", False) and name not in _listed("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"):
        raise _unsupported(folder, name, "an encoder-decoder")
    # A class that comes with the model is in no list; `embedding_names` asks it for its head.
    if not any(name in _listed(mapping) for mapping in WRITERS) and _named_class(config) is not None:
        kind = next((kind for mapping, kind in OTHERS.items() if name in _listed(mapping)), "no causal language model")
        raise _unsupported(folder, name, kind)
    if (why := _reads_both_ways(config)) is not None:
        raise _unsupported(folder, name, f"a model in which a word sees what follows it ({why})")


def _reads_both_ways(config: Any) -> str | None:
    """Return the entry of a config that lets a word see what follows it; None if a word sees only what precedes it."""
    if config.model_type in _mapping("MODEL_FOR_MASKED_LM_MAPPING_NAMES") \
            and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False)):
        return "its config does not say is_decoder"
    text = config.get_text_config()
    both_ways = {"is_causal": False, "use_bidirectional_attention": (True, "all"), "attn_type": "bi"}
    for key, value in both_ways.items():
        found = getattr(text, key, None)
        if found is not None and found in (value if isinstance(value, tuple) else (value,)):
            return f"its config says {key} {found!r}"
    return None


def _architecture(folder: Path, config: Any) -> str | None:
    names = getattr(config, "architectures", None) or [None]
    if not isinstance(names, list) or not isinstance(names[0], str | None):
        raise CheckpointError(f"{folder / 'config.json'} says architectures {names!r:.200}; a list of names is needed")
    return names[0]


def _unsupported(folder: Path, name: str, kind: str) -> UnsupportedError:
    return UnsupportedError(f"{folder} holds {name}, {kind}; tokens can be added to causal language models only")


def _mapping(name: str) -> Mapping[str, Any]:
    from transformers.models.auto import modeling_auto

    found: Mapping[str, Any] = getattr(modeling_auto, name, {})  # not every version has every list
    return found


def _listed(mapping: str) -> set[str]:
    """Return the classes in one of transformers' lists, which has several for some types of model."""
    entries = _mapping(mapping).values()
    return {name for entry in entries for name in (entry if isinstance(entry, list | tuple) else (entry,))}


def loading_class(config: Any) -> Any:
    """Return what loads a model: AutoModelForCausalLM, or the class named by a config that it does not know."""
    import transformers

    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "auto_map", None)
    return transformers.AutoModelForCausalLM if known else _named_class(config) or transformers.AutoModelForCausalLM


def _named_class(config: Any) -> Any:
    """Return the class of transformers that a config names and belongs to; None if there is none."""
    import transformers

    architectures = getattr(config, "architectures", None) or []
    named: Any = getattr(transformers, architectures[0], None) if architectures else None
    return named if named is not None and getattr(named, "config_class", None) is type(config) else None


# -- whether the weights are the class's ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Misfit:
    """How stored tensors differ from those of the model class.

    Attributes:
        said: What differs, with the first names, and what to do.
        wrapped: Whether a wrapper of the model has given the tensors their names.
    """

    said: str
    wrapped: bool


def find_misfit(folder: Path, tensors: "Mapping[str, TensorInfo]", *, quantised: bool,
                trust_remote_code: bool) -> Misfit | None:
    """Let transformers load the headers alone, and return what it would leave at random values, or drop.

    It renames, splits and merges tensors on the way, ties some and ignores others, so only it knows which names fit.

    Args:
        folder: The model folder.
        tensors: All stored tensors.
        quantised: Whether modules may hold other tensors than the class says.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        None if everything fits.

    Raises:
        CheckpointError: If transformers cannot put the tensors together.
    """
    import torch

    config = read_config(folder, trust_remote_code=trust_remote_code)
    cls = type(_meta_model(folder, config, trust_remote_code=trust_remote_code))
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would ask for the library of the method
    headers = {name: torch.empty(info.shape, dtype=torch.float32, device="meta") for name, info in tensors.items()}
    try:
        with Quiet():
            model, report = cls.from_pretrained(None, config=config, state_dict=headers, device_map="meta",
                                                ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception as error:  # whatever a class raises on tensors it cannot use
        if quantised:  # transformers cannot put some parts together before it has unpacked them
            return None
        raise CheckpointError(f"transformers cannot make {cls.__name__} of the tensors of {folder}: "
                              f"{in_one_line(error)}") from None
    return describe_misfit(folder, model, report, quantised=quantised)


def describe_misfit(folder: str | Path, model: Any, report: "Mapping[str, Any]", *, quantised: bool = False
                    ) -> Misfit | None:
    """Say how the tensors of a folder differ from those of the model that transformers has made of them.

    Args:
        folder: The model folder.
        model: The model.
        report: What transformers says about the loading; what a class declares to be optional is not in it.
        quantised: Whether modules may hold other tensors than the class says.

    Returns:
        None if they do not.
    """
    missing, unknown = set(report["missing_keys"]), set(report["unexpected_keys"])
    shapes = sorted(f"{name} is {list(stored)} instead of {list(wanted)}"
                    for name, stored, wanted in report["mismatched_keys"])
    if quantised:
        shapes = []
        missing, unknown = _not_quantised(missing, unknown, {name.rpartition(".")[0] for name in model.state_dict()})
    counts = [f"{len(names)} {what} ({', '.join(sorted(names)[:NAMED])}{', ...' * (len(names) > NAMED)})"
              for what, names in (("missing", missing), ("of another shape", shapes), ("unknown to it", unknown))
              if names]
    if not counts:
        return None
    wrapped = next((f"they were {said}: {cure}" for pattern, said, cure in WRAPPINGS
                    if any(re.search(pattern, name) for name in unknown)), None)
    cure = wrapped or "config.json names another model than the weights are of, or they are not whole; save both " \
                      "with save_pretrained of one class"
    return Misfit(f"the tensors of {folder} are not those of {type(model).__name__}: {'; '.join(counts)}; {cure}",
                  wrapped is not None)


def _not_quantised(missing: set[str], unknown: set[str], modules: set[str]) -> tuple[set[str], set[str]]:
    """Leave out the tensors that quantised modules hold in place of their weights, whatever the method calls them."""
    parts: dict[str, str] = {}  # a stored part -> its module
    for name in unknown:
        above = name.split(".")[:-1]
        owners = (".".join(above[:depth]) for depth in range(len(above), 0, -1))
        owner = next((owner for owner in owners if owner in modules), None)
        if owner is not None:
            parts[name] = owner
    packed = set(parts.values())
    return {name for name in missing if name.rpartition(".")[0] not in packed}, unknown - parts.keys()


# -- what grows with the vocabulary -------------------------------------------------------------------------------

def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _growing(folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]], known: set[str], *,
             trust_remote_code: bool) -> tuple[dict[str, str], set[str], set[str]]:
    """Return what else grows by a row per token, with its config key; what does not grow; what grows otherwise."""
    tables: dict[str, str] = {}
    fixed: set[str] = set()
    odd: set[str] = set()
    for key, count in vocabulary_sizes(config.get_text_config()).items():
        suspects = [name for name, shape in shapes.items() if count in shape and name not in known]
        if not suspects:
            continue  # mostly so: no class to build
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        larger_config = type(config).from_dict(with_sizes(document, {key: count + PROBE_ROWS}))
        larger = _shapes(_meta_model(folder, larger_config, trust_remote_code=trust_remote_code))
        for name in suspects:
            old, new = shapes[name], larger.get(name)
            if new == old:
                fixed.add(name)
            elif new == (old[0] + PROBE_ROWS, *old[1:]):
                tables[name] = key
            else:
                odd.add(name)
    return tables, fixed - odd - tables.keys(), odd - tables.keys()


def _saved_names(model: Any, names: list[str]) -> dict[str, str]:
    """Ask transformers under which names it saves parameters, since it renames some as it reads and writes."""
    import torch

    try:
        from transformers.core_model_loading import revert_weight_conversion

        with Quiet():
            empty = torch.empty(1, dtype=torch.float32)
            saved = {name: next(iter(revert_weight_conversion(model, {name: empty}))) for name in names}
    except Exception:  # not every version has it, and not every class; `stored_name` then goes by the ends of names
        return {}
    return {name: other for name, other in saved.items() if other != name}


def vocabulary_sizes(config: Any) -> dict[str, int]:
    """Return the entries of a config, or of its JSON, that count rows of the vocabulary."""
    entries: Mapping[str, Any] = config if isinstance(config, Mapping) else vars(config)
    return {key: value for key, value in sorted(entries.items()) if key.startswith("vocab_size") and type(value) is int}


def with_sizes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Copy a config with other numbers of rows, in each place that states them, and nothing else changed.

    Args:
        config: config.json as it is written.
        sizes: Rows by config key, such as `vocab_size`.
    """
    changed = copy.deepcopy(dict(config))
    nested = changed.get("text_config")
    for key, size in sizes.items():
        if isinstance(nested, dict):
            nested[key] = size  # also where the config leaves it to the default of its class
        if key in changed or not isinstance(nested, dict):
            changed[key] = size
    return changed


def with_own_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a config, and let the copy say that head and embedding are two matrices."""
    changed = copy.deepcopy(dict(config))
    for part in with_inner(changed):
        part["tie_word_embeddings"] = False
    return changed


def with_inner(config: Any) -> list[dict[str, Any]]:
    """Return a config.json, and the config of the language model inside a wrapper for images or sound."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def _first_reserved_id(config: Any) -> int | None:
    offsets = [getattr(part, "vocab_offset", None) for part in vars(config).values() if hasattr(part, "model_type")]
    return min((offset for offset in offsets if type(offset) is int), default=None)


# -- building the class -------------------------------------------------------------------------------------------

def read_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """Read the configuration of a model folder as transformers does.

    Raises:
        CheckpointError: If it cannot.
    """
    # Imported here and below, so that --help need not load torch and transformers.
    import transformers

    try:
        with Quiet():
            return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config class raises
        raise _cannot_build(folder, error) from error


def _meta_model(folder: Path, config: Any, *, trust_remote_code: bool) -> Any:
    """Build the class that `architectures` names, or the causal LM of the model type, without weights."""
    import torch
    import transformers

    try:
        # AutoModelForCausalLM does not know a model inside a wrapper (text_config); the class named does.
        named = _named_class(config)
        with torch.device("meta"), Quiet():
            if named is not None and hasattr(named, "_from_config"):
                return named._from_config(config)
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a model class raises on a config it cannot use
        raise _cannot_build(folder, error) from error


def _cannot_build(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot build the model class that {folder / 'config.json'} describes: "
                           f"{in_one_line(error)}")


class Quiet:
    """Keep transformers' remarks about a model without weights, and its progress with it, off the terminal."""

    def __enter__(self) -> None:
        from transformers.utils import logging as said

        self._logger = logging.getLogger("transformers")
        self._level, self._bars = self._logger.level, said.is_progress_bar_enabled()
        self._logger.setLevel(logging.CRITICAL)
        said.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as said

        self._logger.setLevel(self._level)
        if self._bars:
            said.enable_progress_bar()
