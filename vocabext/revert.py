"""Make the base again from an expanded checkpoint, byte for byte and without the base.

The expanded folder keeps what `patch` changed (`vocabext.checkpoint.manifest` says how). `revert` trusts none of it:
each restored file must have the digest that was recorded, or the output does not appear.
"""

import json
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vocabext.checkpoint.folder import read_shards
from vocabext.checkpoint.manifest import (
    MANIFEST_NAME,
    ROWS_ORIGINAL,
    Manifest,
    Original,
    Originals,
    OverwrittenRows,
    check_replaceable,
    read_manifest,
)
from vocabext.checkpoint.shards import MAX_HEADER_BYTES, Shard, TensorInfo
from vocabext.checkpoint.verdicts import verified_sha256
from vocabext.errors import CheckpointError, UsageError
from vocabext.files.atomic import check_output, real_path
from vocabext.files.folders import check_space, new_folder
from vocabext.files.links import AUTO, link_file
from vocabext.files.ranges import Advance, Extent, pass_on
from vocabext.progress import Progress, no_progress

WEIGHTS_SUFFIX = ".safetensors"
MARGIN_BYTES = 1_000_000


@dataclass(frozen=True)
class RevertResult:
    """What `revert` made.

    Attributes:
        folder: The restored folder.
        base: The base that it restores, as the user named it to `patch`.
        num_files: How many files it restored.
        num_bytes: Their size.
        lost: What the base had and the expanded folder did not keep, with the reason.
        unproven: Restored files that have no recorded digest.
        seconds: Time it took.
    """

    folder: Path
    base: str
    num_files: int
    num_bytes: int
    lost: dict[str, str]
    unproven: tuple[str, ...]
    seconds: float


def revert(folder: Path, output: Path, *, link: str = AUTO, force: bool = False,
           progress: Progress = no_progress) -> RevertResult:
    """Write the base that a checkpoint was expanded from.

    Args:
        folder: The expanded checkpoint; `revert` only reads it.
        output: The folder to make.
        link: How to carry untouched shards over: `auto`, `hard` or `copy` (see `vocabext.files.links`).
        force: Whether to replace a model folder at `output`, once the new one is complete.
        progress: Told about the bytes written.

    Raises:
        UsageError: If a path is wrong, or `output` exists and `force` is false.
        CheckpointError: If a part of `folder` has changed since it was made, was not kept, or the disk is too full.
    """
    began = time.perf_counter()
    manifest = read_manifest(folder)
    place = real_path(output)
    _check_paths(real_path(folder), place, force=force)
    originals = _originals(manifest, folder)
    sizes = {name: original.num_bytes for part in (originals.carried_over, originals.files, originals.shards)
             for name, original in part.items()}
    with new_folder(place, force=force, like=folder) as target:
        restoration = _Restoration(folder, target, originals)
        restoration.link_weights(link)
        check_space(place.parent, sum(sizes.values()) - restoration.linked_bytes + MARGIN_BYTES, "the restored base")
        with progress("restoring", sum(sizes.values()), "bytes") as task:
            restoration.run(task.advance)
    return RevertResult(output, manifest.base.model, len(sizes), sum(sizes.values()), dict(originals.lost),
                        tuple(restoration.unproven), time.perf_counter() - began)


# -- before the first byte ----------------------------------------------------------------------------------------

def _check_paths(folder: Path, output: Path, *, force: bool) -> None:
    if output == folder:
        raise UsageError(f"the output {output} is the expanded checkpoint itself; choose another output")
    if folder in output.parents or output in folder.parents:
        raise UsageError(f"the output {output} and the expanded checkpoint {folder} lie inside each other; "
                         "choose another output")
    check_output(output, force=force, folder=True)
    check_replaceable(output)


def _originals(manifest: Manifest, folder: Path) -> Originals:
    """Return what the folder keeps of the base, or raise an error if a file that it names is missing."""
    originals = manifest.originals
    if manifest.merged:
        raise CheckpointError(f"{folder} holds a merged adapter and nothing that restores the base; take the base "
                              f"itself, {manifest.base.model}")
    if originals is None:
        raise CheckpointError(f"{folder / MANIFEST_NAME} does not say how to restore the base, because vocabext "
                              f"{manifest.vocabext_version} kept nothing of it; the base is {manifest.base.model}")
    for part in (originals.carried_over, originals.files, originals.shards):
        for name, original in part.items():
            if not (folder / original.stored).is_file():
                raise CheckpointError(f"{folder} lacks {original.stored}, from which {name} is restored; "
                                      f"the base is {manifest.base.model}")
    if any(rows.num_bytes for rows in originals.rows.values()) and not (folder / ROWS_ORIGINAL).is_file():
        raise CheckpointError(f"{folder} lacks {ROWS_ORIGINAL}, the rows that new ones have overwritten; "
                              f"the base is {manifest.base.model}")
    return originals


# -- restoring ----------------------------------------------------------------------------------------------------

