"""How much longer than encoding a corpus once do `mine` and `collect` take? Processor seconds, in turns.

    python benchmarks/mine_speed.py MODEL --corpus PATH [--budgets 1000 5000 20000] [--turns 3] [-o FILE]

The floor is what the tokenizer of the base takes for the corpus in batches, without words and places
(`encode_batch_fast`). Processor seconds of the whole process count, so that neighbours on the machine do not.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe

from vocabext.collect import collect
from vocabext.corpus import read_documents
from vocabext.files.atomic import write_json
from vocabext.mine.counts import BATCH
from vocabext.mine.stage import mine
from vocabext.options import CollectConfig, MineConfig
from vocabext.tokenizer import load_tokenizer


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1000, 5000, 20000])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    base = load_tokenizer(arguments.model)
    documents = list(read_documents([arguments.corpus]))
    texts = [document.text for document in documents]

    def floor() -> None:
        for at in range(0, len(texts), BATCH):
            base.encode_batch(texts[at : at + BATCH])

    found: dict[str, Any] = {"model": arguments.model.name, "bytes": sum(len(text.encode()) for text in texts),
                             "machine": describe(torch.device("cpu")), "budgets": {}}
    for budget in arguments.budgets:
        turns = []
        for _ in range(arguments.turns):
            alone, _ = timed(floor)
            mining, result = timed(lambda budget=budget: mine(documents, base, MineConfig(budget=budget), at_most=True))
            collecting, _ = timed(lambda result=result: collect(documents, base, result.tokens, CollectConfig()))
            turns.append({"floor": alone, "mine": mining, "collect": collecting, "tokens": len(result.tokens)})
        shares = {verb: statistics.median(turn[verb] / turn["floor"] for turn in turns) for verb in ("mine", "collect")}
        found["budgets"][str(budget)] = {"times_the_floor": shares, "cpu_seconds": turns}
        write_json(arguments.output, found)
        print(budget, shares, turns[-1], flush=True)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor seconds of some work, and what it returns."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


if __name__ == "__main__":
    main()
