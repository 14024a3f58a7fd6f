"""How long `eval` takes, part by part, beside the matrix products that it cannot do without.

    python benchmarks/eval_speed.py MODEL --corpus TRAINING --heldout HELDOUT [--tokens 1000] [--bytes 80000]
        [--prompts 16] [-o benchmarks/eval_speed.json]

Tokens are mined from the first megabytes of the corpus. Two row sets are measured, as for a distilled checkpoint: the
mean of the pieces, and rows a little off it. A position is one input of the layers; a row of logits is one product of a
state with the whole head. The floor:

- reading: held-out text once in base ids, and once per row set in merged ids and the branches off them (what one pass
  needs to predict every piece); one row of logits for each of these positions
- writing: the prompts once in base ids and once per row set; one position and one row of logits for each step of a
  greedy continuation per row set, and of the base's own greedy and sampled one; base's opinion of each other text once

Floor seconds are these products at the rate of the largest square product here, on as many threads.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import PeakMemory, describe, matrix_peak

from vocabext.checkpoint.rows import mean_rows
from vocabext.corpus import Document, read_documents
from vocabext.evaluate.stage import RowSet, evaluate
from vocabext.mine.stage import mine
from vocabext.model.frozen import FrozenModel, load_model
from vocabext.options import EvalConfig, MineConfig
from vocabext.progress import no_progress
from vocabext.tokenizer import extend, load_tokenizer

MINED_BYTES = 3_000_000
OFF = 0.05


class Parts:
    """A `Progress` that notes what each task of a stage takes.

    Attributes:
        seconds: Processor seconds of each.
        positions: Inputs of the layers in each.
        heads: Rows of logits in each.
    """

    def __init__(self, model: FrozenModel) -> None:
        self.seconds, self.positions, self.heads = Counter[str](), Counter[str](), Counter[str]()
        self._part, self._since = "the rest", time.process_time()
        layer = next(child for child in model._body.modules() if isinstance(child, torch.nn.ModuleList))[0]
        layer.register_forward_pre_hook(self._body, with_kwargs=True)
        model.model.get_output_embeddings().register_forward_pre_hook(self._head)

    @contextmanager
    def __call__(self, description: str, /, total: int | None = None, unit: str = "") -> Iterator[Any]:
        """Note a task."""
        self.switch(description)
        with no_progress("") as task:
            yield task
        self.switch("the rest")

    def switch(self, part: str) -> None:
        """End a part and begin another."""
        now = time.process_time()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def _body(self, _: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = inputs[0] if inputs else named["hidden_states"]
        self.positions[self._part] += states.shape[0] * states.shape[1]

    def _head(self, _: Any, inputs: tuple[Any, ...]) -> None:
        self.heads[self._part] += inputs[0].shape[:-1].numel()


def floor(found: dict[str, Any], prompts: int, prompt_ids: tuple[int, int], num_sets: int) -> dict[str, int]:
    """Return the positions and rows of logits that are needed.

    Args:
        found: The content of eval.json.
        prompts: How many prompts were continued.
        prompt_ids: Their base ids and their expanded ids.
        num_sets: Row sets.
    """
    reading = found["pieces"] * (1 + num_sets)  # merged ids and inner pieces are together as many as the base ids
    if not prompts:
        return {"positions": reading, "heads": reading}
    own = found["writing"]["base"]["steps"]
    steps = 2 * own + sum(rows["greedy"]["steps"] for rows in found["writing"]["rows"])
    scored = num_sets * own
    return {"positions": reading + prompt_ids[0] + num_sets * prompt_ids[1] + steps + scored,
            "heads": reading + steps + scored}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate once, and count."""
    base, model = load_tokenizer(arguments.model), load_model(arguments.model, device="cpu", dtype=arguments.dtype)
    tokens = mine(_first(arguments.corpus, MINED_BYTES), base, MineConfig(budget=arguments.tokens)).tokens
    expanded = extend(base, tokens)
    rows = [mean_rows(matrix, tokens) for matrix in (model.embedding_VD, model.head_VD)]
    noise = OFF * torch.randn(rows[0].shape, generator=torch.Generator().manual_seed(0))
    row_sets = [RowSet("mean", *rows), RowSet("distilled", *(one + noise * one.std() for one in rows))]
    documents = [d for d in read_documents([arguments.heldout]) if len(d.text) > 500]
    config = EvalConfig(max_bytes=arguments.bytes, prompts=arguments.prompts)
    peak = matrix_peak(model.dtype, model.device)
    parts = Parts(model)
    with PeakMemory(model.device) as memory:
        began = time.monotonic()
        found: Any = evaluate(documents, model, base, expanded, row_sets, config, parts)
        wall = time.monotonic() - began
    parts.switch("end")
    prompts = found["writing"]["base"]["prompts"] if found["writing"] else 0
    needed = floor(found, prompts, _prompt_ids(documents, base, expanded, config, prompts), len(row_sets))
    body = sum(p.numel() for p in model._body.parameters()) - model.embedding_VD.numel()
    flops = {"positions": 2 * body, "heads": 2 * model.head_VD.numel()}
    done = {"positions": sum(parts.positions.values()), "heads": sum(parts.heads.values())}
    return {
        "machine": describe(model.device), "model": Path(arguments.model).name, "dtype": str(model.dtype),
        "tokens": len(tokens), "bytes": found["bytes"], "prompts": prompts, "pieces": found["pieces"],
        "parts": {name: {"cpu_seconds": parts.seconds[name], "positions": parts.positions[name],
                         "heads": parts.heads[name]} for name in parts.seconds if parts.seconds[name] > 0},
        "cpu_seconds": sum(parts.seconds.values()), "seconds": wall,
        "done": done, "floor": needed,
        "flops_over_floor": sum(done[k] * flops[k] for k in flops) / sum(needed[k] * flops[k] for k in flops),
        "floor_flops": sum(needed[k] * flops[k] for k in flops), "matrix_peak": peak,
        "floor_seconds": sum(needed[k] * flops[k] for k in flops) / peak,
        "before_bytes": memory.before_bytes, "peak_bytes": memory.peak_bytes,
        "found": {row["name"]: row["bits_per_byte"] for row in found["rows"]},
    }


def _first(corpus: str, num_bytes: int) -> list[Document]:
    found, size = list[Document](), 0
    for document in read_documents([corpus]):
        found.append(document)
        size += len(document.text.encode())
        if size > num_bytes:
            break
    return found


def _prompt_ids(documents: list[Document], base: Any, expanded: Any, config: EvalConfig, prompts: int
                ) -> tuple[int, int]:
    """Return the base and the expanded ids of all prompts: the first 256 expanded ids of long documents."""
    width = min(config.context, 8_192) // 2
    long = [ids[:width] for ids in expanded.encode_batch([d.text for d in documents[: 20 * max(1, prompts)]])
            if len(ids) >= width and expanded.expansion.is_new(ids[:width]).any()][:prompts]
    return sum(int(expanded.expansion.run_lengths(ids).sum()) for ids in long), sum(map(len, long))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--bytes", type=int, default=80_000)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args()
    found = measure(arguments)
    text = json.dumps(found, indent=2) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
