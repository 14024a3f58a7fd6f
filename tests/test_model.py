"""A frozen model: any layer of any body."""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from vocabext.model.frozen import FrozenModel

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
         "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
GROUPED = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 48}
KINDS = ["sliding_attention", "full_attention", "full_attention"]


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**GROUPED))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=0,
                                      eos_token_id=0))


def neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48))


def opt() -> Any:
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32))


def gemma() -> Any:
    return Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=5, layer_types=KINDS))


def frozen(make: Any) -> FrozenModel:
    torch.manual_seed(0)
    return FrozenModel(make(), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("make", [llama, gpt2, neox, opt, gemma])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_running_up_to_a_layer_gives_its_states_and_its_past_and_nothing_above_is_run(make: Any, layer: int) -> None:
    model, ids = frozen(make), torch.arange(14).view(2, 7) + 3
    states = model.model(ids, output_hidden_states=True).hidden_states[layer]
    ran: list[int] = []
    assert model.takes_branches  # tried once, on a text of its own
    stack = next(child for child in model.model.get_decoder().children() if isinstance(child, torch.nn.ModuleList))
    for number, child in enumerate(stack):
        child.register_forward_hook(lambda *_, number=number: ran.append(number))
    found, past = model.hidden_and_past(model.embed(ids), layer=layer)
    assert torch.allclose(found, states, atol=1e-5)
    assert torch.allclose(model.hidden(model.embed(ids), layer=layer), states, atol=1e-5)
    assert ran == [*range(layer)] * 2
    assert [tuple(keys.shape[::2]) for keys, _ in past] == [(2, 7)] * layer
    again = model.model(ids, output_hidden_states=True).hidden_states
    assert len(again) == 4  # the model is whole again


def test_a_body_of_another_shape_runs_whole_and_gives_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrozenModel, "_stack", None)
    model, ids = frozen(llama), torch.arange(6)[None] + 3
    states = model.model(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(model.hidden(model.embed(ids), layer=2), states[2], atol=1e-5)
