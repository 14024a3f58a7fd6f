"""Tensors and rows, byte by byte, a chunk at a time: a checkpoint may be larger than the memory.

Shapes: V rows as stored, N new rows, D what is stored per row (any shape, taken as one axis).
"""

import math
from collections.abc import Iterator
from hashlib import sha256

import torch

from vocabext.checkpoint import Checkpoint
from vocabext.checks.pair import FaultError, NotCheckedError, Pair
from vocabext.extent import Extent, first_difference, in_parallel, same_inode
from vocabext.rows import DTYPES, mean_row
from vocabext.shards import CHUNK_BYTES

SILENT = -1000.0  # exp of a bias below that is 0


def untouched_tensors(pair: Pair) -> str:
    """Compare the bytes of all tensors without a row per token.

    A shard that both folders share on the disk has nothing to be compared with; its digest is.
    """
    names = sorted(set(pair.base.tensors) - set(pair.base.row_tensors))
    for name in names:
        if name not in pair.new.tensors:
            raise NotCheckedError("tensors are missing")  # another check names them
        a, b = pair.base.tensors[name], pair.new.tensors[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise FaultError(f"{name} is {a.dtype} {list(a.shape)} in the base and {b.dtype} {list(b.shape)} here")
    shared = _shared_shards(pair)
    _compare_digests(pair, shared)
    alike = {*shared, *_equal_shards(pair, shared)}
    for name in names:
        a, b = pair.base.tensors[name], pair.new.tensors[name]
        if a.file == b.file and a.file in alike:
            continue
        at = first_difference(_extent(pair.base, name), _extent(pair.new, name), pair.advance)
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
                  and same_inode(pair.base.folder / file, pair.new.folder / file))  # fmt: skip


def _equal_shards(pair: Pair, shared: list[str]) -> list[str]:
    """Return the shards that are copies of the base's, and note their digests: `revert` wants to know them."""
    copies = sorted((pair.recorded_shards.keys() & pair.base.shards.keys() & pair.new.shards.keys()) - set(shared))

    def digest_if_equal(file: str) -> str | None:
        digest = sha256()
        extents = Extent.whole(pair.base.folder / file), Extent.whole(pair.new.folder / file)
        return digest.hexdigest() if first_difference(*extents, pair.advance, digest) is None else None

    digests = dict(zip(copies, in_parallel(digest_if_equal, copies), strict=True))
    pair.carried_sha256.update({file: digest for file, digest in digests.items() if digest is not None})
    return [file for file, digest in digests.items() if digest is not None]


def _compare_digests(pair: Pair, shared: list[str]) -> None:
    """Compare the digests of shared shards with those that were recorded, where there are any."""
    digests = in_parallel(lambda file: Extent.whole(pair.new.folder / file).sha256(pair.advance), shared)
    for file, digest in zip(shared, digests, strict=True):
        if pair.recorded_shards.get(file) not in (None, digest):
            raise FaultError(f"{file} is one file with the base's (a hard link), and was changed after it was linked")
        pair.carried_sha256[file] = digest


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
        if num_old < first:
            raise FaultError(f"{source} has {num_old} rows in the base, but the new ids begin at {first}")
        if num_new < max(num_old, end):
            raise FaultError(f"{name} has {num_new} rows; {max(num_old, end)} are needed")
        for start, stop in ((0, first), (end, num_old)):
            if stop > start:
                _compare_rows(pair, source, name, start, stop)
                kept += stop - start
    return f"{kept:,} rows in {', '.join(pair.new.row_tensors)}"


def _source(pair: Pair, name: str) -> str:
    """Return the base's tensor that holds the old rows: of a head that was separated, what it was tied to."""
    return name if name in pair.base.tensors else pair.base.vocab_tensors[0]


def _compare_rows(pair: Pair, source: str, name: str, start: int, stop: int) -> None:
    extents = _extent(pair.base, source, start, stop), _extent(pair.new, name, start, stop)
    at = first_difference(*extents, pair.advance)
    if at is not None:
        row = start + at // pair.new.tensors[name].row_bytes
        raise FaultError(f"row {row} of {name} differs from the base")


