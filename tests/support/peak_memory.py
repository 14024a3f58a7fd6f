"""Distills random tokens with one shape of model in a process of its own; prints what was stated and what was used.

    python peak_memory.py SHAPE          one of SHAPES
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from vocabext.distill import distill
from vocabext.model.frozen import FrozenModel
from vocabext.options import DistillConfig
from vocabext.tokens import NewToken, TokenSnippets

COMMON = {"bos_token_id": None, "eos_token_id": None}
# What is most of the memory: text before the tokens; the weights; a step, of a model whose heads share keys.
SHAPES: dict[str, tuple[PretrainedConfig, int, int]] = {
    "past": (GPT2Config(vocab_size=2_000, n_embd=512, n_inner=512, n_layer=8, n_head=8, n_positions=64, **COMMON),
             60, 5),
    "weights": (LlamaConfig(vocab_size=160_000, hidden_size=384, intermediate_size=384, num_hidden_layers=2,
                            num_attention_heads=6, num_key_value_heads=6, tie_word_embeddings=True, **COMMON), 60, 4),
    "step": (LlamaConfig(vocab_size=2_000, hidden_size=256, intermediate_size=768, num_hidden_layers=16,
                         num_attention_heads=8, num_key_value_heads=1, tie_word_embeddings=False, **COMMON), 160, 3),
}
WINDOW = 44


def status_bytes(name: str) -> int:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(line[1]) for line in lines if line[0] == f"{name}:") * 1024


def records(first: int, tokens: int, snippets: int) -> list[TokenSnippets]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(tokens):
        texts = [(*rng.integers(0, first, WINDOW - 12).tolist(), first + number, *rng.integers(0, first, 11).tolist())
                 for _ in range(snippets)]
        token = NewToken(f"t{number}", f"t{number}", (number % first, (number * 7 + 1) % first))
        made.append(TokenSnippets(token, tuple(texts), (WINDOW - 12,) * snippets))
    return made


def run(config: PretrainedConfig, tokens: int, snippets: int, **options: object) -> int:
    """Distill; returns the memory that was stated."""
    torch.manual_seed(0)
    model = FrozenModel(AutoModelForCausalLM.from_config(config), torch.device("cpu"), torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew: making a model has one of its own
    settings = DistillConfig(rounds=1, epochs=1, **options)  # type: ignore[arg-type]
    result = distill(records(config.vocab_size, tokens, snippets), model, settings, first_new_id=config.vocab_size)
    assert result.memory is not None
    print(result.memory.describe(), file=sys.stderr)  # noqa: T201
    return result.memory.total_bytes


if __name__ == "__main__":
    shape, tokens, snippets = SHAPES[sys.argv[1]]
    small = type(shape)(**{**shape.to_dict(), "vocab_size": 64})
    run(small, 2, 2)  # whatever is imported and set up once is no memory of the work
    before = status_bytes("VmRSS")
    stated = run(shape, tokens, snippets)
    print(json.dumps({"stated": stated, "used": status_bytes("VmHWM") - before}))  # noqa: T201
