"""A Llama of three million parameters, and a loss that never holds all logits at once.

The architecture is Llama's, as ``transformers`` implements it, so that every tool that loads
Llama models loads this one: RMSNorm before each block, rotary positions, attention with heads of
64, a gated feed-forward network, and one matrix that is both the embedding and the output head.

The head is the memory problem of a small model: one float32 logit per token *and* vocabulary
entry.  :class:`HeadLoss` computes the cross-entropy a thousand tokens at a time, and because the
gradient of a chunk is known as soon as its loss is (probabilities minus the one-hot target),
computes that at once too; the backward pass only has to hand it on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from training.tokenizer import CONTEXT, VOCABULARY_SIZE

CHUNK = 1_024
"""Tokens per chunk of the loss."""


def build(begin: int, end: int, seed: int) -> LlamaForCausalLM:
    """Make an untrained model.

    Args:
        begin: Id of the begin token.
        end: Id of the end token.
        seed: Of the initial weights.

    Returns:
        The model, in float32.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=begin,
        eos_token_id=end,
        initializer_range=0.02,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # every block starts as the identity
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def chunk_loss(hidden_CD: Tensor, head_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the summed cross-entropy of a chunk and its gradient by the logits.

    Args:
        hidden_CD: Final hidden states.
        head_VD: The output head.
        targets_C: Next tokens.

    Returns:
        The sum of the losses, and its gradient by the logits (C, V).
    """
    logits_CV = F.linear(hidden_CD, head_VD)
    log_total_C1 = logits_CV.logsumexp(-1, keepdim=True)
    picked_C1 = logits_CV.gather(1, targets_C[:, None])
    gradient_CV = (logits_CV - log_total_C1).exp()
    gradient_CV = gradient_CV.scatter_add(1, targets_C[:, None], torch.full_like(picked_C1, -1.0))
    return (log_total_C1 - picked_C1).sum(), gradient_CV


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of hidden states under a head, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
        """Compute the loss and, at once, its gradients."""
        count = len(hidden_ND)
        loss = hidden_ND.new_zeros(())
        gradient_ND = torch.empty_like(hidden_ND)
        gradient_VD = torch.zeros_like(head_VD)
        for start in range(0, count, CHUNK):
            chunk = slice(start, start + CHUNK)
            part, gradient_CV = compiled_chunk_loss(hidden_ND[chunk], head_VD, targets_N[chunk])
            loss += part
            gradient_ND[chunk] = gradient_CV @ head_VD
            gradient_VD.addmm_(gradient_CV.mT, hidden_ND[chunk])
        ctx.save_for_backward(gradient_ND / count, gradient_VD / count)
        return loss / count

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        """Hand on the gradients."""
        gradient_ND, gradient_VD = ctx.saved_tensors
        return gradient_ND * outputs[0], gradient_VD * outputs[0], None


compiled_chunk_loss = torch.compile(chunk_loss, dynamic=False)


class Trainee(nn.Module):
    """A model and its training loss."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        """Compile the model's body; the head is computed by :class:`HeadLoss`.

        Args:
            model: What to train.
        """
        super().__init__()
        self.model = model
        self.body = torch.compile(model.model, dynamic=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Compute the mean loss of predicting every token from those before it.

        Args:
            tokens_BT: One more token per row than positions to predict.

        Returns:
            The loss in nats.
        """
        hidden_BTD = self.body(input_ids=tokens_BT[:, :-1], use_cache=False).last_hidden_state  # type: ignore[no-untyped-call]
        targets_N = tokens_BT[:, 1:].reshape(-1)
        hidden_ND, head_VD = hidden_BTD.flatten(0, 1), self.model.lm_head.weight
        loss: Tensor = HeadLoss.apply(hidden_ND, head_VD, targets_N)  # type: ignore[no-untyped-call]
        return loss
