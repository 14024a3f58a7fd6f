"""vocabext.json: what an expanded checkpoint was made from, and what its new tokens stand for.

The file lies in the new folder. With it, and with the base at hand, every claim about the folder can be
checked again: the runs of the tokens, the rows that were kept, the files that were carried over.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vocabext import __version__
from vocabext.checkpoint import read_json
from vocabext.errors import CheckpointError, UsageError
from vocabext.records import NewToken, write_json

MANIFEST_NAME = "vocabext.json"
MANIFEST_VERSION = 1
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class BaseRecord:
    """The checkpoint that was expanded.

    Attributes:
        model: Folder or hub id, as it was given.
        num_rows: Rows its embedding stores (V).
        num_used_ids: Ids its tokenizer addresses (U); the first new token has this id.
        config_sha256: Digest of its config.json.
        tokenizer_sha256: Digest of its tokenizer.json, None if it has none.
        tensors_sha256: Digest of the bytes of each vocabulary tensor, by stored name.
        expanded: Whether it was an expanded checkpoint itself.
    """

    model: str
    num_rows: int
    num_used_ids: int
    config_sha256: str
    tokenizer_sha256: str | None
    tensors_sha256: dict[str, str]
    expanded: bool = False


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
    """What became of the base's files, as paths relative to the folder.

    Attributes:
        carried_over: Copied byte for byte.
        rewritten: Written anew.
        left_out: Not in the new folder, with the reason.
    """

    carried_over: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


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
    created: str = ""
    vocabext_version: str = __version__
    libraries: dict[str, str] = field(default_factory=dict)

    @property
    def first_new_id(self) -> int:
        """The id of the first new token; all ids below it are the base's."""
        return self.base.num_used_ids

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON-ready values."""
        return {"artifact": "expanded checkpoint", "version": MANIFEST_VERSION, **asdict(self)}


def token_records(tokens: Sequence[NewToken], first_new_id: int,
                  distill: Sequence[Mapping[str, Any]] = ()) -> tuple[TokenRecord, ...]:
    """Number the new tokens.

    Args:
        tokens: The tokens, in token-id order.
        first_new_id: The id of the first.
        distill: What distillation says about each, in the same order; may be empty.
    """
    facts = [dict(fact) for fact in distill] if len(distill) == len(tokens) else [{} for _ in tokens]
    return tuple(TokenRecord(token.token, token.key, token.run, first_new_id + i, fact)
                 for i, (token, fact) in enumerate(zip(tokens, facts, strict=True)))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write vocabext.json into a folder; the date and the versions are filled in where they are empty."""
    document = manifest.to_json()
    document["created"] = manifest.created or datetime.now(UTC).isoformat(timespec="seconds")
    document["libraries"] = manifest.libraries or library_versions()
    write_json(folder / MANIFEST_NAME, document)


def has_manifest(folder: Path) -> bool:
    """Tell whether a model folder says of itself that it is an expanded checkpoint."""
    return (folder / MANIFEST_NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read vocabext.json of an expanded checkpoint.

    Args:
        folder: The model folder.

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
    if document.get("version") != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has format version {document.get('version')}, this vocabext reads {MANIFEST_VERSION}; patch again"
        )
    try:
        manifest = _manifest_from(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); patch again") from None
    for expected, token in enumerate(manifest.tokens, manifest.first_new_id):
        if token.token_id != expected:
            raise CheckpointError(f"{path} gives {token.token!r} the id {token.token_id}, it should be {expected}")
    return manifest


def _manifest_from(document: Mapping[str, Any]) -> Manifest:
    base, files = document["base"], document["files"]
    return Manifest(
        base=BaseRecord(str(base["model"]), int(base["num_rows"]), int(base["num_used_ids"]),
                        str(base["config_sha256"]), base["tokenizer_sha256"], dict(base["tensors_sha256"]),
                        bool(base.get("expanded"))),
        tokens=tuple(TokenRecord(str(row["token"]), str(row["key"]), tuple(int(i) for i in row["run"]),
                                 int(row["token_id"]), dict(row.get("distill") or {})) for row in document["tokens"]),
        method=str(document["method"]), options=dict(document["options"]), head_rows=str(document["head_rows"]),
        files=FileRecord(tuple(files["carried_over"]), tuple(files["rewritten"]), dict(files["left_out"])),
        created=str(document["created"]), vocabext_version=str(document["vocabext_version"]),
        libraries=dict(document["libraries"]),
    )


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide what a checkpoint is."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a repackaged build goes by another name; a version is no reason to fail
    return versions


def file_sha256(path: Path) -> str | None:
    """Return the digest of a file as hexadecimal digits, None if there is no such file."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
