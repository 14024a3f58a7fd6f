"""What a busy neighbour costs a training step, by the way in which OpenMP waits and the number of threads.

    python benchmarks/threads.py MODEL [--rounds 3] [--seconds 6] [-o benchmarks/threads.json]

Each way is a process of its own, since OpenMP reads its settings when torch is loaded. A process runs forward and
backward passes over four texts of 32 ids, stops until it is asked, and says how many positions it did. All ways are
asked in turn, first without a neighbour, then beside one that is busy on one core with the lowest priority, then beside
one of equal priority. Medians of the rounds count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, str]] = {
    "as torch comes": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "KMP_BLOCKTIME=0": {"KMP_BLOCKTIME": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
NEIGHBOURS = {"none": None, "lowest priority": 19, "equal priority": 0}
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def work(model_path: str) -> None:
    """Wait for a number of seconds on stdin, work as long, and write the positions per second; until stdin ends."""
    import torch

    from vocabext.model.frozen import load_model

    model = load_model(model_path, device="cpu", dtype="float32", runs=False)
    inputs_BTD = model.embed(torch.arange(4 * 32).view(4, 32)).detach().requires_grad_()

    def step() -> None:
        model.hidden(inputs_BTD).square().mean().backward()

    step()
    print("ready", flush=True)
    for line in sys.stdin:
        began, cpu, steps = time.monotonic(), time.process_time(), 0
        while time.monotonic() - began < float(line):
            step()
            steps += 1
        seconds = time.monotonic() - began
        print(json.dumps([steps * 4 * 32 / seconds, (time.process_time() - cpu) / seconds]), flush=True)


def neighbour(priority: int) -> "subprocess.Popen[bytes]":
    """Keep one core busy."""
    return subprocess.Popen([sys.executable, "-c", f"import os; os.nice({priority})\nwhile True: pass"])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask all ways in turn."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    workers = {way: subprocess.Popen([sys.executable, __file__, arguments.model, "--work"], env={**clean, **settings},
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for way, settings in WAYS.items() if way in arguments.ways}
    found: dict[str, dict[str, list[list[float]]]] = {beside: {way: [] for way in workers} for beside in NEIGHBOURS}
    loads = []
    from machine import describe  # torch is loaded while the workers load it
    from torch import device

    described = describe(device("cpu"))
    try:
        for worker in workers.values():
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for _ in range(arguments.rounds):
            loads.append(os.getloadavg()[0])
            for beside, priority in NEIGHBOURS.items():
                busy = None if priority is None else neighbour(priority)
                for way, worker in workers.items():
                    assert worker.stdin is not None
                    assert worker.stdout is not None
                    print(arguments.seconds, file=worker.stdin, flush=True)
                    found[beside][way].append(json.loads(worker.stdout.readline()))
                    rate, cores = found[beside][way][-1]
                    print(f"{beside:16s} {way:28s} {rate:8.0f} positions/s, {cores:.2f} cores", flush=True)
                if busy is not None:
                    busy.kill()
                    busy.wait()
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return {"machine": described, "load_averages": loads, "model": Path(arguments.model).name,
            "seconds": arguments.seconds, "rounds": arguments.rounds, "beside": {
                beside: {way: {"positions_per_second": statistics.median(rate for rate, _ in rates),
                               "cores": statistics.median(cores for _, cores in rates), "rounds": rates}
                         for way, rates in ways.items()} for beside, ways in found.items()}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.model)
        return
    found = measure(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
