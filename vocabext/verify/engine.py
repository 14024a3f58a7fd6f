"""Whether vLLM loads the folder and writes what it writes with the base."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vocabext.checkpoint.folder import Checkpoint
from vocabext.verify.adapter import refuse_merged
from vocabext.verify.greedy import MAX_LENGTH
from vocabext.verify.pair import FaultError, NotCheckedError, Pair
from vocabext.verify.plain import prompts

NUM_TOKENS = 24
TIMEOUT_SECONDS = 3600
# Two ids as likely as each other but for the rounding of another kernel are a tie; which wins means nothing.
TIE = {"F32": 1e-4, "F16": 0.01, "BF16": 0.08}


def same_greedy(pair: Pair, use_vllm: bool) -> str:
    """Continue texts without new tokens with base and expanded in vLLM, and compare what they write.

    Both write base ids only: where a new token is likelier, the base could not have written it.

    Args:
        pair: The checkpoints.
        use_vllm: Whether to do it at all.
    """
    refuse_merged(pair)
    if not use_vllm:
        raise NotCheckedError("not asked for; pass --vllm")
    if importlib.util.find_spec("vllm") is None:
        raise NotCheckedError("vLLM is not installed; run: pip install 'vocabext[serve]'")
    texts = prompts(pair)
    tie = TIE[pair.base.dtype]
    try:
        before = _written(pair, pair.base_folder, list(texts.values()))
    except FaultError as error:
        raise NotCheckedError(f"{error}, which is the base") from None
    after = _written(pair, pair.folder, list(texts.values()))
    ties = 0
    for text, old, new in zip(texts, before, after, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(old["ids"], new["ids"], strict=True)) if a != b), None)
        if at is None:
            continue
        wanted, found = old["ids"][at], new["ids"][at]
        likely = old["logprobs"][at]
        if likely[str(wanted)] - likely.get(str(found), float("-inf")) > tie:
            raise FaultError(f"behind {text!r} vLLM writes the id {found} at place {at}, with the base {wanted}")
        ties += 1
    said = f"; {ties} parted where two ids are equally likely" if ties else ""
    return f"vLLM continues {len(texts)} texts by the same {NUM_TOKENS} ids as with the base{said}"


def _written(pair: Pair, folder: Path, rows: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Return what vLLM writes behind some prompts, and how likely it was, from a process of its own."""
    num_ids = min(pair.expansion.first_new_id, pair.base.vocab_size)  # some may have no row in the base
    request = {"folder": str(folder.resolve()), "prompts": rows, "num_ids": num_ids, "num_tokens": NUM_TOKENS,
               "max_length": _max_length(pair.base), "trust_remote_code": pair.trust_remote_code}
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer, log = (Path(scratch) / name for name in ("request.json", "answer.json", "log.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        with open(log, "wb") as file:
            try:
                code = subprocess.run([sys.executable, "-m", "vocabext.verify.greedy", str(asked), str(answer)],
                                      stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False,
                                      timeout=TIMEOUT_SECONDS).returncode
            except subprocess.TimeoutExpired:
                raise NotCheckedError(f"vLLM did not answer within {TIMEOUT_SECONDS:,} s with {folder}") from None
        if code or not answer.is_file():
            raise FaultError(f"vLLM cannot load {folder}: {_cause(log.read_text('utf-8', 'replace'), code)}")
        found: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def _max_length(base: Checkpoint) -> int:
    """Return how long a text vLLM may be asked for: as long as ours, or as the model allows."""
    config = {**base.config, **(base.config.get("text_config") or {})}
    limits = (config.get(key) for key in ("max_position_embeddings", "n_positions"))
    return min([MAX_LENGTH, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])


def _cause(log: str, code: int) -> str:
    """Return the last line of a log that names an error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line or "Exception: " in line]
    said = (named or lines or ["it said nothing"])[-1]
    return f"{said[:300]} (exit code {code})"
