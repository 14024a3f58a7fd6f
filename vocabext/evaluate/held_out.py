"""How rows write on held-out text: at its places, and in free continuations of its beginnings.

Shape suffixes: P places, N new tokens, B prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vocabext.checkpoint.folder import Rows
from vocabext.evaluate.decode import Written, fewest_steps, write_on
from vocabext.evaluate.shift import lost_nats
from vocabext.model.frozen import FrozenModel
from vocabext.model.places import Places, concatenate, find_places
from vocabext.model.run_tree import RunTree
from vocabext.model.writing import find_uses, measure_writing
from vocabext.progress import Progress
from vocabext.tokens import Expansion, Ids

# Windows whose states are computed between two reports of progress.
WINDOWS_AT_ONCE = 32
HEAD_PLACES = 128
# Another greedy text is worse if base finds it so much less likely than its own, in nats per character.
WORSE_NATS = 0.05
EXAMPLES = 3
IDENTICAL, SIMILAR, WORSE = "identical", "similar", "worse"


@dataclass(frozen=True)
class HeldOut:
    """What rows are tried on.

    Attributes:
        windows: Expanded ids of held-out text, prefix included.
        prompts: Expanded ids of the beginnings of documents.
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


def measure_held_out(
    model: FrozenModel, expansion: Expansion, held_out: HeldOut, row_sets: Mapping[str, Rows], progress: Progress
) -> dict[str, Any]:
    """Measure how each set of rows writes.

    Args:
        model: The frozen base model.
        expansion: The new tokens.
        held_out: The text.
        row_sets: Input and output rows, by name.
        progress: Where to report.

    Returns:
        JSON-ready: what the base does, and for each set of rows what `measure_writing` finds in base context
        (`places`) and in merged context (`merged`), `greedy` and `sampling`.
    """
    tree = RunTree.of(expansion.tokens)
    base_prompts = expansion.unmerge_batch(held_out.prompts)
    at_places = _at_places(model, expansion, held_out, row_sets, tree, progress)
    greedy = _Greedy(model, expansion, held_out, base_prompts, tree)
    generator = torch.Generator().manual_seed(held_out.seed)
    samples = write_on(model, base_prompts, expansion, None, num_pieces=held_out.num_pieces, generator=generator)
    texts = [np.concatenate((prompt, written.pieces)) for prompt, written in zip(base_prompts, samples, strict=True)]
    pieces = sum(len(written.pieces) for written in samples)
    found = []
    with progress("writing after held-out prompts", len(row_sets) * len(held_out.prompts), "prompts") as task:
        for name, rows in row_sets.items():
            assert rows.output_ND is not None
            lost = lost_nats(model, texts, [len(p) for p in base_prompts], tree, rows.output_ND,
                             first_new_id=expansion.first_new_id, bias_N=rows.bias_N)
            found.append({"name": name, **at_places[name], "greedy": greedy.compare(rows),
                          "sampling": {"texts": len(texts), "pieces": pieces, "kl_nats_per_piece": sum(lost) / pieces}})
            task.advance(len(held_out.prompts))
    return {"base": greedy.base_facts(), "rows": found}


# -- at places ----------------------------------------------------------------------------------------------------

def _at_places(
    model: FrozenModel, expansion: Expansion, held_out: HeldOut, row_sets: Mapping[str, Rows], tree: RunTree,
    progress: Progress,
) -> dict[str, dict[str, object]]:
    lengths_N = torch.tensor([len(token.run) for token in expansion.tokens])
    parts: dict[str, tuple[list[Places], list[Places]]] = {name: ([], []) for name in row_sets}
    with progress("finding what the base writes", len(held_out.windows), "windows") as task:
        for at in range(0, len(held_out.windows), WINDOWS_AT_ONCE):
            merged = held_out.windows[at : at + WINDOWS_AT_ONCE]
            places = find_places(model, expansion.unmerge_batch(merged), tree, first_new_id=expansion.first_new_id,
                                 first=max(0, held_out.num_prefix - 1))
            for name, rows in row_sets.items():
                parts[name][0].append(places)
                parts[name][1].append(as_read(places, model, merged, expansion, rows))
            task.advance(len(merged))
    found: dict[str, dict[str, object]] = {}
    for name, rows in row_sets.items():
        assert rows.output_ND is not None
        found[name] = {}
        for key, some in zip(("places", "merged"), parts[name], strict=True):
            every = concatenate(some)
            uses = find_uses(every, rows.output_ND.to(model.device), model.logit_map, rows.bias_N)
            found[name][key] = measure_writing(every, uses, lengths_N).to_json()
    return found


