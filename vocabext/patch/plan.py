"""What `patch` is about to do, decided from headers alone: which tensors grow and how, which files become what.

Shapes: V rows as stored, U rows the tokenizer addresses, N new rows, D hidden size.
"""

import fnmatch
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from vocabext.checkpoint.architecture import with_own_head, with_sizes
from vocabext.checkpoint.folder import (
    ADAPTER_CONFIG,
    CONFIG_NAME,
    INDEX_NAME,
    PICKLE_PATTERNS,
    READ_BY_NAME,
    Checkpoint,
    RowsFile,
    read_json,
)
from vocabext.checkpoint.manifest import TensorRecord
from vocabext.checkpoint.shards import Copied, Growth
from vocabext.checkpoint.vocabulary import EMBEDDING, HEAD, HEAD_BIAS, SILENT_BIAS, TIED_IN_VLLM, quantisation
from vocabext.errors import CheckpointError
from vocabext.files.atomic import real_path
from vocabext.files.links import leads_outside
from vocabext.model.support import check_room

SKIPPED_FOLDERS = (".git", ".cache")
OTHER_WEIGHTS = ("*.gguf", "*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.pdparams")
ADAPTER_WEIGHTS = "adapter_model.*"
WEIGHT_INDICES = ("*.index.json", "*.index.*.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MULTIPLE = 64
MEAN = "mean of the rows of the token's run"
# Settings of a quantisation that keep a head out of it; other methods are not known to.
IGNORING = {"compressed-tensors": "ignore", "fp8": "modules_to_not_convert"}
NEVER_HEADS = ("awq", "gptq")


def grown_rows(num_rows: int, needed: int) -> int:
    """Return how many rows a matrix has once `needed` of them are taken.

    It never shrinks, and free rows are used before it grows. Growing, it stays a multiple of 64, or of the
    largest power of two below that it was a multiple of. A matrix with 50,257 rows gets exactly what is needed:
    surplus rows score 0, and in models whose scores are all below zero (GPT-2) that would win.

    Args:
        num_rows: Rows it has (V).
        needed: Rows in use afterwards (U + N).
    """
    if needed <= num_rows:
        return num_rows
    multiple = MULTIPLE
    while num_rows % multiple:
        multiple //= 2
    return -(-needed // multiple) * multiple


# -- tensors ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TensorPlan:
    """What becomes of the tensors with a row per token id.

    Attributes:
        growths: By stored name.
        added: A head of its own for a tied model, by its new name; else empty.
        records: What vocabext.json says about each.
        sizes: Rows by config key, where they change.
        head_rows: Where the rows of the output head come from.
        untied: Whether the base is tied and the new model is not.
        untied_bytes: What the separate head costs.
    """

    growths: dict[str, Growth]
    added: dict[str, Copied]
    records: dict[str, TensorRecord]
    sizes: dict[str, int]
    head_rows: str
    untied: bool
    untied_bytes: int


def plan_tensors(checkpoint: Checkpoint, file: RowsFile, first_new_id: int, *, untie: bool = False) -> TensorPlan:
    """Decide where every new row goes and comes from, and check the rows.

    Args:
        checkpoint: The base.
        file: The rows of the new tokens.
        first_new_id: Id of the first new token (U).
        untie: Whether a tied model gets a head of its own in any case.

    Raises:
        CheckpointError: If the rows do not fit, or there is no room for them.
    """
    from vocabext.checkpoint.rows import constant_rows, mean_of_pieces, rows_from_file

    check_room(checkpoint, first_new_id, len(file.tokens))
    given = {name: rows_from_file(file, name) for name in file.tensors if name in ("input", "output")}
    untied = checkpoint.tied and (untie or _outputs_differ(file, given))
    if untied:
        _refuse_untying(checkpoint, forced=untie)
    # Stored under one name only, a tied matrix gets a second one.
    first = checkpoint.vocab_tensors[0]
    draft = _Draft(checkpoint, file, first_new_id, untied=untied)
    head_rows = MEAN
    for name, tensor in checkpoint.row_tensors.items():
        is_head = tensor.role == HEAD and (untied or not checkpoint.tied)
        if tensor.role in (EMBEDDING, HEAD) and not is_head:
            draft.grow(name, given["input"], "from the rows file")
        elif is_head and "output" in given:
            draft.grow(name, given["output"], "from the rows file")
        elif tensor.role == HEAD_BIAS and _unwritten(file):
            draft.grow(name, constant_rows(SILENT_BIAS), f"{SILENT_BIAS:,.0f}: new tokens are never written")
        else:
            # A head row likely where its pieces were likely: zero rows are not a ban.
            draft.grow(name, mean_of_pieces(checkpoint, name, file.tokens), MEAN)
        head_rows = draft.records[name].rows if is_head else head_rows
    if untied and len(checkpoint.vocab_tensors) == 1:
        missing = HEAD if checkpoint.head_name is None else EMBEDDING
        source = given.get("output" if missing == HEAD else "input")
        rows = source if source is not None else mean_of_pieces(checkpoint, first, file.tokens)
        added = _new_name(checkpoint, missing)
        draft.add(added, missing, first, rows, "from the rows file" if source is not None else MEAN)
        head_rows = draft.records[added].rows if missing == HEAD else head_rows
    if checkpoint.tied and not untied:
        head_rows = "the embedding's, to which the head is tied"
    elif head_rows == MEAN:
        head_rows = "mean of the head rows of the token's run"
    cost = draft.growths[first].num_bytes(checkpoint.tensors[first]) if draft.added else 0
    return TensorPlan(draft.growths, draft.added, draft.records, draft.sizes, head_rows, untied, cost)


def _new_name(checkpoint: Checkpoint, role: str) -> str:
    """Return the name for a tensor that was not stored: spelled by the class, in the way the other one is."""
    names, other = checkpoint.names, checkpoint.vocab_tensors[0]
    name = names.head if role == HEAD else names.embedding
    return name if other == checkpoint.row_tensors[other].parameter else names.saved.get(name, name)


class _Draft:
    """The plan as it grows."""

    def __init__(self, checkpoint: Checkpoint, file: RowsFile, first_new_id: int, *, untied: bool) -> None:
        self.checkpoint, self.first_new_id, self.num_new = checkpoint, first_new_id, len(file.tokens)
        self.silent_ids, self.untied = _silent_ids(file, first_new_id), untied
        if first_new_id > checkpoint.vocab_size and not self.silent_ids:
            # Ids without a row get one. Between two base rows it is never on top; zeros may be.
            self.silent_ids = (checkpoint.vocab_size - 2, checkpoint.vocab_size - 1)
        self.growths: dict[str, Growth] = {}
        self.added: dict[str, Copied] = {}
        self.records: dict[str, TensorRecord] = {}
        self.sizes: dict[str, int] = {}

    def grow(self, name: str, source: Any, said: str) -> None:
        """Let a stored tensor grow by rows from a source."""
        info, tensor = self.checkpoint.tensors[name], self.checkpoint.row_tensors[name]
        self.growths[name] = self._growth(name, source, tensor.role)
        rows = self.growths[name].num_rows
        if rows != info.shape[0]:
            self.sizes[tensor.size_key] = rows
        self.records[name] = TensorRecord(tensor.role, said, info.shape[0], rows, info.file,
                                          self._surplus_ids(self.growths[name], tensor.role, info.shape[0]))

    def add(self, name: str, role: str, like: str, source: Any, said: str) -> None:
        """Add a copy of a stored tensor that gets rows from another source."""
        self.added[name] = Copied(like, self._growth(like, source, role))
        info, growth = self.checkpoint.tensors[like], self.added[name].growth
        self.records[name] = TensorRecord(role, said, 0, growth.num_rows, info.file,
                                          self._surplus_ids(growth, role, info.shape[0]))

    def _growth(self, name: str, source: Any, role: str) -> Growth:
        from vocabext.checkpoint.rows import as_bytes, check_rows, constant_row, mean_row

        info = self.checkpoint.tensors[name]
        check_rows(source, self.num_new, info)
        rows = grown_rows(info.shape[0], self.first_new_id + self.num_new)
        surplus = constant_row(info, SILENT_BIAS) if role == HEAD_BIAS else None
        if self.silent_ids and self._writes(role):
            surplus = mean_row(self.checkpoint, name, self.silent_ids)
        return Growth(self.first_new_id, self.num_new, rows, as_bytes(source, info.dtype), surplus)


    def _writes(self, role: str) -> bool:
        """Tell whether rows of a role are output rows."""
        return role == HEAD or (role == EMBEDDING and self.checkpoint.tied and not self.untied)

    def _surplus_ids(self, growth: Growth, role: str, num_rows: int) -> tuple[int, ...]:
        has_surplus = growth.num_rows > max(num_rows, growth.end_row) or growth.first_row > num_rows
        return self.silent_ids if has_surplus and self._writes(role) else ()


def _silent_ids(file: RowsFile, first_new_id: int) -> tuple[int, ...]:
    """Return the base ids between whose rows a row is hardly ever drawn and never on top; empty if nobody looked.

    Rows that belong to no id score 0 where they are zero, which a sample may draw.
    """
    writing = file.header.get("writing")
    ids = writing.get("silent_ids") if isinstance(writing, dict) else None
    known = isinstance(ids, list) and all(type(i) is int and 0 <= i < first_new_id for i in ids)
    return tuple(ids) if known and ids else ()


def _unwritten(file: RowsFile) -> bool:
    """Tell whether the rows were made for tokens that must not be written."""
    writing = file.header.get("writing")
    return isinstance(writing, dict) and writing.get("kind") == "none"


def _outputs_differ(file: RowsFile, given: Mapping[str, Any]) -> bool:
    from vocabext.checkpoint.rows import same_rows

    if "output" not in given:
        return False
    shapes = file.tensors["input"].shape, file.tensors["output"].shape
    return shapes[0] != shapes[1] or not same_rows(given["input"], given["output"], *shapes[0])


def _refuse_untying(checkpoint: Checkpoint, *, forced: bool) -> None:
    """Refuse a separate head that some reader would not use, or would take for a quantised one."""
    name = checkpoint.names.architecture
    if name in TIED_IN_VLLM and not forced:
        raise CheckpointError(
            f"the rows file has output rows of their own, but vLLM ties the head of {name} to its embedding whatever "
            "the config says; distill again without them, or pass --untie if the model is for transformers only"
        )
    method = quantisation(checkpoint.config)
    if method is not None and method not in (*IGNORING, *NEVER_HEADS):
        raise CheckpointError(f"the model is quantised by {method}, and a head of its own would be taken for a "
                              "quantised one; distill again without output rows")


def new_config(checkpoint: Checkpoint, plan: TensorPlan) -> dict[str, Any]:
    """Return config.json as it must be, with nothing changed that need not be."""
    config = with_sizes(checkpoint.config, plan.sizes) if plan.sizes else dict(checkpoint.config)
    if not plan.untied:
        return config
    config = with_own_head(config)
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        key = IGNORING.get(str(found.get("quant_method"))) if isinstance(found, dict) else None
        if isinstance(found, dict) and key is not None and "lm_head" not in (found.get(key) or ()):
            found[key] = [*(found.get(key) or ()), "lm_head"]
    return config


# -- files --------------------------------------------------------------------------------------------------------

@dataclass
class FilePlan:
    """Which files of the base are carried over, written anew, or left out.

    Attributes:
        shards: Shards that are written anew.
        weights: Other shards, which may be linked.
        others: Everything else that is carried over.
        kept: What is changed or left out, and kept to restore the base.
        left_out: What is not in the new folder under its name, with the reason.
        lost: The part of it that is not kept either.
    """

    shards: list[str]
    weights: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


def plan_files(checkpoint: Checkpoint, plan: TensorPlan, stale: Mapping[str, str]) -> FilePlan:
    """Sort the files of the base.

    Args:
        checkpoint: The base.
        plan: What becomes of its tensors.
        stale: Files of its tokenizer that must not be carried over, with the reason.
    """
    found = FilePlan(sorted({checkpoint.tensors[name].file for name in plan.growths}))
    changed = {*TOKENIZER_FILES}
    if new_config(checkpoint, plan) != checkpoint.config:
        changed.add(CONFIG_NAME)
    if checkpoint.sharded and new_index(checkpoint, plan) is not None:
        changed.add(INDEX_NAME)
    names = list(_files(checkpoint.folder, found.lost))
    verdicts = {name: _why_left_out(name, checkpoint) for name in names}
    gone = {name for name, (_, lost) in verdicts.items() if lost}
    for name in names:
        reason, lost = verdicts[name]
        reason = reason or stale.get(name)
        alone = _why_alone(name, checkpoint, gone, {*names} - gone) if reason is None else None
        reason, lost = reason or alone, lost or alone is not None
        if reason is not None:
            (found.lost if lost else found.left_out)[name] = reason
        if name in found.shards or lost:
            continue
        if reason is not None or name in changed:
            found.kept.append(name)
        else:
            (found.weights if name in checkpoint.shards else found.others).append(name)
    found.left_out = {**found.lost, **found.left_out}
    return found


def _files(folder: Path, lost: dict[str, str]) -> Iterator[str]:
    """Yield the names of all files below a folder; what is no file of the model goes to `lost`."""
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        for name in sorted(folders):
            if name in SKIPPED_FOLDERS:
                lost[f"{(inside / name).as_posix()}/"] = "version control or a cache, no part of the model"
            elif (Path(root) / name).is_symlink():
                lost[f"{(inside / name).as_posix()}/"] = "a link to another folder"
        folders[:] = sorted(name for name in folders
                            if name not in SKIPPED_FOLDERS and not (Path(root) / name).is_symlink())
        for name in sorted(names):
            path = Path(root) / name
            if path.is_symlink() and path.is_file() and leads_outside(path, folder):
                if name.endswith(".safetensors") or any(fnmatch.fnmatch(name, part) for part in READ_BY_NAME):
                    raise CheckpointError(f"{path} is a link to {real_path(path)}, outside the model folder; put the "
                                          "file itself there if it belongs to the model")
                lost[(inside / name).as_posix()] = "a link to a file outside the model folder"
            elif path.is_file() and "\\" not in name:
                yield (inside / name).as_posix()
            else:
                lost[(inside / name).as_posix()] = "no regular file, a link to nowhere, or a name with a backslash"


def _why_left_out(name: str, checkpoint: Checkpoint) -> tuple[str | None, bool]:
    """Say why a file is left out (None if it is not), and whether it is too large to be kept for a way back."""
    base_name = name.rsplit("/", 1)[-1]
    if fnmatch.fnmatch(name, ADAPTER_WEIGHTS):
        return "an adapter beside the model, which readers differ in loading: merge it, or load it from the base", True
    if any(fnmatch.fnmatch(base_name, pattern) for pattern in PICKLE_PATTERNS):
        return "a pickle: it may hold the old vocabulary, and code", True
    if any(fnmatch.fnmatch(base_name, pattern) for pattern in OTHER_WEIGHTS):
        return "weights in another form, with the old vocabulary", True
    if "/" not in name and name.endswith(".safetensors") and name not in checkpoint.shards:
        return "weights that the model does not use; they may hold the old vocabulary", True
    return None, False


def _why_alone(name: str, checkpoint: Checkpoint, gone: Collection[str], carried: Collection[str]) -> str | None:
    """Say why a file that says how to read weights is left out: they are; None if that is not so.

    Args:
        name: The file.
        checkpoint: The base.
        gone: Files that are left out and not kept.
        carried: All others.
    """
    path = PurePosixPath(name)

    def beside(pattern: str, names: Collection[str]) -> bool:
        return any(PurePosixPath(other).parent == path.parent and fnmatch.fnmatch(PurePosixPath(other).name, pattern)
                   for other in names)

    if path.name == ADAPTER_CONFIG and not beside(ADAPTER_WEIGHTS, carried):
        return "describes an adapter that is left out, or not there"
    if path.name == "params.json" and beside("consolidated*", gone):
        return "describes weights that are left out"
    if path.suffix == ".xml" and beside(f"{path.stem}.bin", gone):
        return "describes weights that are left out"
    if name != INDEX_NAME and any(fnmatch.fnmatch(path.name, pattern) for pattern in WEIGHT_INDICES):
        named = _indexed(checkpoint.folder / name)
        if named is not None and not {(path.parent / file).as_posix() for file in named} <= {*carried}:
            return "the index of weights that are left out, or not there"
    return None


def _indexed(path: Path) -> set[str] | None:
    """Return the files that an index of weights names; None if it is no such index."""
    try:
        weight_map = read_json(path).get("weight_map")
    except CheckpointError:
        return None
    return {str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else None


def new_index(checkpoint: Checkpoint, plan: TensorPlan) -> dict[str, Any] | None:
    """Return the index with its totals and with tensors that were added; None if it stays as it is."""
    infos = checkpoint.tensors
    grown_bytes = sum(g.num_bytes(infos[name]) - infos[name].num_bytes for name, g in plan.growths.items())
    grown_bytes += sum(copied.growth.num_bytes(infos[copied.source]) for copied in plan.added.values())
    if not grown_bytes:
        return None
    index = read_json(checkpoint.folder / INDEX_NAME)
    metadata = dict(index["metadata"]) if isinstance(index.get("metadata"), dict) else {}
    if isinstance(metadata.get("total_size"), int | float) and math.isfinite(metadata["total_size"]):
        metadata["total_size"] = int(metadata["total_size"]) + grown_bytes
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += _grown_parameters(checkpoint, plan)
    weight_map = {**index["weight_map"], **{name: plan.records[name].file for name in plan.added}}
    return {**index, **({"metadata": metadata} if metadata else {}), "weight_map": weight_map}


def _grown_parameters(checkpoint: Checkpoint, plan: TensorPlan) -> int:
    """Return how many parameters there are more; a tied matrix that is stored twice counts once."""
    total = 0
    for name, growth in plan.growths.items():
        shape = checkpoint.tensors[name].shape
        if checkpoint.tied and name in checkpoint.vocab_tensors[1:]:
            # Untied, the second copy is a parameter of its own.
            total += growth.num_rows * shape[1] if plan.untied else 0
            continue
        width = shape[1] if len(shape) > 1 else 1
        total += (growth.num_rows - shape[0]) * width
    return total + sum(copied.growth.num_rows * checkpoint.hidden_size for copied in plan.added.values())
