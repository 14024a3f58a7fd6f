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

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from serve.gateway.answers import Refusal
from serve.gateway.arms import BASE, EXPANDED, Arm
from serve.gateway.calls import CHAT, COMPLETIONS, TOKENIZE, Request
from serve.gateway.front import rendering_of
from serve.gateway.upstream import forwarded

if TYPE_CHECKING:
    from serve.gateway.app import Gateway

# Of one answer; its beginning says enough.
MOST_CHARACTERS = 1_000
# Of prompt and answer. vLLM holds a row of logits for each id whose log-probability it is asked for: 2,048 rows of
# 150,000 ids are 1.2 GB, twice, and nobody has set that aside.
MOST_IDS = 2_048


async def reading_loss(gateway: "Gateway", request: Request, answer: str) -> float | None:
    """Return how much less likely an answer of the base is behind the prompt as the expanded tokenizer reads it.

    Args:
        gateway: Its expanded engine is asked.
        request: A completion of one text, or a chat.
        answer: What the base arm answered.

    Returns:
        The loss in nats per character, negative if the answer is likelier, 0 if both read the prompt alike; None
        where it cannot be asked for: no text, more than `MOST_IDS` ids, no place free, or an engine that refuses.
    """
    answer = answer[:MOST_CHARACTERS]
    base, expanded, headers = gateway.arms[BASE], gateway.arms[EXPANDED], forwarded(request.headers)
    try:
        question = _question(request)
        if question is None or not answer:
            return None
        with gateway.slot(EXPANDED):
            by_expanded = await _ids(gateway, expanded, question, headers)
            by_base = (await _ids(gateway, base, question, headers) if base.front is None
                       else base.front.expansion.unmerge(by_expanded).tolist())
            answer_ids = await _answer_ids(gateway, base, answer, headers)
            if max(len(by_base), len(by_expanded)) + len(answer_ids) > MOST_IDS:
                return None
            if by_base == by_expanded:
                return 0.0
            before, after = [await _log_probability(gateway, expanded, prompt, answer_ids, headers)
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


async def _post(
    gateway: "Gateway", arm: Arm, path: str, value: Mapping[str, Any], headers: Mapping[str, str]
) -> dict[str, Any]:
    body = json.dumps({"model": arm.model, **value}).encode()
    status, answer = await gateway.upstream.post_json(arm.url + path, body, arm=arm.name, headers=headers)
    if status != 200:
        raise Refusal(502, f"the engine of the {arm.name} arm answered with status {status}")
    found: dict[str, Any] = json.loads(answer)
    return found


async def _ids(
    gateway: "Gateway", arm: Arm, question: Mapping[str, Any], headers: Mapping[str, str]
) -> list[int]:
    """Return the ids of a prompt as the engine behind an arm reads it."""
    return list((await _post(gateway, arm, TOKENIZE, question, headers))["tokens"])


async def _answer_ids(gateway: "Gateway", base: Arm, answer: str, headers: Mapping[str, str]) -> list[int]:
    if base.front is not None:
        return base.front.encode(answer, special=False)
    return await _ids(gateway, base, {"prompt": answer, "add_special_tokens": False}, headers)


async def _log_probability(
    gateway: "Gateway", arm: Arm, prompt: Sequence[int], answer: Sequence[int], headers: Mapping[str, str]
) -> float:
    """Return the log-probability of ids behind a prompt, in nats."""
    found = await _post(gateway, arm, COMPLETIONS, {
        "prompt": [*prompt, *answer], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}, headers)
    steps = found["choices"][0]["prompt_logprobs"][-len(answer):]
    return sum(float(step[str(i)]["logprob"]) for step, i in zip(steps, answer, strict=True))
