"""Verify that an expanded checkpoint still means what its base meant.

A check passes, fails, or says why it was not made; all of them run, so that one report names everything
that is wrong. The checks themselves are in `vocabext.checks`.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vocabext.checkpoint import read_json
from vocabext.checks import behaviour, files, pipeline, weights
from vocabext.checks.pair import FaultError, NotCheckedError, Pair
from vocabext.errors import CheckpointError, TokenizerError
from vocabext.manifest import read_manifest
from vocabext.progress import Progress, no_progress
from vocabext.records import Document

VERIFY_NAME = "verify.json"
PASS, FAIL, SKIPPED = "pass", "fail", "not checked"
NUM_ADVERSARIAL = 20_000
# A row this many times longer than the longest base row would win every softmax it is in.
MAX_NORM_RATIO = 3.0


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


@dataclass(frozen=True)
class Verification:
    """All verdicts on one checkpoint."""

    model: str
    against: str
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != FAIL for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the content of verify.json."""
        return {"artifact": "verify", "version": 1, "passed": self.passed, "model": self.model,
                "against": self.against, "seconds": self.seconds, "checks": [asdict(c) for c in self.checks]}


def verify(
    folder: Path, against: str, documents: Iterable[Document] | None = None, *, trust_remote_code: bool = False,
    seed: int = 0, load_weights: bool = True, progress: Progress = no_progress,
) -> Verification:  # fmt: skip
    """Run every check on an expanded checkpoint.

    Args:
        folder: The expanded checkpoint.
        against: The base: folder or hub id.
        documents: Text to try the invariant on, besides the generated one.
        trust_remote_code: Passed to transformers for the base.
        seed: Seed of the generated text.
        load_weights: Whether to load both models and compare their logits.
        progress: Where to report.

    Raises:
        UsageError: If `folder` or the base does not exist.
        CheckpointError: If `folder` is no expanded checkpoint at all, or the base is damaged.
        TokenizerError: If the base has no tokenizer.
        CorpusError: If a text cannot be read.
    """
    began = time.monotonic()
    pair = Pair(folder, against, read_manifest(folder), trust_remote_code, seed)
    _ = pair.base, pair.base_tokenizer  # a base that cannot be read is no fault of the checkpoint
    checks: list[tuple[str, Callable[[], str]]] = [
        ("untouched tensors equal", lambda: weights.untouched_tensors(pair)),
        ("old rows bit-identical", lambda: weights.old_rows(pair)),
        ("new rows plausible", lambda: weights.new_rows(pair, MAX_NORM_RATIO)),
        ("config agrees", lambda: weights.config(pair)),
        ("files carried over", lambda: files.carried_over(pair)),
        ("no stale tokenizer files", lambda: files.no_stale_tokenizer(pair)),
        ("tokenizer is the base's, extended", lambda: pipeline.same_as_extension(pair)),
        ("old token ids kept", lambda: behaviour.old_ids(pair)),
        ("prompts and chats as in the base", lambda: behaviour.prompts_as_in_base(pair)),
        ("invariant on the corpus", lambda: behaviour.invariant_on_corpus(pair, documents)),
        ("invariant on adversarial text", lambda: behaviour.invariant_on_adversarial(pair, NUM_ADVERSARIAL)),
        ("streaming and offsets", lambda: behaviour.streaming_and_offsets(pair)),
        # Behind the other texts: what they saw in context need not be searched for.
        ("new tokens reachable and readable", lambda: behaviour.new_tokens(pair)),
        ("loads in transformers, same logits", lambda: weights.same_logits(pair, load_weights)),
    ]
    verdicts: list[Check] = []
    with progress("verifying", len(checks) + 1, "checks") as task:
        for name, check in checks:
            task.note(name)
            verdicts.append(_verdict(name, check))
            task.advance()
        failed = any(check.verdict == FAIL for check in verdicts)
        verdicts.insert(0, _verdict("made from this base", lambda: files.recorded_base(pair, others_failed=failed)))
        task.advance()
    return Verification(str(folder), against, tuple(verdicts), time.monotonic() - began)


def _verdict(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, PASS, check())
    except NotCheckedError as reason:
        return Check(name, SKIPPED, str(reason))
    except (FaultError, CheckpointError, TokenizerError) as fault:
        return Check(name, FAIL, str(fault))


def read_verification(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's verify.json, None if there is none."""
    path = folder / VERIFY_NAME
    return read_json(path) if path.is_file() else None
