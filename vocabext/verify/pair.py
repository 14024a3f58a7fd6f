"""The base and the expanded checkpoint that `verify` compares."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vocabext.checkpoint.folder import Checkpoint, open_checkpoint, read_shards, resolve_model
from vocabext.checkpoint.manifest import Manifest
from vocabext.checkpoint.shards import Shard
from vocabext.checkpoint.verdicts import verified_sha256
from vocabext.errors import CheckpointError, TokenizerError
from vocabext.files.ranges import Advance, ignore
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, load_base_of, load_expanded
from vocabext.tokens import Expansion
from vocabext.verify.adversarial import Adversary
from vocabext.verify.sample import Reading


class FaultError(Exception):
    """A check found something wrong; the message says what."""


class NotCheckedError(Exception):
    """A check could not be made; the message says why."""


@dataclass
class Pair:
    """The two checkpoints, opened when a check first asks for them.

    Attributes:
        folder: The expanded checkpoint.
        against: The base: folder or hub id.
        manifest: What `folder` says about itself.
        trust_remote_code: Passed to transformers for the base.
        seed: Seed of everything that is drawn.
        seen: Ids that the new tokenizer produced in any text so far.
        advance: Told how many bytes were compared.
        carried_sha256: Digests of the shards that were found equal to the base's, and to what was recorded of them.
        reading: How much of the corpus was encoded; None without a corpus.
        files: Size and digest of each file that a server may read, once they are recorded.
    """

    folder: Path
    against: str
    manifest: Manifest
    trust_remote_code: bool = False
    seed: int = 0
    seen: set[int] = field(default_factory=set)
    advance: Advance = ignore
    carried_sha256: dict[str, str] = field(default_factory=dict)
    reading: Reading | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    @cached_property
    def earlier_sha256(self) -> dict[str, str]:
        """The digests of carried-over shards that earlier runs of `verify` have recorded."""
        return verified_sha256(self.folder)

    @cached_property
    def recorded_shards(self) -> dict[str, str | None]:
        """The shards that were carried over, with their digests where `patch` or an earlier `verify` computed them."""
        originals = self.manifest.originals
        kept = {} if originals is None else originals.carried_over
        shards = {name: original.sha256 for name, original in kept.items() if name.endswith(".safetensors")}
        earlier = self.earlier_sha256
        return {**earlier, **{name: digest or earlier.get(name) for name, digest in shards.items()}}

    @cached_property
    def base_folder(self) -> Path:
        """The base's folder, downloaded if need be."""
        return resolve_model(self.against)

    @cached_property
    def base(self) -> Checkpoint:
        """The base's tensors and config."""
        return open_checkpoint(self.base_folder, trust_remote_code=self.trust_remote_code)

    @property
    def shards(self) -> dict[str, Shard]:
        """The headers of the expanded checkpoint's shards.

        Raises:
            CheckpointError: If a shard is damaged, and this is the first check to ask.
            NotCheckedError: If another check has said so.
        """
        return self._or_said("shards", lambda: self._headers)

    @property
    def new(self) -> Checkpoint:
        """The expanded checkpoint's tensors and config.

        Raises:
            CheckpointError: If its parts contradict each other, and this is the first check to ask.
            NotCheckedError: If another check has said so.
        """
        _ = self.shards
        return self._or_said("tensors", lambda: self._opened)

    @cached_property
    def base_tokenizer(self) -> BaseTokenizer:
        """The base's effective tokenizer."""
        return load_base_of(self.base_folder, self.manifest.first_new_id, trust_remote_code=self.trust_remote_code)

    @cached_property
    def expansion(self) -> Expansion:
        """What the manifest says that the new tokens mean."""
        return Expansion([record.new_token for record in self.manifest.tokens], self.manifest.first_new_id)

    @cached_property
    def adversary(self) -> Adversary:
        """What generates text that hurts these tokenizers."""
        return Adversary(self.base_tokenizer, self.expansion)

    @property
    def new_tokenizer(self) -> ExpandedTokenizer:
        """The tokenizer that transformers makes of the expanded folder.

        Raises:
            TokenizerError: If it cannot be loaded, and this is the first check to ask for it.
            NotCheckedError: If it cannot be loaded, and another check has said so.
        """
        return self._or_said("tokenizer", lambda: self._loaded)

    def _or_said(self, what: str, get: Callable[[], Any]) -> Any:
        """Return something; where it cannot be had, the first check to ask says why, and the others are not made."""
        if what in self._said:
            raise NotCheckedError(f"the {what} cannot be loaded")
        try:
            return get()
        except (CheckpointError, TokenizerError):
            self._said.add(what)
            raise

    @cached_property
    def _headers(self) -> dict[str, Shard]:
        return read_shards(self.folder)

    @cached_property
    def _opened(self) -> Checkpoint:
        # Tensors that are missing or too many have a check of their own.
        return open_checkpoint(self.folder, trust_remote_code=self.trust_remote_code, complete=False)

    @cached_property
    def _loaded(self) -> ExpandedTokenizer:
        return load_expanded(self.folder, self.expansion)
