"""What the base would write as one unit: how the probability of a first piece is shared out among the units.

Shape suffixes: R places, N new tokens, K depths, E entries, A places whose text is still in the tree.

A *unit* is what one decode step writes: a piece, or a new token. By the chain rule, the divergence of the distributions
over units is that of the first pieces, plus that of the units among those with the same first piece. The first is known
everywhere. For the second, the base's own pass over the text knows more than which unit came: along the tree of runs it
knows exactly how likely each continuation was, as far as the text goes with the tree; what lies behind a branch that
the text did not take is estimated by how often it came to an end in the text as a whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vocabext.model.run_tree import ROOT, RunTree
from vocabext.tokens import Expansion, Ids

# Tells the log probability of pieces after positions of the base's text, (E,) from two times (E,).
NO_PIECE = -1
LogsOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class UnitShares:
    """The tree of runs with what the text has of it.

    Attributes:
        tree: The runs.
        first_N: The first piece of each new token.
        below_start: Where the tokens at or below each node begin in `below_E`; one more entry than nodes.
        below_E: These tokens.
        share_E: The share of the node's visits that each of them is.
        end_share: For each node that is the end of a run, the share of what goes no further that is its token.
    """

    tree: RunTree
    first_N: torch.Tensor
    below_start: torch.Tensor
    below_E: torch.Tensor
    share_E: torch.Tensor
    end_share: torch.Tensor

    @classmethod
    def counted(cls, expansion: Expansion, windows: Sequence[Ids]) -> "UnitShares":
        """Count in expanded text.

        Args:
            expansion: The new tokens.
            windows: Expanded ids.
        """
        tree = RunTree.of(expansion.tokens)
        visits = torch.zeros(len(tree.token_of), dtype=torch.double)
        counts_N = torch.ones(expansion.num_new, dtype=torch.double)  # none is impossible
        for window in windows:
            pieces = np.append(expansion.unmerge(window), NO_PIECE)
            paths = walk(tree, torch.from_numpy(pieces), torch.from_numpy(expansion.edges(window)[1:]))
            for nodes in paths:
                visits.index_add_(0, nodes[nodes >= 0], torch.ones(int((nodes >= 0).sum()), dtype=torch.double))
            counts_N += torch.from_numpy(expansion.counts(window)).double()
        below = [sorted({*tree.below(node), int(tree.token_of[node])} - {-1}) for node in range(len(visits))]
        size = torch.tensor([len(some) for some in below])
        below_E = torch.tensor([token for some in below for token in some], dtype=torch.long)
        node_E = torch.repeat_interleave(torch.arange(len(below)), size)
        total = torch.zeros_like(visits).index_add_(0, node_E, counts_N[below_E])
        visits = torch.maximum(visits, total)
        ends = tree.token_of >= 0
        own = torch.where(ends, counts_N[tree.token_of.clamp(min=0)], torch.zeros_like(visits))
        end_share = own / (visits - (total - own)).clamp(min=1)
        return cls(tree, torch.tensor([token.run[0] for token in expansion.tokens]),
                   torch.cat((torch.zeros(1, dtype=torch.long), size.cumsum(0))), below_E,
                   (counts_N[below_E] / visits[node_E]).float(), end_share.float().clamp(max=1))

    def behind(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return for each token at or below some nodes: the index of the node, the token, and its share."""
        start, size = self.below_start[nodes], self.below_start[nodes + 1] - self.below_start[nodes]
        which = torch.repeat_interleave(torch.arange(len(nodes)), size)
        at = start[which] + torch.arange(len(which)) - (size.cumsum(0) - size)[which]
        return which, self.below_E[at], self.share_E[at]


def walk(tree: RunTree, pieces: torch.Tensor, starts: torch.Tensor) -> list[torch.Tensor]:
    """Follow the text from some places along the tree.

    Args:
        tree: The runs.
        pieces: Base ids, `NO_PIECE` behind the end of each text.
        starts: Where the walks begin, (R,).

    Returns:
        For each depth the node that is reached, (R,), -1 where the text has left the tree or ended.
    """
    found, node_R = [], torch.full((len(starts),), ROOT)
    for depth in range(tree.path.shape[1]):
        next_R = torch.full_like(node_R, -1)
        at = (node_R >= 0).nonzero().flatten()
        parent, piece, child = tree.children(node_R[at])
        hit = piece == pieces[starts[at] + depth][parent]
        next_R[at[parent[hit]]] = child[hit]
        found.append(next_R)
        node_R = next_R
        if not bool((node_R >= 0).any()):
            break
    return found


def unit_targets(shares: UnitShares, pieces: torch.Tensor, starts: torch.Tensor, logs: LogsOf
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how likely each new token is at each place, given its first piece there, and which piece that is.

    Args:
        shares: The tree.
        pieces: Base ids, `NO_PIECE` behind the end of each text.
        starts: Where the units begin, (R,); each is predicted from the position before it.
        logs: Tells the log probability of pieces after positions.

    Returns:
        Probabilities (R, N), and the first piece (R,), -1 where no run begins with it.
    """
    tree, num = shares.tree, len(starts)
    path = walk(tree, pieces, starts)
    target_RN = torch.zeros(num, len(shares.first_N))
    first_R = torch.where(path[0] >= 0, pieces[starts], torch.full_like(starts, -1))
    reached_R = (path[0] >= 0).float()
    reached, given = [], []
    for depth, node_R in enumerate(path):
        reached.append(reached_R)
        at = (node_R >= 0).nonzero().flatten()
        known = pieces[starts[at] + depth + 1] >= 0
        # What the base makes of a text behind its end is not known: the node stands for all that is behind it.
        sent_R = _spread(shares, target_RN, at[~known], node_R[at[~known]], reached_R[at[~known]])
        inside = at[known]
        parent, piece, child = tree.children(node_R[inside])
        position = starts[inside] + depth
        mass = reached_R[inside][parent] * logs(position[parent], piece).exp()
        on_path = piece == pieces[position + 1][parent]
        sent_R += _spread(shares, target_RN, inside[parent[~on_path]], child[~on_path], mass[~on_path])
        given.append(sent_R)
        reached_R = torch.zeros(num).index_put_((inside[parent[on_path]],), mass[on_path])
    below_R = torch.zeros(num)
    for depth in range(len(path) - 1, -1, -1):
        node_R = path[depth].clamp(min=0)
        below_R = below_R + given[depth]
        whole = ((path[depth] >= 0) & (tree.token_of[node_R] >= 0)).nonzero().flatten()
        whole = whole[pieces[starts[whole] + depth + 1] >= 0]
        own = shares.end_share[node_R[whole]] * (reached[depth][whole] - below_R[whole]).clamp(min=0)
        target_RN[whole, tree.token_of[node_R[whole]]] += own
        below_R = below_R.index_add(0, whole, own)
    return target_RN, first_R


def _spread(shares: UnitShares, target_RN: torch.Tensor, row: torch.Tensor, nodes: torch.Tensor, mass: torch.Tensor
            ) -> torch.Tensor:
    """Give the tokens behind some nodes their shares of the nodes' mass; returns what was given away, (R,)."""
    which, token, share = shares.behind(nodes)
    given = mass[which] * share
    target_RN.index_put_((row[which], token), given, accumulate=True)
    return torch.zeros(len(target_RN)).index_add_(0, row[which], given)
