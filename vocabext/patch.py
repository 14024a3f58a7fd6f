"""Write a new model folder: the base, with the new tokens in its tokenizer and their rows in its tensors.

No weights are loaded. Only the shards that hold vocabulary tensors are written anew, in one pass over their
bytes; the other shards are linked or copied, everything else is copied. What it takes to get the base back
lies in `vocabext_base/` (see `vocabext.manifest`). The folder is built beside its destination and renamed
last, so it is there whole or not at all.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocabext.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    Checkpoint,
    RowsFile,
    open_checkpoint,
    open_rows,
    resolve_model,
)
from vocabext.errors import CheckpointError, UsageError
from vocabext.folders import Syncer, new_folder
from vocabext.links import AUTO, COPY, LINKS, Copier, link_file
from vocabext.manifest import (
    ORIGINAL_SUFFIX,
    ORIGINALS_FOLDER,
    ROWS_ORIGINAL,
    BaseRecord,
    FileRecord,
    Manifest,
    Original,
    Originals,
    OverwrittenRows,
    TensorRecord,
    file_sha256,
    has_manifest,
    token_records,
    write_manifest,
)
from vocabext.patch_plan import FilePlan, TensorPlan, new_config, new_index, plan_files, plan_tensors
from vocabext.progress import Progress, no_progress
from vocabext.records import check_output, real_path
from vocabext.shards import READ_BYTES, write_shard

if TYPE_CHECKING:
    from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer

Advance = Callable[[int], object]

MARGIN_BYTES = 1_000_000  # index, manifest, headers


@dataclass(frozen=True)
class PatchResult:
    """What `patch` made.

    Attributes:
        folder: The new folder.
        num_new: New tokens (N).
        first_new_id: Id of the first new token (U of the base).
        num_rows_before: Rows the base stores (V).
        num_rows: Rows the new checkpoint stores.
        head_rows: Where the rows of the output head come from.
        untied_bytes: What a head of its own costs a model that was tied; 0 if it is tied as before.
        files: What became of the base's files.
        num_linked: Weight files that share their bytes with the base's.
        links: How they share them: `reflink` or `hard link`; None if none do.
        bytes_written: Size of everything that was written.
        folder_bytes: Size of the new folder, linked files included.
        seconds: Time it took.
    """

    folder: Path
    num_new: int
    first_new_id: int
    num_rows_before: int
    num_rows: int
    head_rows: str
    untied_bytes: int
    files: FileRecord
    num_linked: int
    links: str | None
    bytes_written: int
    folder_bytes: int
    seconds: float


def patch(rows_path: Path, model: str, output_folder: Path, *, force: bool = False, link: str = AUTO,
          untie: bool = False, trust_remote_code: bool = False, progress: Progress = no_progress,
          say: Callable[[str], None] = lambda _: None) -> PatchResult:
    """Write a new model folder with the new tokens and their rows.

    Args:
        rows_path: The artifact of `distill`.
        model: The base: a folder or hub id. It is only read.
        output_folder: The folder to make.
        force: Whether a model folder that is there already is replaced, once the new one is complete.
        link: How shards that stay as they are come into the new folder: `auto`, `hard` or `copy`.
        untie: Whether a tied model gets an output head of its own; it does in any case where the rows file has
            output rows that differ from the input rows.
        trust_remote_code: Whether code that comes with the model may run.
        progress: Told about the bytes read.
        say: Told what a user should know, a line at a time.

    Returns:
        What was made.

    Raises:
        UsageError: If a path or option is wrong, or the output is there already and `force` is false.
        CheckpointError: If the base is damaged, the rows were made for another model, or the disk is too full.
        TokenizerError: If the tokens cannot be added to the base's tokenizer.
    """
    from vocabext.tokenizer import extend, load_tokenizer

    started = time.perf_counter()
    if link not in LINKS:
        raise UsageError(f"--link is {link!r}; it must be one of {', '.join(LINKS)}")
    output = real_path(output_folder)
    if real_path(Path(model)) != output:  # which gets a clearer refusal below
        check_output(output, force=force, folder=True)
    file = open_rows(rows_path)
    base_folder = resolve_model(model)
    check_places(output, base_folder, rows_path)
    checkpoint = open_checkpoint(base_folder, trust_remote_code=trust_remote_code)
    base = load_tokenizer(str(base_folder), trust_remote_code=trust_remote_code)
    _check_rows(file, checkpoint, base.num_used_ids)
    expanded = extend(base, file.tokens)
    tensors = plan_tensors(checkpoint, file, base.num_used_ids, untie=untie)
    files = plan_files(checkpoint, tensors, _stale_files(base_folder))
    if tensors.untied:
        say(f"the head gets a matrix of its own, so that input and output rows can differ: "
            f"{tensors.untied_bytes / 1e6:,.1f} MB more")
    with new_folder(output, force=force) as folder:
        writer = _Writer(checkpoint, expanded, tensors, files, folder, link)
        writer.link_weights()
        _check_space(output.parent, writer.num_bytes() + MARGIN_BYTES)
        writer.write(progress)
        record = writer.record()
        write_manifest(folder, Manifest(
            base=_base_record(model, checkpoint, base, writer.tensors_sha256),
            tokens=token_records(file.tokens, base.num_used_ids, file.header.get("per_token") or ()),
            method=str(file.header.get("method", "unknown")), options=dict(file.header.get("options") or {}),
            head_rows=tensors.head_rows, files=record, untied=tensors.untied, tensors=writer.records(),
            originals=writer.originals))
        writer.write_config()
        _check_new(folder, checkpoint, tensors, trust_remote_code=trust_remote_code)
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    num_rows = tensors.records[checkpoint.vocab_tensors[0]].num_rows
    linked = sum(sizes[folder / name] for name in writer.linked)
    return PatchResult(
        output_folder, len(file.tokens), base.num_used_ids, checkpoint.vocab_size, num_rows, tensors.head_rows,
        tensors.untied_bytes, record, len(writer.linked), next(iter(writer.linked.values()), None),
        sum(sizes.values()) - linked, sum(sizes.values()), time.perf_counter() - started)


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
    output, base, rows = real_path(output), real_path(base), real_path(rows)
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


def _check_rows(file: RowsFile, checkpoint: Checkpoint, num_used: int) -> None:
    """Refuse rows whose header says that they were made for another model."""
    if not file.tokens:
        raise CheckpointError("the rows file holds no tokens; there is nothing to add")
    recorded = file.header.get("base")
    recorded = recorded if isinstance(recorded, dict) else {}
    found = {"num_used_ids": num_used, "hidden_size": checkpoint.hidden_size,
             "tokenizer_sha256": file_sha256(checkpoint.folder / "tokenizer.json")}
    for key, value in found.items():
        if recorded.get(key) is not None and value is not None and recorded[key] != value:
            raise CheckpointError(
                f"the rows were made for {recorded.get('model', 'a model')} with {key} {recorded[key]}, but "
                f"{checkpoint.folder} has {value}; use the model they were made for, or distill again"
            )


def _stale_files(folder: Path) -> dict[str, str]:
    from vocabext.tokenizer import is_stale

    return {path.name: "would rebuild the tokenizer without the new tokens"
            for path in folder.iterdir() if is_stale(path.name)}


def _check_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"the new checkpoint needs {needed:,} bytes, but {parent} has {free:,} bytes free; "
            "free some, or choose an output elsewhere"
        )


# -- writing ------------------------------------------------------------------------------------------------------

@dataclass
class _Writer:
    """Fills the new folder.

    Attributes:
        checkpoint: The base.
        expanded: The new tokenizer.
        tensors: What becomes of the tensors.
        files: What becomes of the files.
        folder: Where it all goes.
        link: How weights come over.
        linked: Weight files that were linked, and how.
        tensors_sha256: Digests of the base's vocabulary tensors, once its shards are read.
        new_rows_sha256: Digests of the new rows of each tensor, once they are written.
        originals: What restores the base.
    """

    checkpoint: Checkpoint
    expanded: "ExpandedTokenizer"
    tensors: TensorPlan
    files: FilePlan
    folder: Path
    link: str = COPY
    linked: dict[str, str] = field(default_factory=dict)
    tensors_sha256: dict[str, str] = field(default_factory=dict)
    new_rows_sha256: dict[str, str] = field(default_factory=dict)
    originals: Originals = field(default_factory=Originals)

    def link_weights(self) -> None:
        """Link what can be linked; that takes no space, so it comes before the question for it."""
        for name in self.files.weights:
            how = link_file(self.checkpoint.folder / name, self.folder / name, self.link)
            if how is not None:
                self.linked[name] = how

    def num_bytes(self) -> int:
        """Return how many bytes are still to be written, a little more than less."""
        infos, base = self.checkpoint.tensors, self.checkpoint.folder
        copied = [name for name in (*self.files.weights, *self.files.others) if name not in self.linked]
        total = sum((base / name).stat().st_size for name in (*copied, *self.files.kept, *self.files.shards))
        for name, growth in self.tensors.growths.items():
            overwritten = max(0, min(growth.end_row, infos[name].shape[0]) - growth.first_row)
            total += growth.num_bytes(infos[name]) - infos[name].num_bytes + overwritten * infos[name].row_bytes
        total += sum(added.growth.num_bytes(infos[added.source]) for added in self.tensors.added.values())
        return total + len(self.expanded.backend.to_str().encode()) + 2 * sum(
            self.checkpoint.shards[name].data_start for name in self.files.shards)

    def write(self, progress: Progress) -> None:
        """Write everything but config.json and vocabext.json."""
        from vocabext.tokenizer import save_expanded

        base = self.checkpoint.folder
        save_expanded(self.expanded, base, self.folder)
        for name in [name for name in self.files.others if (self.folder / name).exists()]:
            self.files.others.remove(name)  # the tokenizer has a file of this name as well
            self.files.kept.append(name)
        self.originals.lost.update(self.files.lost)
        work = [name for name in (*self.files.weights, *self.files.others) if name not in self.linked]
        total = sum((base / name).stat().st_size for name in (*work, *self.files.shards))
        with progress("writing the checkpoint", total, "bytes") as task, Syncer() as syncer:
            advance = _locked(task.advance)
            with Copier(advance) as copier:
                for name in self.files.weights:
                    if name not in self.linked:
                        copier.add(base / name, self.folder / name)
                    self.originals.carried_over[name] = Original((base / name).stat().st_size, None, name)
                self._keep_files()
                for name in self.files.others:
                    self.originals.carried_over[name] = _copy_small(base / name, self.folder / name, name, advance)
                for name in self.files.shards:
                    syncer.add(self._rewrite(name, advance))
        index = new_index(self.checkpoint, self.tensors) if self.checkpoint.sharded else None
        if index is not None:
            _write_json(self.folder / INDEX_NAME, index)

    def write_config(self) -> None:
        """Write config.json, without which the folder is no model: last of all."""
        if CONFIG_NAME in self.files.kept:
            _write_json(self.folder / CONFIG_NAME, new_config(self.checkpoint, self.tensors))

    def record(self) -> FileRecord:
        """Return what became of the base's files."""
        carried = tuple(sorted(self.originals.carried_over))
        there = {path.name for path in self.folder.iterdir() if path.is_file()} - {*carried}
        rewritten = there | {CONFIG_NAME} if CONFIG_NAME in self.files.kept else there  # it comes last
        return FileRecord(carried, tuple(sorted(rewritten)), self.files.left_out)

    def records(self) -> dict[str, TensorRecord]:
        """Return what became of the tensors with a row per token."""
        return {name: replace(record, new_rows_sha256=self.new_rows_sha256[name])
                for name, record in self.tensors.records.items()}

    def _keep_files(self) -> None:
        for name in self.files.kept:
            stored = f"{ORIGINALS_FOLDER}/{name}{ORIGINAL_SUFFIX}"
            self.originals.files[name] = _copy_small(
                self.checkpoint.folder / name, self.folder / stored, stored)

    def _rewrite(self, name: str, advance: Advance) -> Path:
        added = {new: copied for new, copied in self.tensors.added.items() if self.tensors.records[new].file == name}
        kept_path = self.folder / ROWS_ORIGINAL
        kept_path.parent.mkdir(exist_ok=True)
        with open(kept_path, "ab") as kept:
            old = write_shard(self.checkpoint.folder, self.checkpoint.shards[name], self.folder / name,
                              self.tensors.growths, added, kept, advance)
        if not kept_path.stat().st_size:
            kept_path.unlink()
        advance(self.checkpoint.shards[name].data_start)
        self.tensors_sha256.update(old.tensors_sha256)
        self.new_rows_sha256.update(old.new_rows_sha256)
        stored = f"{ORIGINALS_FOLDER}/{name}.header{ORIGINAL_SUFFIX}"
        (self.folder / stored).write_bytes(old.header)
        self.originals.shards[name] = Original(old.num_bytes, old.sha256, stored)
        for tensor, (offset, size, sha256) in old.overwritten.items():
            if size:
                row_bytes = self.checkpoint.tensors[tensor].row_bytes
                self.originals.rows[tensor] = OverwrittenRows(
                    self.tensors.growths[tensor].first_row, size // row_bytes, offset, size, sha256)
        return self.folder / name


def _locked(advance: Advance) -> Advance:
    """Let several threads count."""
    lock = threading.Lock()

    def counted(count: int) -> None:
        with lock:
            advance(count)

    return counted


def _copy_small(source: Path, target: Path, stored: str, advance: Advance = lambda _: None) -> Original:
    """Copy a file and take its digest on the way."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with open(source, "rb") as old, open(target, "xb") as new:
        while chunk := old.read(READ_BYTES):
            digest.update(chunk)
            new.write(chunk)
            size += len(chunk)
            advance(len(chunk))
    return Original(size, digest.hexdigest(), stored)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _base_record(model: str, checkpoint: Checkpoint, base: "BaseTokenizer",
                 tensors_sha256: Mapping[str, str]) -> BaseRecord:
    config_sha256 = file_sha256(checkpoint.folder / CONFIG_NAME)
    assert config_sha256 is not None  # open_checkpoint has read it
    return BaseRecord(
        model=model, num_rows=checkpoint.vocab_size, num_used_ids=base.num_used_ids, config_sha256=config_sha256,
        tokenizer_sha256=file_sha256(checkpoint.folder / "tokenizer.json"),
        tensors_sha256=dict(tensors_sha256), expanded=has_manifest(checkpoint.folder))


def _check_new(folder: Path, checkpoint: Checkpoint, tensors: TensorPlan, *, trust_remote_code: bool) -> None:
    """Open the new folder as any reader would: its headers, index and config must agree with its model class."""
    new = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    if new.tied != (checkpoint.tied and not tensors.untied):
        raise CheckpointError(
            f"{new.names.architecture} ties its head to the embedding whatever config.json says; distill again "
            "without output rows"
        )
    assert new.row_tensors.keys() == tensors.records.keys(), f"{new.row_tensors} for {tensors.records}"
