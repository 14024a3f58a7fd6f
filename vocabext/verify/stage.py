"""Verify that an expanded checkpoint still means what its base meant.

A check passes, fails, or says why it was not made; all of them run, so that one report names everything
that is wrong. The checks themselves are in the other files of this folder.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from vocabext.checkpoint.manifest import read_manifest
from vocabext.checkpoint.served import file_times
from vocabext.checkpoint.verdicts import FAIL, PASS, SKIPPED, Check, Verification
from vocabext.checkpoint.verdicts import VERIFY_NAME as VERIFY_NAME  # where the verdicts go is asked of this module
from vocabext.checkpoint.vocabulary import MAX_NORM_RATIO
from vocabext.corpus import Document
from vocabext.errors import CheckpointError, TokenizerError, VocabextError, in_one_line, lacks_memory
from vocabext.progress import Progress, Task, no_progress
from vocabext.verify import adapter, behaviour, config, engine, extension, files, logits, tensors
from vocabext.verify.pair import FaultError, NotCheckedError, Pair
from vocabext.verify.sample import SAMPLE_BYTES

NUM_ADVERSARIAL = 20_000
NOTED_BYTES = 1_000_000_000
RECORDED = "files recorded for serving"


def verify(
    folder: Path, against: str, documents: Iterable[Document] | None = None, *, trust_remote_code: bool = False,
    seed: int = 0, load_weights: bool = True, use_vllm: bool = False, full: bool = False,
    progress: Progress = no_progress,
) -> Verification:
    """Run every check on an expanded checkpoint.

    Args:
        folder: The expanded checkpoint.
        against: The base: folder or hub id.
        documents: Text to try the invariant on, besides the generated one.
        trust_remote_code: Passed to transformers for the base.
        seed: Seed of the generated text.
        load_weights: Whether to load both models and compare their logits.
        use_vllm: Whether to load both in vLLM and compare what they write.
        full: Whether to encode all documents, and not a sample where they are larger than `SAMPLE_BYTES`.
        progress: Where to report.

    Raises:
        UsageError: If `folder` or the base does not exist.
        CheckpointError: If `folder` is no expanded checkpoint at all, or the base is damaged.
        TokenizerError: If the base has no tokenizer.
        CorpusError: If a text cannot be read.
    """
    began, times = time.monotonic(), file_times(folder) if folder.is_dir() else {}
    pair = Pair(folder, against, read_manifest(folder), trust_remote_code, seed)
    _ = pair.base, pair.base_tokenizer  # a base that cannot be read is no fault of the checkpoint
    checks: list[tuple[str, Callable[[], str]]] = [
        ("shards complete", lambda: config.shards_complete(pair)),
        ("config agrees", lambda: config.config_agrees(pair)),
        ("named ids, stops and bans kept", lambda: config.named_ids_kept(pair)),
        ("untouched tensors equal", lambda: tensors.untouched_tensors(pair)),
        ("old rows bit-identical", lambda: tensors.old_rows(pair)),
        ("new rows plausible", lambda: tensors.new_rows(pair, MAX_NORM_RATIO)),
        ("files carried over", lambda: files.carried_over(pair)),
        ("no stale tokenizer files", lambda: files.no_stale_tokenizer(pair)),
        ("tokenizer is the base's, extended", lambda: extension.same_as_extension(pair)),
        ("old token ids kept", lambda: behaviour.old_ids(pair)),
        ("prompts and chats as in the base", lambda: behaviour.prompts_as_in_base(pair)),
        ("invariant on the corpus", lambda: behaviour.invariant_on_corpus(
            pair, documents, limit=None if full else SAMPLE_BYTES)),
        ("invariant on adversarial text", lambda: behaviour.invariant_on_adversarial(pair, NUM_ADVERSARIAL)),
        ("streaming and offsets", lambda: behaviour.streaming_and_offsets(pair)),
        # Behind the other texts: what they saw in context need not be searched for.
        ("new tokens reachable and readable", lambda: behaviour.new_tokens(pair)),
        ("loads in transformers, same logits", lambda: logits.same_logits(pair, load_weights)),
        ("loads in vLLM, same greedy output", lambda: engine.same_greedy(pair, use_vllm)),
    ]
    if pair.manifest.adapter:
        checks.append(("drift with the adapter", lambda: adapter.adapter_drift(pair, load_weights)))
    verdicts: list[Check] = []
    with progress("verifying", len(checks) + 2, "checks") as task:
        for name, check in checks:
            task.note(name)
            pair.advance = _counted(name, task)
            verdicts.append(_verdict(name, check))
            task.advance()
        failed = any(check.verdict == FAIL for check in verdicts)
        verdicts.insert(0, _verdict("made from this base", lambda: files.recorded_base(pair, others_failed=failed)))
        task.advance()
        task.note(RECORDED)
        verdicts.insert(1, _verdict(RECORDED, lambda: files.recorded(pair, times, verdicts)))
        task.advance()
    # A digest that is known is never given up: what is found later may be what went wrong.
    carried = {**pair.carried_sha256, **pair.earlier_sha256}
    return Verification(str(folder), against, tuple(verdicts), time.monotonic() - began, carried,
                        None if pair.reading is None else asdict(pair.reading), pair.files)


def _counted(name: str, task: Task) -> Callable[[int], None]:
    """Return what counts the bytes that a check has compared, and says so now and then."""
    done, lock = 0, threading.Lock()  # files are compared several at a time

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            before, done = done, done + count
        if done // NOTED_BYTES > before // NOTED_BYTES:
            task.note(f"{name}, {done / 1e9:,.1f} GB compared")
            task.advance(0)  # on a log: a line, if the last one is old enough

    return advance


def _verdict(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, PASS, check())
    except NotCheckedError as reason:
        return Check(name, SKIPPED, str(reason))
    except Exception as error:  # a check that breaks must not take the verdicts of the others along
        if lacks_memory(error):
            return Check(name, SKIPPED, f"the memory is too small for it: {in_one_line(error)}")
        if isinstance(error, FaultError | CheckpointError | TokenizerError):
            return Check(name, FAIL, str(error))
        if isinstance(error, VocabextError):
            raise  # a corpus that cannot be read, or a package that is missing, is no fault of the checkpoint
        return Check(name, FAIL, f"the check broke off with {type(error).__name__}: {in_one_line(error)}")
