"""How well new tokens are written: our fit, prior ways of making output rows, ablations, and the limit of it all.

    vocabext mine medquad.jsonl.gz --model biomed-13m --budget 500 -o candidates.jsonl
    vocabext collect candidates.jsonl --corpus medquad.jsonl.gz -o snippets.jsonl
    vocabext distill snippets.jsonl --model biomed-13m -o rows.safetensors
    python benchmarks/writing.py snippets.jsonl rows.safetensors --model biomed-13m --heldout medquad.heldout.jsonl.gz
        [--places 200] [--heldout-places 30000] [--json benchmarks/writing.json] [--docs docs/benchmarks.md]

Places are those of `vocabext.model.places`: deserved is where base's own greedy continuation writes the whole run
of a new token. `adopted` is the share of these at which such a token is on top; `wrong` the share of all places at
which a new token is on top and base writes something else; `at 1 %` moves the base's best logit by one number so that
exactly 1 % of places are wrong, which compares ways at the same fidelity. The base's weights are never changed.

The limits: `run probability` writes the run that base itself finds most likely wherever that exceeds a threshold, which
no row can know better; `network on the state` is a network of one hidden layer in place of rows, on the same states.

Shape suffixes: P places, N new tokens, D hidden size, I places of one step.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from sections import put_section

from vocabext.checkpoint.folder import Rows, load_rows
from vocabext.checkpoint.rows import mean_rows
from vocabext.corpus import read_documents
from vocabext.distill.output_rows.fit import DECAY, OutputFit, Targets, longest_runs
from vocabext.distill.output_rows.stage import silent_row
from vocabext.evaluate.held_out import HeldOut, measure_held_out
from vocabext.files.atomic import write_json
from vocabext.files.jsonl import read_jsonl
from vocabext.model.frozen import FrozenModel, load_model
from vocabext.model.places import Places, find_places
from vocabext.model.run_tree import RunTree
from vocabext.model.writing import find_uses, measure_writing
from vocabext.progress import no_progress
from vocabext.tokenizer import extend, load_tokenizer
from vocabext.tokens import Expansion, Ids, TokenSnippets

CONTEXT = 256
WRONG = 0.01
EPOCHS = 6.0
CAUTIONS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
LIKELY = 0.05  # runs below it are not followed unless greedy decoding writes them


@dataclass
class Bench:
    """Everything that is tried on the same places."""

    model: FrozenModel
    expansion: Expansion
    lengths_N: torch.Tensor
    train: Places
    next_P: torch.Tensor
    held: Places

    @property
    def num_new(self) -> int:
        """How many rows."""
        return self.expansion.num_new

    def measure(self, rows_ND: torch.Tensor) -> dict[str, Any]:
        """Measure rows at held-out places, as they are and at 1 % wrong."""
        uses = find_uses(self.held, rows_ND, self.model.logit_map)
        found = measure_writing(self.held, uses, self.lengths_N)
        return {"adoption": found.adoption, "wrong": found.false_use, "nll_rise_nats": found.nll_rise_nats,
                "pieces": found.adopted_pieces / max(1, found.adoptable_pieces),
                "adoption_at_1_percent": adoption_at(uses.ahead_P, uses.right_P, uses.deserved_P)}

    def fit(self, kind: type[OutputFit] | None = None, places: Places | None = None, caution: float = 1.0
            ) -> torch.Tensor:
        """Fit rows in some way."""
        places = self.train if places is None else places
        targets = Targets(places, longest_runs(places, self.lengths_N), self.model.logit_map)
        fit = (kind or OutputFit)(targets, self.num_new, self.model.device)
        fit.train(EPOCHS, caution)
        return fit.rows_ND.cpu()


def adoption_at(ahead_P: torch.Tensor, right_P: torch.Tensor, deserved_P: torch.Tensor) -> float:
    """Return the share of deserved places that are written if the threshold lets 1 % of all places be wrong."""
    order = torch.argsort(-ahead_P)
    allowed = (~right_P[order]).float().cumsum(0) <= WRONG * len(ahead_P)
    return float((right_P[order] & allowed).sum() / deserved_P.sum())


# -- other ways ---------------------------------------------------------------------------------------------------

def weighted_mean(head_VD: torch.Tensor, tokens: Sequence[Any], weight: Callable[[int, int], float]) -> torch.Tensor:
    """Return means of pieces, each with a weight that depends on its place and id."""
    rows = []
    for token in tokens:
        weights = torch.tensor([weight(at, piece) for at, piece in enumerate(token.run)])
        rows.append((weights[:, None] * head_VD[list(token.run)].float()).sum(0) / weights.sum())
    return torch.stack(rows)


def next_token_rows(bench: Bench, start_ND: torch.Tensor, epochs: float = 6.0, rate: float = 1e-3) -> torch.Tensor:
    """Train output rows with AdamW to predict the next id of the expanded text; everything else is frozen."""
    rows_ND = start_ND.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([rows_ND], lr=rate)
    at_P = (bench.next_P >= 0).nonzero().flatten()
    generator, batch = torch.Generator().manual_seed(0), 1024
    steps = int(epochs * len(at_P) / batch)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        at_I = at_P[torch.randint(len(at_P), (batch,), generator=generator)]
        logits_IN = bench.train.hidden_PD[at_I].float() @ rows_ND.T
        every_I = torch.logaddexp(logits_IN.logsumexp(1), bench.train.normaliser_P[at_I])
        new_I = bench.next_P[at_I] < bench.num_new
        chosen_I = logits_IN.gather(1, bench.next_P[at_I].clamp(max=bench.num_new - 1)[:, None])[:, 0]
        loss = (every_I - torch.where(new_I, chosen_I, torch.zeros_like(chosen_I))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rows_ND.detach()


class AnyRight(OutputFit):
    """Labels: any token whose run base writes, not the longest."""

    def _loss(self, white_ND: torch.Tensor, at: torch.Tensor, caution: float) -> torch.Tensor:
        right_IN = self.right_in(at, len(white_ND))
        scores_IN = self.targets.scores(self.unwhitened(white_ND), at)
        base_I = self.targets.places.top_P[at]
        every_I = torch.logaddexp(scores_IN.logsumexp(1), base_I)
        some_I = right_IN.any(1)
        good_I = scores_IN.masked_fill(~right_IN, -1e9).logsumexp(1)
        return torch.where(some_I, every_I - good_I, caution * (every_I - base_I)).mean()

    def right_in(self, at: torch.Tensor, num_new: int) -> torch.Tensor:
        """Tell which tokens base writes at some places, (I, N)."""
        places = self.targets.places
        if not hasattr(self, "_right_PN"):
            self._right_PN = torch.zeros(len(places), num_new, dtype=torch.bool)
            self._right_PN[places.place_R[places.greedy_R], places.token_R[places.greedy_R]] = True
        return self._right_PN[at]


class Soft(OutputFit):
    """Labels: the probability that base gives to each run, next to all base tokens."""

    def _loss(self, white_ND: torch.Tensor, at: torch.Tensor, caution: float) -> torch.Tensor:
        places = self.targets.places
        if not hasattr(self, "_share_PN"):
            self._share_PN = torch.zeros(len(places), len(white_ND), dtype=torch.float16)
            self._share_PN[places.place_R, places.token_R] = places.log_p_R.exp().half()
        share_IN = self._share_PN[at].float()
        share_IN = share_IN / share_IN.sum(1, keepdim=True).clamp(min=1.0)  # runs inside each other add up to more
        scores_IN = self.targets.scores(self.unwhitened(white_ND), at)
        base_I = places.normaliser_P[at]
        every_I = torch.logaddexp(scores_IN.logsumexp(1), base_I)
        loss_I = every_I - (share_IN * scores_IN).sum(1) - (1 - share_IN.sum(1)) * base_I
        return loss_I.mean()


def with_margin(margin: float) -> type[OutputFit]:
    """Labels as in ours, against a base logit that is higher by a margin."""

    class Margin(OutputFit):
        def _loss(self, white_ND: torch.Tensor, at: torch.Tensor, caution: float) -> torch.Tensor:
            scores_IN = self.targets.scores(self.unwhitened(white_ND), at)
            every = torch.cat((scores_IN, self.targets.places.top_P[at][:, None] + margin), 1)
            label_I = self.targets.label_P[at]
            loss_I = torch.nn.functional.cross_entropy(every, label_I, reduction="none")
            return (loss_I * torch.where(label_I < len(white_ND), 1.0, caution)).mean()

    return Margin


def with_decay(decay: float) -> type[OutputFit]:
    """Ours with another weight of the squared rows."""

    class Decay(OutputFit):
        def _loss(self, white_ND: torch.Tensor, at: torch.Tensor, caution: float) -> torch.Tensor:
            return super()._loss(white_ND, at, caution) + (decay - DECAY) * white_ND.square().sum()

    return Decay


def low_rank(rows_ND: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the nearest rows of a rank."""
    left, size, right = torch.linalg.svd(rows_ND, full_matrices=False)
    return left[:, :rank] * size[:rank] @ right[:rank]


