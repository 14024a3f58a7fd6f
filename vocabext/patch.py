"""Write a new model folder: the base, with the new tokens in its tokenizer and their rows in its tensors.

Only the shards that hold vocabulary tensors are written anew; everything else is copied byte for byte. The
folder is built beside its destination and renamed last, so it is there whole or not at all.
"""

import fnmatch
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocabext.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    PICKLE_PATTERNS,
    Checkpoint,
    Rows,
    load_rows,
    open_checkpoint,
    place_rows,
    read_json,
    resolve_model,
    with_vocab_size,
    write_shard,
)
from vocabext.errors import CheckpointError, OutputExistsError, UsageError
from vocabext.manifest import (
    MANIFEST_NAME,
    BaseRecord,
    FileRecord,
    Manifest,
    file_sha256,
    has_manifest,
    token_records,
    write_manifest,
)
from vocabext.progress import Progress, no_progress
from vocabext.records import NewToken, check_output

if TYPE_CHECKING:
    import torch

    from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer

SKIPPED_FOLDERS = (".git", ".cache")
OTHER_WEIGHTS = ("*.gguf", "*.onnx", "*.onnx_data", "*.tflite")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MARGIN_BYTES = 1_000_000  # config, index, manifest


@dataclass(frozen=True)
class PatchResult:
    """What `patch` made.

    Attributes:
        folder: The new folder.
        num_new: New tokens (N).
        first_new_id: Id of the first new token (U of the base).
        num_rows_before: Rows the base stores (V).
        num_rows: Rows the new checkpoint stores, max(V, U + N).
        head_rows: Where the rows of the output head come from.
        files: What became of the base's files.
        bytes_written: Size of the new folder.
        seconds: Time it took.
    """

    folder: Path
    num_new: int
    first_new_id: int
    num_rows_before: int
    num_rows: int
    head_rows: str
    files: FileRecord
    bytes_written: int
    seconds: float


def patch(rows_path: Path, model: str, output_folder: Path, *, force: bool = False, trust_remote_code: bool = False,
          progress: Progress = no_progress) -> PatchResult:
    """Write a new model folder with the new tokens and their rows.

    Args:
        rows_path: The artifact of `distill`.
        model: The base: a folder or hub id. It is only read.
        output_folder: The folder to make.
        force: Whether a model folder that is there already is replaced, once the new one is complete.
        trust_remote_code: Whether code that comes with the model may run.
        progress: Told about the bytes written.

    Returns:
        What was made.

    Raises:
        UsageError: If a path is wrong, or the output is there already and `force` is false.
        CheckpointError: If the base is damaged, the rows were made for another model, or the disk is too full.
        TokenizerError: If the tokens cannot be added to the base's tokenizer.
    """
    from vocabext.tokenizer import extend, load_tokenizer

    started = time.perf_counter()
    output = output_folder.resolve()
    if Path(model).resolve() != output:  # which gets a clearer refusal below
        check_output(output, force=force, folder=True)
    tokens, rows, header = load_rows(rows_path)
    base_folder = resolve_model(model)
    check_places(output, base_folder, rows_path)
    checkpoint = open_checkpoint(base_folder, trust_remote_code=trust_remote_code)
    base = load_tokenizer(str(base_folder), trust_remote_code=trust_remote_code)
    _check_rows(tokens, header, checkpoint, base.num_used_ids)
    expanded = extend(base, tokens)
    replaced, head_rows = _new_tensors(checkpoint, tokens, rows, base.num_used_ids)
    plan = _Plan(checkpoint, replaced)
    _check_space(output.parent, plan.num_bytes + len(expanded.backend.to_str().encode()) + MARGIN_BYTES)
    with _new_folder(output, force=force) as folder:
        files = _write(plan, expanded, folder, progress)
        write_manifest(folder, Manifest(
            base=_base_record(model, checkpoint, base), tokens=token_records(
                tokens, base.num_used_ids, header.get("per_token") or ()),
            method=str(header.get("method", "unknown")), options=dict(header.get("options") or {}),
            head_rows=head_rows, files=files))
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return PatchResult(output_folder, len(tokens), base.num_used_ids, checkpoint.vocab_size, plan.num_rows, head_rows,
                       files, num_bytes, time.perf_counter() - started)


# -- before the first byte ----------------------------------------------------------------------------------------

def check_places(output: Path, base: Path, rows: Path) -> None:
    """Refuse an output that would destroy what it is made from, or something that is no model.

    Args:
        output: The folder to make; with `--force` it may exist.
        base: The base model's folder.
        rows: The rows file.

    Raises:
        UsageError: If they lie inside each other, or `output` is there and no model folder.
    """
    output, base, rows = output.resolve(), base.resolve(), rows.resolve()
    if output == base:
        raise UsageError(f"the output {output} is the base model itself; choose another output")
    if base in output.parents:
        raise UsageError(f"the output {output} lies inside the base model {base}; choose another output")
    if output in base.parents:
        raise UsageError(f"the base model {base} lies inside the output {output}; choose another output")
    if output in rows.parents:
        raise UsageError(f"the rows {rows} lie inside the output {output}; choose another output")
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"the output {output} is a file; choose another output")
    if any(output.iterdir()) and not (output / CONFIG_NAME).is_file() and not has_manifest(output):
        raise UsageError(f"the output {output} is no model folder, and --force replaces model folders only")


