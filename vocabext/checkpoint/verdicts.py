"""verify.json: the verdicts of `verify`, which stay with the checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from vocabext.checkpoint.served import ServedFile
from vocabext.errors import CheckpointError
from vocabext.files.atomic import read_object
from vocabext.tables import Shown, Table

VERIFY_NAME = "verify.json"
PASS, FAIL, SKIPPED = "pass", "fail", "not checked"


@dataclass(frozen=True)
class Check:
    """One verdict.

    Attributes:
        name: What was checked.
        verdict: `pass`, `fail` or `not checked`.
        detail: What was found, or why it was not checked.
    """

    name: str
    verdict: str
    detail: str


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """All verdicts on one checkpoint.

    Attributes:
        model: The expanded checkpoint.
        against: The base.
        checks: The verdicts.
        seconds: Time it took.
        carried_sha256: Digests of the shards that this `verify`, or an earlier one, has found equal to the base's.
        corpus: How much of the corpus it encoded: `documents`, `bytes`, `encoded_documents`, `encoded_bytes`; None
            without a corpus.
        files: Size and digest of each file that a server may read; empty if a check failed.
    """

    model: str
    against: str
    checks: tuple[Check, ...]
    seconds: float
    carried_sha256: dict[str, str] = field(default_factory=dict)
    corpus: dict[str, int] | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != FAIL for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the content of verify.json."""
        return {"artifact": "verify", "version": 1, "passed": self.passed, "model": self.model,
                "against": self.against, "seconds": self.seconds, "checks": [asdict(c) for c in self.checks],
                "carried_sha256": self.carried_sha256, "corpus": self.corpus, "files": self.files}

    def _table(self) -> Table:
        failed = sum(check.verdict == FAIL for check in self.checks)
        title = f"{self.model} passed" if self.passed else f"{self.model} failed {failed} of {len(self.checks)} checks"
        return Table(title, ("", "check", "found"), [(c.verdict, c.name, c.detail) for c in self.checks])


def verified_sha256(folder: Path) -> dict[str, str]:
    """Return the digests of the shards that a `verify` has found equal to the base's.

    A `verify` that failed for another reason counts as well.
    """
    found = (read_object(folder / VERIFY_NAME) or {}).get("carried_sha256")
    return {str(name): str(digest) for name, digest in found.items()} if isinstance(found, dict) else {}


def verified_files(document: Mapping[str, Any]) -> dict[str, ServedFile] | None:
    """Return the files that a verify.json records; None if an older version, which records none, wrote it.

    Raises:
        CheckpointError: If the record cannot be read.
    """
    if "files" not in document:
        return None
    try:
        return msgspec.convert(document["files"], dict[str, ServedFile])
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{VERIFY_NAME} is damaged: {error}") from None
