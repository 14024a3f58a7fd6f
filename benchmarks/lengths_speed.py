"""Is `serve lengths` as fast as the two tokenizers it runs? Measure both on the same text, in turns.

    python benchmarks/lengths_speed.py BASE EXPANDED --corpus PATH [--turns 5] [-o FILE]

The floor is what the tokenizers alone take: `encode_batch_fast` of the base, then of the expanded tokenizer, on
all cores, on texts that are in memory. `serve lengths` reads the corpus, encodes with both, counts, and checks
the invariant on every document. A share of 1 means that all of this costs nothing.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from vocabext.corpus import read_documents
from vocabext.files.atomic import write_json
from vocabext.serve.lengths import measure_lengths
from vocabext.serve.model import Encoder, load_encoder
from vocabext.serve.provenance import provenance


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("expanded", type=Path)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args()
    texts = [document.text for document in read_documents([arguments.corpus])]
    encoders = [load_encoder(folder) for folder in (arguments.base, arguments.expanded)]
    alone(encoders, texts)  # both have seen the words once
    pairs = []
    for _ in range(arguments.turns):
        floor = alone(encoders, texts)
        pairs.append((floor, measure_lengths(str(arguments.base), str(arguments.expanded),
                                             [arguments.corpus])["encoding_seconds"]))
    result = table(pairs, sum(len(text.encode()) for text in texts))
    print(f"| tokenizers alone, MB/s | serve lengths, MB/s | share |\n|---|---|---|\n"
          f"| {result['tokenizers_megabytes_per_second']:.2f} | {result['lengths_megabytes_per_second']:.2f} "
          f"| {result['share']:.2f} |")
    if arguments.output:
        write_json(arguments.output, {**result, "turns": arguments.turns, "provenance": provenance()})


def alone(encoders: list[Encoder], texts: list[str]) -> float:
    """Return the seconds that both tokenizers take for the texts, and nothing else."""
    began = time.perf_counter()
    for encoder in encoders:
        encoder.backend.encode_batch_fast(texts, add_special_tokens=False)
    return time.perf_counter() - began


def table(pairs: list[tuple[float, float]], num_bytes: int) -> dict[str, Any]:
    """Turn pairs of (alone, lengths) seconds into speeds; every byte is encoded twice."""
    return {
        "bytes": num_bytes,
        "tokenizers_megabytes_per_second": 2 * num_bytes / 1e6 / statistics.median(floor for floor, _ in pairs),
        "lengths_megabytes_per_second": 2 * num_bytes / 1e6 / statistics.median(whole for _, whole in pairs),
        "share": statistics.median(floor / whole for floor, whole in pairs),
        "seconds": [{"tokenizers": floor, "lengths": whole} for floor, whole in pairs],
    }


if __name__ == "__main__":
    main()
