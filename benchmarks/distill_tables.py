"""The tables of distill_reference.py, made from its JSON: printed after a run, and written into docs/benchmarks.md.

Measured once, shown in several places: nothing here measures anything.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 2**20
TIMES = ("seconds", "CPU seconds", "times faster")
MEMORY = ("peak MiB", "beyond the start")
Found = dict[str, Any]
SCRIPT = "python benchmarks/distill_reference.py"
# The JSON files of the section: what each is about, and how it is made.
FILES = {
    "distill_reference.json": ("Against the reference", f"{SCRIPT} -o benchmarks/distill_reference.json"),
    "distill_scale.json": ("5,000 tokens in one go", f"{SCRIPT} --scale 5000 --snippets 8 --ours rounds=1 "
                                                     "-o benchmarks/distill_scale.json"),
    "distill_gpu.json": ("On a GPU", f"{SCRIPT} --random-model 1b -o benchmarks/distill_gpu.json"),
}
INTRODUCTION = """## Distillation

The same tokens and snippets are distilled by the training step of the paper's reference implementation
(`benchmarks/reference_step.py` says how it was read, and that doubts were settled in its favour) and by `distill`, in
processes with the same threads on the same machine. *Hidden error* is the mean squared error of last-layer states on
held-out documents with all new tokens merged, from the first new token of a window on; *gap recovered* is the share of
the way from mean-of-pieces rows to the base, in nats of the same targets. The floor is the teacher once over each text
and the student forward and back, only the layers and positions that count, at the measured peak.
"""


def render(found: Found) -> str:
    """Return the tables of any of the three kinds of result."""
    if "parts" in found:
        return scale(found)
    return comparison(found) if "quality" in found else random_weights(found)


def section(folder: Path) -> str:
    """Return the section of docs/benchmarks.md, made of the JSON files that are there."""
    parts = [INTRODUCTION]
    for name, (title, command) in FILES.items():
        path = folder / name
        if path.is_file():
            parts.append(f"### {title}\n\n`{command}`\n\n{render(json.loads(path.read_text(encoding='utf-8')))}")
        elif name == "distill_gpu.json":
            parts.append(f"### {title}\n\nNot run: no GPU was at hand. `{command}` is the command.\n")
    return "\n".join(parts)


def where(found: Found) -> str:
    """Return the machine and the date in one line."""
    machine = found["machine"]
    return (f"{machine['device']} ({machine['instructions']}), {machine['cpus']} cores, "
            f"{machine['threads']} threads, torch {machine['torch']}, {machine['date']}")


# -- the comparison ---------------------------------------------------------------------------------------------------


def comparison(found: Found) -> str:
    """Return the tables of a comparison on a real model."""
    quality, (reference, ours) = found["quality"], _two(found)
    rows = []
    for name, run in (("base", None), ("mean", None), (reference["name"], reference), (ours["name"], ours)):
        q = quality[name]
        rows.append((name, *(_times(run, reference) if run else ("", "", "")), f"{q['hidden_error']:.4f}",
                     f"{q['relative_error']:.4f}", f"{q['nll_nats']:.4f}", _share(q["gap_recovered"]),
                     f"{q['bits_per_byte']:.4f}", f"{q['bits_per_byte_writing']:.4f}", *_mebibytes(run)))
    options = found["options"]
    title = (f"{found['tokens']} tokens, {found['snippets']:,} snippets, {options['model']}, {where(found)}; held-out: "
             f"{options['max_bytes'] / 1000:.0f} kB of {options['heldout'] or options['corpus']}")
    return "\n".join((
        title, "",
        table(("", *TIMES, "hidden error", "relative", "NLL, nats", "gap recovered", "bits/byte reading",
               "bits/byte writing", *MEMORY), rows),
        f"ours, of {found['tokens']} tokens: {ours['at_start']} keep their start; {ours['left_out']} would be left out "
        f"of a checkpoint, but count here; {ours['shown_per_token']:.1f} snippets shown per token", "",
        curve(found), work(found["work"])))


def _two(found: Found) -> tuple[Found, Found]:
    """Return the whole run of the reference, and the first of ours: its defaults."""
    runs = found["runs"]
    return (max((run for run in runs if run["shown_per_token"] is None), key=lambda run: run["seconds"]),
            next(run for run in runs if run["shown_per_token"] is not None))


def curve(found: Found) -> str:
    """Return error against time for both, and how much faster ours is where both its measures are as good."""
    quality, (reference, _) = found["quality"], _two(found)
    runs = sorted(found["runs"], key=lambda run: (run["shown_per_token"] is not None, run["seconds"]))
    lines = table(("run", "seconds", "CPU seconds", "snippets shown per token", "hidden error", "gap recovered"), [
        (run["name"], f"{run['seconds']:.1f}", f"{run['cpu_seconds']:.1f}",
         "" if run["shown_per_token"] is None else f"{run['shown_per_token']:.1f}",
         f"{quality[run['name']]['hidden_error']:.4f}", _share(quality[run["name"]]["gap_recovered"]))
        for run in runs])
    wanted = quality[reference["name"]]
    reached = [run for run in runs if run["shown_per_token"] is not None
               and quality[run["name"]]["hidden_error"] <= wanted["hidden_error"]
               and (quality[run["name"]]["gap_recovered"] or 0) >= (wanted["gap_recovered"] or 0)]
    if not reached:
        return f"{lines}no run of ours reached both the reference's error and its gap\n"
    fastest = min(reached, key=lambda run: run["seconds"])
    return (f"{lines}at equal or lower error and equal or larger gap: {fastest['name']}, "
            f"{reference['seconds'] / fastest['seconds']:.1f} times as fast as the reference\n")


def work(found: Found) -> str:
    """Return what the matrix units did of what they can, and where our time goes."""
    rows = []
    for who in ("reference", "ours"):
        w = found[who]
        rate, peak, own = (w[key] / 1e9 for key in ("body_flops_per_second", "peak_flops_per_second",
                                                    "peak_at_model_shape_flops_per_second"))
        floor = w["floor_teacher_flops"] + w["floor_student_flops"]
        rows.append((who, w["dtype"], f"{w['seconds']:.1f}", f"{w['body_flops'] / 1e12:.3f}",
                     f"{w['other_flops'] / 1e12:.3f}", f"{rate:,.0f}", f"{peak:,.0f}", f"{rate / peak:.1%}",
                     f"{own:,.0f}", f"{floor / 1e12:.3f}", f"{w['floor_seconds']:.2f}",
                     f"{w['seconds'] / w['floor_seconds']:.1f}"))
    w = found["ours"]
    peak, own = w["peak_flops_per_second"], w["peak_at_model_shape_flops_per_second"]
    return table(("", "dtype", "seconds", "layers, TFLOP", "other products, TFLOP", "layers, GFLOP/s", "peak GFLOP/s",
                  "of peak", "peak at the model's shape", "floor, TFLOP", "floor, s at peak", "time / floor"), rows,
    ) + "\n" + table(("where our time goes", "seconds"), [
        ("the floor, at peak", f"{w['floor_seconds']:.2f}"),
        ("work in the layers beyond the floor, at peak", f"{w['body_flops'] / peak - w['floor_seconds']:.2f}"),
        ("products of the model's shape slower than the peak", f"{w['body_flops'] / own - w['body_flops'] / peak:.2f}"),
        ("other products, at peak", f"{w['other_flops'] / peak:.2f}"),
        ("everything else: element-wise work, indexing, starting operations, waiting",
         f"{w['seconds'] - w['body_flops'] / own - w['other_flops'] / peak:.2f}")])


def random_weights(found: Found) -> str:
    """Return the tables of a comparison on random weights."""
    (reference, ours), options = _two(found), found["options"]
    return "\n".join((
        f"{found['tokens']} tokens, {found['snippets']:,} snippets, Llama {options['random_model']} with random "
        f"weights, {where(found)}", "",
        table(("", *TIMES, "new tokens/s", "snippets/s", "MFU", *MEMORY), [
            (run["name"], *_times(run, reference), f"{found['tokens'] / run['seconds']:.1f}",
             f"{found['snippets'] / run['seconds']:,.0f}",
             f"{found['work'][who]['floor_seconds'] / run['seconds']:.1%}", *_mebibytes(run))
            for who, run in (("reference", reference), ("ours", ours))]),
        work(found["work"])))


def scale(found: Found) -> str:
    """Return time and memory of a long run, part by part."""
    unit = "tokens" if "tokens" in found["parts"][0] else "snippets"  # those are of an older run
    return "\n".join((
        f"{found['tokens']:,} tokens, {found['snippets']:,} snippets in {found['seconds']:.1f} s (CPU "
        f"{found['cpu_seconds']:.1f} s), {where(found)}; {found['before_bytes'] / MIB:,.0f} MiB in use before", "",
        table(("part", unit, "seconds", "CPU seconds", f"CPU seconds per {unit[:-1]}", "peak MiB"), [
            (part["stage"], f"{part[unit]:,}", f"{part['seconds']:.1f}", f"{part['cpu_seconds']:.1f}",
             f"{part['cpu_seconds'] / part[unit]:.4f}" if part[unit] else "",
             f"{part['peak_bytes'] / MIB:,.0f}")
            for part in found["parts"]])))


# -- markdown ---------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join((*lines, *("| " + " | ".join(row) + " |" for row in rows), ""))


def _mebibytes(run: Found | None) -> tuple[str, str]:
    if run is None or run["peak_bytes"] is None:
        return "", ""
    return f"{run['peak_bytes'] / MIB:,.0f}", f"{(run['peak_bytes'] - run['before_bytes']) / MIB:,.0f}"


def _times(run: Found, reference: Found) -> tuple[str, str, str]:
    return f"{run['seconds']:.1f}", f"{run['cpu_seconds']:.1f}", f"{reference['seconds'] / run['seconds']:.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
