"""Free writing: base and expanded continue the same prompts, each with its own ids.

Shape suffixes: B prompts, P positions of the longest prompt, T positions of texts behind it, D hidden size, V base ids,
N new tokens, S steps of one text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vocabext.checkpoint.folder import Rows
from vocabext.model.branches import Branches
from vocabext.model.frozen import FrozenModel
from vocabext.model.places import log_p_of, top_and_normaliser
from vocabext.model.run_tree import ROOT, RunTree
from vocabext.progress import Task, no_progress
from vocabext.tokens import Expansion, Ids

# Prompts that are continued together.
AT_ONCE = 64


@dataclass(frozen=True)
class Written:
    """What follows a prompt.

    Attributes:
        ids: The ids, one per decode step.
        pieces: The same as base ids.
        hidden_SD: The state that predicts each id.
        log_p_S: Its log probability.
        normaliser_S: Log of the sum of the exponentials of all logits there.
    """

    ids: list[int]
    pieces: list[int]
    hidden_SD: torch.Tensor
    log_p_S: torch.Tensor
    normaliser_S: torch.Tensor

    @property
    def nats(self) -> float:
        """How unlikely the text is."""
        return -float(self.log_p_S.sum())


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
    return [written for at in range(0, len(prompts), AT_ONCE)
            for written in Begun(model, prompts[at : at + AT_ONCE], expansion, rows).write(num_pieces, generator)]


class Begun:
    """Prompts that a model has read, with whatever follows them: written, or read."""

    @torch.no_grad()
    def __init__(self, model: FrozenModel, prompts: Sequence[Ids], expansion: Expansion, rows: Rows | None) -> None:
        """Read prompts; the arguments are those of `write_on`."""
        self.model, self.expansion = model, expansion
        self.input_ND = None if rows is None else rows.input_ND.to(model.device)
        self.output_ND = None if rows is None or rows.output_ND is None else rows.output_ND.to(model.device)
        self.bias_N = None if rows is None else rows.bias_N
        self.length_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        hidden_BPD, self.past = model.hidden_and_past(self._embed(_padded(prompts).to(model.device)))
        self.last_BD = hidden_BPD[torch.arange(len(prompts)), self.length_B - 1]
        # Prompts are padded on the right: what follows must not see the padding.
        self.position_BP = torch.arange(hidden_BPD.shape[1], device=model.device).expand(len(prompts), -1)
        self.seen_BP = self.position_BP < self.length_B[:, None]

    @torch.no_grad()
    def write(self, num_pieces: int, generator: torch.Generator | None = None, task: Task | None = None
              ) -> list[Written]:
        """Continue all prompts, as `write_on` does.

        Args:
            num_pieces: How many base ids to write.
            generator: Samples at temperature 1; None writes greedily.
            task: Told of one position per step and prompt; of those of a prompt that ends earlier as skipped.
        """
        task = task or no_progress("").__enter__()
        size, stops = len(self.last_BD), set(self.model.stop_ids)
        run, last_BD = self.model.behind(self.past, num_pieces), self.last_BD
        position_BK, seen_BK = self.position_BP, self.seen_BP
        steps: list[tuple[torch.Tensor, ...]] = []
        written: list[list[int]] = [[] for _ in range(size)]
        count, done = [0] * size, [False] * size
        while True:
            logits_BV = self._logits(last_BD)
            chosen_B, normaliser_B = _choose(logits_BV, generator)
            steps.append((last_BD, log_p_of(chosen_B, logits_BV, normaliser_B), normaliser_B))
            task.advance(size - sum(done))
            for b, token_id in enumerate(chosen_B.tolist()):
                if not done[b]:
                    written[b].append(token_id)
                    count[b] += int(self.expansion.run_lengths([token_id])[0])
                    done[b] = count[b] >= num_pieces or token_id in stops
            if all(done):
                break
            seen_BK = torch.cat((seen_BK, seen_BK.new_ones(size, 1)), 1)
            position_BK = torch.cat((position_BK, (self.length_B + len(steps) - 1)[:, None]), 1)
            last_BD = run(self._embed(chosen_B[:, None]), Branches(position_BK, seen_BK[:, None]))[:, -1]
        task.skip(size * num_pieces - sum(map(len, written)))
        hidden_BSD, log_p_BS, normaliser_BS = (torch.stack(column, 1) for column in zip(*steps, strict=True))
        return [self._written(ids, hidden_BSD[b], log_p_BS[b], normaliser_BS[b]) for b, ids in enumerate(written)]

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[Written]:
        """Read texts as if they had been written.

        Args:
            texts: Ids, at least one each.
            prompts: The prompt that each follows.
        """
        if not texts:
            return []
        at_B, length_B = torch.tensor(prompts, device=self.model.device), [len(text) for text in texts]
        ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        hidden_BTD = self.last_BD[at_B][:, None]
        if (size := ids_BT.shape[1] - 1) > 0:
            step_T = torch.arange(size, device=self.model.device)
            seen_BTK = torch.cat((self.seen_BP[at_B][:, None].expand(-1, size, -1),
                                  (step_T <= step_T[:, None]).expand(len(texts), -1, -1)), 2)
            positions_BK = torch.cat((self.position_BP[at_B], self.length_B[at_B][:, None] + step_T), 1)
            past = [(keys[at_B.to(keys.device)], values[at_B.to(values.device)]) for keys, values in self.past]
            behind_BTD = self.model.hidden(self._embed(ids_BT[:, :-1].to(self.model.device)),
                                           branches=Branches(positions_BK, seen_BTK), past=past)
            hidden_BTD = torch.cat((hidden_BTD, behind_BTD), 1)
        found = []
        for b, text in enumerate(texts):
            logits_SV = self._logits(hidden_BTD[b, : length_B[b]])
            _, _, normaliser_S = top_and_normaliser(logits_SV)
            log_p_S = log_p_of(torch.tensor(text, device=logits_SV.device), logits_SV, normaliser_S)
            found.append(self._written(list(text), hidden_BTD[b], log_p_S, normaliser_S))
        return found

    def _embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.model.embed(ids_BT, self.input_ND, self.expansion.first_new_id)

    def _logits(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        return self.model.logits(hidden_PD, first_new_id=self.expansion.first_new_id, new_rows_ND=self.output_ND,
                                 new_bias_N=self.bias_N)

    def _written(self, ids: list[int], *columns: torch.Tensor) -> Written:
        return Written(ids, self.expansion.unmerge(ids).tolist(), *(column[: len(ids)] for column in columns))


def _padded(texts: Sequence[Ids]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(text.copy()) for text in texts], batch_first=True)


def _choose(logits_BV: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids that are written, and the normalisers."""
    _, id_B, normaliser_B = top_and_normaliser(logits_BV)
    if generator is None:
        return id_B, normaliser_B
    shares_BV = torch.softmax(logits_BV.double(), -1).cpu()
    return torch.multinomial(shares_BV, 1, generator=generator).flatten().to(logits_BV.device), normaliser_B


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
