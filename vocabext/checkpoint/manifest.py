"""vocabext.json: what an expanded checkpoint was made from, and what its new tokens stand for.

The file lies in the new folder. Who has the base can check every claim about the folder with it: the runs of the
tokens, the rows that `patch` kept, the files that it carried over.

The new folder also holds what restores the base, byte for byte and without the base.
`Manifest.originals` says where, for every file that the base had (paths are relative, with `/`):

    carried over     the file itself, under its own name: linked or copied, never changed
    small file       vocabext_base/NAME.base, its bytes: config, index, tokenizer, each file changed or left out
    rewritten shard  vocabext_base/NAME.header.base holds its first bytes, the eight of the length and the header.
                     The tensors follow in the order of their offsets in that header, without gaps. Each has the
                     bytes of the tensor of the same name in the new folder; a tensor with a row per token id has
                     the first rows of it, as many as the old header says, with the rows in `OverwrittenRows` put
                     back where they were
    lost             not kept: other copies of the weights (pickles, GGUF, ONNX), caches, links to folders

The suffix keeps readers from taking an old file for a file of the model. A digest is that of the whole original file;
it is None only for a carried-over shard, which `patch` links or copies without reading it.
"""

import importlib.metadata
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from vocabext import __version__
from vocabext.checkpoint.architecture import EmbeddingNames
from vocabext.checkpoint.folder import CONFIG_NAME, read_json
from vocabext.errors import CheckpointError, UsageError
from vocabext.files.atomic import write_json
from vocabext.files.ranges import file_sha256
from vocabext.tokens import NewToken

MANIFEST_NAME = "vocabext.json"
MANIFEST_VERSION = 2
READABLE_VERSIONS = (1, 2)  # version 1 has neither `tensors` nor `originals`
ORIGINALS_FOLDER = "vocabext_base"
ADAPTER_FOLDER, HEAL_NAME = "adapter", "heal.json"  # in the model folder, where no reader looks unless told to
ORIGINAL_SUFFIX = ".base"
ROWS_ORIGINAL = f"{ORIGINALS_FOLDER}/rows.bin{ORIGINAL_SUFFIX}"
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class BaseRecord:
    """The checkpoint that was expanded.

    Attributes:
        model: Folder or hub id, as the user wrote it.
        num_rows: Rows its embedding stores (V).
        num_used_ids: Ids its tokenizer addresses, or its files name (U); the first new token has this id.
        config_sha256: Digest of its config.json.
        tokenizer_sha256: Digest of its tokenizer.json; None if it has none.
        tensors_sha256: Digest of the bytes of each vocabulary tensor, by stored name.
    """

    model: str
    num_rows: int
    num_used_ids: int
    config_sha256: str
    tokenizer_sha256: str | None
    tensors_sha256: dict[str, str]


@dataclass(frozen=True)
class TokenRecord:
    """One new token.

    Attributes:
        token: Its text.
        key: Its spelling in the tokenizer's vocabulary.
        run: The base token ids it stands for.
        token_id: Its id, which is also the number of its row.
        distill: What distillation says about it, such as losses; empty if nothing.
    """

    token: str
    key: str
    run: tuple[int, ...]
    token_id: int
    distill: dict[str, Any] = field(default_factory=dict)

    @property
    def new_token(self) -> NewToken:
        """The token as the stages know it."""
        return NewToken(self.token, self.key, self.run)


@dataclass(frozen=True)
class FileRecord:
    """What `patch` did with the base's files, as paths relative to the folder.

    Attributes:
        carried_over: Files that it copied byte for byte.
        rewritten: Files that it wrote anew.
        left_out: Files that the new folder lacks, with the reason.
    """

    carried_over: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorRecord:
    """A stored tensor whose first axis counts token ids.

    Attributes:
        role: `embedding`, `head`, `head bias`, or `per-layer embedding` and the like.
        rows: Where its new rows come from, in words.
        num_rows_before: Rows in the base; 0 for a head that was separated from its embedding (`--untie`).
        num_rows: Rows in the new folder. Those behind the last new token are as in the base, or surplus.
        file: Its shard, the same in base and new folder.
        surplus: Base ids whose mean row the surplus rows hold, as do the rows of base ids that had none; empty if
            these rows are zero (in a bias: far below all others).
        new_rows_sha256: Digest of the bytes of its new rows; None where an older version wrote the file.
    """

    role: str
    rows: str
    num_rows_before: int
    num_rows: int
    file: str
    surplus: tuple[int, ...] = ()
    new_rows_sha256: str | None = None