def first_windows(places: Places, share: float) -> Places:
    """Return the places of a share of the windows."""
    kept_P = places.window_P < share * (int(places.window_P.max()) + 1)
    number_P = kept_P.cumsum(0) - 1
    kept_R = kept_P[places.place_R]
    return Places(**{name: value[kept_R] if name.endswith("_R") else value[kept_P]
                     for name, value in vars(places).items() if name not in ("place_R", "num_windows")},
                  place_R=number_P[places.place_R[kept_R]], num_windows=places.num_windows)


# -- limits -------------------------------------------------------------------------------------------------------

def run_probability(places: Places) -> dict[str, float]:
    """Return what the teacher's own probability of the likeliest run adopts: calibrated, and at 1 % wrong."""
    best_P = torch.zeros(len(places)).scatter_reduce_(0, places.place_R, places.log_p_R.exp(), "amax")
    deserved_P = torch.zeros(len(places), dtype=torch.bool)
    deserved_P[places.place_R[places.greedy_R]] = True
    # The token with a share p of the softmax beats the first piece if p / (1 - p) exceeds that piece's probability.
    on_P = best_P > (1 - best_P) * (places.top_P - places.normaliser_P).exp()
    return {"adoption": float((on_P & deserved_P).sum() / deserved_P.sum()),
            "wrong": float((on_P & ~deserved_P).float().mean()),
            "adoption_at_1_percent": adoption_at(best_P, deserved_P, deserved_P)}


