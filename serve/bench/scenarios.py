"""The loads that are measured, and their prompts: the same texts for base and expanded.

Three scenarios, because they are limited by different things:

    prefill   a long prompt, one output token: what it costs to read a text
    decode    a short prompt, a long answer: what it costs to write text
    mixed     passages and the beginning of a text, a long answer: what retrieval does all day

Each is measured at one or several *points*: so many requests in flight at once, or so many arriving per
second at random (Poisson) moments, the same moments for both models.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from vocabext.errors import CorpusError, UsageError
from vocabext.serve.model import Encoder

PREFILL, DECODE, MIXED = "prefill", "decode", "mixed"
SCENARIOS = (PREFILL, DECODE, MIXED)
CONTEXT_MARGIN_TOKENS = 16  # for the tokens that frame a prompt
DEFAULT_PROMPT_TOKENS = 2032
NUM_PASSAGES = 3
SAMPLED_TEXTS, SAMPLED_CHARACTERS = 100, 1000  # to see how many tokens a character takes
RATE_SECONDS = 10.0  # how long requests keep arriving at a point with a rate, at least
REQUESTS_PER_SLOT = 2  # requests per request in flight, at least


@dataclass(frozen=True)
class Point:
    """One scenario under one load; exactly one of `concurrency` and `request_rate` is set.

    Attributes:
        scenario: `prefill`, `decode` or `mixed`.
        concurrency: Requests in flight at once; None where requests arrive at a rate.
        request_rate: Requests arriving per second; None where the number in flight is fixed.
    """

    scenario: str
    concurrency: int | None = 1
    request_rate: float | None = None

    @property
    def name(self) -> str:
        """What to call the point in a table: `prefill x1`, `mixed 2/s`."""
        load = f"x{self.concurrency}" if self.request_rate is None else f"{self.request_rate:g}/s"
        return f"{self.scenario} {load}"

    def num_requests(self, texts: int) -> int:
        """Return how many requests a pass needs to fill the load, at least `texts`."""
        if self.request_rate is not None:
            return max(texts, math.ceil(self.request_rate * RATE_SECONDS))
        return max(texts, REQUESTS_PER_SLOT * (self.concurrency or 1))


@dataclass(frozen=True)
class PromptShape:
    """How large prompts and answers are."""

    # Prompts per pass; more where the concurrency or the rate needs more.
    texts: int = 6
    # Length of a prefill prompt in *base* tokens; None takes 2,032, or less if the context is smaller.
    prompt_tokens: int | None = None
    # Length of a decode prompt in characters.
    prompt_characters: int = 200
    # Length of all passages of a mixed prompt together, in characters.
    passage_characters: int = 1500
    # Characters of every answer, the same for both models.
    output_characters: int = 256


def points_of(scenarios: Iterable[str], concurrencies: Iterable[int], rates: Iterable[float]) -> tuple[Point, ...]:
    """Return every scenario at every load once, in the order in which they are measured."""
    loads: list[tuple[int | None, float | None]] = [
        *((count, None) for count in concurrencies), *((None, rate) for rate in rates)]
    return tuple(dict.fromkeys(Point(scenario, *load) for scenario in scenarios for load in loads))


def tokens_per_character(texts: Sequence[str], encoders: Iterable[Encoder]) -> float:
    """Return how many tokens a character of a corpus takes, with the tokenizer that needs most: 0.2 to over 3."""
    sample = "\n\n".join(text[:SAMPLED_CHARACTERS] for text in texts[:: max(1, len(texts) // SAMPLED_TEXTS)])
    return max(len(encoder.encode(sample)) for encoder in encoders) / max(1, len(sample))


def max_output_tokens(output_characters: int, per_character: float) -> int:
    """Return how many tokens an answer may take to reach its characters.

    Twice as many as such text takes (`per_character`), and at least half as many as characters: a model that writes
    nothing visible must come to an end.
    """
    return max(1, output_characters // 2, math.ceil(2 * per_character * output_characters))


def prompt_limit(shape: PromptShape, context: int | None, answer_tokens: int) -> int:
    """Return how many base tokens a prefill prompt may have.

    Raises:
        UsageError: If the prompt, or an answer, does not fit into the context.
    """
    room = (context or 10**9) - CONTEXT_MARGIN_TOKENS
    if shape.prompt_tokens is not None and shape.prompt_tokens > room:
        raise UsageError(f"--prompt-tokens {shape.prompt_tokens} does not fit into the context of {context} tokens; "
                         f"use at most {max(room, 0)}")
    if answer_tokens > room // 2:
        most = max(room // 2, 0) * shape.output_characters // answer_tokens
        raise UsageError(f"--output-characters {shape.output_characters} may need {answer_tokens} tokens, which leaves "
                         f"too little of the context of {context} tokens for the prompt; use at most {most}")
    return min(shape.prompt_tokens or DEFAULT_PROMPT_TOKENS, room)


def build_prompts(
    texts: Iterable[str], encoder: Encoder, shape: PromptShape, points: Iterable[Point], context: int | None,
    seed: int = 0, *, answer_tokens: int,
) -> dict[str, tuple[str, ...]]:
    """Cut the prompts of every scenario out of held-out texts, in random order.

    Prefill prompts are long stretches of text (documents joined by a blank line) that end at a space just before they
    would exceed the limit in *base* tokens. Decode prompts are the beginnings of documents. Mixed prompts are passages
    of other documents, then such a beginning; a document that holds the beginning is no other one. Equal documents
    count once.

    Args:
        texts: The documents.
        encoder: The base model's tokenizer.
        shape: How large prompts are.
        points: What will be measured.
        context: The context in tokens, None if unknown.
        seed: Seed of the order of the documents.
        answer_tokens: Most tokens that an answer may take.

    Returns:
        The prompts of each scenario, as many as its largest point needs.

    Raises:
        CorpusError: If there is too little text.
        UsageError: If something does not fit into the context.
    """
    documents = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not documents:
        raise CorpusError("the corpus holds no text to make prompts from; pass held-out documents as --corpus")
    random.Random(seed).shuffle(documents)
    limit = prompt_limit(shape, context, answer_tokens)
    room = (context or 10**9) - CONTEXT_MARGIN_TOKENS - answer_tokens
    needed: dict[str, int] = {}
    for point in points:
        needed[point.scenario] = max(needed.get(point.scenario, 0), point.num_requests(shape.texts))
    makers = {PREFILL: lambda count: _long_prompts("\n\n".join(documents), encoder, limit, count),
              DECODE: lambda count: _openings(documents, encoder, room, shape.prompt_characters, count),
              MIXED: lambda count: _retrieved(documents, encoder, room, shape, count)}
    made = {scenario: tuple(makers[scenario](count)) for scenario, count in needed.items()}
    _check_enough(made, points, shape)
    return made


def _check_enough(made: Mapping[str, tuple[str, ...]], points: Iterable[Point], shape: PromptShape) -> None:
    """Refuse a load that the corpus cannot fill: fewer prompts than requests in flight would be another load."""
    for point in points:
        have, need = len(made[point.scenario]), point.num_requests(shape.texts)
        if have < need and (point.request_rate is not None or have < (point.concurrency or 1)):
            raise CorpusError(f"the corpus holds text for {have} {point.scenario} prompts, but {point.name} needs "
                              f"{need}; pass more held-out documents, or a smaller load")


def _openings(documents: list[str], encoder: Encoder, room: int, characters: int, count: int) -> list[str]:
    long = [document for document in documents if len(document) >= characters] or documents
    return [_fit(_cut_at_space(document, characters), encoder, room) for document in long[:count]]


def _retrieved(documents: list[str], encoder: Encoder, room: int, shape: PromptShape, count: int) -> list[str]:
    """Put passages of other documents before the beginnings of documents, as retrieval does."""
    size = max(1, shape.passage_characters // NUM_PASSAGES)
    prompts = []
    for number, opening in enumerate(_openings(documents, encoder, room, shape.prompt_characters, count)):
        first = (count + number * NUM_PASSAGES) % len(documents)
        in_turn = (documents[(first + i) % len(documents)] for i in range(len(documents)))
        others = list(islice((document for document in in_turn if opening not in document), NUM_PASSAGES))
        if len(others) < NUM_PASSAGES:
            raise CorpusError(f"a mixed prompt needs passages of {NUM_PASSAGES} other documents, but of the "
                              f"{len(documents)} different documents of the corpus {len(others)} do not hold the text "
                              "that it continues; pass more held-out documents, or other scenarios")
        passages = "\n\n".join(_cut_at_space(other, size) for other in others)
        left = room - len(encoder.encode(f"\n\n{opening}"))
        if left < 1:
            raise UsageError(f"the beginning of a document takes {room - left} tokens, and the context has room for "
                             f"{room} beside the answer; use fewer --prompt-characters than {shape.prompt_characters}")
        prompts.append(f"{_fit(passages, encoder, left)}\n\n{opening}")
    return prompts


def _long_prompts(text: str, encoder: Encoder, limit: int, count: int) -> list[str]:
    prompts: list[str] = []
    start = 0
    while len(prompts) < count and start < len(text):
        prompt = _fit(text[start : start + 12 * limit], encoder, limit)
        start += max(1, len(prompt))
        if prompts and len(prompt) < len(prompts[0]) // 2:
            break  # the rest of the corpus: too short to be a long prompt
        if prompt.strip():
            prompts.append(prompt)
    return prompts


def _fit(text: str, encoder: Encoder, limit: int) -> str:
    """Return the beginning of a text that has at most `limit` tokens, cut at a space if possible."""
    while len(text) > 1 and (count := len(encoder.encode(text))) > limit:
        text = _cut_at_space(text, min(len(text) - 1, max(1, int(len(text) * limit / count))))
    return text


def _cut_at_space(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    space = text.rfind(" ", 0, length + 1)
    return text[: space if space > length * 0.8 else length].rstrip() or text[:length]
