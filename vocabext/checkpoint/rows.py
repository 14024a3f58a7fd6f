"""Where new rows come from: a rows file, or the mean of their pieces. A `RowSource` makes a few at a time.

Shapes: N new rows, n of them at a time, V rows as stored, D width (a bias has none).
"""

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch

from vocabext.checkpoint.folder import Checkpoint, RowsFile
from vocabext.checkpoint.shards import TensorInfo, row_ranges
from vocabext.errors import CheckpointError
from vocabext.files.ranges import Extent, read_scattered
from vocabext.tokens import NewToken

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Returns the new rows [i, j) in float32.
RowSource = Callable[[int, int], torch.Tensor]
# A row shorter than this fraction of the median length is as good as zero.
NOTHING = 1e-3
# How many rows of a matrix are in memory as float32 at a time.
ROWS_AT_ONCE = 4_096


def mean_rows(matrix_VD: torch.Tensor, tokens: Sequence[NewToken]) -> torch.Tensor:
    """Return the mean of the rows of each token's run, (N, D), float32: the usual baseline, and our start."""
    return _means(matrix_VD, [t.run for t in tokens])


def _means(matrix_VD: torch.Tensor, runs: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the mean of the rows of each run; one call does all runs of a length, since calls cost more than sums."""
    found = torch.empty(len(runs), *matrix_VD.shape[1:], dtype=torch.float32, device=matrix_VD.device)
    for length in {len(run) for run in runs}:
        chosen = [i for i, run in enumerate(runs) if len(run) == length]
        found[chosen] = matrix_VD[torch.tensor([runs[i] for i in chosen])].float().mean(1)
    return found


def row_norms(matrix_VD: torch.Tensor) -> torch.Tensor:
    """Return the length of each row, (V,), float32, on the host, with few rows in float32 at a time."""
    return torch.cat([part.float().norm(dim=1).cpu() for part in matrix_VD.split(ROWS_AT_ONCE)])


def rows_in_use(matrix_VD: torch.Tensor, first_new_id: int, textless_ids: Collection[int] = ()) -> torch.Tensor:
    """Tell which base rows stand for tokens that the model was trained on, (U,), on the host.

    Many checkpoints have rows that nobody trained: of reserved and special ids, of ids that the tokenizer lacks. They
    may be zero, next to nothing, or all the same, and say nothing about the others. A row in use is longer than that,
    has text, and differs from all others. Where fewer than two rows are so, equal ones count; where fewer still, those
    without text.

    Args:
        matrix_VD: Embedding or head of the base model.
        first_new_id: Id of the first new token (U).
        textless_ids: Ids below it that no text has.
    """
    num_rows = min(first_new_id, len(matrix_VD))  # the last ids may have no row
    norms_V = row_norms(matrix_VD[:num_rows])
    some_V = norms_V > 0
    if bool(some_V.any()):
        some_V &= norms_V >= NOTHING * norms_V[some_V].median()
    free_V = some_V.clone()
    free_V[[i for i in textless_ids if i < num_rows]] = False
    checksums = np.fromiter(_checksums(matrix_VD[:num_rows]), np.uint32, num_rows)
    _, which, count = np.unique(checksums, return_inverse=True, return_counts=True)
    alone_V = free_V & torch.from_numpy(count[which] == 1)
    return next((found_V for found_V in (alone_V, free_V) if int(found_V.sum()) > 1), some_V)


def _checksums(matrix_VD: torch.Tensor) -> Iterator[int]:
    for part in matrix_VD.detach().split(ROWS_AT_ONCE):
        yield from (zlib.crc32(row) for row in part.cpu().contiguous().view(torch.uint8).numpy())


def rows_from_file(file: RowsFile, name: str) -> RowSource:
    """Return a source of the `input` or `output` rows of a rows file."""
    info = file.tensors[name]

    def read(first: int, last: int) -> torch.Tensor:
        start = file.data_start + info.start + first * info.row_bytes
        raw = Extent(file.path, start, (last - first) * info.row_bytes).read()
        return torch.frombuffer(raw, dtype=DTYPES[info.dtype]).view(last - first, *info.shape[1:]).float()

    return read


def mean_of_pieces(checkpoint: Checkpoint, name: str, tokens: Sequence[NewToken]) -> RowSource:
    """Return a source of the mean rows of each token's run, in any stored tensor with a row per token id."""
    info = checkpoint.tensors[name]
    start = checkpoint.extent(name).start

    def read(first: int, last: int) -> torch.Tensor:
        some = tokens[first:last]
        pieces = sorted({piece for token in some for piece in token.run})
        if (odd := next((piece for piece in pieces if piece >= info.shape[0]), None)) is not None:
            raise CheckpointError(f"a new token has the piece {odd}, but {info.file} has {info.shape[0]} rows for it")
        raw = read_scattered(checkpoint.folder / info.file, (start + piece * info.row_bytes for piece in pieces),
                             info.row_bytes)
        rows = torch.frombuffer(raw, dtype=DTYPES[info.dtype]).view(len(pieces), *info.shape[1:])
        at = {piece: i for i, piece in enumerate(pieces)}
        return _means(rows, [[at[piece] for piece in token.run] for token in some])

    return read


def as_bytes(source: RowSource, dtype: str) -> Callable[[int, int], bytes]:
    """Return a source of the same rows as bytes, in a stored dtype."""

    def read(first: int, last: int) -> bytes:
        return source(first, last).to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy().tobytes()

    return read


def check_rows(source: RowSource, num_new: int, info: TensorInfo) -> None:
    """Refuse new rows that do not fit the tensor they go into; `patch` asks before it writes anything.

    Raises:
        CheckpointError: If the widths differ, or a row is not finite in the dtype of the tensor.
    """
    dtype = DTYPES[info.dtype]
    bad: list[int] = []
    for first, last in row_ranges(num_new, info.row_bytes):
        rows = source(first, last)
        if tuple(rows.shape[1:]) != info.shape[1:]:
            raise CheckpointError(
                f"the new rows are {list(rows.shape[1:])} wide, but a row of the model is {list(info.shape[1:])} wide; "
                "they were made for another model"
            )
        finite = torch.isfinite(rows.to(dtype)).reshape(len(rows), -1).all(1)
        bad += [first + row for row in (~finite).nonzero().flatten().tolist()]
    if bad:
        raise CheckpointError(f"{len(bad)} new rows are not finite in {dtype}, the first is row {bad[0]}")


def same_rows(one: RowSource, other: RowSource, num_new: int, row_bytes: int) -> bool:
    """Tell whether two sources give the same rows."""
    return all(torch.equal(one(first, last), other(first, last)) for first, last in row_ranges(num_new, row_bytes))


def mean_row(checkpoint: Checkpoint, name: str, ids: Sequence[int]) -> bytes:
    """Return the bytes of the mean of some rows of a stored tensor, in its dtype."""
    source = mean_of_pieces(checkpoint, name, [NewToken("", "", tuple(ids))])
    return as_bytes(source, checkpoint.tensors[name].dtype)(0, 1)


def constant_row(info: TensorInfo, value: float) -> bytes:
    """Return the bytes of one row of a tensor that holds one value everywhere."""
    return torch.full(info.shape[1:], value, dtype=DTYPES[info.dtype]).reshape(-1).view(torch.uint8).numpy().tobytes()


def constant_rows(value: float) -> RowSource:
    """Return a source of equal rows for a tensor without width (a bias)."""
    return lambda first, last: torch.full((last - first,), value, dtype=torch.float32)
