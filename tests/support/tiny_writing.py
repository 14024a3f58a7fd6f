"""A tiny random model with a taste, and runs that it may write, for tests of `vocabext.writing`."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vocabext.checkpoint.folder import Rows
from vocabext.model.frozen import FrozenModel
from vocabext.tokens import NewToken

NUM_BASE = 30


def sharp_model(first_new_id: int = NUM_BASE) -> FrozenModel:
    """A random model with a taste: some runs are likely, and some are what greedy decoding writes."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=first_new_id + 2, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, bos_token_id=None,
                         eos_token_id=None)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return FrozenModel(model, torch.device("cpu"), torch.float64)


def some_tokens(rng: np.random.Generator, count: int, first_new_id: int = NUM_BASE) -> list[NewToken]:
    """Random runs of two to four ids; some are the beginnings of others."""
    runs = {tuple(rng.integers(0, first_new_id, rng.integers(2, 5)).tolist()) for _ in range(count)}
    runs |= {run[:2] for run in runs if len(run) > 3}
    return [NewToken(str(run), str(run), run) for run in sorted(runs)]


def random_rows(model: FrozenModel, count: int, loud: float = 1.0) -> Rows:
    """Input and output rows; the louder, the more often they are on top."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, model.embedding_VD.shape[1])
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    return Rows(0.3 * made[0], loud * made[1])
