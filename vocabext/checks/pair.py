"""The base and the expanded checkpoint that `verify` compares."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vocabext.checkpoint import Checkpoint, open_checkpoint, resolve_model
from vocabext.checks.adversarial import Adversary
from vocabext.errors import TokenizerError
from vocabext.expansion import Expansion
from vocabext.manifest import Manifest
from vocabext.tokenizer import BaseTokenizer, ExpandedTokenizer, load_expanded, load_tokenizer


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
    """

    folder: Path
    against: str
    manifest: Manifest
    trust_remote_code: bool = False
    seed: int = 0
    seen: set[int] = field(default_factory=set)
    _unloadable: bool = False

    @cached_property
    def base_folder(self) -> Path:
        """The base's folder, downloaded if need be."""
        return resolve_model(self.against)

    @cached_property
    def base(self) -> Checkpoint:
        """The base's tensors and config."""
        return open_checkpoint(self.base_folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def new(self) -> Checkpoint:
        """The expanded checkpoint's tensors and config."""
        return open_checkpoint(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def base_tokenizer(self) -> BaseTokenizer:
        """The base's effective tokenizer."""
        return load_tokenizer(self.base_folder, trust_remote_code=self.trust_remote_code)

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
        if self._unloadable:
            raise NotCheckedError("the tokenizer cannot be loaded")
        try:
            return self._loaded
        except TokenizerError:
            self._unloadable = True
            raise

    @cached_property
    def _loaded(self) -> ExpandedTokenizer:
        return load_expanded(self.folder, self.expansion)
