"""How well does it predict text it has not seen?  Held-out bits per byte.

A loss per token cannot be compared between vocabularies; the number of bits that the model needs
for a text, divided by the text's bytes, can: gzip, an n-gram model and a neural network all have
such a number.  The bits are those of the document's own tokens, given the begin token; the end
token is not counted.

Documents that are longer than the context are read in windows that overlap by half, and every
token is scored in the first window that contains it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from training.loop import Corpus
from training.ngram import NGram, best_mixture, bits
from training.tokenizer import CONTEXT, VOCABULARY_SIZE

STRIDE = CONTEXT // 2


@torch.no_grad()
def document_bits(model: LlamaForCausalLM, tokens_T: Tensor) -> float:
    """Compute the bits a document costs.

    Args:
        model: The model, in float32.
        tokens_T: Begin token and text, without the end token.

    Returns:
        The bits of all tokens but the first.
    """
    nats = 0.0
    scored = 1
    for start in range(0, len(tokens_T), STRIDE):
        window_W = tokens_T[start : start + CONTEXT]
        logits_WV = model(input_ids=window_W[None]).logits[0]
        fresh = slice(scored - start - 1, len(window_W) - 1)
        targets = window_W[1:][fresh]
        nats += float(F.cross_entropy(logits_WV[:-1][fresh], targets, reduction="sum"))
        scored = start + len(window_W)
        if scored == len(tokens_T):
            break
    return nats / math.log(2)


def model_bits(model: LlamaForCausalLM, corpus: Corpus) -> float:
    """Compute the bits that all documents of a corpus cost."""
    total = 0.0
    for first, last in zip(corpus.starts[:-1], corpus.starts[1:] - 1, strict=True):
        total += document_bits(model, torch.from_numpy(corpus.tokens_N[first:last].astype("int64")))
    return total


def compare(
    model: LlamaForCausalLM,
    training: dict[str, Corpus],
    heldout: dict[str, tuple[Corpus, int]],
) -> dict[str, object]:
    """Compare the model with 5-grams.

    Args:
        model: The model, in float32.
        training: What the 5-grams are trained on: ``seen`` is the text that the model saw, every
            document once; ``domain`` only the domain part of it; ``all`` every training document,
            more than the model saw.
        heldout: Name to the documents and their bytes.

    Returns:
        For each held-out corpus the bits per byte, ready for JSON.
    """
    grams = {name: NGram(corpus, VOCABULARY_SIZE) for name, corpus in training.items()}
    result: dict[str, object] = {}
    for name, (corpus, size) in heldout.items():
        p = {key: gram.probabilities(corpus) for key, gram in grams.items()}
        mixed, weight = best_mixture(p["domain"], p["seen"], corpus)
        mixed_all, weight_all = best_mixture(p["domain"], p["all"], corpus)
        result[name] = {
            "documents": len(corpus.starts) - 1,
            "bytes": size,
            "tokens": len(corpus.tokens_N) - 2 * (len(corpus.starts) - 1),
            "bits_per_byte": {
                "model": round(model_bits(model, corpus) / size, 4),
                "5-gram, text the model saw": round(bits(p["seen"], corpus) / size, 4),
                "5-gram, the same mixed with a domain 5-gram": round(mixed / size, 4),
                "5-gram, all training text": round(bits(p["all"], corpus) / size, 4),
                "5-gram, all training text mixed with a domain 5-gram": round(mixed_all / size, 4),
                "uniform": round(
                    (len(corpus.tokens_N) - 2 * (len(corpus.starts) - 1)) * math.log2(VOCABULARY_SIZE) / size,
                    4,
                ),
            },
            "domain_weight_of_mixtures": [round(weight, 2), round(weight_all, 2)],
        }
    return result


@torch.no_grad()
def continuations(
    model: LlamaForCausalLM, prompts: dict[str, list[int]], length: int, seed: int
) -> dict[str, list[int]]:
    """Sample a continuation of every prompt.

    Args:
        model: The model.
        prompts: Text to its tokens, begin token included.
        length: New tokens.
        seed: Of the samples.

    Returns:
        Text to the continuation's tokens.
    """
    torch.manual_seed(seed)
    result = {}
    for text, ids in prompts.items():
        output = model.generate(
            torch.tensor([ids]),
            max_new_tokens=length,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            pad_token_id=model.config.eos_token_id,
        )
        result[text] = cast("list[int]", output[0, len(ids) :].tolist())
    return result
