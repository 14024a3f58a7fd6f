"""What a rows file says about the model class of its base: it gives `patch` a head start.

To ask a class for its vocabulary parameters takes transformers, whose import takes longer than writing some
gigabytes. `distill` has asked already, so it writes the answer down, with what the answer depends on. `patch`
starts by it and still asks; whoever changes the record is found out before the new folder has its name.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vocabext.architecture import EmbeddingNames
from vocabext.checkpoint import CONFIG_NAME, RowsFile, read_json
from vocabext.errors import CheckpointError
from vocabext.manifest import file_sha256


@dataclass(frozen=True)
class KnownClass:
    """What a rows file says about the base at hand.

    Attributes:
        names: The vocabulary parameters of its class.
        num_used: Ids that its tokenizer addresses (U).
    """

    names: EmbeddingNames
    num_used: int


def base_record(folder: Path, names: EmbeddingNames, *, model: str, num_used_ids: int) -> dict[str, Any]:
    """Return what the header of a rows file says about the base that it is made for, as `header["base"]`.

    Args:
        folder: The base.
        names: What its class says.
        model: How the user calls it.
        num_used_ids: Ids that its tokenizer addresses (U).
    """
    return {"model": model, "num_used_ids": num_used_ids, "hidden_size": names.shapes[names.embedding][1],
            "tokenizer_sha256": file_sha256(folder / "tokenizer.json"), "class": class_record(folder, names)}


def class_record(folder: Path, names: EmbeddingNames) -> dict[str, Any] | None:
    """Return what the header of a rows file says about the class of its base, as `header["base"]["class"]`.

    Args:
        folder: The base.
        names: What its class says.

    Returns:
        JSON-ready values; None where they would depend on code whose version nobody can tell: code that comes with
        the model, or transformers between two releases.
    """
    version = _transformers_version()
    if version is None or "auto_map" in read_json(folder / CONFIG_NAME):
        return None
    return {"transformers": version, "config_sha256": file_sha256(folder / CONFIG_NAME), "names": names_to_json(names)}


def known_class(file: RowsFile, folder: Path) -> KnownClass | None:
    """Return what a rows file says about the class and the tokenizer of a base, if that is the base it was made for.

    Args:
        file: The rows file.
        folder: The base.

    Returns:
        None if it says nothing, or says it about another config, tokenizer or version of transformers.
    """
    base = file.header.get("base")
    record = base.get("class") if isinstance(base, dict) else None
    if not isinstance(base, dict) or not isinstance(record, dict):
        return None
    num_used, version = base.get("num_used_ids"), _transformers_version()
    if type(num_used) is not int or num_used < 0 or version is None or record.get("transformers") != version:
        return None
    digests = {CONFIG_NAME: record.get("config_sha256"), "tokenizer.json": base.get("tokenizer_sha256")}
    if any(found is None or found != file_sha256(folder / name) for name, found in digests.items()):
        return None
    names = names_from_json(record.get("names"))
    return None if names is None else KnownClass(names, num_used)


def check_class(known: KnownClass, found: EmbeddingNames, file: RowsFile, folder: Path) -> None:
    """Refuse a rows file that says something else about a class than the class itself.

    Args:
        known: What the file says.
        found: What the class says.
        file: The rows file.
        folder: The base.

    Raises:
        CheckpointError: If they differ; names the first difference.
    """
    said, seen = names_to_json(known.names), names_to_json(found)
    for key, value in said.items():
        if value != seen[key]:
            raise CheckpointError(f"{file.path} says that the model class of {folder} has {key} {value}, but it has "
                                  f"{seen[key]}; distill again")


def _transformers_version() -> str | None:
    """Return the version of transformers, without an import; None if it is no release."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None
    return None if "dev" in version or "+" in version else version


# -- as JSON ------------------------------------------------------------------------------------------------------

def names_to_json(names: EmbeddingNames) -> dict[str, Any]:
    """Return the vocabulary parameters of a class as JSON-ready values."""
    found = {part.name: getattr(names, part.name) for part in fields(names)}
    return {**found, "shapes": {name: list(shape) for name, shape in names.shapes.items()},
            "saved": dict(names.saved), "tables": dict(names.tables), "fixed": sorted(names.fixed),
            "odd": sorted(names.odd)}


def names_from_json(value: Any) -> EmbeddingNames | None:
    """Read what `names_to_json` has made; None if it is anything else."""
    if not isinstance(value, Mapping) or value.keys() != {part.name for part in fields(EmbeddingNames)}:
        return None
    texts = [value["architecture"], value["embedding"]]
    texts += [value[key] for key in ("head", "head_bias") if value[key] is not None]
    counts = [value["num_parameters"], *([] if value["first_reserved_id"] is None else [value["first_reserved_id"]])]
    if not (_texts(texts) and _counts(counts) and type(value["tied"]) is bool
            and all(_texts_by_name(value[key]) for key in ("saved", "tables"))
            and all(isinstance(value[key], list) and _texts(value[key]) for key in ("fixed", "odd"))
            and isinstance(value["shapes"], dict)
            and all(isinstance(shape, list) and _counts(shape) for shape in value["shapes"].values())):
        return None
    parameters = {*texts[1:], *value["tables"]}  # each has rows, which are looked at
    if value["shapes"].keys() != parameters or not all(value["shapes"].values()) \
            or (value["head"] is None and (value["tied"] or value["head_bias"] is not None)):
        return None
    return EmbeddingNames(**{
        **value, "shapes": {name: tuple(shape) for name, shape in value["shapes"].items()},
        "fixed": frozenset(value["fixed"]), "odd": frozenset(value["odd"])})


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) and value for value in values)


def _counts(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _texts_by_name(value: Any) -> bool:
    return isinstance(value, dict) and _texts(list(value.values()))
