"""What an expansion has changed: files, tensors, rows, and tokens with examples of how the new tokenizer cuts text.

`diff` reads all of it off the two folders; vocabext.json only says which tokens are new, and why files were left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING

from vocabext.checkpoint.folder import Checkpoint, open_checkpoint, resolve_model
from vocabext.checkpoint.manifest import Manifest, read_manifest
from vocabext.checkpoint.shards import TensorInfo
from vocabext.errors import CheckpointError
from vocabext.files.ranges import Extent, first_difference, same_inode
from vocabext.progress import Progress, no_progress

if TYPE_CHECKING:
    from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer

Changes = dict[str, tuple[object, object]]
SAME, LINKED, CHANGED, ADDED, REMOVED = "same bytes", "one file on the disk", "changed", "added", "not there"
# Texts around a new token, tried until its tokenizer uses it: tokenizers differ in where they do.
BEFORE, AFTER = ("", "x", ". ", "x ", "\n"), ("", " ", ".", "\n")


@dataclass(frozen=True)
class FileChange:
    """A file of either folder.

    Attributes:
        name: Its path, relative to the folder.
        state: How the expansion has changed it: `SAME`, `LINKED`, `CHANGED`, `ADDED` or `REMOVED`.
        bytes_before: Its size in the base; None if it is not there.
        bytes_after: Its size in the expanded folder; None if it is not there.
        reason: Why it was left out, if vocabext.json says so.
    """

    name: str
    state: str
    bytes_before: int | None
    bytes_after: int | None
    reason: str = ""


@dataclass(frozen=True)
class TensorChange:
    """A tensor that is not in both folders with the same bytes.

    Attributes:
        name: Its stored name.
        dtype: Its type.
        rows_before: Length of its first axis in the base; None if it is not there.
        rows_after: Length of its first axis in the expanded folder; None if it is not there.
        width: Shape of one row.
        note: What the change means.
    """

    name: str
    dtype: str
    rows_before: int | None
    rows_after: int | None
    width: tuple[int, ...]
    note: str


@dataclass(frozen=True)
class RowChange:
    """Where the new rows went, the same in all tensors.

    Attributes:
        num_new: New tokens.
        first_id: The first new id.
        last_id: The last.
        num_rows_before: Rows of the base.
        num_rows_after: Rows now.
        num_free_taken: How many new rows took the place of rows that no id used.
        num_surplus: How many rows the matrix has grown by behind the last new row.
    """

    num_new: int
    first_id: int
    last_id: int
    num_rows_before: int
    num_rows_after: int
    num_free_taken: int
    num_surplus: int


@dataclass(frozen=True)
class Cut:
    """How both tokenizers cut a text.

    Attributes:
        text: The text.
        before: The part of the text that each of the base's tokens covers.
        after: The part that each of the expanded tokenizer's tokens covers.
    """

    text: str
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class TokenChange:
    """A new token.

    Attributes:
        token_id: Its id.
        token: Its text.
        pieces: The base tokens that it stands for, as text; `�` for bytes that make no character alone.
        run: Their ids.
        example: A short text that has it; None if `diff` found none.
    """

    token_id: int
    token: str
    pieces: tuple[str, ...]
    run: tuple[int, ...]
    example: Cut | None


@dataclass(frozen=True)
class Difference:
    """Everything that `vocabext diff` says."""

    base: str
    expanded: Path
    method: str
    created: str
    head_rows: str
    config: Changes
    files: tuple[FileChange, ...]
    num_tensors: int
    tensors: tuple[TensorChange, ...]
    rows: RowChange
    tokens: tuple[TokenChange, ...]
    examples: tuple[Cut, ...]


def diff(base: str, expanded: Path, texts: Sequence[str] = (), *, trust_remote_code: bool = False,
         progress: Progress = no_progress) -> Difference:
    """Compare an expanded checkpoint with its base.

    Args:
        base: The base: a folder or hub id.
        expanded: The expanded checkpoint.
        texts: Texts to cut by both tokenizers.
        trust_remote_code: Whether code that comes with the base may run.
        progress: Told about the bytes compared.

    Raises:
        UsageError: If a folder does not exist.
        CheckpointError: If `expanded` was not made by `patch`, was made from another base, or a folder is damaged.
        TokenizerError: If a tokenizer cannot be loaded.
    """
    from vocabext.tokenizer import load_base_of, load_expanded
    from vocabext.tokens import Expansion

    manifest = read_manifest(expanded)
    folder = resolve_model(base)
    old, new = (open_checkpoint(path, trust_remote_code=trust_remote_code) for path in (folder, expanded))
    before = load_base_of(folder, manifest.first_new_id, trust_remote_code=trust_remote_code)
    if before.first_new_id != manifest.first_new_id:
        raise CheckpointError(f"{expanded} was made from {manifest.base.model} with {manifest.first_new_id:,} token "
                              f"ids, but {base} has {before.first_new_id:,}; pass the base it was made from")
    after = load_expanded(expanded, Expansion([t.new_token for t in manifest.tokens], manifest.first_new_id))
    return Difference(
        base=base, expanded=expanded, method=manifest.method, created=manifest.created, head_rows=manifest.head_rows,
        config=_config_changes(old.config, new.config), files=tuple(_files(folder, expanded, manifest, progress)),
        num_tensors=len(new.tensors), tensors=tuple(_tensors(old, new, manifest, progress)),
        rows=_rows(old, new, manifest), tokens=tuple(_tokens(before, after)),
        examples=tuple(_cut(before, after, text) for text in texts))


def _config_changes(old: Mapping[str, object], new: Mapping[str, object], prefix: str = "") -> Changes:
    changes: Changes = {}
    for key in sorted(old.keys() | new.keys()):
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            changes |= _config_changes(left, right, f"{prefix}{key}.")
        elif left != right:
            changes[prefix + key] = (left, right)
    return changes


# -- files --------------------------------------------------------------------------------------------------------

def _files(base: Path, expanded: Path, manifest: Manifest, progress: Progress) -> Iterator[FileChange]:
    before, after = _sizes(base), _sizes(expanded)
    reasons = manifest.files.left_out
    both = [name for name in before if name in after and before[name] == after[name]
            and not same_inode(base / name, expanded / name)]
    with progress("comparing files", 2 * sum(before[name] for name in both), "bytes") as task:
        for name in sorted(before.keys() | after.keys()):
            if name not in after:
                yield FileChange(name, REMOVED, before[name], None, reasons.get(name, ""))
            elif name not in before:
                yield FileChange(name, ADDED, None, after[name])
            elif before[name] != after[name]:
                yield FileChange(name, CHANGED, before[name], after[name])
            elif name not in both:
                yield FileChange(name, LINKED, before[name], after[name])
            else:
                extents = Extent.whole(base / name), Extent.whole(expanded / name)
                same = first_difference(*extents, lambda count: task.advance(2 * count)) is None
                yield FileChange(name, SAME if same else CHANGED, before[name], after[name])


def _sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of all files, by name, but not of hidden ones: caches and version control."""
    names = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name.as_posix(): path.stat().st_size for name, path in names.items()
            if not any(part.startswith(".") for part in name.parts)}


