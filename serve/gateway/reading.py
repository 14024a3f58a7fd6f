"""How well the expanded model reads: how likely it finds the base's own answers behind its own reading of the prompt.

Two greedy texts part at the first near tie, so how far they agree says little about an arm that misreads its
prompts. The probability of one given text says more. The expanded engine is asked twice for the log-probability of the
same base ids, the answer: behind the prompt as the base tokenizer reads it, and behind the prompt as the expanded
tokenizer reads it. What is less likely behind new tokens, in nats per character, is what their input rows lose.

Both terms come from the expanded engine, because log-probabilities are taken over all of an engine's rows: wherever a
model likes to write a new token, the base id in its place loses as much, and a model that writes well would look like
one that reads badly. In the difference of the two terms that cancels but for what reading changes of it. The price:
whatever else may be wrong with the expanded model is in both terms, and is left to the other measures and to `verify`.

One answer costs the expanded engine two forward passes over prompt and answer without a cache (vLLM computes whole
prompts anew where their log-probabilities are asked for), one after the other, in one place among the arm's requests.
The base engine turns texts into ids and computes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.arms import BASE, EXPANDED
from vocabext.serve.gateway.calls import CHAT, COMPLETIONS, TOKENIZE, Request
from vocabext.serve.gateway.engines import Engines
from vocabext.serve.gateway.front import rendering_of
from vocabext.serve.gateway.load import Loads

# Of one answer; its beginning says enough.
MOST_CHARACTERS = 1_000
# Of prompt and answer. vLLM holds a row of logits for each id whose log-probability it is asked for: 2,048 rows of
# 150,000 ids are 1.2 GB, twice, and nobody has set that aside.
MOST_IDS = 2_048


async def reading_loss(engines: Engines, loads: Loads, request: Request, answer: str) -> float | None:
    """Return how much less likely an answer of the base is behind the prompt as the expanded tokenizer reads it.

    Args:
        engines: The expanded one is asked.
        loads: The questions hold one place among the expanded arm's requests.
        request: A completion of one text, or a chat.
        answer: What the base arm answered.

    Returns:
        The loss in nats per character, negative if the answer is likelier, 0 if both read the prompt alike; None
        where it cannot be asked for: no text, more than `MOST_IDS` ids, no place free, or an engine that refuses.
    """
    answer = answer[:MOST_CHARACTERS]
    front, headers = engines.front, request.forwarded
    try:
        question = _question(request)
        if question is None or not answer:
            return None
        with loads.slot(EXPANDED):
            by_expanded = await _ids(engines, EXPANDED, question, headers)
            by_base = (await _ids(engines, BASE, question, headers) if front is None
                       else front.expansion.unmerge(by_expanded).tolist())
            answer_ids = await _answer_ids(engines, answer, headers)
            if max(len(by_base), len(by_expanded)) + len(answer_ids) > MOST_IDS:
                return None
            if by_base == by_expanded:
                return 0.0
            before, after = [await _log_probability(engines, prompt, answer_ids, headers)
                             for prompt in (by_base, by_expanded)]
    except (Refusal, ValueError, KeyError, TypeError, IndexError):
        return None  # the request itself was answered; what cannot be compared is not counted
    return (before - after) / len(answer)


def _question(request: Request) -> dict[str, Any] | None:
    """Return what to tokenize, None for requests whose prompt is no text.

    Raises:
        Refusal: If a chat cannot be said in ids.
    """
    document = request.document
    if (document.get("n") or 1) != 1 or document.get("echo"):
        return None
    if request.path == COMPLETIONS:
        prompt = document.get("prompt")
        return {"prompt": prompt} if isinstance(prompt, str) and prompt else None
    if request.path != CHAT or not document.get("messages"):
        return None
    return {name: value for name, value in rendering_of(document).items() if name != "model"}


async def _ids(engines: Engines, arm: str, question: Mapping[str, Any], headers: Mapping[str, str]) -> list[int]:
    """Return the ids of a prompt as the engine behind an arm reads it."""
    return list((await engines.post(arm, TOKENIZE, question, headers))["tokens"])


async def _answer_ids(engines: Engines, answer: str, headers: Mapping[str, str]) -> list[int]:
    if engines.front is not None:
        return engines.front.encode(answer, special=False)
    return await _ids(engines, BASE, {"prompt": answer, "add_special_tokens": False}, headers)


async def _log_probability(
    engines: Engines, prompt: Sequence[int], answer: Sequence[int], headers: Mapping[str, str]
) -> float:
    """Return the log-probability of ids behind a prompt, in nats."""
    found = await engines.post(EXPANDED, COMPLETIONS, {
        "prompt": [*prompt, *answer], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}, headers)
    steps = found["choices"][0]["prompt_logprobs"][-len(answer):]
    return sum(float(step[str(i)]["logprob"]) for step, i in zip(steps, answer, strict=True))
