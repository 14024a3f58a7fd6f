"""The files of a model folder that a server reads: `verify` records them, and every start compares them.

A verdict holds for the files that `verify` has checked. So verify.json records size and digest of each, and a start
refuses a folder in which a file has another size or digest, is missing, or was added.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vocabext.checkpoint.folder import PICKLE_PATTERNS
from vocabext.checkpoint.manifest import MANIFEST_NAME
from vocabext.files.ranges import Extent, in_parallel

WEIGHT_PATTERNS = ("*.safetensors", "*.gguf", *PICKLE_PATTERNS)
PATTERNS = (*WEIGHT_PATTERNS, MANIFEST_NAME, "*config*.json", "*index.json", "*token*.json", "vocab*", "merges.txt",
            "chat_template*", "*.jinja", "*.model", "*.tiktoken", "*.py", "params.json", "modules.json")
TEMPLATES_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class ServedFile:
    """One file as `verify` found it.

    Attributes:
        num_bytes: Its size.
        sha256: Digest of its bytes.
    """

    num_bytes: int
    sha256: str


def served_files(folder: Path) -> dict[str, Path]:
    """Return the files that a server may read, by their path in the folder, sorted."""
    paths = [*folder.iterdir(), *(folder / TEMPLATES_FOLDER).glob("*")]
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths)
            if path.is_file() and not path.name.startswith(".") and _matches(path.name, PATTERNS)}


def file_times(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size in bytes, and time of the last change in ns, of each file that a server may read."""
    statuses = {name: path.stat() for name, path in served_files(folder).items()}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in statuses.items()}


def record_files(folder: Path, known: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return size and digest of each file that a server may read, as verify.json has them.

    Args:
        folder: The model folder.
        known: Digests that were computed a moment ago, by name.
    """
    def record(item: tuple[str, Path]) -> tuple[str, dict[str, Any]]:
        extent = Extent.whole(item[1])
        return item[0], asdict(ServedFile(extent.count, known.get(item[0]) or extent.sha256()))

    return dict(in_parallel(record, served_files(folder).items()))


def difference(folder: Path, recorded: Mapping[str, ServedFile], *, all_digests: bool) -> str | None:
    """Say which file of a folder differs from its record, with both values; None if none does.

    Args:
        folder: The model folder.
        recorded: What verify.json records.
        all_digests: Whether to compare digests of weights, too; else weights are compared by size, the rest by digest.
    """
    files = served_files(folder)
    for name, record in recorded.items():
        if name not in files:
            return f"{name} is missing; {record.num_bytes:,} bytes were verified"
        size = files[name].stat().st_size
        if size != record.num_bytes:
            return f"{name} has {size:,} bytes; {record.num_bytes:,} were verified"
    for name in sorted(files.keys() - recorded.keys()):
        return f"{name} was added; it was not verified"
    hashed = [name for name in recorded if all_digests or not _matches(Path(name).name, WEIGHT_PATTERNS)]
    digests = in_parallel(lambda name: Extent.whole(files[name]).sha256(), hashed)
    for name, digest in zip(hashed, digests, strict=True):
        if digest != recorded[name].sha256:
            return f"{name} has the digest {digest[:12]}; {recorded[name].sha256[:12]} was verified"
    return None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
