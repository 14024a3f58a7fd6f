"""What each choice of `heal` is worth: objectives, ranks, step sizes, all with the same little text.

    python benchmarks/heal_ablations.py expanded --model biomed-13m --corpus medquad.jsonl.gz
        --heldout medquad.heldout.jsonl.gz [--text 50000] [--only NAME...] --json benchmarks/heal_ablations.json

The measures are those of benchmarks/heal.py. Settings that the JSON has already are not measured again.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from heal import Arm, Bench, load_windows
from machine import describe

from vocabext.api.model import Expanded, Model
from vocabext.checkpoint.folder import load_rows
from vocabext.corpus import read_documents
from vocabext.files.atomic import read_object, write_json
from vocabext.heal.stage import Text, heal
from vocabext.model.adapter import load_adapter
from vocabext.model.frozen import load_model
from vocabext.options import HealConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "objective: what the text has": {"objective": "text"},
    "objective: first pieces only": {"objective": "pieces"},
    "rank 8": {"rank": 8},
    "rank 64": {"rank": 64},
    "adapter's steps 3e-4": {"learning_rate": 3e-4},
    "adapter's steps 2e-3": {"learning_rate": 2e-3},
    "rows alone (adapter's steps 1e-12)": {"learning_rate": 1e-12},
    "rows' steps 0.004": {"row_rate": 0.004},
    "rows' steps 0.1": {"row_rate": 0.1},
}


def main() -> None:
    """Measure what is missing, and write after each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expanded", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--text", type=int, default=50_000)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[*SETTINGS])
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    expanded = Expanded(arguments.expanded, Model(arguments.model))
    windows = load_windows(arguments.heldout, expanded, arguments.windows)
    model = load_model(arguments.model, device="cpu", dtype="float32")
    bench = Bench(model, expanded.expansion)
    oracle = [bench.oracle(window, len(expanded.base.tokenizer.prefix_ids)) for window in windows]
    result = read_object(arguments.json) or {
        "machine": describe(model.device), "text": arguments.text, "windows": len(windows), "settings": {}}
    for name in arguments.only:
        if name in result["settings"]:
            continue
        with TemporaryDirectory() as scratch:
            config = HealConfig(**{"text": arguments.text, "held_out": 4, "device": "cpu", **SETTINGS[name]})
            began = time.process_time()
            text = Text(read_documents([arguments.corpus]), [arguments.corpus])
            made = heal(arguments.expanded, arguments.model, text, config, Path(scratch) / "work")
            spent = time.process_time() - began
            _, rows, _ = load_rows(made.rows)
            assert rows.output_ND is not None
            own = load_model(arguments.model, device="cpu", dtype="float32")
            load_adapter(own, made.adapter)
            healed = Bench(own, expanded.expansion, bench.model)
            found = healed.at_windows(Arm(rows.input_ND, rows.output_ND, nullcontext), windows, oracle)
        result["settings"][name] = {**found, "cpu_seconds": spent, "options": SETTINGS[name]}
        write_json(arguments.json, result)
        print(name, found, f"{spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