def network(bench: Bench, steps: int = 300, hidden: int = 512) -> dict[str, float]:
    """Return what a network on the frozen states adopts at 1 % wrong: more than linear, and no rows at all."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(bench.train.hidden_PD.shape[1], hidden), torch.nn.GELU(),
                                 torch.nn.Linear(hidden, bench.num_new + 1))
    optimizer = torch.optim.Adam(layers.parameters(), lr=2e-3)
    label_P = longest_runs(bench.train, bench.lengths_N)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        at_I = torch.randint(len(bench.train), (2048,))
        loss = torch.nn.functional.cross_entropy(layers(bench.train.hidden_PD[at_I].float()), label_P[at_I])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = torch.cat([layers(part_PD.float()) for part_PD in bench.held.hidden_PD.split(8192)])
    ahead_P, token_P = scores[:, :-1].max(1)
    greedy = bench.held.place_R[bench.held.greedy_R] * bench.num_new + bench.held.token_R[bench.held.greedy_R]
    right_P = torch.isin(torch.arange(len(bench.held)) * bench.num_new + token_P, greedy)
    deserved_P = torch.zeros(len(bench.held), dtype=torch.bool)
    deserved_P[bench.held.place_R[bench.held.greedy_R]] = True
    return {"adoption_at_1_percent": adoption_at(ahead_P - scores[:, -1], right_P, deserved_P)}


# -- the run ------------------------------------------------------------------------------------------------------

def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snippets", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--places", type=int, default=200, help="base ids of snippets per token")
    parser.add_argument("--heldout-places", type=int, default=30_000)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="Markdown file whose section is written anew")
    arguments = parser.parse_args()
    result = run(arguments)
    text = as_markdown(result)
    sys.stdout.write(text + "\n")
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.docs:
        put_section(arguments.docs, text)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return everything that is published."""
    torch.manual_seed(0)
    _, lines = read_jsonl(arguments.snippets, ("snippets",))
    tokens, given, header = load_rows(arguments.rows)
    if given.output_ND is None or (header.get("writing") or {}).get("kind") != "fit":
        raise SystemExit(f"{arguments.rows} has no fitted output rows; distill with --output-rows fit")
    fitted = header["writing"]
    by_run = {record.new_token.run: record for record in map(TokenSnippets.from_json, lines)}
    records = [by_run[token.run] for token in tokens]
    base, model = load_tokenizer(arguments.model), load_model(arguments.model, dtype="float32")
    expanded = extend(base, tokens)
    say(f"{len(tokens)} tokens; reading places")
    all_records = list(by_run.values())
    expansion = Expansion([record.new_token for record in all_records], base.first_new_id)
    bench = _bench(records, arguments, base, model, expanded, expansion, base.prefix_ids)
    lengths_N, head_VD = bench.lengths_N, model.head_VD
    mean_ND = mean_rows(head_VD, tokens)
    texts = {piece: len(base.decode([piece]).strip()) or 1 for token in tokens for piece in token.run}
    silent_D, leak, _ = silent_row(head_VD, [bench.train], base.first_new_id, model.logit_map)
    ways = {
        "ours (default)": given.output_ND,
        "zero": torch.zeros_like(mean_ND),
        "mean of pieces": mean_ND,
        "front-weighted mean (1, 1/2, 1/4, ...)": weighted_mean(head_VD, tokens, lambda at, _: 0.5**at),
        "length-weighted mean (characters)": weighted_mean(head_VD, tokens, lambda _, piece: float(texts[piece])),
        "first piece": torch.stack([head_VD[token.run[0]].float() for token in tokens]),
        "input row (tied)": given.input_ND,
        "next-token training, AdamW": next_token_rows(bench, mean_ND),
    }
    rows = {name: bench.measure(rows_ND) for name, rows_ND in ways.items()}
    say("ablations")
    plain_ND = bench.fit(caution=2.0)
    ablations = {"longest run, caution 2": bench.measure(plain_ND),
                 "labels: any right token": bench.measure(bench.fit(AnyRight, caution=2.0)),
                 "labels: base's run probability (soft)": bench.measure(bench.fit(Soft)),
                 "margin 1": bench.measure(bench.fit(with_margin(1.0), caution=2.0)),
                 "decay 1e-5": bench.measure(bench.fit(with_decay(1e-5), caution=2.0)),
                 "decay 1e-4": bench.measure(bench.fit(with_decay(1e-4), caution=2.0)),
                 "rank 64": bench.measure(low_rank(plain_ND, 64)),
                 "half of the text": bench.measure(bench.fit(places=first_windows(bench.train, 0.5), caution=2.0)),
                 "quarter of the text": bench.measure(bench.fit(places=first_windows(bench.train, 0.25), caution=2.0)),
                 "half of the places that deserve nothing": bench.measure(
                     bench.fit(places=fewer(bench.train, lengths_N), caution=2.0))}
    curve = {str(c): bench.measure(plain_ND if c == 2.0 else bench.fit(caution=c)) for c in CAUTIONS}
    limits = {"run probability": run_probability(bench.held), "network on the state": network(bench)}
    say("free writing")
    free = _free(bench, arguments, base, expanded, given, ways)
    leaks = {name: largest_share(bench.held, rows_ND) for name, rows_ND in (
        ("zero row", torch.zeros(1, mean_ND.shape[1])), ("mean of pieces", mean_ND),
        ("silent row (mean of the two least likely base rows)", silent_D[None]),
        ("row fitted to be unlikely", fitted_silence(bench)[None]), ("input row (tied)", given.input_ND))}
    deserved = int(torch.unique(bench.held.place_R[bench.held.greedy_R]).numel())
    return {"machine": describe(model.device), "tokens": len(tokens), "places": len(bench.train),
            "held_out_places": len(bench.held), "deserved": deserved,
            "silent": len(fitted["silent"]), "written": fitted["written"], "caution": fitted["caution"],
            "own_held_out": fitted["held_out"],
            "rows": rows, "curve": curve, "ablations": ablations, "limits": limits, "free": free, "leaks": leaks,
            "silent_row_leak_when_fitted": leak,
            "wall_seconds": {"reading": fitted["read_seconds"], "fit": fitted["fit_seconds"]}}