# -- tensors ------------------------------------------------------------------------------------------------------

def _tensors(old: Checkpoint, new: Checkpoint, manifest: Manifest, progress: Progress) -> Iterator[TensorChange]:
    with progress("comparing tensors", new.weight_bytes, "bytes") as task:
        for name in sorted(old.tensors.keys() | new.tensors.keys()):
            before, after = old.tensors.get(name), new.tensors.get(name)
            one = after or before
            assert one is not None  # it is a name of one of them
            if before and after and (before.dtype, before.shape) == (after.dtype, after.shape) and (
                    same_inode(old.folder / before.file, new.folder / after.file)
                    or first_difference(old.extent(name), new.extent(name), task.advance) is None):
                continue
            yield TensorChange(name, one.dtype, _first_axis(before), _first_axis(after), one.shape[1:],
                               _note(name, old, new, manifest))


def _first_axis(info: TensorInfo | None) -> int | None:
    return info.shape[0] if info and info.shape else None


def _note(name: str, old: Checkpoint, new: Checkpoint, manifest: Manifest) -> str:
    if name in manifest.tensors:
        return f"{manifest.tensors[name].role}; new rows: {manifest.tensors[name].rows}"
    if name in new.row_tensors:
        return "one row per token id"
    if name not in new.tensors:
        return "missing"
    return "unexpected: it should be as in the base" if name in old.tensors else "unexpected: the base does not have it"


def _rows(old: Checkpoint, new: Checkpoint, manifest: Manifest) -> RowChange:
    first, end = manifest.first_new_id, manifest.first_new_id + len(manifest.tokens)
    before, after = old.vocab_size, new.vocab_size
    return RowChange(len(manifest.tokens), first, end - 1, before, after, max(0, min(end, before) - first),
                     after - max(before, end))


# -- tokens -------------------------------------------------------------------------------------------------------

def _tokens(before: "BaseTokenizer", after: "ExpandedTokenizer") -> Iterator[TokenChange]:
    tokens, first = after.tokens, after.first_new_id
    found: dict[int, str] = {}
    for left, right in product(BEFORE, AFTER):
        wanted = {i: left + token.token + right for i, token in enumerate(tokens) if i not in found}
        for (i, text), ids in zip(wanted.items(), after.encode_batch([*wanted.values()]), strict=True):
            if first + i in ids:
                found[i] = text
    for i, token in enumerate(tokens):
        pieces = tuple(before.decode([piece]) for piece in token.run)
        example = _cut(before, after, found[i]) if i in found else None
        yield TokenChange(first + i, token.token, pieces, token.run, example)


def _cut(before: "BaseTokenizer", after: "ExpandedTokenizer", text: str) -> Cut:
    return Cut(text, *(_parts(tokenizer, text) for tokenizer in (before, after)))


def _parts(tokenizer: "BaseTokenizer | ExpandedTokenizer", text: str) -> tuple[str, ...]:
    """Return the part of the text that each token covers; an empty part for a token of bytes inside a character."""
    stops = [*accumulate((end for _, end in tokenizer.encode_with_places([text])[0].offsets), max)]
    return tuple(text[start:stop] for start, stop in pairwise([0, *stops[:-1], len(text)])) if stops else ()
