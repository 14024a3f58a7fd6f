"""Artifacts as JSON Lines: a header line that says what was made from what, then one line per record.

The header makes a wrong file a clear error instead of a strange one.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from vocabext.errors import UsageError
from vocabext.files.atomic import atomic_file

FORMAT_VERSION = 1
# The verb that writes each kind of JSON Lines artifact.
MADE_BY = {"candidates": "mine", "snippets": "collect"}
# What a file of candidates looks like, and the way in for words that were not mined.
CANDIDATES_LAYOUT = (
    """its first line is {"artifact": "candidates", "version": 1, "base": {"model": MODEL}}, each further line is a """
    """token, such as {"token": " word", "key": "\u0120word", "run": [12, 345]}; for a word of your own, """
    """vocabext.tokenizer.load_tokenizer(MODEL).new_token(" word").to_json() returns what belongs on its line""")
Record = TypeVar("Record")


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
                ) -> tuple[dict[str, Any], list[Record]]:
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