def _check_rows(tokens: Sequence[NewToken], header: Mapping[str, Any], checkpoint: Checkpoint, num_used: int) -> None:
    """Refuse rows whose header says that they were made for another model."""
    if not tokens:
        raise CheckpointError("the rows file holds no tokens; there is nothing to add")
    recorded = header.get("base")
    recorded = recorded if isinstance(recorded, dict) else {}
    found = {"num_used_ids": num_used, "hidden_size": checkpoint.hidden_size,
             "tokenizer_sha256": file_sha256(checkpoint.folder / "tokenizer.json")}
    for key, value in found.items():
        if recorded.get(key) is not None and value is not None and recorded[key] != value:
            raise CheckpointError(
                f"the rows were made for {recorded.get('model', 'a model')} with {key} {recorded[key]}, but "
                f"{checkpoint.folder} has {value}; use the model they were made for, or distill again"
            )


def _check_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"the new checkpoint needs {needed:,} bytes, but {parent} has {free:,} bytes free; "
            "free some, or choose an output elsewhere"
        )


def _new_tensors(checkpoint: Checkpoint, tokens: Sequence[NewToken], rows: Rows,
                 num_used: int) -> tuple[dict[str, "torch.Tensor"], str]:
    """Return the vocabulary tensors with the new rows in place, by stored name, and where the head's come from."""
    import torch

    from vocabext.rows import mean_rows

    if checkpoint.tied:
        if rows.output_ND is not None and not torch.equal(rows.input_ND, rows.output_ND):
            raise CheckpointError(
                f"the rows file has output rows of their own, but the head of {checkpoint.folder} is tied to its "
                "embedding; distill again for this model"
            )
        placed = place_rows(checkpoint.read(checkpoint.vocab_tensors[0]), rows.input_ND, num_used_rows=num_used)
        return dict.fromkeys(checkpoint.vocab_tensors, placed), "the embedding's, to which the head is tied"
    assert checkpoint.embedding_name is not None  # open_checkpoint refuses an untied model without it
    embed_VD = checkpoint.read(checkpoint.embedding_name)
    replaced = {checkpoint.embedding_name: place_rows(embed_VD, rows.input_ND, num_used_rows=num_used)}
    if checkpoint.head_name is None:
        return replaced, "none: the model has no output head"
    head_VD, output_ND, origin = checkpoint.read(checkpoint.head_name), rows.output_ND, "from the rows file"
    if output_ND is None:
        # Likely where its pieces were likely: the head was not distilled, and zero rows are not a ban.
        output_ND = mean_rows(head_VD, tokens)
        origin = "mean of the head rows of the token's run"
    return {**replaced, checkpoint.head_name: place_rows(head_VD, output_ND, num_used_rows=num_used)}, origin


class _Plan:
    """Which files of the base are copied, written anew, or left out."""

    def __init__(self, checkpoint: Checkpoint, replaced: Mapping[str, "torch.Tensor"]) -> None:
        self.checkpoint = checkpoint
        self.replaced = replaced
        self.num_rows = len(replaced[checkpoint.vocab_tensors[0]])
        self.shards = sorted({checkpoint.tensors[name].file for name in replaced})
        self.growth_bytes = sum(tensor.nbytes - checkpoint.tensors[name].num_bytes for name, tensor in replaced.items())
        self.left_out: dict[str, str] = {}
        self.carried: list[str] = []
        written = {*self.shards, CONFIG_NAME, *TOKENIZER_FILES}
        if checkpoint.sharded and self.growth_bytes:
            written.add(INDEX_NAME)
        for name in _files(checkpoint.folder, self.left_out):
            reason = _why_left_out(name, checkpoint)
            if reason is not None:
                self.left_out[name] = reason
            elif name not in written:
                self.carried.append(name)
        sizes = ((checkpoint.folder / name).stat().st_size for name in (*self.carried, *self.shards))
        self.num_bytes = sum(sizes) + self.growth_bytes