@torch.no_grad()
def as_read(places: Places, model: FrozenModel, merged: Sequence[Ids], expansion: Expansion, rows: Rows) -> Places:
    """Return those places that are there in merged text, too, with the states and logits found there.

    What deserves to be written there stays as it is: base's own continuation of its own text.

    Args:
        places: Places of the unmerged windows.
        model: The frozen base model.
        merged: The windows in expanded ids.
        expansion: The new tokens.
        rows: Rows of the new tokens.
    """
    input_ND, states, keys = rows.input_ND.to(model.device), [], []
    longest = max(int(expansion.run_lengths(ids).sum()) for ids in merged)
    for window, ids in enumerate(merged):
        inputs = torch.from_numpy(ids.copy()).to(model.device)[None]
        states.append(model.hidden(model.embed(inputs, input_ND, expansion.first_new_id))[0])
        keys.append(window * longest + torch.from_numpy(expansion.last_positions(ids)))
    state_PD, key_P = torch.cat(states), torch.cat(keys)
    wanted_P = places.window_P * longest + places.position_P
    kept = torch.isin(wanted_P, key_P).nonzero().flatten()
    hidden_PD = state_PD[torch.searchsorted(key_P, wanted_P[kept]).to(state_PD.device)]
    logits = [model.logits(some_PD, first_new_id=expansion.first_new_id) for some_PD in hidden_PD.split(HEAD_PLACES)]
    tops = [some_PV.max(1) for some_PV in logits]
    still_R = torch.isin(places.place_R, kept)
    return replace(
        places, hidden_PD=hidden_PD.cpu(), top_P=torch.cat([top.values for top in tops]).cpu(),
        top_id_P=torch.cat([top.indices for top in tops]).cpu(),
        normaliser_P=torch.cat([some_PV.logsumexp(1) for some_PV in logits]).cpu(), window_P=places.window_P[kept],
        position_P=places.position_P[kept], next_P=places.next_P[kept],
        place_R=torch.searchsorted(kept, places.place_R[still_R]), token_R=places.token_R[still_R],
        log_p_R=places.log_p_R[still_R], greedy_R=places.greedy_R[still_R])


# -- free greedy writing ------------------------------------------------------------------------------------------

class _Greedy:
    """Base's own greedy continuations, and how others compare with them."""

    def __init__(
        self, model: FrozenModel, expansion: Expansion, held_out: HeldOut, base_prompts: Sequence[Ids], tree: RunTree
    ) -> None:
        self.model, self.expansion, self.held_out, self.base_prompts = model, expansion, held_out, base_prompts
        self.own = write_on(model, base_prompts, expansion, None, num_pieces=held_out.num_pieces)
        self.texts = [held_out.decode(written.pieces) for written in self.own]
        self.nats = self._nats(self.own)
        self.characters = sum(map(len, self.texts))
        self.steps = sum(len(written.ids) for written in self.own)
        self.fewest = sum(fewest_steps(written.pieces, tree) for written in self.own)

    def base_facts(self) -> dict[str, object]:
        return {"prompts": len(self.own), "characters": self.characters, "steps": self.steps,
                "characters_per_step": self.characters / self.steps, "fewest_steps": self.fewest,
                "characters_per_step_if_all_adopted": self.characters / self.fewest}

    def compare(self, rows: Rows) -> dict[str, object]:
        written = write_on(self.model, self.held_out.prompts, self.expansion, rows, num_pieces=self.held_out.num_pieces)
        texts = [self.held_out.decode(some.ids) for some in written]
        characters, steps = sum(map(len, texts)), sum(len(some.ids) for some in written)
        kinds, common, examples = [], [], []
        for b, (text, nats) in enumerate(zip(texts, self._nats(written), strict=True)):
            own = self.texts[b]
            common.append(common_prefix(own, text))
            same = common[-1] >= min(len(own), len(text))
            loss = nats / max(1, len(text)) - self.nats[b] / max(1, len(own))
            kinds.append(IDENTICAL if same else WORSE if loss > WORSE_NATS else SIMILAR)
            if kinds.count(kinds[-1]) <= EXAMPLES:
                examples.append({"kind": kinds[-1], "prompt": self.held_out.decode(self.held_out.prompts[b].tolist()),
                                 "base": own, "expanded": text, "lost_nats_per_character": loss})
        per_step, base = characters / steps, self.characters / self.steps
        possible = self.characters / self.fewest - base
        return {"characters": characters, "steps": steps, "characters_per_step": per_step,
                "share_of_possible_gain": (per_step - base) / possible if possible > 0 else None,
                "new_tokens": sum(int(self.expansion.is_new(some.ids).sum()) for some in written),
                **{kind: kinds.count(kind) for kind in (IDENTICAL, SIMILAR, WORSE)},
                "common_characters": float(np.mean(common)), "examples": examples}

    @torch.no_grad()
    def _nats(self, written: Sequence[Written]) -> list[float]:
        """Return how unlikely the base finds each continuation of its prompt."""
        found = []
        for prompt, some in zip(self.base_prompts, written, strict=True):
            ids = torch.from_numpy(np.concatenate((prompt, some.pieces))).to(self.model.device)
            hidden_PD = self.model.hidden(self.model.embed(ids[None]))[0][len(prompt) - 1 : -1]
            logs = self.model.log_probabilities(hidden_PD, first_new_id=self.expansion.first_new_id)
            found.append(-float(logs.gather(1, ids[len(prompt) :, None]).sum()))
        return found


def common_prefix(left: str, right: str) -> int:
    """Return how many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
