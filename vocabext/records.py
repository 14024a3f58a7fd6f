"""The records that cross from one stage to the next, and their JSON Lines form.

A stage's artifact begins with one header line (`{"artifact": ..., "version": ..., ...}`) that says
what was made from what, followed by one line per record. The header makes a wrong file a clear
error instead of a strange one.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from vocabext.errors import OutputExistsError, UsageError

Record = TypeVar("Record")

FORMAT_VERSION = 1
UNFINISHED = re.compile(r"\..+\.\d+\.tmp")  # what `atomic_file` calls a file that it is writing
# The verb that writes each kind of JSON Lines artifact.
MADE_BY = {"candidates": "mine", "snippets": "collect"}
# What a file of candidates looks like, and the way in for words that were not mined.
CANDIDATES_LAYOUT = (
    """its first line is {"artifact": "candidates", "version": 1, "base": {"model": MODEL}}, each further line is a """
    """token, such as {"token": " word", "key": "\u0120word", "run": [12, 345]}; for a word of your own, """
    """vocabext.tokenizer.load_tokenizer(MODEL).new_token(" word").to_json() returns what belongs on its line""")


@dataclass(frozen=True)
class Document:
    """One text of a corpus.

    Attributes:
        name: Where it came from, such as `notes.jsonl:17`.
        text: The text itself.
    """

    name: str
    text: str


@dataclass(frozen=True)
class NewToken:
    """A new token: a name for a fixed run of base token ids.

    Attributes:
        token: The text it stands for, such as `" cardiomyopathy"`.
        key: Its spelling in the tokenizer's vocabulary, such as `"Ġcardiomyopathy"`.
        run: The base token ids it replaces, at least two.
        count: How often the expanded tokenizer produced it in the mining corpus.
        saved: How many tokens it saved there, given the tokens chosen before it.
    """

    token: str
    key: str
    run: tuple[int, ...]
    count: int = 0
    saved: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        return {"token": self.token, "key": self.key, "run": list(self.run), "count": self.count, "saved": self.saved}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "NewToken":
        """Read a record back; extra fields are ignored.

        Raises:
            ValueError: If a field is missing or of another kind; says which.
        """
        if not isinstance(row, dict):
            raise ValueError(f"{row!r:.60} is no JSON object")
        for name in ("token", "key"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"{name!r} is {row[name]!r:.60}, not text" if name in row else f"{name!r} is missing")
        if "run" not in row:
            raise ValueError("'run' is missing")
        if not _are_ids(row["run"]) or len(row["run"]) < 2:
            raise ValueError(f"'run' is {row['run']!r:.60}, not a list of at least two token ids")
        return cls(row["token"], row["key"], tuple(row["run"]), int(row.get("count", 0)), int(row.get("saved", 0)))


@dataclass(frozen=True)
class TokenSnippets:
    """The snippets of one new token.

    Attributes:
        new_token: The token.
        snippets: Windows of *expanded* ids, each with the token at `positions[i]`.
        positions: Index of the token inside each snippet.
        occurrences: How often the token occurred in the corpus that was sampled.
        num_generated: How many of the snippets the model wrote itself.
        num_inside: How many show the token where the text has a longer one that is merged from it.
    """

    new_token: NewToken
    snippets: tuple[tuple[int, ...], ...] = ()
    positions: tuple[int, ...] = ()
    occurrences: int = 0
    num_generated: int = 0
    num_inside: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        return {**self.new_token.to_json(), "occurrences": self.occurrences, "num_generated": self.num_generated,
                "num_inside": self.num_inside, "positions": list(self.positions),
                "snippets": [list(s) for s in self.snippets]}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "TokenSnippets":
        """Read a record back; a plain `NewToken` line reads as a token without snippets.

        Raises:
            ValueError: If a field is missing or of another kind; says which.
        """
        token, snippets, positions = NewToken.from_json(row), row.get("snippets", []), row.get("positions", [])
        if not isinstance(snippets, list) or not all(map(_are_ids, snippets)):
            raise ValueError("'snippets' is not a list of lists of token ids")
        if not _are_ids(positions) or len(positions) != len(snippets):
            raise ValueError(f"'positions' is not a list of {len(snippets)} places, one for each snippet")
        return cls(token, tuple(map(tuple, snippets)), tuple(positions), int(row.get("occurrences", 0)),
                   int(row.get("num_generated", 0)), int(row.get("num_inside", 0)))


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def check_output(path: Path, *, force: bool, folder: bool = False) -> None:
    """Refuse an output that exists (unless `force`) or whose parent folder does not.

    Args:
        path: Where something is to be written.
        force: Whether what is there may be replaced.
        folder: Whether a folder is to be written, not a file.

    Raises:
        OutputExistsError: If `path` exists and `force` is false.
        UsageError: If the parent of `path` is not a folder, or `path` is one and a file is to be written.
    """
    if path.is_dir() and not folder:
        raise UsageError(f"{path} is a folder, but a file is written here; choose another output")
    if path.exists() and not force:
        raise OutputExistsError(path)
    if real_path(path).is_symlink():
        raise UsageError(f"{path} is a link that leads to itself; choose another output")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder {path.absolute().parent} does not exist; create it, or choose another output")


def real_path(path: Path) -> Path:
    """Return a path without links in it; one that leads to itself stays as it is (`Path.resolve` gives up there)."""
    return Path(os.path.realpath(path))


class _OutputFile(io.FileIO):
    """A temporary file; an error of writing it names the output that it will be."""

    def __init__(self, path: Path, output: Path) -> None:
        self._output = output
        with naming(output):
            super().__init__(path, "w")

    def write(self, data: Any, /) -> int:
        with naming(self._output):
            return super().write(data)


@contextmanager
def naming(output: Path) -> Iterator[None]:
    """Let errors of the system name an output: a full disk does not say which, and temporary names mean nothing."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(output), None
        raise


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary sibling of `path` for writing; rename it onto `path` if the block succeeds.

    An error of the system that comes from the output names `path`; any other of the block stays as it is.

    Raises:
        UsageError: If `path` is a folder.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder, but a file is written here; choose another output")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with io.BufferedWriter(_OutputFile(temporary, path)) as binary:
            file = binary if "b" in mode else io.TextIOWrapper(binary, encoding="utf-8")
            yield file
            file.flush()
            with naming(path):
                os.fsync(file.fileno())
        with naming(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what `atomic_file` left in a folder when its process was killed; nobody may be writing there."""
    for path in folder.glob(".*.tmp"):
        if UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, atomically."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_object(path: Path) -> dict[str, Any] | None:
    """Read one JSON object; None for a file that is missing or damaged, or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_jsonl(path: Path, artifact: str, header: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Write an artifact: its header line, then one line per row, atomically."""
    with atomic_file(path) as file:
        for row in ({"artifact": artifact, "version": FORMAT_VERSION, **header}, *rows):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path, artifacts: tuple[str, ...]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read an artifact back.

    Args:
        path: The file.
        artifacts: The kinds that are accepted.

    Returns:
        The header and the rows.

    Raises:
        UsageError: If the file is missing, is no JSON Lines, or is another kind of artifact.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file")
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a JSON Lines file of vocabext: {error}{_layout(artifacts)}") from None
    header = rows[0] if rows and isinstance(rows[0], dict) else {}
    if header.get("artifact") not in artifacts:
        kind = repr(header["artifact"]) if "artifact" in header else "nothing that vocabext wrote"
        needed = " or ".join(f"{name!r} (from `vocabext {MADE_BY[name]}`)" for name in artifacts)
        raise UsageError(f"{path} holds {kind}, but {needed} is needed here{_layout(artifacts)}")
    if header.get("version") != FORMAT_VERSION:
        raise UsageError(f"{path} has format version {header.get('version')}, this vocabext reads {FORMAT_VERSION}; "
                         "make the file again")
    return header, rows[1:]


def read_tokens(path: Path, artifacts: tuple[str, ...], parse: Callable[[dict[str, Any]], Record]
                ) -> tuple[dict[str, Any], list[Record]]:  # fmt: skip
    """Read an artifact that has a token on each line.

    Args:
        path: The file.
        artifacts: The kinds that are accepted.
        parse: Makes a record of a line; raises ValueError where it cannot.

    Returns:
        The header, with a `base` and `options` that are objects, and the records.

    Raises:
        UsageError: If the file is missing, damaged, empty or another artifact.
    """
    header, rows = read_jsonl(path, artifacts)
    for part in ("base", "options"):
        if not isinstance(header.setdefault(part, {}), dict):
            raise UsageError(f"{path} is damaged: {part!r} of its first line is {header[part]!r:.60}, not an object"
                             f"{_layout(artifacts)}")
    records = []
    for number, row in enumerate(rows, start=1):
        try:
            records.append(parse(row))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is damaged at token {number}: {error}{_layout(artifacts)}") from None
    if not records:
        raise UsageError(f"{path} holds no tokens; mine again")
    return header, records


def _layout(artifacts: tuple[str, ...]) -> str:
    if "candidates" in artifacts:
        return f"; mine again, or mend it: {CANDIDATES_LAYOUT}"
    return f"; run vocabext {MADE_BY[artifacts[0]]} again"
