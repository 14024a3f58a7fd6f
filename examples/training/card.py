"""The model card, written from ``training.json`` and from nothing else.

Every number of the card is a number that the script measured; a card that is written by hand
drifts away from its model.
"""

from __future__ import annotations

from typing import Any

TEMPLATE = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- vocabext-example
---

# The vocabext example model

A small causal language model for trying vocabext on: a Llama of {parameters:,} parameters with a
byte-level BPE vocabulary of {vocab_size:,} tokens. The vocabulary was trained on **general English only**; the model
read domain text as well (below).
Domain text (here: CPython's own documentation) is therefore over-tokenized, as it is under the
vocabulary of a large model: {heldout_domain_bpt:.2f} bytes per token on held-out Python
documentation, {heldout_general_bpt:.2f} on held-out general English.

It is a demonstration. It continues dictionary entries and docstrings in their style; it knows
nothing and follows no instructions.

## Architecture

| | |
| --- | --- |
| Class | `LlamaForCausalLM` |
| Parameters | {parameters:,} (input and output embeddings tied) |
| Layers | {num_hidden_layers} |
| Hidden size | {hidden_size} |
| Attention heads | {num_attention_heads} of size {head_dim} |
| Feed-forward size | {intermediate_size} |
| Context | {max_position_embeddings:,} tokens |
| Vocabulary | {vocab_size:,}, the two special tokens at its end |
| Weights | bfloat16, {weight_megabytes:.1f} MB |

## Training data

General English, from Debian packages (the licences are those of the texts):

| Package | Version | Licence | Training documents | Bytes | Trains the tokenizer |
| --- | --- | --- | --- | --- | --- |
{sources}

Domain text: the **mining side** of CPython {python}'s documentation (help topics and docstrings
of the standard library, PSF licence), as `examples/python_docs.py` extracts it:
{domain_documents:,} documents, {domain_bytes:,} bytes. A real language model has seen its domain
too, as pieces; so has this one. The held-out side, about a tenth of the modules and topics, was
seen by neither the tokenizer nor the model.

The model read {tokens_seen:,} tokens: {general_tokens_seen:,} of general text
({general_epochs} passes) and {domain_tokens_seen:,} of domain text ({domain_epochs} passes,
{domain_percent:.0f} % of the tokens, more of it towards the end).

## Training

```
{command}
```

| | |
| --- | --- |
| Hardware | {hardware} |
| Wall time | {wall_minutes:.1f} minutes, including compilation |
| Throughput | {tokens_per_second:,} tokens per second |
| Steps | {steps:,} of {tokens_per_step:,} tokens |
| Row length | {short_row}, {context:,} for the last {long_percent:.0f} % of the time |
| Optimizer | Muon for matrices, AdamW for the embedding and the norms, float32 |
| Learning rate | {muon_rate} and {adam_rate}, warmed up, then falling to zero |
| Training loss at the end | {final_training_loss:.3f} nats per token (running mean) |

The run is bounded by time, not by steps, so another machine will reach another loss.

## Held-out bits per byte

Lower is better. Both kinds of model use the same tokens, and the bytes are the same.
The baseline is an interpolated 5-gram with modified Kneser-Ney smoothing. "Text the model saw"
gives it exactly the documents that the model read, once each. "All training text" gives it more
general text than the model had time to read. The mixtures add a 5-gram of the domain text alone,
with the weight that is best on the held-out text itself, which favours the baseline.

| | Python documentation | General English |
| --- | --- | --- |
{results}

Held out: {heldout_domain_documents:,} documents of Python documentation
({heldout_domain_bytes:,} bytes), {heldout_general_documents:,} documents of general text
({heldout_general_bytes:,} bytes).

## Samples

Temperature 0.7, top 40, first sample of a fixed seed.

{samples}

## Limits

* Too small and too briefly trained to be useful for anything but demonstrations and tests.
* General English here means dictionaries and a database manual; ordinary prose is rare in it.
* The 1913 dictionary has the language and the prejudices of its time.
* The Python documentation was read more than once, so its mining side is partly memorised;
  judge the model on the held-out side only.
"""


def table(rows: list[list[object]]) -> str:
    """Write the body of a Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def result_rows(evaluation: dict[str, Any]) -> str:
    """Write the rows of the comparison, the model's in bold."""
    domain = evaluation["domain"]["bits_per_byte"]
    general = evaluation["general"]["bits_per_byte"]
    rows: list[list[object]] = []
    for name in domain:
        cells = [name, f"{domain[name]:.3f}", f"{general[name]:.3f}"]
        rows.append([f"**{cell}**" for cell in cells] if name == "model" else list(cells))
    return table(rows)


def write(record: dict[str, Any], config: dict[str, Any]) -> str:
    """Write the card.

    Args:
        record: The contents of ``training.json``.
        config: The contents of ``config.json``.

    Returns:
        The card, in Markdown.
    """
    training, evaluation = record["training"], record["evaluation"]
    domain, general = evaluation["domain"], evaluation["general"]
    sources = [
        [
            f"`{source['package']}`",
            source["version"],
            source["licence"],
            f"{source['documents']:,}",
            f"{source['bytes']:,}",
            "yes" if source["tokenizer"] else "no",
        ]
        for source in record["sources"]
    ]
    samples = "\n\n".join(
        f"```\n{prompt}▸{continuation.rstrip()}\n```" for prompt, continuation in record["samples"].items()
    )
    return TEMPLATE.format_map(
        {
            **config,
            **training,
            **record["settings"],
            "parameters": record["parameters"],
            "weight_megabytes": record["weight_bytes"] / 1e6,
            "command": record["command"],
            "hardware": record["hardware"],
            "python": record["corpus_python_version"],
            "sources": table(sources),
            "domain_documents": record["domain"]["documents"],
            "domain_bytes": record["domain"]["bytes"],
            "domain_percent": 100 * training["domain_tokens_seen"] / training["tokens_seen"],
            "wall_minutes": training["wall_seconds"] / 60,
            "heldout_domain_bpt": domain["bytes"] / domain["tokens"],
            "heldout_general_bpt": general["bytes"] / general["tokens"],
            "heldout_domain_documents": domain["documents"],
            "heldout_domain_bytes": domain["bytes"],
            "heldout_general_documents": general["documents"],
            "heldout_general_bytes": general["bytes"],
            "results": result_rows(evaluation),
            "samples": samples,
        }
    )
