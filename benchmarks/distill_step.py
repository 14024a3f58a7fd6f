"""What one training step costs by its size, and whether compiling it pays.

    python benchmarks/distill_step.py [--model DIR] [--dtype float32] [--compile] [-o result.json]

One step reads so many positions of one snippet of each token, forward and back; the table shows microseconds per
position, and how far the products of the layers are from the most that matrix products reach here. The teacher is
timed beside it. With --compile the layers are compiled by torch first, which costs the seconds shown once for each
shape that is new to it. Text is random: none of this depends on what is read.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from distill_reference import ASSETS, random_records, write
from distill_tables import table
from machine import describe, matrix_peak
from work import BodyShape

from vocabext.distill.input_rows.contexts import teach
from vocabext.distill.input_rows.engine import snippet_errors
from vocabext.distill.input_rows.examples import build_examples
from vocabext.files.atomic import write_json
from vocabext.model.frozen import load_model
from vocabext.tokens import Expansion

SIZES = (250, 500, 1_000, 2_000, 4_000)
REACH = 8
SECONDS = 2.0


def main(argv: Sequence[str] | None = None) -> None:
    """Time every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "models" / "biomed-13m", help="folder of the model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--positions", type=int, nargs="*", default=SIZES, help="sizes of a step")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args(argv)
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    shape, peak = BodyShape.of(model), matrix_peak(model.dtype, model.device)
    if arguments.compile:
        model.model.get_decoder().compile(dynamic=True)
    first_new_id = shape.rows
    rows = []
    for positions in arguments.positions:
        tokens = max(1, positions // (REACH + 1))
        records = random_records(tokens, 1, first_new_id)
        expansion = Expansion([record.new_token for record in records], first_new_id)
        part = build_examples(records, expansion, range(tokens), prefix_ids=[1], reach=REACH).to(model.device)
        contexts = teach(model, part, model.num_layers, keep_past=True)
        row_GD = torch.randn(tokens, shape.hidden, device=model.device).requires_grad_()

        def step(part: Any = part, contexts: Any = contexts, row_GD: Any = row_GD) -> None:
            torch.autograd.grad(snippet_errors(model, part, contexts, row_GD, model.num_layers).sum(), row_GD)

        def read(part: Any = part) -> None:
            teach(model, part, model.num_layers, keep_past=True)

        first, seconds = _time(step, model.device)
        _, teacher_seconds = _time(read, model.device)
        read_positions = int(part.teacher_length_W.sum())
        count = int(part.length_S.sum())
        flops = 2 * shape.linear(count, shape.layers)
        rows.append({"positions": count, "first_seconds": first, "step_seconds": seconds,
                     "flops_per_second": flops / seconds, "teacher_seconds_per_position":
                     teacher_seconds / read_positions, "teacher_flops_per_second":
                     shape.linear(read_positions, shape.layers) / teacher_seconds})
    write(table(("positions", "first step, s", "us per position", "GFLOP/s", "of peak", "teacher, us per position",
                 "of peak"),
                [(f"{row['positions']:,}", f"{row['first_seconds']:.2f}",
                  f"{row['step_seconds'] / row['positions'] * 1e6:.1f}", f"{row['flops_per_second'] / 1e9:,.0f}",
                  f"{row['flops_per_second'] / peak:.0%}", f"{row['teacher_seconds_per_position'] * 1e6:.1f}",
                  f"{row['teacher_flops_per_second'] / peak:.0%}") for row in rows]))
    if arguments.output:
        write_json(arguments.output, {"machine": describe(model.device), "dtype": arguments.dtype, "peak": peak,
                                      "compiled": arguments.compile, "rows": rows})


def _time(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return how long the first call takes, and the fastest of those after it."""
    times: list[float] = []
    while len(times) < 4 or sum(times[1:]) < SECONDS:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return times[0], min(times[1:])


if __name__ == "__main__":
    main()
