"""Write a new model folder: the base, with the new tokens in its tokenizer and their rows in its tensors.

No weights are loaded. Only the shards that hold vocabulary tensors are written anew, in one pass over their
bytes; the other shards are linked or copied, everything else is copied. What it takes to get the base back
lies in `vocabext_base/` (see `vocabext.checkpoint.manifest`). The folder is built beside its destination and renamed
last, so it is there whole or not at all.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vocabext.checkpoint.folder import (
    CONFIG_NAME,
    INDEX_NAME,
    Checkpoint,
    RowsFile,
    open_checkpoint,
    open_rows,
    resolve_model,
)
from vocabext.checkpoint.manifest import (
    ADAPTER_FOLDER,
    HEAL_NAME,
    ORIGINAL_SUFFIX,
    ORIGINALS_FOLDER,
    BaseRecord,
    FileRecord,
    Manifest,
    Original,
    Originals,
    check_replaceable,
    refuse_expanded,
    token_records,
    write_manifest,
)
from vocabext.checkpoint.named_ids import listed
from vocabext.errors import CheckpointError, UsageError
from vocabext.files.atomic import check_output, real_path, write_json
from vocabext.files.folders import Syncer, check_space, new_folder
from vocabext.files.links import AUTO, LINKS, Copier
from vocabext.files.ranges import Advance, Extent, file_sha256, ignore, pass_on
from vocabext.patch.plan import FilePlan, TensorPlan, new_config, new_index, plan_files, plan_tensors
from vocabext.patch.weights import WeightWriter
from vocabext.progress import Progress, no_progress

if TYPE_CHECKING:
    from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer

MARGIN_BYTES = 1_000_000  # index, manifest, headers


@dataclass(frozen=True)
class PatchResult:
    """What `patch` made.

    Attributes:
        folder: The new folder.
        num_new: New tokens (N).
        num_searched: Those that would be merges, but whose parts are no tokens: text is searched for them.
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
        reserved: Ids behind the tokenizer's own that a file names; the new tokens go behind them.
        given_rows: Ids that had no row and got a silent one, with what they are.
        rules: Stops and bans of the base that no new token holds.
    """

    folder: Path
    num_new: int
    num_searched: int
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
    reserved: dict[int, str] = field(default_factory=dict)
    given_rows: dict[int, str] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)


def patch(rows_path: Path, model: str, output_folder: Path, *, force: bool = False, link: str = AUTO,
          untie: bool = False, healed: Path | None = None, trust_remote_code: bool = False,
          progress: Progress = no_progress, say: Callable[[str], None] = lambda _: None) -> PatchResult:
    """Write a new model folder with the new tokens and their rows.

    Args:
        rows_path: The artifact of `distill`.
        model: The base: a folder or hub id. It is only read.
        output_folder: The folder to make.
        force: Whether a model folder that is there already is replaced, once the new one is complete.
        link: How shards that stay as they are come into the new folder: `auto`, `hard` or `copy`.
        untie: Whether a tied model gets an output head of its own; it does in any case where the rows file has
            output rows that differ from the input rows.
        healed: What `heal` left: a folder whose adapter and heal.json come into the new one, too.
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
    from vocabext.tokenizer import extend, given_rows, load_base

    started = time.perf_counter()
    if link not in LINKS:
        raise UsageError(f"--link is {link!r}; it must be one of {', '.join(LINKS)}")
    output = real_path(output_folder)
    if real_path(Path(model)) != output:  # which gets a clearer refusal below
        check_output(output, force=force, folder=True)
    file = open_rows(rows_path)
    base_folder = resolve_model(model)
    check_paths(output, base_folder, rows_path)
    refuse_expanded(base_folder)
    checkpoint = open_checkpoint(base_folder, trust_remote_code=trust_remote_code)
    base = load_base(base_folder, trust_remote_code=trust_remote_code)
    given = given_rows(base, checkpoint.vocab_size)  # refuses a tokenizer of another checkpoint
    _check_rows(file, checkpoint, base.first_new_id)
    expanded = extend(base, file.tokens)
    tensors = plan_tensors(checkpoint, file, base.first_new_id, untie=untie)
    files = plan_files(checkpoint, tensors, _stale_files(checkpoint.folder))
    if tensors.untied:
        say(f"the head gets a matrix of its own, so that input and output rows can differ: "
            f"{tensors.untied_bytes / 1e6:,.1f} MB more")
    with new_folder(output, force=force, like=base_folder) as folder:
        weights = WeightWriter(checkpoint, tensors, files, folder, link)
        weights.link_weights()
        others = _OtherFiles(checkpoint, files, folder, weights.originals)
        tokenizer_bytes = len(expanded.backend.to_str().encode())
        check_space(output.parent, weights.num_bytes() + others.num_bytes() + tokenizer_bytes + MARGIN_BYTES,
                    "the new checkpoint")
        with progress("writing the checkpoint", weights.read_bytes() + others.read_bytes(), "bytes") as task, \
                Syncer() as syncer, Copier(task.advance) as copier:
            weights.write(copier, syncer)
            others.write(expanded, copier)
        others.write_index(tensors)
        record = others.record()
        adapter = {} if healed is None else _copy_adapter(healed, folder)
        _say_ids(base, given, say)
        write_manifest(folder, Manifest(
            base=_base_record(model, checkpoint, base, weights.tensors_sha256),
            tokens=token_records(file.tokens, base.first_new_id, file.header.get("per_token") or ()),
            method=str(file.header.get("method", "unknown")), options=dict(file.header.get("options") or {}),
            head_rows=tensors.head_rows, files=record, untied=tensors.untied, tensors=weights.records(),
            originals=weights.originals, reserved=_by_text(base.reserved), given_rows=_by_text(given),
            rules=base.named.rules.to_json(), adapter=adapter))
        others.write_config(tensors)
        _check_new(folder, checkpoint, tensors, trust_remote_code=trust_remote_code)
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    num_rows = tensors.records[checkpoint.vocab_tensors[0]].num_rows
    linked = sum(sizes[folder / name] for name in weights.linked)
    return PatchResult(
        output_folder, len(file.tokens), len(base.scheme.searched(file.tokens)), base.first_new_id,
        checkpoint.vocab_size, num_rows, tensors.head_rows, tensors.untied_bytes, record,
        len(weights.linked), next(iter(weights.linked.values()), None),
        sum(sizes.values()) - linked, sum(sizes.values()), time.perf_counter() - started, base.reserved, given,
        base.named.rules.to_json())


