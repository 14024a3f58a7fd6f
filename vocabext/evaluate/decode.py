"""Free writing: base and expanded continue the same prompts, each with its own ids.

Shape suffixes: B prompts, P positions of the longest prompt, D hidden size, V base ids, N new tokens, S steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vocabext.checkpoint.folder import Rows
from vocabext.model.branches import Branches
from vocabext.model.frozen import FrozenModel
from vocabext.model.run_tree import ROOT, RunTree
from vocabext.tokens import Expansion, Ids

# Prompts that are continued together.
AT_ONCE = 64


@dataclass(frozen=True)
class Written:
    """What was written after one prompt.

    Attributes:
        ids: The ids as they were written, one per decode step.
        pieces: The same as base ids.
    """

    ids: list[int]
    pieces: list[int]


@torch.no_grad()
def write_on(
    model: FrozenModel, prompts: Sequence[Ids], expansion: Expansion, rows: Rows | None, *, num_pieces: int,
    generator: torch.Generator | None = None,
) -> list[Written]:
    """Continue prompts until each is so many base ids longer, or ends by itself.

    Args:
        model: The frozen base model.
        prompts: Expanded ids, or base ids without `rows`; the tokenizer's prefix included.
        expansion: The new tokens.
        rows: Their input and output rows; None writes base ids only.
        num_pieces: How many base ids to write. A new token at the end may add a few more.
        generator: Samples at temperature 1; None writes greedily.
    """
    found: list[Written] = []
    for at in range(0, len(prompts), AT_ONCE):
        found += _write(model, prompts[at : at + AT_ONCE], expansion, rows, num_pieces, generator)
    return found


def _write(
    model: FrozenModel, prompts: Sequence[Ids], expansion: Expansion, rows: Rows | None, num_pieces: int,
    generator: torch.Generator | None,
) -> list[Written]:
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    ids_BP = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(prompt.copy()) for prompt in prompts],
                                             batch_first=True).to(model.device)
    input_ND = None if rows is None else rows.input_ND.to(model.device)
    output_ND = None if rows is None or rows.output_ND is None else rows.output_ND.to(model.device)
    bias_N = None if rows is None else rows.bias_N
    first, stops = expansion.first_new_id, set(model.stop_ids)
    hidden_BPD, past = model.hidden_and_past(model.embed(ids_BP, input_ND, first))
    last_BD = hidden_BPD[torch.arange(len(prompts)), lengths_B - 1]
    # Prompts are padded on the right: what is written must not see the padding.
    position_BP = torch.arange(ids_BP.shape[1], device=model.device).expand(len(prompts), -1)
    seen_BP = position_BP < lengths_B[:, None]
    written: list[list[int]] = [[] for _ in prompts]
    count = [0] * len(prompts)
    done = [False] * len(prompts)
    while True:
        logits_BV = model.logits(last_BD, first_new_id=first, new_rows_ND=output_ND, new_bias_N=bias_N)
        chosen_B = _choose(logits_BV, generator)
        for b, token_id in enumerate(chosen_B.tolist()):
            if not done[b]:
                written[b].append(token_id)
                count[b] += int(expansion.run_lengths([token_id])[0])
                done[b] = count[b] >= num_pieces or token_id in stops
        if all(done):
            break
        step = max(map(len, written))
        seen_BP = torch.cat((seen_BP, seen_BP.new_ones(len(prompts), 1)), 1)
        position_BP = torch.cat((position_BP, (lengths_B + step - 1)[:, None]), 1)
        hidden_BPD, past = model.hidden_and_past(model.embed(chosen_B[:, None], input_ND, first),
                                                 branches=Branches(position_BP, seen_BP[:, None]), past=past)
        last_BD = hidden_BPD[:, -1]
    return [Written(ids, expansion.unmerge(ids).tolist()) for ids in written]


def _choose(logits_BV: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    if generator is None:
        return logits_BV.argmax(-1)
    shares_BV = torch.softmax(logits_BV.double(), -1).cpu()
    return torch.multinomial(shares_BV, 1, generator=generator).flatten().to(logits_BV.device)


def fewest_steps(pieces: Sequence[int], tree: RunTree) -> int:
    """Return how many steps some base ids take if the longest run that they spell is one step wherever one begins."""
    steps, at = 0, 0
    while at < len(pieces):
        at += longest_match(pieces, at, tree) or 1
        steps += 1
    return steps


def longest_match(pieces: Sequence[int], at: int, tree: RunTree) -> int:
    """Return the length of the longest run that the ids from `at` on spell; 0 for none."""
    return max((length for _, length in matches(pieces, at, tree)), default=0)


def matches(pieces: Sequence[int], at: int, tree: RunTree) -> list[tuple[int, int]]:
    """Return token and length of every run that the ids from `at` on spell."""
    found, node = [], ROOT
    for depth, piece in enumerate(pieces[at:], 1):
        node = tree.step(node, piece)
        if node < 0:
            break
        if (token := int(tree.token_of[node])) >= 0:
            found.append((token, depth))
    return found