def new_rows(pair: Pair, max_norm_ratio: float) -> str:
    """Look for new rows that are no numbers, zero, or so long that they would win every softmax.

    Rows behind the last id and behind the base's own must be zero, or between two base rows that the manifest names, or
    in a bias far below all others.

    Args:
        pair: The checkpoints.
        max_norm_ratio: How many times the length of the longest base row is too long.
    """
    first, end = pair.expansion.first_new_id, pair.expansion.end_id
    worst = 0.0
    for name in pair.new.row_tensors:
        longest = max((float(norms.max()) for _, norms in _norms(pair.new, name, 0, first)), default=0.0)
        bias = len(pair.new.tensors[name].shape) == 1  # one number per token may well be zero
        for start, norms in _norms(pair.new, name, first, end):
            for i, norm in enumerate(norms.tolist(), start - first):
                token = pair.expansion.tokens[i].token
                if not math.isfinite(norm) or (norm == 0 and not bias):
                    raise FaultError(f"the row of {token!r} in {name} has norm {norm}")
                if norm > max_norm_ratio * longest:
                    times = f"{norm / longest:.1f} times as long as" if longest else "longer than"
                    raise FaultError(f"the row of {token!r} in {name} is {times} the longest base row")
                worst = max(worst, norm / longest if longest else 0.0)
        _check_surplus(pair, name)
    return f"{pair.expansion.num_new:,} rows, the longest {worst:.2f} times the longest base row"


def _check_surplus(pair: Pair, name: str) -> None:
    info = pair.new.tensors[name]
    begin = max(pair.expansion.end_id, pair.base.tensors[_source(pair, name)].shape[0])
    expected, said = _surplus_row(pair, name)
    for start, rows in _rows(pair.new, name, begin, info.shape[0]):
        odd = (rows > SILENT if len(info.shape) == 1 else rows != expected).any(dim=1).nonzero()
        if len(odd):
            raise FaultError(f"row {start + int(odd[0])} of {name} belongs to no id and is not "
                             f"{'silent' if len(info.shape) == 1 else said}")


def _surplus_row(pair: Pair, name: str) -> tuple[torch.Tensor, str]:
    """Return what rows without an id must be, and in words."""
    record, source = pair.manifest.tensors.get(name), _source(pair, name)
    if record is None or not record.surplus:
        return torch.zeros(1), "zero"
    if not all(0 <= i < pair.expansion.first_new_id for i in record.surplus):
        raise FaultError(f"the manifest names the rows {list(record.surplus)} for the surplus of {name}, the base has "
                         f"{pair.expansion.first_new_id} ids")
    info = pair.base.tensors[source]
    raw = bytearray(mean_row(pair.base, source, record.surplus))
    row = torch.frombuffer(raw, dtype=DTYPES[info.dtype]).float()
    return row, f"the mean of the rows {' and '.join(map(str, record.surplus))}"


def _norms(checkpoint: Checkpoint, name: str, first: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the lengths of some rows, and the number of the first of them, a chunk at a time."""
    for start, rows in _rows(checkpoint, name, first, end):
        yield start, rows.norm(dim=1)


def _rows(checkpoint: Checkpoint, name: str, first: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield some rows, and the number of the first of them, a chunk at a time."""
    info = checkpoint.tensors[name]
    size = info.row_bytes
    step = max(1, CHUNK_BYTES // size)
    for start in range(first, min(end, info.shape[0]), step):
        stop = min(start + step, end, info.shape[0])
        raw = bytearray().join(_extent(checkpoint, name, start, stop).chunks())
        yield start, torch.frombuffer(raw, dtype=DTYPES[info.dtype]).view(stop - start, -1).float()


def _extent(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Extent:
    """Return where a tensor lies, or some of its rows."""
    info = checkpoint.tensors[name]
    begin = checkpoint.shards[info.file].data_start + info.start
    if stop is None:
        return Extent(checkpoint.folder / info.file, begin, info.num_bytes)
    size = info.row_bytes
    return Extent(checkpoint.folder / info.file, begin + start * size, (stop - start) * size)
