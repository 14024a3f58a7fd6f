"""How a healed model reads and writes, against its base and against its rows alone.

    vocabext mine medquad.jsonl.gz --model biomed-13m --budget 500 -o candidates.jsonl
    vocabext collect candidates.jsonl --corpus medquad.jsonl.gz -o snippets.jsonl
    vocabext distill snippets.jsonl --model biomed-13m -o rows.safetensors
    vocabext patch rows.safetensors --model biomed-13m -o expanded
    vocabext heal expanded --against biomed-13m --corpus medquad.jsonl.gz --general wikitext.valid.jsonl -o healed
    python benchmarks/heal.py expanded healed --model biomed-13m --heldout medquad.heldout.jsonl.gz
        --general wikitext.test.jsonl [--windows 24] [--prompts 200] [--json benchmarks/heal.json]

On windows of held-out text, after every expanded id:

- `kl`: KL(base || model) of the next piece, new tokens counted by their first piece.
- `on_top`: where the text has a new token, the share at which it is on top; for the base, that all of its run is.
  For the oracle, the base's own exact distribution over units, that it is the likeliest of these.
- `wrong`: the share of all places at which a new token is on top that the base's own exact distribution over units (the
  probability of each run, less that of the runs that go on from it) would not put there.
- `drift`: the first of these on general text, in base ids and in expanded ids.

`eval` measures the rest: bits per byte, characters per step, and how likely the base finds what was written.

Shape suffixes: T positions, P places, N new tokens, V base ids, R runs.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe
from sections import put_section

from vocabext.api.model import Expanded, Model
from vocabext.checkpoint.folder import open_checkpoint, read_json
from vocabext.corpus import Document, read_documents
from vocabext.files.atomic import write_json
from vocabext.heal.text import windows_of
from vocabext.model.adapter import load_adapter
from vocabext.model.first_pieces import first_piece_logs
from vocabext.model.frozen import FrozenModel, load_model
from vocabext.model.places import find_places
from vocabext.model.run_tree import RunTree
from vocabext.tokens import Expansion, Ids

WINDOW = 192
BEGINNING, PROMPT = 300, 64  # characters of documents that are continued, and twice the ids of a prompt
ABLATIONS = Path(__file__).parent / "heal_ablations.json"
LIKELY = 0.01  # runs that the base finds less likely are never its likeliest unit


@dataclass
class Arm:
    """Rows and the body that they belong to.

    Attributes:
        input_ND: Input rows.
        output_ND: Output rows.
        switch: Puts the model into that body.
    """

    input_ND: torch.Tensor
    output_ND: torch.Tensor
    switch: Callable[[], AbstractContextManager[Any]]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expanded", type=Path)
    parser.add_argument("healed", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--general", required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-bytes", type=int, default=60_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="Markdown file whose section is written anew")
    arguments = parser.parse_args()
    result = run(arguments)
    for part in ("arms", "written"):
        for name, value in result[part].items():
            sys.stdout.write(f"{part}, {name}: {value}\n")
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.docs:
        put_section(arguments.docs, as_markdown(result, ABLATIONS))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return everything that is published."""
    healed = Expanded(arguments.healed, Model(arguments.model))
    model = load_model(arguments.model, device="cpu", dtype="float32")
    adapter = load_adapter(model, arguments.healed / "adapter")
    adapter.disable_adapter_layers()

    class On:
        def __enter__(self) -> None:
            adapter.enable_adapter_layers()

        def __exit__(self, *_: object) -> None:
            adapter.disable_adapter_layers()

    arms = {"rows": Arm(*_rows(arguments.expanded, healed.expansion), nullcontext),
            "healed": Arm(*_rows(arguments.healed, healed.expansion), On)}
    windows, general = (load_windows(path, healed, arguments.windows)
                        for path in (arguments.heldout, arguments.general))
    bench = Bench(model, healed.expansion)
    oracle = [bench.oracle(window, len(healed.base.tokenizer.prefix_ids)) for window in windows]
    found: dict[str, Any] = {"base": {"on_top": bench.base_on_top(windows)},
                             "oracle": {"on_top": bench.oracle_on_top(windows, oracle)}}
    for name, arm in arms.items():
        found[name] = {**bench.at_windows(arm, windows, oracle),
                       "drift": bench.kl(arm, healed.expansion.unmerge_batch(general)),
                       "drift_expanded": bench.kl(arm, general)}
    result = healed.evaluate(arguments.heldout, prompts=0, max_bytes=arguments.max_bytes, dtype="float32").to_json()
    beginnings = [Document(d.name, d.text[:BEGINNING]) for d in read_documents([arguments.heldout])]
    free = healed.evaluate(beginnings[: 2 * arguments.prompts], prompts=arguments.prompts, context=PROMPT,
                           max_bytes=BEGINNING * 2 * arguments.prompts, dtype="float32").to_json()
    report = read_json(arguments.healed / "heal.json")
    return {"machine": describe(model.device), "windows": len(windows), "window": WINDOW, "tokens": len(healed.tokens),
            "heal": {key: report.get(key) for key in (
                "options", "steps", "seconds", "cpu_seconds", "curve", "kept_step")},
            "arms": found, "reading": result["rows"], "written": _written(free), "shorter": result["shorter"]}


