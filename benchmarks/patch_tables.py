"""The tables of patch_speed.py, made from its JSON: printed after a run, and written into docs/benchmarks.md.

Measured once, shown in several places: nothing here measures anything.
"""

import statistics
from collections.abc import Sequence
from typing import Any

GIB, MIB = 2**30, 2**20
WAYS = ("start", "cp", "copy", "link", "transformers", "read", "verify", "verify-link", "revert")
SAID = {
    "start": "Python, torch and transformers imported", "cp": "`cp -r`", "copy": "`vocabext patch --link copy`",
    "link": "`vocabext patch` (hard links)", "transformers": "transformers: resize and save",
    "read": "`cat` of all files", "verify": "`vocabext verify --skip-weights`",
    "verify-link": "the same, of hard links", "revert": "`vocabext revert --link copy`"}
WRITING = ("copy", "link", "transformers", "revert")  # what is compared with cp
TEXT = """## Checkpoints

How long it takes to make, prove and undo an expanded checkpoint, next to copying its base. The base has random
weights in the shape of a Llama, a head of its own, and a matrix that must grow. Every line is a process of its own that
begins with a cold cache. *Until on disk* adds the time of a `sync` afterwards: `cp` returns before its bytes are there,
`patch` and `revert` do not. `patch` and `verify` cannot be faster than their imports, which ask the model class for
the names of its tensors. `revert` imports neither torch nor transformers. With links, what is left are the shards that
hold the vocabulary, which are written anew. So *the bar for links* is the imports, and as much of the time of `cp` as
these shards are of the model. What was measured on 2026-11-25 is of a `patch` that wrote weights during its imports;
today's writes them afterwards.
"""
Found = dict[str, Any]


def table(found: Found) -> str:
    """Return the table of one checkpoint: medians over the turns.

    Args:
        found: What `patch_speed.py -o` writes.
    """
    by_way = {way: [run for run in found["runs"] if run["way"] == way] for way in WAYS}
    lines = ["| | seconds (each turn) | until on disk | x `cp` | CPU seconds | peak memory, MiB: anonymous "
             "| resident |", "|---|---|---|---|---|---|---|"]
    for way in (way for way in WAYS if by_way[way]):
        runs = by_way[way]
        synced = _until_on_disk(runs)
        ratio = f"{synced / _until_on_disk(by_way['cp']):.2f}" if way in WRITING and by_way["cp"] else ""
        turns = ", ".join(f"{run['wall_seconds']:.1f}" for run in runs)
        lines.append(f"| {SAID[way]} | {_median(runs, 'wall_seconds'):.1f} ({turns}) "
                     f"| {f'{synced:.1f}' if way in (*WRITING, 'cp') else ''} | {ratio} "
                     f"| {_median(runs, 'cpu_seconds'):.1f} | {_median(runs, 'peak_anonymous_bytes') / MIB:,.0f} "
                     f"| {_median(runs, 'peak_resident_bytes') / MIB:,.0f} |")
        if way == "link" and by_way["start"] and by_way["cp"]:
            copying = _until_on_disk(by_way["cp"])
            share = found["checkpoint"]["rewritten_bytes"] / found["checkpoint"]["bytes"]
            bar = _median(by_way["start"], "wall_seconds") + share * copying
            lines.append(f"| the bar for links | {bar:.1f} | {bar:.1f} | {bar / copying:.2f} |  |  |  |")
    return "\n".join(lines)


def _median(runs: Sequence[Found], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _until_on_disk(runs: Sequence[Found]) -> float:
    return statistics.median(run["wall_seconds"] + run["sync_seconds"] for run in runs)


def title(found: Found) -> str:
    """Return what was patched, where and when, in one line."""
    checkpoint, machine = found["checkpoint"], found["machine"]
    size, rewritten = checkpoint["bytes"] / 1e9, checkpoint["rewritten_bytes"] / 1e9
    memory = machine["memory_bytes"] / GIB
    return (f"{size:.1f} GB in {checkpoint['shards']} shards, {rewritten:.1f} GB of them with vocabulary; "
            f"{checkpoint['new_tokens']:,} new tokens. {machine['processor']}, {machine['cpus']} cores, "
            f"{memory:.0f} GiB of memory, {machine['file_system']}, torch {machine['torch']}, "
            f"transformers {machine['transformers']}, {machine['date']}")


def section(results: Sequence[Found]) -> str:
    """Return the section of docs/benchmarks.md."""
    ordered = sorted(results, key=lambda found: float(found["checkpoint"]["bytes"]))
    parts = (f"{title(found)}:\n\n{table(found)}\n" for found in ordered)
    return "\n".join((TEXT, *parts)).rstrip() + "\n"