class _Restoration:
    """Writes every file of the base into a folder, and checks each."""

    def __init__(self, folder: Path, target: Path, originals: Originals) -> None:
        self._folder, self._target, self._originals = folder, target, originals
        self._files = dict(sorted({**originals.carried_over, **originals.files}.items()))
        self._linked: set[str] = set()
        self._verified = verified_sha256(folder)
        self.unproven: list[str] = []

    def link_weights(self, how: str) -> None:
        """Link the weights that can be linked: they take no space, so `revert` asks for space afterwards."""
        for name, original in self._files.items():
            if name.endswith(WEIGHTS_SUFFIX):  # nobody edits weights in place, which would edit both files
                target = self._target / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if link_file(self._folder / original.stored, target, how) is not None:
                    self._linked.add(name)

    @property
    def linked_bytes(self) -> int:
        """Size of the linked files."""
        return sum(self._files[name].num_bytes for name in self._linked)

    def run(self, advance: Advance) -> None:
        """Write all other files, and check every one."""
        for name, original in self._files.items():
            (self._target / name).parent.mkdir(parents=True, exist_ok=True)
            self._write(name, original, Extent.whole(self._folder / original.stored).chunks(), advance)
        shards = read_shards(self._folder) if self._originals.shards else {}
        for name, original in sorted(self._originals.shards.items()):
            self._write(name, original, self._shard(name, original, shards), advance)

    def _write(self, name: str, original: Original, chunks: Iterator[bytes], advance: Advance) -> None:
        """Write one file, or only read it if it is a link; raise an error if it is not what the base had."""
        path, linked = self._target / name, name in self._linked
        with open(path, "rb" if linked else "xb") as file:
            count, digest = pass_on(chunks, None if linked else file, advance)
        wanted = original.sha256 or self._verified.get(name)
        if count != original.num_bytes:
            raise CheckpointError(f"{original.stored} has changed since it was made: {name} of the base had "
                                  f"{original.num_bytes:,} bytes, restored it has {count:,}")
        if wanted is None:
            self.unproven.append(name)
        elif digest != wanted:
            source = original.stored if name in self._files else "a tensor in the new shards"
            raise CheckpointError(f"{source} has changed since it was made: restored, {name} has the digest "
                                  f"{digest[:12]}, the base's was {wanted[:12]}")

    def _shard(self, name: str, original: Original, shards: Mapping[str, Shard]) -> Iterator[bytes]:
        """Yield the bytes of an old shard: its header, which the folder keeps, and its tensors from the new shards."""
        extent = Extent.whole(self._folder / original.stored)
        if extent.count > 8 + MAX_HEADER_BYTES:
            raise CheckpointError(f"{original.stored} is no header of a shard: it has {extent.count:,} bytes")
        raw = bytes(extent.read())
        yield raw
        found = {tensor: (shard, info) for shard in shards.values() for tensor, info in shard.tensors.items()}
        for tensor, num_bytes in _tensor_sizes(raw, original.stored):
            if tensor not in found or found[tensor][1].num_bytes < num_bytes:
                raise CheckpointError(f"the checkpoint has changed since it was made: {tensor} of {name} is missing or "
                                      f"shorter than {num_bytes:,} bytes")
            yield from self._tensor(tensor, *found[tensor], num_bytes)

    def _tensor(self, name: str, shard: Shard, info: TensorInfo, num_bytes: int) -> Iterator[bytes]:
        """Yield the old bytes of a tensor: its first rows, with those that new rows have overwritten put back."""
        whole = Extent(self._folder / info.file, shard.data_start + info.start, num_bytes)
        rows = self._originals.rows.get(name)
        if rows is None or not rows.num_bytes:
            yield from whole.chunks()
            return
        first = rows.first_row * (rows.num_bytes // rows.num_rows)
        end = first + rows.num_bytes
        if end > num_bytes:
            raise CheckpointError(f"{MANIFEST_NAME} is damaged: the overwritten rows of {name} end at byte {end:,} of "
                                  f"{num_bytes:,}")
        yield from whole.part(0, first).chunks()
        yield from self._overwritten(name, rows)
        yield from whole.part(end, num_bytes - end).chunks()

    def _overwritten(self, name: str, rows: OverwrittenRows) -> Iterator[bytes]:
        extent = Extent(self._folder / ROWS_ORIGINAL, rows.offset, rows.num_bytes)
        if extent.sha256() != rows.sha256:
            raise CheckpointError(f"{ROWS_ORIGINAL} has changed since it was made: the overwritten rows of "
                                  f"{name} have another digest")
        yield from extent.chunks()


def _tensor_sizes(raw: bytes, stored: str) -> list[tuple[str, int]]:
    """Return name and size of every tensor that a header describes, in the order of their bytes."""
    try:
        length = struct.unpack("<Q", raw[:8])[0]
        entries: dict[str, Any] = json.loads(raw[8:])
        if length != len(raw) - 8:
            raise ValueError(length)
        offsets = [(int(entry["data_offsets"][0]), int(entry["data_offsets"][1]), name)
                   for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, struct.error):
        raise CheckpointError(f"{stored} has changed since it was made: it is no header of a shard") from None
    sizes, position = [], 0
    for start, end, name in sorted(offsets):
        if start != position or end < start:
            raise CheckpointError(f"{stored} has changed since it was made: its tensors leave gaps")
        sizes.append((name, end - start))
        position = end
    return sizes