@dataclass(frozen=True)
class Original:
    """One file of the base, and where its bytes are.

    Attributes:
        num_bytes: Its size in the base.
        sha256: Digest of the whole file in the base; None if `patch` carried it over without reading it.
        stored: Where its bytes (for a rewritten shard: its first bytes) lie in the new folder.
    """

    num_bytes: int
    sha256: str | None
    stored: str


@dataclass(frozen=True)
class OverwrittenRows:
    """Rows of a base tensor that new tokens took; the file `ROWS_ORIGINAL` holds their old bytes.

    Attributes:
        first_row: The first of them.
        num_rows: How many.
        offset: Where their bytes begin in `ROWS_ORIGINAL`.
        num_bytes: Size of these bytes.
        sha256: Digest of these bytes.
    """

    first_row: int
    num_rows: int
    offset: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Originals:
    """All that restores the base's folder; see the module's text.

    Attributes:
        carried_over: Files that are in the new folder under their own name.
        files: Files kept below `vocabext_base/`.
        shards: Rewritten shards; `stored` holds the first bytes, the rest comes from the new shards.
        rows: By stored tensor name, the rows that new ones have overwritten in it.
        lost: Files and folders (with a `/` behind the name) that are not kept, with the reason.
    """

    carried_over: dict[str, Original] = field(default_factory=dict)
    files: dict[str, Original] = field(default_factory=dict)
    shards: dict[str, Original] = field(default_factory=dict)
    rows: dict[str, OverwrittenRows] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything vocabext.json says.

    Attributes:
        base: The checkpoint that was expanded.
        tokens: The new tokens, in token-id order.
        method: How the rows were made, such as `mean`.
        options: The options of the stage that made the rows.
        head_rows: Where the rows of the output head come from.
        files: What became of the base's files.
        untied: Whether the base was tied and the head is a tensor of its own here.
        tensors: Every tensor with a row per token id, by stored name; empty in version 1.
        originals: What restores the base; None in version 1.
        reserved: Ids behind the tokenizer's own that a file of the base names, by the id, with file and entry.
        given_rows: Ids without a row in the base, by the id, with what they are; they got a row like surplus ones.
        rules: Stops and bans of the base that no new token hides.
        adapter: The adapter that heals the body: its `folder`, or `merged` true where its weights were added to the
            body's, and the digests of its files; empty if there is none.
        created: When, in UTC, ISO 8601.
        vocabext_version: The version that wrote it.
        libraries: Versions of the libraries it used.
    """

    base: BaseRecord
    tokens: tuple[TokenRecord, ...]
    method: str
    options: dict[str, Any]
    head_rows: str
    files: FileRecord
    untied: bool = False
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    originals: Originals | None = None
    reserved: dict[str, str] = field(default_factory=dict)
    given_rows: dict[str, str] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    vocabext_version: str = __version__
    libraries: dict[str, str] = field(default_factory=dict)

    @property
    def first_new_id(self) -> int:
        """The id of the first new token; all ids below it are the base's."""
        return self.base.num_used_ids

    @property
    def merged(self) -> bool:
        """Whether the weights contain an adapter, so that the body is not the base's."""
        return bool(self.adapter.get("merged"))

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON-ready values."""
        return {"artifact": "expanded checkpoint", "version": MANIFEST_VERSION, **asdict(self)}


def token_records(tokens: Sequence[NewToken], first_new_id: int,
                  distill: Sequence[Mapping[str, Any]] = ()) -> tuple[TokenRecord, ...]:
    """Number the new tokens.

    Args:
        tokens: The tokens, in token-id order.
        first_new_id: The id of the first.
        distill: What distillation says about each, in the same order; empty if it says nothing.
    """
    facts = distill if len(distill) == len(tokens) else [{}] * len(tokens)
    return tuple(TokenRecord(token.token, token.key, token.run, i, dict(fact))
                 for i, token, fact in zip(count(first_new_id), tokens, facts, strict=False))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write vocabext.json into a folder; an empty date becomes now, empty versions those that are installed."""
    document = manifest.to_json()
    document["created"] = manifest.created or datetime.now(UTC).isoformat(timespec="seconds")
    document["libraries"] = manifest.libraries or library_versions()
    write_json(folder / MANIFEST_NAME, document)


