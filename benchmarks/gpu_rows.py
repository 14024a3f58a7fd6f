"""Are a device's rows the processor's, and what do distil, patch and eval cost there?

    python benchmarks/gpu_rows.py [--model DIR] [--device cuda] [-o result.json]

The same tokens with the same snippets are distilled on the processor in float32, on the device in float32 and on the
device in bfloat16. A row is compared by how far it went from the mean of its pieces: the distance between two
trained rows, in units of the way that the processor's row went. Training amplifies rounding, so rows are never equal
to the bit on another device.
Then the folder is patched, and evaluated on the device on held-out text with all three sets of rows.

It exits with 1 where the device's float32 rows are worse than TOLERANCE allows.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from distill_reference import write
from distill_tables import table
from machine import Clock, PeakMemory, describe

import vocabext
from vocabext.files.atomic import write_json
from vocabext.model.frozen import pick_device

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Most that the device may lose against the processor, in bits per byte of held-out text.
TOLERANCE = 0.01


def main(argv: Sequence[str] | None = None) -> None:
    """Make all rows, compare them, patch, evaluate, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "model", help="folder (default: the embedded model)")
    parser.add_argument("--mining", type=Path, help="text to mine (default: CPython's documentation)")
    parser.add_argument("--heldout", type=Path, help="text to measure on")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--snippets", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(arguments, Path(scratch))
    write(render(found))
    if arguments.output:
        write_json(arguments.output, found)
    lost = found["runs"][1]["bits_per_byte"] - found["runs"][0]["bits_per_byte"]
    if lost > TOLERANCE:
        sys.exit(f"{arguments.device} loses {lost:.4f} bits per byte against the processor, more than {TOLERANCE}")


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return everything that is measured, JSON-ready."""
    device = pick_device(arguments.device)
    mining, heldout = arguments.mining, arguments.heldout
    if mining is None or heldout is None:
        subprocess.run([sys.executable, str(EXAMPLES / "python_docs.py"), "-o", str(scratch)], check=True)
        mining, heldout = scratch / "mining.jsonl", scratch / "heldout.jsonl"
    base = vocabext.load(arguments.model, verbose=False)
    tokens = base.mine(mining, budget=arguments.tokens)
    snippets = base.collect(tokens, mining, snippets=arguments.snippets, min_snippets=min(8, arguments.snippets))
    start = base.distill(snippets, method="mean")
    runs = []
    rows: list[vocabext.NewRows] = []
    for where, dtype in (("cpu", "float32"), (arguments.device, "float32"), (arguments.device, "bfloat16")):
        place = pick_device(where)
        with PeakMemory(place) as memory:
            clock = Clock(place)
            rows.append(base.distill(snippets, device=where, dtype=dtype, leave_out=0, output_rows="mean", rounds=1))
            seconds, cpu_seconds = clock.read()
        runs.append({"device": where, "dtype": dtype, "seconds": seconds, "cpu_seconds": cpu_seconds,
                     "peak_bytes": memory.peak_bytes, **evaluate(base, rows[-1], heldout, scratch, device)})
    for run, made in zip(runs, rows, strict=True):
        run["distance_quartiles"] = distances(start, rows[0], made)
    return {"model": arguments.model.name, "tokens": len(tokens), "snippets": arguments.snippets,
            "tolerance_bits_per_byte": TOLERANCE, "machine": describe(device), "runs": runs}


def evaluate(
    base: vocabext.Model, rows: vocabext.NewRows, heldout: Path, scratch: Path, device: torch.device
) -> dict[str, Any]:
    """Patch a folder with `rows`, evaluate it on `device`, and return seconds and bits per byte."""
    clock = Clock(device)
    new = base.patch(rows, scratch / "expanded", force=True)
    patch_seconds, _ = clock.read()
    clock = Clock(device)
    found = new.evaluate(heldout, device=str(device), max_bytes=50_000, prompts=8).to_json()
    eval_seconds, _ = clock.read()
    by_name = {row["name"]: row["bits_per_byte"] for row in found["rows"]}
    return {"patch_seconds": patch_seconds, "eval_seconds": eval_seconds, "bits_per_byte": by_name["distilled"],
            "base_bits_per_byte": by_name["base"], "mean_bits_per_byte": by_name["mean"]}


def distances(start: vocabext.NewRows, reference: vocabext.NewRows, rows: vocabext.NewRows) -> list[float]:
    """Return the quartiles, over tokens, of the distance to `reference` in units of its way from `start`."""
    at_start_ND, theirs_ND, ours_ND = (made.input_ND for made in (start, reference, rows))
    way_N = (theirs_ND - at_start_ND).norm(dim=1).clamp(min=1e-9)
    share_N = (ours_ND - theirs_ND).norm(dim=1) / way_N
    return [float(share) for share in torch.quantile(share_N, torch.tensor([0.25, 0.5, 0.75]))]


def render(found: dict[str, Any]) -> str:
    """Return the tables."""
    first = found["runs"][0]
    lines = [[f"{run['device']}, {run['dtype']}", f"{run['seconds']:.1f}", f"{run['peak_bytes'] / 2**30:.2f}",
              f"{run['patch_seconds']:.1f}", f"{run['eval_seconds']:.1f}", f"{run['bits_per_byte']:.4f}",
              " ".join(f"{share:.3f}" for share in run["distance_quartiles"])] for run in found["runs"]]
    return "\n".join([
        f"{found['model']}, {found['tokens']} tokens, {found['snippets']} snippets; base "
        f"{first['base_bits_per_byte']:.4f} bits per byte, mean of pieces {first['mean_bits_per_byte']:.4f}", "",
        table(["rows made on", "distill s", "peak GiB", "patch s", "eval s", "bits per byte", "distance, quartiles"],
              lines)])


if __name__ == "__main__":
    main()
