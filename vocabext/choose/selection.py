"""The set of tokens that saves most for what it costs.

A token saves (pieces - 1) tokens per use and costs nats. At an exchange rate of r tokens per nat, its worth is what it
saves minus r times what it costs; the set with the most worth for some r is on the frontier of savings against loss.
Choosing by the quotient of the two alone would fill a budget of N tokens with those that are harmless and rare.

Tokens change each other: without a phrase its words are used more, and a token that is merged from others needs these.
So each set is counted by encoding the text with it, and chosen again with these counts until it stays the same.

Shape suffixes: N candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vocabext.choose.cost import Costs
from vocabext.choose.text import KeptText
from vocabext.tokenizer import BaseTokenizer
from vocabext.tokens import Ids, NewToken

# How often a set is counted and chosen again at most.
TURNS = 4

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Counted:
    """A set of tokens, counted.

    Attributes:
        chosen: Their numbers among the candidates, rising.
        uses: How often the text holds each of them with this set.
        saved: Tokens that the set saves on the text.
        nats: What the set is expected to cost there.
    """

    chosen: Ids
    uses: Ids
    saved: int
    nats: float


@dataclass
class Selection:
    """Candidates with their costs, and the text on which sets of them are counted.

    Attributes:
        base: The base's tokenizer.
        tokens: The candidates, best first by what they save.
        text: Text that was not mined; all its documents are counted.
        costs: What each candidate costs per use.
        together: All candidates, counted.
    """

    base: BaseTokenizer
    tokens: Sequence[NewToken]
    text: KeptText
    costs: Costs
    together: Counted = field(init=False)
    _known: dict[tuple[int, ...], Counted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look up what tokens are merged from, and count all candidates together."""
        self._saves_N = np.asarray([len(token.run) - 1 for token in self.tokens])
        self._parts = self.base.scheme.parts(self.tokens)
        self.together = together = self.count(np.arange(len(self.tokens)))
        mined_N = np.asarray([token.count for token in self.tokens], np.float64)
        # Rare tokens are hardly in this text; how often the mined text holds them says more.
        scale = together.uses.sum() / max(1.0, mined_N.sum())
        self._uses_N = (together.uses + mined_N * scale) / 2 if mined_N.sum() else together.uses.astype(np.float64)

    def count(self, chosen: Ids) -> Counted:
        """Count a set on the text."""
        key = tuple(chosen.tolist())
        if key not in self._known:
            expansion, rows = self.text.encode([self.tokens[i] for i in key])
            uses = sum((expansion.counts(ids) for ids in rows), np.zeros(len(key), np.int64))
            self._known[key] = Counted(chosen, uses, self.text.base_tokens - sum(map(len, rows)),
                                       float(uses @ self.costs.nats_N[chosen]))
        return self._known[key]

    def by_savings(self, budget: int) -> Counted:
        """Return the set that mining alone would take: the first candidates."""
        return self.count(self._fill(-np.arange(len(self.tokens), dtype=np.float64) + len(self.tokens), budget))

    def by_cost(self, budget: int, rate: float) -> Counted:
        """Return the set that is worth most at an exchange rate.

        Args:
            budget: Most tokens.
            rate: How many saved tokens a nat is worth.
        """
        uses_N, best, turn = self._uses_N.copy(), None, 0
        while turn < TURNS:
            worth_N = uses_N * (self._saves_N - rate * self.costs.nats_N)
            found = self.count(self._fill(worth_N, budget))
            if best is not None and self._worth(found, rate) <= self._worth(best, rate):
                break
            best, turn = found, turn + 1
            uses_N[found.chosen] = found.uses
        assert best is not None
        return best

    def reasons(self, chosen: Counted, rate: float, budget: int) -> list[str]:
        """Say for each candidate why it would be left out of a chosen set."""
        taken = set(chosen.chosen.tolist())
        saved_N = self._uses_N * self._saves_N
        worth_N = saved_N - rate * self._uses_N * self.costs.nats_N
        least = min((worth_N[i] for i in taken), default=0.0)
        reasons = []
        for i in range(len(self.tokens)):
            missing = [self.tokens[part].token for part in self._with_parts(i) - {i} - taken]
            if worth_N[i] <= 0:
                reasons.append("it costs more than it saves")
            elif missing and worth_N[i] > least:
                reasons.append(f"it is merged from {missing[0]!r}, which is left out")
            elif saved_N[i] > least:
                reasons.append("for what it costs, others save more")
            else:
                reasons.append(f"others save more; the budget is {budget:,}")
        return reasons

    def _worth(self, found: Counted, rate: float) -> float:
        return found.saved - rate * found.nats

    def _fill(self, worth_N: Floats, budget: int) -> Ids:
        """Take tokens by falling worth, each with what it is merged from, until the budget is full."""
        taken: set[int] = set()
        for i in np.argsort(-worth_N, kind="stable").tolist():
            if worth_N[i] <= 0 or len(taken) >= budget:
                break
            needed = self._with_parts(i) - taken
            if len(taken) + len(needed) <= budget and worth_N[list(needed)].sum() > 0:
                taken |= needed
        return np.asarray(sorted(taken), np.int64)

    def _with_parts(self, number: int) -> set[int]:
        found, open_ = {number}, [number]
        while open_:
            more = set(self._parts[open_.pop()]) - found
            found |= more
            open_ += more
        return found