def _bench(
    records: Sequence[TokenSnippets], arguments: argparse.Namespace, base: Any, model: FrozenModel, expanded: Any,
    expansion: Expansion, prefix_ids: Sequence[int],
) -> Bench:
    prefix = np.asarray(prefix_ids, np.int64)
    own = expanded.expansion
    tree, windows, merged = RunTree.of(own.tokens), list[Ids](), list[Ids]()
    for record in records:
        wanted = arguments.places
        for snippet, ids in zip(record.snippets, expansion.unmerge_batch(record.snippets), strict=True):
            windows.append(np.concatenate((prefix, ids)))
            merged.append(np.concatenate((prefix, np.asarray(snippet, np.int64))))
            wanted -= len(ids)
            if wanted <= 0:
                break
    order = np.random.default_rng(0).permutation(len(windows))
    windows, merged = [windows[i] for i in order], [merged[i] for i in order]
    first = max(0, len(prefix) - 1)
    train = find_places(model, windows, tree, first_new_id=base.first_new_id, likely=LIKELY, first=first)
    number = {record.new_token.run: i for i, record in enumerate(records)}
    next_P = _next_ids(train, merged, expansion, number)
    held_windows, size = list[Ids](), 0
    for document in read_documents([arguments.heldout]):
        ids = np.asarray(base.encode(document.text)[:CONTEXT], np.int64)
        if len(ids) > 8 and size < arguments.heldout_places:
            held_windows.append(np.concatenate((prefix, ids)))
            size += len(ids)
    held = find_places(model, held_windows, tree, first_new_id=base.first_new_id, likely=LIKELY, first=first)
    return Bench(model, own, torch.tensor([len(t.run) for t in own.tokens]), train, next_P, held)


