"""Groups that are finished, kept beside the output until it is written.

Interrupted at any moment, a run with the same options, snippets and model goes on after its last finished
group, with the same result as if nothing had happened: a group depends on the seed and on its own tokens only.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vocabext.distill.input_rows.engine import GroupFit
from vocabext.files.atomic import atomic_file
from vocabext.model.frozen import FrozenModel
from vocabext.tokens import TokenSnippets

# Numbers of each tensor that go into the digest of a model.
SAMPLED = 256
NAMES = ("rows_GD", "start_error_G", "end_error_G", "shown_G")


def work_digest(records: Sequence[TokenSnippets], facts: Mapping[str, Any]) -> str:
    """Return a digest of everything that decides about the result.

    Args:
        records: The tokens with their snippets.
        facts: Options and what identifies the model; JSON-ready.
    """
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True, default=str).encode())
    for record in records:
        digest.update(json.dumps(record.to_json(), sort_keys=True).encode())
    return digest.hexdigest()


class FinishedGroups:
    """A folder with one file for each finished group."""

    def __init__(self, folder: Path, digest: str) -> None:
        """Open the folder.

        Args:
            folder: Where; made when the first group is finished.
            digest: `work_digest`; a folder of other work is ignored and replaced.
        """
        self._folder, self._digest = folder, digest

    def load(self, name: str) -> GroupFit | None:
        """Return a finished group, or None if it is not there, or belongs to other work."""
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("digest") != self._digest:
                    return None
                return GroupFit(*(file.get_tensor(key) for key in NAMES))
        except (SafetensorError, OSError):
            return None

    def save(self, name: str, fit: GroupFit) -> None:
        """Keep a finished group, whole or not at all."""
        from safetensors.torch import save

        self._folder.mkdir(exist_ok=True)
        tensors = {key: getattr(fit, key).detach().cpu().contiguous() for key in NAMES}
        with atomic_file(self._path(name), "wb") as file:
            file.write(save(tensors, metadata={"digest": self._digest}))

    def remove(self) -> None:
        """Delete the folder: the output is written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def model_facts(model: FrozenModel) -> dict[str, Any]:
    """Return what identifies a model: its kind, its numbers, and a digest of some of every tensor."""
    digest = hashlib.sha256()
    for name, weight in model.model.named_parameters():
        digest.update(f"{name} {list(weight.shape)}".encode())
        if not weight.is_meta:
            some = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)]
            digest.update(some.float().cpu().numpy().tobytes())
    return {"kind": type(model.model).__name__, "name": getattr(model.model.config, "_name_or_path", None),
            "dtype": str(model.dtype), "device": model.device.type, "weights": digest.hexdigest()}
