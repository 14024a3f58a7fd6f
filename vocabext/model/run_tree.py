"""The runs of all new tokens as one tree, so that what they share is followed once.

Shape suffixes: E edges of the tree, N new tokens, F nodes that are followed, C their children.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vocabext.tokens import NewToken

ROOT = 0


@dataclass(frozen=True)
class RunTree:
    """A prefix tree of runs, laid out as arrays.

    Attributes:
        first_child: Where the children of each node begin; one more entry than nodes.
        piece_E: The base id on the way to each child.
        child_E: The node there.
        token_of: For each node the new token whose run ends there, -1 for none.
        path: For each node the pieces that lead to it, padded with 0.
        depth: How many these are.
    """

    first_child: torch.Tensor
    piece_E: torch.Tensor
    child_E: torch.Tensor
    token_of: torch.Tensor
    path: torch.Tensor
    depth: torch.Tensor

    @classmethod
    def of(cls, tokens: Sequence[NewToken]) -> "RunTree":
        """Build the tree of some tokens, no two of which have the same run."""
        children: list[dict[int, int]] = [{}]
        paths: list[tuple[int, ...]] = [()]
        token_of = [-1]
        for index, token in enumerate(tokens):
            node = ROOT
            for piece in token.run:
                if piece not in children[node]:
                    children[node][piece] = len(children)
                    children.append({})
                    paths.append((*paths[node], piece))
                    token_of.append(-1)
                node = children[node][piece]
            token_of[node] = index
        longest = max(map(len, paths))
        counts = torch.tensor([0, *(len(below) for below in children)])
        return cls(
            counts.cumsum(0), torch.tensor([p for below in children for p in below], dtype=torch.long),
            torch.tensor([c for below in children for c in below.values()], dtype=torch.long), torch.tensor(token_of),
            torch.tensor([[*path, *(0,) * (longest - len(path))] for path in paths]).view(len(paths), longest),
            torch.tensor([len(path) for path in paths]),
        )

    def children(self, nodes_F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """List the children of some nodes.

        Returns:
            For each child, (C,): the index of its parent in `nodes_F`, the piece on the way, and the node.
        """
        start_F, count_F = self.first_child[nodes_F], self.first_child[nodes_F + 1] - self.first_child[nodes_F]
        parent_C = torch.repeat_interleave(torch.arange(len(nodes_F)), count_F)
        before_F = count_F.cumsum(0) - count_F
        edge_C = start_F[parent_C] + torch.arange(len(parent_C)) - before_F[parent_C]
        return parent_C, self.piece_E[edge_C], self.child_E[edge_C]

    def has_children(self, nodes_F: torch.Tensor) -> torch.Tensor:
        """Tell which nodes some run goes on from, (F,)."""
        return self.first_child[nodes_F + 1] > self.first_child[nodes_F]

    def step(self, node: int, piece: int) -> int:
        """Return the node that a piece leads to, -1 if no run goes on with it."""
        low, high = int(self.first_child[node]), int(self.first_child[node + 1])
        at = (self.piece_E[low:high] == piece).nonzero()
        return int(self.child_E[low + int(at[0])]) if len(at) else -1

    def below(self, node: int) -> list[int]:
        """Return the tokens whose runs go on from a node."""
        found, nodes = list[int](), [node]
        while nodes:
            at = nodes.pop()
            below_C = self.child_E[int(self.first_child[at]) : int(self.first_child[at + 1])]
            found += [token for token in self.token_of[below_C].tolist() if token >= 0]
            nodes += below_C.tolist()
        return found
