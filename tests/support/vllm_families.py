"""Load base and expanded folders of many families in vLLM, one after the other in one process, and compare them.

    python tests/support/vllm_families.py FOLDER [FAMILY...]      all families if none is named

Each is a tiny random model; both continue the same prompts greedily by base ids. One line of JSON per family: `same`,
`differs` with the place, or the error with which vLLM refuses the base, which is no fault of ours.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from patch_case import make_rows
from tiny_families import FAMILIES, tiny_family

from vocabext.patch.stage import patch
from vocabext.verify.engine import TIE

TEXTS = tuple(f" heart {word}" for word in ("rate", "muscle", "of", "and", "the", "rest", "so", "a"))
PROMPTS = [[0, 40, 77, 120, 260, 285, 9], [0, 5, 280, 281, 17], [0, 271, 272, 30, 31, 32]]
NUM_IDS, NUM_TOKENS = 290, 16


def expanded(folder: Path, family: str) -> tuple[Path, Path]:
    """Make a base of a family, and expand it by eight tokens."""
    base = tiny_family(folder / family / "base", family)
    make_rows(base, folder / family / "rows.safetensors", TEXTS)
    patch(folder / family / "rows.safetensors", str(base), folder / family / "new")
    return base, folder / family / "new"


def written(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Return the ids that vLLM writes behind each prompt, and the log probabilities of the likeliest."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    model = LLM(model=str(folder), enforce_eager=True, max_num_seqs=8, max_model_len=64, dtype="float32", seed=0)
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5,
                                  detokenize=False, allowed_token_ids=list(range(NUM_IDS)))
        wanted: Any = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = [result.outputs[0] for result in model.generate(wanted, sampling, use_tqdm=False)]
        return [(list(output.token_ids), [{i: found.logprob for i, found in step.items()} for step in output.logprobs])
                for output in outputs]
    finally:
        del model
        gc.collect()
        cleanup_dist_env_and_memory()


def compare(base: Path, new: Path) -> dict[str, Any]:
    """Tell whether base and expanded write the same; equally likely ids may be exchanged."""
    try:
        before = written(base, PROMPTS)
    except Exception as error:  # whatever vLLM raises on a family that it does not serve here
        return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    ties = 0
    for number, ((old, likely), (now, _)) in enumerate(zip(before, written(new, PROMPTS), strict=True)):
        at = next((i for i, (a, b) in enumerate(zip(old, now, strict=True)) if a != b), None)
        if at is None:
            continue
        if likely[at][old[at]] - likely[at].get(now[at], float("-inf")) > TIE["F32"]:
            return {"differs": f"prompt {number}, place {at}: {old[at]} in the base, {now[at]} here"}
        ties += 1
    (new_prompt,) = written(new, [[*PROMPTS[0], NUM_IDS, NUM_IDS + len(TEXTS) - 1]])
    return {"same": len(PROMPTS), "ties": ties, "behind new tokens": len(new_prompt[0])}


def main(folder: str, *families: str) -> None:
    """Compare families, and print what was found."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    for family in families or FAMILIES:
        found = compare(*expanded(Path(folder), family))
        sys.stdout.write(json.dumps({family: found}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
