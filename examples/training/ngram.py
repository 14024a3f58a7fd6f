"""The baseline: an interpolated, modified Kneser-Ney 5-gram over the same tokens.

Before neural networks this was *the* language model, and it is hard to beat with little data.  A
model that does not beat it has learned nothing but frequencies.

The estimate for a token ``w`` after four tokens ``c`` is::

    P5(w | c) = max(count(c w) - D, 0) / count(c) + gamma(c) * P4(w | c without its first token)

and so on down to ``P1``, which falls back to the uniform distribution.  ``gamma`` is the mass that
the discounts ``D`` took away.  Two ideas make it Kneser-Ney: below the highest order, a count is
not how often an n-gram occurs but after how many *different* tokens it occurs (``Francisco`` is
frequent, but only after ``San``); and the discounts are estimated from how many n-grams were seen
once, twice, three and four times.

The tables are plain sorted arrays.  An n-gram is named by an integer: the name of its first n-1
tokens, times the vocabulary size, plus its last token; the n-gram's own name is the rank of that
integer among all that were seen.  Looking up is a binary search for all positions at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.loop import Corpus

ORDER = 5

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """The n-grams of one order.

    Attributes:
        keys: Sorted integers that name the n-grams, see the module's text.
        numerator: Discounted count per n-gram.
        total: Count per context; a context is an n-gram of the order below.
        backoff: Discounted mass per context, as a fraction of ``total``.
    """

    keys: Ints
    numerator: Floats
    total: Floats
    backoff: Floats


def name_ngrams(keys: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Rank integers.

    Args:
        keys: One integer per occurrence.

    Returns:
        The distinct integers in order, the rank of every occurrence, the number of occurrences
        of each distinct integer, and the place of one occurrence of each.
    """
    order = np.argsort(keys)
    ordered = keys[order]
    is_new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    ranks = np.empty(len(keys), np.int64)
    ranks[order] = np.cumsum(is_new) - 1
    first = np.flatnonzero(is_new)
    counts = np.diff(np.append(first, len(keys)))
    return ordered[first], ranks, counts, order[first]


def discounts(counts: Ints) -> Floats:
    """Return the discount of every n-gram by its count: three values, for 1, 2, and 3 or more.

    Args:
        counts: Counts of the n-grams of one order.

    Returns:
        One discount per n-gram.
    """
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        by_count = np.array([0.0, 0.5, 0.5, 0.5])
    else:
        y = n1 / (n1 + 2 * n2)
        by_count = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    result: Floats = by_count[np.minimum(counts, 3)]
    return result


def document_ends(corpus: Corpus) -> Ints:
    """Return, for every token, where its document ends."""
    return np.repeat(corpus.starts[1:], np.diff(corpus.starts))


