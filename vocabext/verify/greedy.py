"""Greedy output of vLLM, in a process of its own: `python -m vocabext.verify.greedy REQUEST ANSWER`.

The request is a JSON file: a model folder, prompts as token ids, how many ids there are to write with, and how
many to write. The answer: for each prompt the ids written, and the log probabilities of the likeliest at each step.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

MAX_LENGTH = 256
LIKELIEST = 5


def main(request_path: str, answer_path: str) -> None:
    """Load the model, write, and leave.

    Args:
        request_path: What to do.
        answer_path: Where the answer goes; it is written last.
    """
    # One process, so that nothing outlives it; little memory: the prompts are short.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    model = LLM(model=request["folder"], enforce_eager=True, max_num_seqs=8, max_model_len=request["max_length"],
                trust_remote_code=request["trust_remote_code"], seed=0)
    sampling = SamplingParams(temperature=0.0, max_tokens=request["num_tokens"], ignore_eos=True, logprobs=LIKELIEST,
                              detokenize=False, allowed_token_ids=list(range(request["num_ids"])))
    prompts: Any = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    answer = []
    for result in model.generate(prompts, sampling, use_tqdm=False):
        written = result.outputs[0]
        steps = [{str(i): found.logprob for i, found in step.items()} for step in written.logprobs or ()]
        answer.append({"ids": list(written.token_ids), "logprobs": steps})
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