def _next_ids(places: Places, merged: Sequence[Ids], expansion: Expansion, number: dict[tuple[int, ...], int]
              ) -> torch.Tensor:
    """Return for each place the new token that the expanded text has there, N for a base id, -1 for inside of a run."""
    following = []
    for ids in merged:
        found = np.full(int(expansion.run_lengths(ids).sum()), -1)
        for at, token_id in zip(expansion.last_positions(ids)[:-1], ids[1:], strict=True):
            is_new = token_id >= expansion.first_new_id
            run = expansion.tokens[token_id - expansion.first_new_id].run if is_new else ()
            found[at] = number.get(run, len(number))
        following.append(torch.from_numpy(found))
    return torch.tensor([int(following[w][p]) for w, p in zip(
        places.window_P.tolist(), places.position_P.tolist(), strict=True)])


def fewer(places: Places, lengths_N: torch.Tensor) -> Places:
    """Return the places without every other one at which nothing is deserved."""
    other_P = longest_runs(places, lengths_N) == len(lengths_N)
    kept_P = ~other_P | (other_P.cumsum(0) % 2 == 0)
    number_P, kept_R = kept_P.cumsum(0) - 1, kept_P[places.place_R]
    return Places(**{name: value[kept_R] if name.endswith("_R") else value[kept_P]
                     for name, value in vars(places).items() if name not in ("place_R", "num_windows")},
                  place_R=number_P[places.place_R[kept_R]], num_windows=places.num_windows)


