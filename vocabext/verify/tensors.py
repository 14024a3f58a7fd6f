"""Tensors and rows, byte by byte, a chunk at a time: a checkpoint may be larger than the memory.

Shapes: V rows as stored, N new rows, D what is stored per row (any shape, taken as one axis).
"""

import math
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING

import torch

from vocabext.checkpoint.folder import Checkpoint
from vocabext.checkpoint.rows import DTYPES, mean_row
from vocabext.checkpoint.shards import CHUNK_BYTES
from vocabext.checkpoint.vocabulary import PER_LAYER, SILENT_BIAS, TABLE
from vocabext.files.ranges import Extent, first_difference, in_parallel, same_inode
from vocabext.tokenizer import given_rows
from vocabext.verify.adapter import refuse_merged
from vocabext.verify.pair import FaultError, NotCheckedError, Pair

if TYPE_CHECKING:
    from hashlib import _Hash

SILENT = -1000.0  # exp of a bias below that is 0


def untouched_tensors(pair: Pair) -> str:
    """Compare the bytes of all tensors without a row per token.

    A shard that both folders share on the disk has nothing to be compared with; its digest is.
    """
    refuse_merged(pair)
    names = sorted(set(pair.base.tensors) - set(pair.base.row_tensors))
    for name in names:
        if name not in pair.new.tensors:
            raise NotCheckedError("tensors are missing")  # another check names them
        a, b = pair.base.tensors[name], pair.new.tensors[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise FaultError(f"{name} is {a.dtype} {list(a.shape)} in the base and {b.dtype} {list(b.shape)} here")
    shared = _shared_shards(pair)
    _note_digests(pair, _digests(pair, shared), "is one file with the base's (a hard link), and was changed after it "
                                                "was linked")
    copies = _equal_shards(pair, shared)
    _note_digests(pair, copies, "is equal to the base's, but both were changed since a digest was recorded")
    alike = {*shared, *copies}
    for name in names:
        a, b = pair.base.tensors[name], pair.new.tensors[name]
        if a.file == b.file and a.file in alike:
            continue
        at = first_difference(pair.base.extent(name), pair.new.extent(name), pair.advance)
        if at is not None:
            raise FaultError(f"the bytes of {name} differ from the base, from byte {at:,} on")
    num_bytes = sum(pair.base.tensors[name].num_bytes for name in names)
    recorded = sum(pair.recorded_shards.get(file) is not None for file in shared)
    count = f"{len(shared):,} shard{'s' * (len(shared) != 1)}"
    note = f", {count} shared with the base on the disk ({recorded} with a recorded digest)" if shared else ""
    return f"{len(names):,} tensors, {num_bytes:,} bytes{note}"


def _shared_shards(pair: Pair) -> list[str]:
    """Return the shards that both folders share on the disk."""
    return sorted(file for file in pair.new.shards if file in pair.base.shards
                  and same_inode(pair.base.folder / file, pair.new.folder / file))


def _equal_shards(pair: Pair, shared: list[str]) -> dict[str, str]:
    """Return the digests of the shards that are copies of the base's."""
    copies = sorted((pair.recorded_shards.keys() & pair.base.shards.keys() & pair.new.shards.keys()) - set(shared))

    def digest_if_equal(file: str) -> str | None:
        digest = sha256()
        extents = Extent.whole(pair.base.folder / file), Extent.whole(pair.new.folder / file)
        return digest.hexdigest() if first_difference(*extents, pair.advance, digest) is None else None

    digests = dict(zip(copies, in_parallel(digest_if_equal, copies), strict=True))
    return {file: digest for file, digest in digests.items() if digest is not None}


def _digests(pair: Pair, files: list[str]) -> dict[str, str]:
    digests = in_parallel(lambda file: Extent.whole(pair.new.folder / file).sha256(pair.advance), files)
    return dict(zip(files, digests, strict=True))


def _note_digests(pair: Pair, digests: Mapping[str, str], said: str) -> None:
    """Compare digests with those that were recorded, where there are any, and note them: `revert` wants to know them.

    A digest that was recorded stays the one to compare with, however often the shard is found to have another.
    """
    changed = [file for file, digest in digests.items() if pair.recorded_shards.get(file) not in (None, digest)]
    pair.carried_sha256.update({file: digest for file, digest in digests.items() if file not in changed})
    if changed:
        file = changed[0]
        raise FaultError(f"{file} {said}: its digest is {digests[file][:12]}, recorded is "
                         f"{str(pair.recorded_shards[file])[:12]}; get the base again, and patch it again")


def old_rows(pair: Pair) -> str:
    """Compare the bits of all rows that belong to base ids, and of padding behind the new ones."""
    first, end = pair.expansion.first_new_id, pair.expansion.end_id
    kept = 0
    for name in pair.new.row_tensors:
        source = _source(pair, name)
        before, after = pair.base.tensors[source], pair.new.tensors[name]
        if before.dtype != after.dtype or before.shape[1:] != after.shape[1:]:
            raise FaultError(f"a row of {name} is {before.dtype} {list(before.shape[1:])} in the base, "
                             f"{after.dtype} {list(after.shape[1:])} here")
        num_old, num_new = before.shape[0], after.shape[0]
        if num_old < first and pair.new.row_tensors[name].role not in (PER_LAYER, TABLE):
            given_rows(pair.base_tokenizer, num_old)  # an error where ids of plain text have no row
        if num_new < max(num_old, end):
            raise FaultError(f"{name} has {num_new} rows; {max(num_old, end)} are needed")
        for start, stop in ((0, min(first, num_old)), (end, num_old)):
            if stop > start:
                _compare_rows(pair, source, name, start, stop)
                kept += stop - start
        _check_silent(pair, name, num_old, first)
    return f"{kept:,} rows in {', '.join(pair.new.row_tensors)}"


def _source(pair: Pair, name: str) -> str:
    """Return the base's tensor that holds the old rows: of a head that was separated, what it was tied to."""
    return name if name in pair.base.tensors else pair.base.vocab_tensors[0]


def _compare_rows(pair: Pair, source: str, name: str, start: int, stop: int) -> None:
    at = first_difference(pair.base.rows(source, start, stop), pair.new.rows(name, start, stop), pair.advance)
    if at is not None:
        row = start + at // pair.new.tensors[name].row_bytes
        raise FaultError(f"row {row} of {name} differs from the base")


def new_rows(pair: Pair, max_norm_ratio: float) -> str:
    """Look for new rows that are no numbers, zero, so long that they would win every softmax, or not what was written.

    Rows behind the last id and behind the base's own must be zero, or between two base rows that the manifest names, or
    in a bias far below all others.

    Args:
        pair: The checkpoints.
        max_norm_ratio: How many times the length of the longest base row is too long.
    """
    worst = 0.0
    for name in pair.new.row_tensors:
        worst = max(worst, _check_new_rows(pair, name, max_norm_ratio))
        begin = max(pair.expansion.end_id, pair.base.tensors[_source(pair, name)].shape[0])
        _check_silent(pair, name, begin, pair.new.tensors[name].shape[0])
    unproven = [name for name in pair.new.row_tensors if _new_rows_sha256(pair, name) is None]
    note = f"; the bits of those in {', '.join(unproven)} were not checked: no digest was recorded" if unproven else ""
    return f"{pair.expansion.num_new:,} rows, the longest {worst:.2f} times the longest base row{note}"


def _check_new_rows(pair: Pair, name: str, max_norm_ratio: float) -> float:
    """Check the new rows of one tensor; returns the length of the longest, in units of the longest base row."""
    first, end, info = pair.expansion.first_new_id, pair.expansion.end_id, pair.new.tensors[name]
    if info.shape[0] < end:
        raise NotCheckedError("rows are missing")  # another check names them
    longest = max((float(rows.norm(dim=1).max()) for _, rows in _rows(pair.new, name, 0, first)), default=0.0)
    bias, worst, digest = len(info.shape) == 1, 0.0, sha256()
    silent = torch.tensor(SILENT_BIAS, dtype=DTYPES[info.dtype]).float()
    for start, rows in _rows(pair.new, name, first, end, digest):
        norms = rows.norm(dim=1)
        if bias:  # one number per token may well be zero, or keep a token from ever being written
            norms[rows[:, 0] == silent] = 0.0
        for i, norm in enumerate(norms.tolist(), start - first):
            token = pair.expansion.tokens[i].token
            if not math.isfinite(norm) or (norm == 0 and not bias):
                raise FaultError(f"the row of {token!r} in {name} has norm {norm}")
            if norm > max_norm_ratio * longest:
                times = f"{norm / longest:.1f} times as long as" if longest else "longer than"
                raise FaultError(f"the row of {token!r} in {name} is {times} the longest base row")
            worst = max(worst, norm / longest if longest else 0.0)
    recorded = _new_rows_sha256(pair, name)
    if recorded not in (None, digest.hexdigest()):
        raise FaultError(f"the new rows of {name} were changed after they were written: their digest is "
                         f"{digest.hexdigest()[:12]}, recorded is {str(recorded)[:12]}; patch again")
    return worst


def _new_rows_sha256(pair: Pair, name: str) -> str | None:
    """Return the digest of new rows as they were written; None if an older `patch` has recorded none."""
    record = pair.manifest.tensors.get(name)
    return None if record is None else record.new_rows_sha256


def _check_silent(pair: Pair, name: str, begin: int, end: int) -> None:
    """Look at rows that belong to no id, or to one that the base has no row for."""
    if begin >= end:
        return
    bias = len(pair.new.tensors[name].shape) == 1
    expected, said = _surplus_row(pair, name)
    for start, rows in _rows(pair.new, name, begin, end):
        odd = (rows > SILENT if bias else rows != expected).any(dim=1).nonzero()
        if len(odd):
            raise FaultError(f"row {start + int(odd[0])} of {name} is none of the base's and is not "
                             f"{'silent' if bias else said}")


def _surplus_row(pair: Pair, name: str) -> tuple[torch.Tensor, str]:
    """Return what rows without an id must be, and in words."""
    record, source = pair.manifest.tensors.get(name), _source(pair, name)
    if record is None or not record.surplus:
        return torch.zeros(1, dtype=torch.float32), "zero"
    if not all(0 <= i < pair.expansion.first_new_id for i in record.surplus):
        raise FaultError(f"the manifest names the rows {list(record.surplus)} for the surplus of {name}, the base has "
                         f"{pair.expansion.first_new_id} ids")
    info = pair.base.tensors[source]
    raw = bytearray(mean_row(pair.base, source, record.surplus))
    row = torch.frombuffer(raw, dtype=DTYPES[info.dtype]).float()
    return row, f"the mean of the rows {' and '.join(map(str, record.surplus))}"


def _rows(checkpoint: Checkpoint, name: str, first: int, end: int, digest: "_Hash | None" = None
          ) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield some rows, and the number of the first of them, a chunk at a time; `digest` gets their bytes."""
    info = checkpoint.tensors[name]
    size = info.row_bytes
    step = max(1, CHUNK_BYTES // size)
    for start in range(first, min(end, info.shape[0]), step):
        stop = min(start + step, end, info.shape[0])
        raw = checkpoint.rows(name, start, stop).read()
        if digest is not None:
            digest.update(raw)
        yield start, torch.frombuffer(raw, dtype=DTYPES[info.dtype]).view(stop - start, -1).float()