def _files(folder: Path, left_out: dict[str, str]) -> Iterator[str]:
    """Yield the names of all files below a folder; what is no file of the model goes to `left_out`."""
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        for name in sorted(folders):
            if name in SKIPPED_FOLDERS:
                left_out[f"{(inside / name).as_posix()}/"] = "version control or a cache, no part of the model"
            elif (Path(root) / name).is_symlink():
                left_out[f"{(inside / name).as_posix()}/"] = "a link to another folder"
        folders[:] = sorted(name for name in folders
                            if name not in SKIPPED_FOLDERS and not (Path(root) / name).is_symlink())
        for name in sorted(names):
            if (Path(root) / name).is_file():
                yield (inside / name).as_posix()
            else:
                left_out[(inside / name).as_posix()] = "no regular file, or a link to nowhere"


def _why_left_out(name: str, checkpoint: Checkpoint) -> str | None:
    base_name = name.rsplit("/", 1)[-1]
    if any(fnmatch.fnmatch(base_name, pattern) for pattern in PICKLE_PATTERNS):
        return "a pickle: it may hold the old vocabulary, and code"
    if fnmatch.fnmatch(name, "pytorch_model*.index.json"):
        return "the index of pickled weights"
    if any(fnmatch.fnmatch(base_name, pattern) for pattern in OTHER_WEIGHTS):
        return "weights in another form, with the old vocabulary"
    if "/" not in name and name.endswith(".safetensors") and name not in checkpoint.shards:
        return "weights that the model does not use; they may hold the old vocabulary"
    if name == MANIFEST_NAME:
        return "describes how the base was expanded"
    return None


# -- writing ------------------------------------------------------------------------------------------------------

def _write(plan: _Plan, expanded: "ExpandedTokenizer", folder: Path, progress: Progress) -> FileRecord:
    from vocabext.tokenizer import save_expanded

    checkpoint = plan.checkpoint
    stale = save_expanded(expanded, checkpoint.folder, folder)
    left_out = {**plan.left_out, **dict.fromkeys(stale, "would rebuild the tokenizer without the new tokens")}
    carried = [name for name in plan.carried if name not in left_out and not (folder / name).exists()]
    rewritten = {path.name for path in folder.iterdir()} | {CONFIG_NAME, *plan.shards}
    sizes = {name: (checkpoint.folder / name).stat().st_size for name in (*carried, *plan.shards)}
    with progress("writing the checkpoint", sum(sizes.values()), "bytes") as task:
        for name in carried:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, folder / name)
            task.advance(sizes[name])
        for name in plan.shards:
            write_shard(checkpoint.folder, checkpoint.shards[name], folder / name, plan.replaced)
            task.advance(sizes[name])
    if checkpoint.sharded and plan.growth_bytes:
        _write_json(folder / INDEX_NAME, _grown_index(plan))
        rewritten.add(INDEX_NAME)
    config = with_vocab_size(checkpoint.config, plan.num_rows)
    if config == checkpoint.config:  # the free rows were enough
        shutil.copyfile(checkpoint.folder / CONFIG_NAME, folder / CONFIG_NAME)
        rewritten.remove(CONFIG_NAME)
        carried.append(CONFIG_NAME)
    else:
        _write_json(folder / CONFIG_NAME, config)
    return FileRecord(tuple(carried), tuple(sorted(rewritten)), left_out)


def _grown_index(plan: _Plan) -> dict[str, Any]:
    """Return the base's index with the totals that have grown."""
    index = read_json(plan.checkpoint.folder / INDEX_NAME)
    metadata = dict(index.get("metadata") or {})
    if isinstance(metadata.get("total_size"), int | float):
        metadata["total_size"] = int(metadata["total_size"]) + plan.growth_bytes
    if isinstance(metadata.get("total_parameters"), int):
        tensors = list(plan.replaced)[:1] if plan.checkpoint.tied else list(plan.replaced)
        new_rows = plan.num_rows - plan.checkpoint.vocab_size
        metadata["total_parameters"] += len(tensors) * new_rows * plan.checkpoint.hidden_size
    return {**index, "metadata": metadata} if metadata else index


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _base_record(model: str, checkpoint: Checkpoint, base: "BaseTokenizer") -> BaseRecord:
    config_sha256 = file_sha256(checkpoint.folder / CONFIG_NAME)
    assert config_sha256 is not None  # open_checkpoint has read it
    return BaseRecord(
        model=model, num_rows=checkpoint.vocab_size, num_used_ids=base.num_used_ids, config_sha256=config_sha256,
        tokenizer_sha256=file_sha256(checkpoint.folder / "tokenizer.json"),
        tensors_sha256={name: checkpoint.digest(name) for name in checkpoint.vocab_tensors},
        expanded=has_manifest(checkpoint.folder))


@contextmanager
def _new_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary sibling of `output`; rename it onto `output` if the block succeeds."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _put(temporary, output, force=force)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, output: Path, *, force: bool) -> None:
    """Rename the finished folder; a folder that it replaces is moved aside first, and deleted last."""
    if not output.exists():
        temporary.rename(output)
        return
    if not force:
        raise OutputExistsError(output)  # it was not there when we began
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    try:
        output.rename(old)
        temporary.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    shutil.rmtree(old)