def fitted_silence(bench: Bench, steps: int = 300) -> torch.Tensor:
    """Return the row that minimises its largest probability at the places of training, no longer than base's rows."""
    hidden_PD, normaliser_P = bench.train.hidden_PD[:32_768].float(), bench.train.normaliser_P[:32_768]
    longest = float(bench.model.head_VD.norm(dim=1).max())
    row_D = (-hidden_PD.mean(0) / hidden_PD.mean(0).norm()).requires_grad_(True)
    optimizer = torch.optim.Adam([row_D], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.logsumexp(hidden_PD @ row_D - normaliser_P, 0).backward()
        optimizer.step()
        with torch.no_grad():
            row_D *= min(1.0, longest / float(row_D.norm()))
    return row_D.detach()


def largest_share(places: Places, rows_ND: torch.Tensor) -> dict[str, float]:
    """Return the largest and the mean probability that one such row takes, and how often it is on top."""
    largest, total, on_top = 0.0, 0.0, 0
    for at in torch.arange(len(places)).split(8192):
        best_C = (places.hidden_PD[at].float() @ rows_ND.float().T).amax(1)
        share_C = torch.sigmoid(best_C - places.normaliser_P[at])
        largest, total = max(largest, float(share_C.max())), total + float(share_C.sum())
        on_top += int((best_C > places.top_P[at]).sum())
    return {"largest": largest, "mean": total / len(places), "on_top": on_top / len(places)}


def _free(bench: Bench, arguments: argparse.Namespace, base: Any, expanded: Any, given: Rows,
          ways: dict[str, torch.Tensor]) -> dict[str, Any]:
    prompts, prefix = list[Ids](), np.asarray(base.prefix_ids, np.int64)
    for document in read_documents([arguments.heldout]):
        ids = np.asarray(expanded.encode(document.text)[:48], np.int64)
        if len(ids) == 48 and len(prompts) < arguments.prompts:
            prompts.append(np.concatenate((prefix, ids)))
    chosen = {name: Rows(given.input_ND, ways[name]) for name in (
        "ours (default)", "mean of pieces", "next-token training, AdamW", "zero")}
    bold = bench.fit(caution=1.0)
    chosen["ours, caution 1"] = Rows(given.input_ND, bold)
    windows = [prompts[0]]
    return measure_held_out(bench.model, bench.expansion, HeldOut(windows, prompts, len(prefix), 64, expanded.decode),
                            chosen, no_progress)


# -- text ---------------------------------------------------------------------------------------------------------

def as_markdown(result: dict[str, Any]) -> str:
    """Return the section for the docs."""
    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|",
                          *("| " + " | ".join(row) + " |" for row in rows)])

    def measured(name: str, found: dict[str, Any]) -> list[str]:
        return [name, *(f"{found[k]:.3f}" for k in ("adoption",)), f"{found['wrong']:.2%}",
                f"{found['nll_rise_nats']:.4f}", f"{found['pieces']:.3f}", f"{found['adoption_at_1_percent']:.3f}"]

    head = ("output rows", "adopted of deserved", "wrongly on top, of all places", "nats lost elsewhere",
            "pieces saved, of all", "adopted at 1 % wrong")
    base = result["free"]["base"]
    free = [[row["name"], f"{row['greedy']['characters_per_step']:.3f}",
             f"{row['greedy']['share_of_possible_gain'] or 0:.1%}",
             " / ".join(str(row["greedy"][kind]) for kind in ("identical", "similar", "worse")),
             f"{row['sampling']['kl_nats_per_piece']:.4f}"] for row in result["free"]["rows"]]
    limits = [[name, *("" if k not in found else f"{found[k]:.3f}" for k in (
        "adoption", "wrong", "adoption_at_1_percent"))] for name, found in result["limits"].items()]
    leaks = [[name, f"{found['largest']:.1e}", f"{found['mean']:.1e}", f"{found['on_top']:.2%}"]
             for name, found in result["leaks"].items()]
    times = ", ".join(f"{name} {value:.1f} s" for name, value in result["wall_seconds"].items())
    return "\n\n".join([
        "## Writing",
        f"`python benchmarks/writing.py`: {result['tokens']} new tokens, base frozen. Ours are the rows of "
        f"`vocabext distill`; what is compared with them is fitted to {result['places']:,} places. "
        f"{result['held_out_places']:,} held-out places, {result['deserved']:,} of them "
        f"deserved. {result['silent']} tokens are silent by the held-out rule. Wall time on a shared machine: "
        f"{times} ({1000 * sum(result['wall_seconds'].values()) / result['tokens']:.0f} ms per token).",
        table(head, [measured(name, found) for name, found in result["rows"].items()]),
        "The curve: the weight of places where nothing is deserved (caution). The default chooses it on held-out "
        f"snippets, here {result['caution']:.1f}.",
        table(("caution", *head[1:]), [measured(name, found) for name, found in result["curve"].items()]),
        "Limits of a frozen base: the teacher's own probability of the likeliest run, and a network on the states.",
        table(("limit", "adopted if calibrated", "wrong then", "adopted at 1 % wrong"), limits),
        f"Free greedy writing after {base['prompts']} held-out prompts, 64 pieces each: base "
        f"{base['characters_per_step']:.3f} characters per step, "
        f"{base['characters_per_step_if_all_adopted']:.3f} if every run became one step.",
        table(("rows", "characters per step", "of the possible gain", "greedy text identical / similar / worse",
               "shift of samples, nats per piece"), free),
        "Ablations, at caution 2:",
        table(("change", *head[1:]), [measured(name, found) for name, found in result["ablations"].items()]),
        "Rows that should not be written: the probability that the likeliest of them takes at a held-out place.",
        table(("row", "largest", "mean", "on top"), leaks),
    ])


def say(text: str) -> None:
    """Report at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
