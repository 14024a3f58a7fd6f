"""How rows read and write held-out text: at its places, and in free continuations of its beginnings.

Shape suffixes: P places, N new tokens, B prompts, S windows.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vocabext.checkpoint.folder import Rows
from vocabext.evaluate.decode import AT_ONCE, Begun, Written, fewest_steps
from vocabext.evaluate.reading import read_merged
from vocabext.evaluate.shift import lost_nats
from vocabext.model.frozen import FrozenModel
from vocabext.model.places import Places, concatenate, find_places
from vocabext.model.run_tree import RunTree
from vocabext.model.writing import Uses, find_uses, measure_writing
from vocabext.progress import Progress, Task
from vocabext.tokens import Expansion, Ids

# Windows that are read by base and all rows before the next ones are.
WINDOWS_AT_ONCE = 32
# Another greedy text is worse if base finds it so much less likely than its own, in nats per character.
WORSE_NATS = 0.05
EXAMPLES = 3
BOOTSTRAP_DRAWS = 1_000
IDENTICAL, SIMILAR, WORSE = "identical", "similar", "worse"

Floats = npt.NDArray[np.float64]
# Opens the body of rows that have another than the base's.
Bodies = Mapping[str, Callable[[], AbstractContextManager[FrozenModel]]]


@dataclass(frozen=True)
class HeldOut:
    """What rows are tried on.

    Attributes:
        windows: Expanded ids of held-out text, prefix included.
        prompts: Expanded ids of the beginnings of documents; none leaves writing unmeasured.
        num_prefix: How many ids the tokenizer puts in front.
        num_pieces: How many base ids are written after each prompt.
        decode: From expanded ids to text.
        seed: Of the samples.
    """

    windows: Sequence[Ids]
    prompts: Sequence[Ids]
    num_prefix: int
    num_pieces: int
    decode: Callable[[Sequence[int]], str]
    seed: int = 0


@dataclass
class Nats:
    """How unlikely the windows are: their base pieces, and their canonical ids.

    Attributes:
        reading_S: Of the base pieces.
        writing_S: Of the expanded ids; of the base the same as reading.
    """

    reading_S: Floats
    writing_S: Floats


def measure_held_out(
    model: FrozenModel, expansion: Expansion, held_out: HeldOut, row_sets: Mapping[str, Rows], progress: Progress,
    bodies: Bodies | None = None,
) -> tuple[dict[str, Nats], dict[str, Any] | None]:
    """Measure how each set of rows reads and writes.

    Args:
        model: The frozen base model.
        expansion: The new tokens.
        held_out: The text.
        row_sets: Input and output rows, by name.
        progress: Where to report.
        bodies: By name, the bodies of rows that have another than the base's.

    Returns:
        By name, and for `base`, how unlikely each window is. And JSON-ready: what the base does, and for each set of
        rows what `measure_writing` finds in base context (`places`) and in merged context (`merged`), `greedy` and
        `sampling`; None without prompts.
    """
    # Without prompts nobody asks what deserves to be written.
    tree = RunTree.of(expansion.tokens if held_out.prompts else ())
    bodies = bodies or {}
    nats, at_places = _read_windows(model, expansion, held_out, row_sets, tree, progress, bodies)
    if not held_out.prompts:
        return nats, None
    base, found = _write(model, expansion, held_out, row_sets, tree, progress, bodies)
    return nats, {"base": base, "rows": [
        {"name": name, **at_places[name], **found[name]} for name in row_sets]}


# -- at places ----------------------------------------------------------------------------------------------------

@dataclass
class _AtPlaces:
    """Places without their states, and what rows do there."""

    places: list[Places] = field(default_factory=list)
    uses: list[Uses] = field(default_factory=list)

    def add(self, places: Places, model: FrozenModel, rows: Rows) -> None:
        assert rows.output_ND is not None
        self.uses.append(find_uses(places, rows.output_ND.to(model.device), model.logit_map, rows.bias_N))
        self.places.append(replace(places, hidden_PD=places.hidden_PD.new_empty(len(places), 0)))

    def to_json(self, lengths_N: torch.Tensor) -> dict[str, object]:
        uses = Uses(**{name: torch.cat([getattr(part, name) for part in self.uses]) for name in vars(self.uses[0])})
        return measure_writing(concatenate(self.places), uses, lengths_N).to_json()


def _read_windows(
    model: FrozenModel, expansion: Expansion, held_out: HeldOut, row_sets: Mapping[str, Rows], tree: RunTree,
    progress: Progress, bodies: Bodies,
) -> tuple[dict[str, Nats], dict[str, dict[str, object]]]:
    lengths_N = torch.tensor([len(token.run) for token in expansion.tokens])
    first, size = max(1, held_out.num_prefix), len(held_out.windows)
    nats = {name: Nats(np.zeros(size), np.zeros(size)) for name in ("base", *row_sets)}
    parts = {name: (_AtPlaces(), _AtPlaces()) for name in row_sets}
    total = sum(int(expansion.run_lengths(window).sum()) for window in held_out.windows) * (1 + len(row_sets))
    with progress("reading held-out text", total, "positions") as task:
        for at in range(0, size, WINDOWS_AT_ONCE):
            stems = held_out.windows[at : at + WINDOWS_AT_ONCE]
            here, base_ids = slice(at, at + len(stems)), expansion.unmerge_batch(stems)
            places = find_places(model, base_ids, tree, first_new_id=expansion.first_new_id, first=first - 1)
            nats["base"].reading_S[here] = nats["base"].writing_S[here] = np.bincount(
                places.window_P.numpy(), -places.next_log_p_P.double().numpy(), len(stems))
            task.advance(sum(map(len, base_ids)))
            for name, rows in row_sets.items():
                with _body(bodies, name, model) as own:
                    found = read_merged(own, stems, first, expansion, rows, places)
                    apart = read_merged(own, base_ids, first, expansion, rows, places).places if (
                        name in bodies and held_out.prompts) else places
                nats[name].reading_S[here], nats[name].writing_S[here] = found.reading_nats_S, found.writing_nats_S
                if held_out.prompts:
                    for part, seen in zip(parts[name], (apart, found.places), strict=True):
                        part.add(seen, model, rows)
                task.advance(sum(map(len, base_ids)))
    if not held_out.prompts:
        return nats, {}
    return nats, {name: {key: part.to_json(lengths_N) for key, part in zip(("places", "merged"), both, strict=True)}
                  for name, both in parts.items()}


def _body(bodies: Bodies, name: str, model: FrozenModel) -> AbstractContextManager[FrozenModel]:
    """Return the model that rows belong to."""
    return bodies[name]() if name in bodies else nullcontext(model)


# -- free writing -------------------------------------------------------------------------------------------------

def _write(
    model: FrozenModel, expansion: Expansion, held_out: HeldOut, row_sets: Mapping[str, Rows], tree: RunTree,
    progress: Progress, bodies: Bodies,
) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """Let base and rows continue the prompts; base reads its prompts once for all that is asked of it."""
    prompts, base_prompts = held_out.prompts, expansion.unmerge_batch(held_out.prompts)
    generator = torch.Generator().manual_seed(held_out.seed)
    own, num_sampled = list[Written](), 0
    written: dict[str, list[Written]] = {name: [] for name in row_sets}
    nats: dict[str, list[float]] = {name: [] for name in row_sets}
    lost = dict.fromkeys(row_sets, 0.0)
    total = (sum(map(len, base_prompts)) + len(row_sets) * sum(map(len, prompts))
             + (2 + 2 * len(row_sets)) * held_out.num_pieces * len(prompts))
    with progress("writing after held-out prompts", total, "positions") as task:
        for at in range(0, len(prompts), AT_ONCE):
            here = slice(at, at + AT_ONCE)
            begun = Begun(model, base_prompts[here], expansion, None)
            task.advance(sum(map(len, base_prompts[here])))
            greedy = begun.write(held_out.num_pieces, task=task)
            own += greedy
            sampled = begun.write(held_out.num_pieces, generator, task)
            num_sampled += sum(len(some.pieces) for some in sampled)
            known = [{tuple(some.pieces): some.nats} for some in greedy]
            for name, rows in row_sets.items():
                assert rows.output_ND is not None
                with _body(bodies, name, model) as own_body:
                    read = sampled
                    if name in bodies:
                        read = Begun(own_body, base_prompts[here], expansion, None).read(
                            [some.pieces for some in sampled], range(len(sampled)))
                    lost[name] += sum(lost_nats(own_body, read, tree, rows.output_ND, rows.bias_N))
                    lost[name] += sum(theirs.nats - ours.nats for theirs, ours in zip(read, sampled, strict=True))
                    with_rows = Begun(own_body, prompts[here], expansion, rows)
                    task.advance(sum(map(len, prompts[here])))
                    written[name] += (texts := with_rows.write(held_out.num_pieces, task=task))
                nats[name] += _base_nats(begun, texts, known, task)
                task.skip((len(texts) * held_out.num_pieces) - sum(len(some.pieces) for some in texts))
    base = _Greedy(held_out, own, tree)
    return base.facts(), {name: {
        "greedy": base.compare(written[name], nats[name], expansion),
        "sampling": {"texts": len(prompts), "pieces": num_sampled, "kl_nats_per_piece": lost[name] / num_sampled},
    } for name in row_sets}


def _base_nats(begun: Begun, texts: Sequence[Written], known: list[dict[tuple[int, ...], float]], task: Task
               ) -> list[float]:
    """Return how unlikely the base finds texts; each that follows a prompt is read once, whoever has written it."""
    new = [b for b, some in enumerate(texts) if tuple(some.pieces) not in known[b]]
    for b, read in zip(new, begun.read([texts[b].pieces for b in new], new), strict=True):
        known[b][tuple(read.pieces)] = read.nats
    task.advance(sum(len(texts[b].pieces) for b in new))
    task.skip(sum(len(some.pieces) for some in texts) - sum(len(texts[b].pieces) for b in new))
    return [known[b][tuple(some.pieces)] for b, some in enumerate(texts)]


class _Greedy:
    """Base's own greedy continuations, and how others compare with them."""

    def __init__(self, held_out: HeldOut, own: Sequence[Written], tree: RunTree) -> None:
        self.held_out, self.own = held_out, own
        self.texts = [held_out.decode(written.pieces) for written in own]
        self.characters = sum(map(len, self.texts))
        self.steps = sum(len(written.ids) for written in own)
        self.fewest = sum(fewest_steps(written.pieces, tree) for written in own)

    def facts(self) -> dict[str, object]:
        return {"prompts": len(self.own), "characters": self.characters, "steps": self.steps,
                "base_nats_per_character": sum(some.nats for some in self.own) / max(1, self.characters),
                "characters_per_step": self.characters / self.steps, "fewest_steps": self.fewest,
                "characters_per_step_if_all_adopted": self.characters / self.fewest}

    def compare(self, written: Sequence[Written], nats: Sequence[float], expansion: Expansion) -> dict[str, object]:
        texts = [self.held_out.decode(some.ids) for some in written]
        characters, steps = sum(map(len, texts)), sum(len(some.ids) for some in written)
        kinds, common, examples = [], [], []
        for b, text in enumerate(texts):
            own = self.texts[b]
            common.append(common_prefix(own, text))
            same = common[-1] >= min(len(own), len(text))
            loss = nats[b] / max(1, len(text)) - self.own[b].nats / max(1, len(own))
            kinds.append(IDENTICAL if same else WORSE if loss > WORSE_NATS else SIMILAR)
            if kinds.count(kinds[-1]) <= EXAMPLES:
                examples.append({"kind": kinds[-1], "prompt": self.held_out.decode(self.held_out.prompts[b].tolist()),
                                 "base": own, "expanded": text, "lost_nats_per_character": loss})
        per_step, base = characters / steps, self.characters / self.steps
        possible = self.characters / self.fewest - base
        return {"characters": characters, "steps": steps, "characters_per_step": per_step,
                "base_nats_per_character": sum(nats) / max(1, characters),
                "base_nats_ratio_interval": self._ratio_interval(list(map(len, texts)), nats),
                "share_of_possible_gain": (per_step - base) / possible if possible > 0 else None,
                "new_tokens": sum(int(expansion.is_new(some.ids).sum()) for some in written),
                **{kind: kinds.count(kind) for kind in (IDENTICAL, SIMILAR, WORSE)},
                "common_characters": float(np.mean(common)), "examples": examples}


    def _ratio_interval(self, characters: Sequence[int], nats: Sequence[float]) -> list[float] | None:
        """Return the 95 % bootstrap interval, over prompts, of the ratio of both base nats per character."""
        own = np.array([some.nats for some in self.own]), np.array([len(text) for text in self.texts])
        at = np.random.default_rng(0).integers(0, len(self.own), (BOOTSTRAP_DRAWS, len(self.own)))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = (np.array(nats)[at].sum(1) / np.array(characters)[at].sum(1)) / (
                own[0][at].sum(1) / own[1][at].sum(1))
        return [float(x) for x in np.quantile(ratios, [0.025, 0.975])] if np.isfinite(ratios).all() else None


def common_prefix(left: str, right: str) -> int:
    """Return how many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