# -- before the first byte ----------------------------------------------------------------------------------------

def check_paths(output: Path, base: Path, rows: Path) -> None:
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
    check_replaceable(output)


def _check_rows(file: RowsFile, checkpoint: Checkpoint, first_new_id: int) -> None:
    """Refuse rows whose header says that they were made for another model."""
    if not file.tokens:
        raise CheckpointError("the rows file holds no tokens; there is nothing to add")
    recorded = file.header.get("base")
    recorded = recorded if isinstance(recorded, dict) else {}
    found = {"num_used_ids": first_new_id, "hidden_size": checkpoint.hidden_size,
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


# -- writing ------------------------------------------------------------------------------------------------------

class _OtherFiles:
    """Fills the new folder with everything but weights and vocabext.json."""

    def __init__(self, checkpoint: Checkpoint, files: FilePlan, folder: Path, originals: Originals) -> None:
        self._checkpoint, self._files, self._folder, self._originals = checkpoint, files, folder, originals

    def num_bytes(self) -> int:
        """Return how many bytes are to be copied."""
        return self.read_bytes() + self._size(self._files.kept)

    def read_bytes(self) -> int:
        """Return the size of the files that are carried over."""
        return self._size(self._files.others)

    def _size(self, names: Iterable[str]) -> int:
        return sum((self._checkpoint.folder / name).stat().st_size for name in names)

    def write(self, expanded: "ExpandedTokenizer", copier: Copier) -> None:
        """Write the tokenizer, and copy what is carried over or kept."""
        from vocabext.tokenizer import save_expanded

        base = self._checkpoint.folder
        save_expanded(expanded, base, self._folder)
        for name in [name for name in self._files.others if (self._folder / name).exists()]:
            self._files.others.remove(name)  # the tokenizer has a file of this name as well
            self._files.kept.append(name)
        self._originals.lost.update(self._files.lost)
        for name in self._files.kept:
            stored = f"{ORIGINALS_FOLDER}/{name}{ORIGINAL_SUFFIX}"
            self._originals.files[name] = _copy_small(base / name, self._folder / stored, stored)
        for name in self._files.others:
            self._originals.carried_over[name] = _copy_small(base / name, self._folder / name, name, copier.advance)

    def write_index(self, tensors: TensorPlan) -> None:
        """Write the index of the shards, if it changes."""
        index = new_index(self._checkpoint, tensors) if self._checkpoint.sharded else None
        if index is not None:
            write_json(self._folder / INDEX_NAME, index)

    def write_config(self, tensors: TensorPlan) -> None:
        """Write config.json, without which the folder is no model: last of all."""
        if CONFIG_NAME in self._files.kept:
            write_json(self._folder / CONFIG_NAME, new_config(self._checkpoint, tensors))

    def record(self) -> FileRecord:
        """Return what became of the base's files."""
        carried = tuple(sorted(self._originals.carried_over))
        there = {path.name for path in self._folder.iterdir() if path.is_file()} - {*carried}
        rewritten = there | {CONFIG_NAME} if CONFIG_NAME in self._files.kept else there  # it comes last
        return FileRecord(carried, tuple(sorted(rewritten)), self._files.left_out)


def _copy_small(source: Path, target: Path, stored: str, advance: Advance = ignore) -> Original:
    """Copy a file and take its digest on the way."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "xb") as new:
        return Original(*pass_on(Extent.whole(source).chunks(), new, advance), stored)


def _copy_adapter(healed: Path, folder: Path) -> dict[str, Any]:
    """Copy an adapter and its report into the new folder; returns what vocabext.json says about it."""
    (folder / ADAPTER_FOLDER).mkdir()
    digests = {}
    for path in sorted((healed / ADAPTER_FOLDER).iterdir()):
        name = f"{ADAPTER_FOLDER}/{path.name}"
        digests[name] = _copy_small(path, folder / name, name).sha256
    _copy_small(healed / HEAL_NAME, folder / HEAL_NAME, HEAL_NAME)
    return {"folder": ADAPTER_FOLDER, "merged": False, "sha256": digests}


def _base_record(model: str, checkpoint: Checkpoint, base: "BaseTokenizer",
                 tensors_sha256: Mapping[str, str]) -> BaseRecord:
    config_sha256 = file_sha256(checkpoint.folder / CONFIG_NAME)
    assert config_sha256 is not None  # open_checkpoint has read it
    return BaseRecord(
        model=model, num_rows=checkpoint.vocab_size, num_used_ids=base.first_new_id, config_sha256=config_sha256,
        tokenizer_sha256=file_sha256(checkpoint.folder / "tokenizer.json"),
        tensors_sha256=dict(tensors_sha256))


def _say_ids(base: "BaseTokenizer", given: Mapping[int, str], say: Callable[[str], None]) -> None:
    if base.reserved:
        say(f"ids that files name are left free, the new tokens begin at {base.first_new_id}: {listed(base.reserved)}")
    if given:
        say(f"ids that have no row in the base get one that is never written: {listed(given)}")
    if beyond := base.named.out_of_reach(base.num_own_ids):
        say(f"files name ids far behind all rows, which stay without one: {listed(beyond)}")
    rules = base.named.rules
    if rules.count > len(rules.anywhere) or rules.anywhere.keys() - {*base.added.values()}:
        say(f"kept: {rules.describe()}")


def _by_text(named: Mapping[int, str]) -> dict[str, str]:
    return {str(i): what for i, what in named.items()}


def _check_new(folder: Path, checkpoint: Checkpoint, tensors: TensorPlan, *, trust_remote_code: bool) -> None:
    """Open the new folder as any reader would: its headers, index and config must agree with its model class."""
    new = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    if new.tied != (checkpoint.tied and not tensors.untied):
        raise CheckpointError(
            f"{new.names.architecture} ties its head to the embedding whatever config.json says; distill again "
            "without output rows"
        )
    if new.row_tensors.keys() != tensors.records.keys():
        found, written = (", ".join(sorted(names)) for names in (new.row_tensors, tensors.records))
        raise CheckpointError(f"{new.names.architecture} finds the tensors {found} in the new folder, but {written} "
                              "were written; please report this")