class NGram:
    """A 5-gram model of a tokenized corpus."""

    def __init__(self, corpus: Corpus, vocabulary: int) -> None:
        """Count and discount.

        Args:
            corpus: Documents to train on; no n-gram crosses from one to the next.
            vocabulary: Number of tokens.
        """
        self.vocabulary = vocabulary
        tokens = corpus.tokens_N.astype(np.int64)
        ends = document_ends(corpus)
        names = tokens  # of the n-gram that starts at each position
        keys: list[Ints] = [np.arange(vocabulary)]
        raw: list[Ints] = [np.bincount(tokens, minlength=vocabulary)]
        preceding: list[Ints] = []  # in how many different ways an n-gram is preceded
        for n in range(2, ORDER + 1):
            places = np.flatnonzero(np.arange(len(tokens)) + n <= ends)
            found, ranks, counts, sample = name_ngrams(names[places] * vocabulary + tokens[places + n - 1])
            suffixes = names[places[sample] + 1]
            preceding.append(np.bincount(suffixes, minlength=len(keys[-1])))
            keys.append(found)
            raw.append(counts)
            names = np.full(len(tokens), -1)
            names[places] = ranks
        self.tables = []
        for n in range(1, ORDER + 1):
            counts = raw[n - 1]
            if n < ORDER:  # what starts a document has nothing before it and keeps its count
                counts = np.where(preceding[n - 1] > 0, preceding[n - 1], counts)
            if n == 1:
                counts = np.where(preceding[0] > 0, counts, 0)  # the begin token is given
            self.tables.append(self._table(n, keys, counts))

    def _table(self, n: int, keys: list[Ints], counts: Ints) -> Table:
        """Make the table of one order from its counts."""
        discount = discounts(counts)
        contexts = keys[n - 1] // self.vocabulary if n > 1 else np.zeros(len(counts), np.int64)
        size = len(keys[n - 2]) if n > 1 else 1
        total = np.bincount(contexts, weights=counts, minlength=size)
        taken = np.bincount(contexts, weights=np.minimum(discount, counts), minlength=size)
        backoff = np.divide(taken, total, out=np.ones(size), where=total > 0)
        return Table(keys[n - 1], np.maximum(counts - discount, 0.0), total.astype(np.float64), backoff)

    def probabilities(self, corpus: Corpus) -> Floats:
        """Compute the probability of every token given those before it in its document.

        Args:
            corpus: Documents to score.

        Returns:
            One probability per token; those of the begin tokens mean nothing.
        """
        tokens = corpus.tokens_N.astype(np.int64)
        size = len(tokens)
        begins = np.repeat(corpus.starts[:-1], np.diff(corpus.starts))
        places = np.arange(size)
        table = self.tables[0]
        p: Floats = (table.numerator[tokens] + table.backoff[0] * table.total[0] / self.vocabulary) / (table.total[0])
        contexts = tokens  # name of the (n-1)-gram that starts at each position
        for n in range(2, ORDER + 1):
            table = self.tables[n - 1]
            grams = np.full(size, -1)
            ahead = np.flatnonzero((places + n <= size) & (contexts >= 0))
            wanted = contexts[ahead] * self.vocabulary + tokens[ahead + n - 1]
            rank = np.minimum(np.searchsorted(table.keys, wanted), len(table.keys) - 1)
            grams[ahead] = np.where(table.keys[rank] == wanted, rank, -1)
            scored = places[n - 1 :]
            starts = scored - n + 1
            inside = (starts >= begins[scored]) & (contexts[starts] >= 0)
            scored, starts = scored[inside], starts[inside]
            known = table.total[contexts[starts]] > 0
            scored, starts = scored[known], starts[known]
            context, gram = contexts[starts], grams[starts]
            numerator = np.where(gram >= 0, table.numerator[gram], 0.0)
            p[scored] = numerator / table.total[context] + table.backoff[context] * p[scored]
            contexts = grams
        return p


def scored_mask(corpus: Corpus) -> NDArray[np.bool_]:
    """Say which tokens count: all but each document's begin and end token."""
    mask = np.ones(len(corpus.tokens_N), bool)
    mask[corpus.starts[:-1]] = False
    mask[corpus.starts[1:] - 1] = False
    return mask


def bits(probabilities: Floats, corpus: Corpus) -> float:
    """Return the bits that the scored tokens cost."""
    return float(-np.log2(probabilities[scored_mask(corpus)]).sum())


def best_mixture(first: Floats, second: Floats, corpus: Corpus) -> tuple[float, float]:
    """Mix two models with the weight that is best for this very text.

    Choosing the weight on the text that is scored favours the baseline, a little.

    Args:
        first: Probabilities under one model.
        second: Probabilities under the other.
        corpus: The text.

    Returns:
        The bits it costs, and the weight of the first model.
    """
    weights = np.linspace(0, 1, 21)
    costs = [bits(w * first + (1 - w) * second, corpus) for w in weights]
    best = int(np.argmin(costs))
    return costs[best], float(weights[best])
