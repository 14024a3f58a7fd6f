"""The weights of a new folder: linked, copied in threads, or written anew.

A thread copies bytes and computes nothing: transformers changes the default dtype of the whole process for a while.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from vocabext.checkpoint.folder import Checkpoint
from vocabext.checkpoint.manifest import (
    ORIGINAL_SUFFIX,
    ORIGINALS_FOLDER,
    ROWS_ORIGINAL,
    Original,
    Originals,
    OverwrittenRows,
    TensorRecord,
)
from vocabext.checkpoint.shards import write_shard
from vocabext.files.folders import Syncer
from vocabext.files.links import COPY, Copier, link_file
from vocabext.files.ranges import Advance
from vocabext.patch.plan import FilePlan, TensorPlan


@dataclass
class WeightWriter:
    """Fills the new folder with weights.

    Attributes:
        checkpoint: The base.
        tensors: What becomes of the tensors.
        files: What becomes of the files.
        folder: Where it all goes.
        link: How weights come over.
        linked: Weight files that were linked, and how.
        tensors_sha256: Digests of the base's vocabulary tensors, once its shards are read.
        new_rows_sha256: Digests of the new rows of each tensor, once they are written.
        originals: What restores the base.
    """

    checkpoint: Checkpoint
    tensors: TensorPlan
    files: FilePlan
    folder: Path
    link: str = COPY
    linked: dict[str, str] = field(default_factory=dict)
    tensors_sha256: dict[str, str] = field(default_factory=dict)
    new_rows_sha256: dict[str, str] = field(default_factory=dict)
    originals: Originals = field(default_factory=Originals)

    def link_weights(self) -> None:
        """Link what can be linked; that takes no space, so it comes before the question for it."""
        for name in self.files.weights:
            how = link_file(self.checkpoint.folder / name, self.folder / name, self.link)
            if how is not None:
                self.linked[name] = how

    @property
    def copied(self) -> list[str]:
        """The weight files that are not linked."""
        return [name for name in self.files.weights if name not in self.linked]

    def num_bytes(self) -> int:
        """Return how many bytes of weights are still to be written, a little more than less."""
        infos = self.checkpoint.tensors
        total = self.read_bytes() + 2 * sum(self.checkpoint.shards[name].data_start for name in self.files.shards)
        for name, growth in self.tensors.growths.items():
            overwritten = max(0, min(growth.end_row, infos[name].shape[0]) - growth.first_row)
            total += growth.num_bytes(infos[name]) - infos[name].num_bytes + overwritten * infos[name].row_bytes
        return total + sum(added.growth.num_bytes(infos[added.source]) for added in self.tensors.added.values())

    def read_bytes(self) -> int:
        """Return the size of all files that are read."""
        return sum((self.checkpoint.folder / name).stat().st_size for name in (*self.copied, *self.files.shards))

    def write(self, copier: Copier, syncer: Syncer) -> None:
        """Let the copier copy what is not linked, and rewrite the shards that change meanwhile."""
        base = self.checkpoint.folder
        for name in self.files.weights:
            self.originals.carried_over[name] = Original((base / name).stat().st_size, None, name)
        for name in self.copied:
            copier.add(base / name, self.folder / name)
        for name in self.files.shards:
            syncer.add(self._rewrite(name, copier.advance))

    def records(self) -> dict[str, TensorRecord]:
        """Return what became of the tensors with a row per token."""
        return {name: replace(record, new_rows_sha256=self.new_rows_sha256[name])
                for name, record in self.tensors.records.items()}

    def _rewrite(self, name: str, advance: Advance) -> Path:
        added = {new: copied for new, copied in self.tensors.added.items() if self.tensors.records[new].file == name}
        kept_path = self.folder / ROWS_ORIGINAL
        kept_path.parent.mkdir(exist_ok=True)
        with open(kept_path, "ab") as kept:
            old = write_shard(self.checkpoint.folder, self.checkpoint.shards[name], self.folder / name,
                              self.tensors.growths, added, kept, advance)
        if not kept_path.stat().st_size:
            kept_path.unlink()
        advance(self.checkpoint.shards[name].data_start)
        self.tensors_sha256.update(old.tensors_sha256)
        self.new_rows_sha256.update(old.new_rows_sha256)
        stored = f"{ORIGINALS_FOLDER}/{name}.header{ORIGINAL_SUFFIX}"
        (self.folder / stored).write_bytes(old.header)
        self.originals.shards[name] = Original(old.num_bytes, old.sha256, stored)
        for tensor, (offset, size, sha256) in old.overwritten.items():
            if size:
                row_bytes = self.checkpoint.tensors[tensor].row_bytes
                self.originals.rows[tensor] = OverwrittenRows(
                    self.tensors.growths[tensor].first_row, size // row_bytes, offset, size, sha256)
        return self.folder / name