def has_manifest(folder: Path) -> bool:
    """Tell whether a model folder says of itself that it is an expanded checkpoint."""
    return (folder / MANIFEST_NAME).is_file()


def check_replaceable(output: Path) -> None:
    """Refuse an output that exists and is no model folder, since `--force` replaces nothing else.

    Raises:
        UsageError: If it is a file, or a folder that holds something else.
    """
    if output.is_file():
        raise UsageError(f"the output {output} is a file; choose another output")
    if output.exists() and any(output.iterdir()) and not (output / CONFIG_NAME).is_file() and not has_manifest(output):
        raise UsageError(f"the output {output} is no model folder, and --force replaces model folders only")


def expanded_from(folder: Path) -> str | None:
    """Say what a model folder was expanded from, and what to do; None if nothing shows that it was expanded.

    A folder that has lost its vocabext.json shows it by `vocabext_base/`.
    """
    if has_manifest(folder):
        model = read_manifest(folder).base.model
        return (f"{folder} was expanded from {model} already; expand {model} again with the longer list of tokens, or "
                f"get it back with: vocabext revert {shlex.quote(str(folder))} -o FOLDER")
    if (folder / ORIGINALS_FOLDER).is_dir():
        return (f"{folder} was expanded already: it holds {ORIGINALS_FOLDER}/, but its {MANIFEST_NAME} is gone; expand "
                "the model that it was made from again with the longer list of tokens")
    return None


def refuse_expanded(folder: Path) -> None:
    """Refuse a base that was expanded already: the next new tokens could cut its own.

    Raises:
        UsageError: If it was expanded.
        CheckpointError: If its vocabext.json is damaged.
    """
    if (said := expanded_from(folder)) is not None:
        raise UsageError(f"a model cannot be expanded twice yet: {said}")


def read_manifest(folder: Path) -> Manifest:
    """Read vocabext.json of an expanded checkpoint.

    Raises:
        UsageError: If there is no such folder.
        CheckpointError: If the file is missing or damaged, of another version, or its token ids have gaps.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UsageError(f"the folder {folder} does not exist")
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}; it is no expanded checkpoint that vocabext patch made")
    document = read_json(path)
    if document.get("version") not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{path} has format version {document.get('version')}, this vocabext reads {MANIFEST_VERSION}; patch again"
        )
    try:
        manifest = _manifest_from(document)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); patch again") from None
    for expected, token in enumerate(manifest.tokens, manifest.first_new_id):
        if token.token_id != expected:
            raise CheckpointError(f"{path} gives {token.token!r} the id {token.token_id}, it should be {expected}")
    return manifest


def _manifest_from(document: Mapping[str, Any]) -> Manifest:
    """Return the manifest that a document holds; an entry that is missing or null, as in older versions, is empty."""
    manifest = msgspec.convert({key: value for key, value in document.items() if value is not None}, Manifest)
    files, kept = manifest.files, manifest.originals or Originals()
    originals = (kept.carried_over, kept.files, kept.shards)
    for name in chain(files.carried_over, files.rewritten, files.left_out, *originals,
                      (original.stored for part in originals for original in part.values())):
        inside(name)
    return manifest


def inside(name: str) -> str:
    """Return a path that a manifest names, if it stays in the folder: anybody may have written the manifest.

    Raises:
        ValueError: If it is absolute, leads upwards, or is empty.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise ValueError(f"the path {name!r} leads out of the folder")
    return name


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide what a checkpoint is."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a repackaged build has another name, which is no reason to fail
    return versions


def base_record(folder: Path, names: EmbeddingNames, *, model: str, first_new_id: int) -> dict[str, Any]:
    """Return what the header of a rows file says about its base, as `header["base"]`; `model` is the user's name."""
    return {"model": model, "num_used_ids": first_new_id, "hidden_size": names.shapes[names.embedding][1],
            "tokenizer_sha256": file_sha256(folder / "tokenizer.json")}