def _rows(folder: Path, expansion: Expansion) -> tuple[torch.Tensor, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    new = slice(expansion.first_new_id, expansion.end_id)
    names = checkpoint.vocab_tensors
    return checkpoint.read(names[0])[new].float(), checkpoint.read(names[-1])[new].float()


def load_windows(path: str, healed: Expanded, count: int) -> list[Ids]:
    """Return windows of text, from documents in random order."""
    texts = [document.text for document in read_documents([path])]
    random.Random(0).shuffle(texts)
    return windows_of(texts, healed.tokenizer, healed.base.tokenizer.prefix_ids, WINDOW, count)


def _written(result: dict[str, Any]) -> dict[str, Any]:
    """Return what `eval` says about free writing, without the examples."""
    writing = result["writing"]
    return {"base": writing["base"], **{row["name"]: {
        **{key: value for key, value in row["greedy"].items() if key != "examples"},
        "kl_nats_per_piece": row["sampling"]["kl_nats_per_piece"],
        "base_nats_ratio": row["greedy"]["base_nats_per_character"] / writing["base"]["base_nats_per_character"]}
        for row in writing["rows"]}}


class Bench:
    """The base, and what it would write."""

    def __init__(self, model: FrozenModel, expansion: Expansion, teacher: FrozenModel | None = None) -> None:
        """Take the model.

        Args:
            model: The base, or the healed model.
            expansion: The new tokens.
            teacher: The base, if it is another.
        """
        self.model, self.expansion, self.tree = model, expansion, RunTree.of(expansion.tokens)
        self.teacher = teacher or model
        self.first_N = torch.tensor([token.run[0] for token in expansion.tokens])

    @torch.no_grad()
    def logits(self, ids: Ids, arm: Arm | None = None) -> torch.Tensor:
        """Return the logits after every id; of an arm with those of the new tokens behind, (T, V + N)."""
        first, inputs = self.expansion.first_new_id, torch.from_numpy(ids)[None]
        if arm is None:
            return self.teacher.logits(self.teacher.hidden(self.teacher.embed(inputs))[0], first_new_id=first)
        with arm.switch():
            hidden_TD = self.model.hidden(self.model.embed(inputs, arm.input_ND, first))[0]
        return self.model.logits(hidden_TD, first_new_id=first, new_rows_ND=arm.output_ND)

    def _kl(self, window: Ids, logits_TU: torch.Tensor) -> torch.Tensor:
        base_TV = self.logits(self.expansion.unmerge(window))[torch.from_numpy(self.expansion.last_positions(window))]
        return torch.nn.functional.kl_div(first_piece_logs(logits_TU, self.first_N), torch.log_softmax(base_TV, 1),
                                          log_target=True, reduction="none").sum(1)

    def kl(self, arm: Arm, windows: Sequence[Ids]) -> float:
        """Return the mean divergence from the base after every id."""
        return float(torch.cat([self._kl(window, self.logits(window, arm)) for window in windows]).mean())

    def at_windows(self, arm: Arm, windows: Sequence[Ids], oracle: Sequence[torch.Tensor]) -> dict[str, float]:
        """Return divergence, on top and wrong."""
        nats, right, new, wrong, places, written = list[torch.Tensor](), 0, 0, 0, 0, 0.0
        for window, unit_T in zip(windows, oracle, strict=True):
            logits_TU = self.logits(window, arm)
            nats.append(self._kl(window, logits_TU))
            top_T, following = logits_TU.argmax(1), torch.from_numpy(window[1:])
            is_new = following >= self.expansion.first_new_id
            right, new = right + int((top_T[:-1] == following)[is_new].sum()), new + int(is_new.sum())
            written += float(torch.nn.functional.cross_entropy(logits_TU[:-1], following, reduction="sum"))
            known = unit_T >= 0
            wrong += int(((top_T >= self.expansion.first_new_id) & (top_T != unit_T) & known).sum())
            places += int(known.sum())
        return {"kl": float(torch.cat(nats).mean()), "on_top": right / new, "wrong": wrong / places,
                "written_nats": written / sum(len(window) - 1 for window in windows)}

    def base_on_top(self, windows: Sequence[Ids]) -> float:
        """Return where the text has a new token, how often each of its pieces is the base's likeliest."""
        right, new = 0, 0
        for window in windows:
            base = self.expansion.unmerge(window)
            hit = self.logits(base).argmax(1)[:-1] == torch.from_numpy(base[1:])
            edges = self.expansion.edges(window)
            for at in self.expansion.is_new(window).nonzero()[0].tolist():
                right, new = right + bool(hit[edges[at] - 1 : edges[at + 1] - 1].all()), new + 1
        return right / new

    def oracle_on_top(self, windows: Sequence[Ids], oracle: Sequence[torch.Tensor]) -> float:
        """Return where the text has a new token, how often it is the base's likeliest unit."""
        following = torch.cat([torch.from_numpy(window[1:]) for window in windows])
        is_new = following >= self.expansion.first_new_id
        return float((torch.cat([unit_T[:-1] for unit_T in oracle]) == following)[is_new].float().mean())

    def oracle(self, window: Ids, num_prefix: int) -> torch.Tensor:
        """Return the likeliest unit after every id by the base's own distribution, (T,); -1 where it is not known."""
        base, first_new = self.expansion.unmerge(window), self.expansion.first_new_id
        found = find_places(self.model, [base], self.tree, first_new_id=first_new, likely=LIKELY,
                            first=max(0, num_prefix - 1))
        run_PN = torch.zeros(len(found), self.expansion.num_new)
        run_PN[found.place_R, found.token_R] = found.log_p_R.exp()
        own_PN = run_PN.clone()
        for token, longer in enumerate(self._going_on()):
            if longer:
                own_PN[:, token] -= run_PN[:, longer].sum(1)
        piece_PV = torch.softmax(self.logits(base)[found.position_P], 1)
        piece_PV.index_add_(1, self.first_N, -own_PN.clamp(min=0))
        unit_P = torch.cat((piece_PV, own_PN), 1).argmax(1)
        unit_Q = torch.full((len(base),), -1)
        unit_Q[found.position_P] = unit_P
        return unit_Q[torch.from_numpy(self.expansion.last_positions(window))]

    def _going_on(self) -> list[list[int]]:
        """Return for each token the next longer ones whose runs begin with its own."""
        runs = {token.run: number for number, token in enumerate(self.expansion.tokens)}
        found: list[list[int]] = [[] for _ in runs]
        for run, number in runs.items():
            shorter = next((runs[run[:size]] for size in range(len(run) - 1, 1, -1) if run[:size] in runs), None)
            if shorter is not None:
                found[shorter].append(number)
        return found


def as_markdown(result: dict[str, Any], ablations: Path) -> str:
    """Return the section for the docs."""
    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|",
                          *("| " + " | ".join(row) + " |" for row in rows)])

    arms, reading = result["arms"], {row["name"]: row for row in result["reading"]}
    written, options = result["written"], result["heal"]["options"]
    base = written["base"]

    def ratio(name: str) -> str:
        low, high = written[name]["base_nats_ratio_interval"]
        return f"{written[name]['base_nats_ratio']:.2f} ({low:.2f} to {high:.2f})"

    lines = [
        ("KL per expanded id, nats", "0", *(f"{arms[arm]['kl']:.3f}" for arm in ("rows", "healed"))),
        ("bits per byte as written", *(f"{reading[name]['bits_per_byte_writing']:.3f}"
                                       for name in ("base", "distilled", "healed"))),
        ("a new token on top where the text has it (base: all of its run)",
         *(f"{arms[arm]['on_top']:.3f}" for arm in ("base", "rows", "healed"))),
        ("a new token on top that the base's likeliest unit is not", "0",
         *(f"{arms[arm]['wrong']:.1%}" for arm in ("rows", "healed"))),
        ("characters per decode step", f"{base['characters_per_step']:.2f}",
         *(f"{written[name]['characters_per_step']:.2f}" for name in ("distilled", "healed"))),
        ("base's nats per character of the greedy text, relative to its own", "1", ratio("distilled"), ratio("healed")),
        ("drift on general text, nats per piece", "0", *(f"{arms[arm]['drift']:.4f}" for arm in ("rows", "healed"))),
    ]
    parts = [
        "## Healing",
        f"`python benchmarks/heal.py`: {result['tokens']} new tokens, {options['text']:,} expanded ids of text, rank "
        f"{options['rank']}, {result['windows']} held-out windows of {result['window']} ids, greedy text after "
        f"{base['prompts']} held-out prompts (95 % intervals over prompts). The general text that the drift is "
        "measured on is the test part of WikiText-2; its validation part was trained on. The base's own likeliest "
        f"unit is the token of the text at {arms['oracle']['on_top']:.3f} of the places that have one.",
        table(("held-out text", "base", "rows alone", "healed"), lines)]
    if ablations.is_file():
        found = read_json(ablations)
        parts += [
            f"`python benchmarks/heal_ablations.py`: each with {found['text']:,} ids of text, without general text; "
            f"{found['windows']} held-out windows.",
            table(("setting", "KL, nats", "nats per id as written", "on top", "not the likeliest unit", "processor s"),
                  [(name, f"{one['kl']:.3f}", f"{one['written_nats']:.3f}", f"{one['on_top']:.3f}",
                    f"{one['wrong']:.1%}", f"{one['cpu_seconds']:.0f}") for name, one in found["settings"].items()])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
