"""What a model folder says of itself, and whether it may be served."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vocabext.checkpoint.manifest import has_manifest, read_manifest
from vocabext.checkpoint.verdicts import VERIFY_NAME
from vocabext.errors import CheckpointError
from vocabext.files.atomic import read_object


def card_of(folder: Path, verification: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """Return what a model folder says of itself, as lines of a table.

    Args:
        folder: The model folder.
        verification: The content of verify.json; looked for in the folder if it is not given.
    """
    if not has_manifest(folder):
        return [("vocabulary", "as published (no vocabext.json)")]
    manifest = read_manifest(folder)
    last = manifest.first_new_id + len(manifest.tokens) - 1
    verification = _verification(folder) if verification is None else verification
    verified = "not yet; run: vocabext verify"
    if verification is not None:
        verified = "passed" if verification.get("passed") is True else "FAILED"
    return [
        ("base", manifest.base.model),
        ("new tokens", f"{len(manifest.tokens):,} (ids {manifest.first_new_id} to {last})"),
        ("rows made by", manifest.method),
        ("made", manifest.created),
        ("verified", verified),
    ]


def require_verified(folder: Path) -> None:
    """Refuse an expanded folder that `verify` has not passed; a base folder has nothing to verify.

    Raises:
        CheckpointError: If verify.json is missing, unreadable, or says that a check failed.
    """
    if not has_manifest(folder):
        return
    base = read_manifest(folder).base.model
    advice = f"run: vocabext verify {folder} --against {base}, or pass --unverified to serve it all the same"
    verification = _verification(folder)
    if verification is None:
        raise CheckpointError(f"{folder} is an expanded model that was not verified (no {VERIFY_NAME}); {advice}")
    if verification.get("passed") is not True:
        checks = verification.get("checks")
        failed = [str(check.get("name")) for check in (checks if isinstance(checks, list) else [])
                  if isinstance(check, dict) and check.get("verdict") == "fail"]
        raise CheckpointError(f"{folder} failed verification ({', '.join(failed) or 'see ' + VERIFY_NAME}); {advice}")


def _verification(folder: Path) -> dict[str, Any] | None:
    document = read_object(folder / VERIFY_NAME) or {}
    return document if document.get("artifact") == "verify" else None
