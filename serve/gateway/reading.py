"""How well the expanded arm reads: how likely it finds the base's own answers, after the same prompt.

Two greedy texts part at the first near tie, so how far they agree says little about an arm that misreads its
prompts. The probability of one given text says more: both engines are asked for the log-probabilities of the same
base ids, the answer, behind the prompt as each of them reads it. What the expanded arm finds less likely, in nats
per character, is what its new rows lose. Written tokens play no part, since the answer is given in base ids.

One answer costs each engine one more forward pass over prompt and answer, without decoding; prefix caching saves
most of it.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from serve.gateway.answers import Refusal
from serve.gateway.arms import BASE, EXPANDED, Arm
from serve.gateway.calls import CHAT, COMPLETIONS, TOKENIZE, Request
from serve.gateway.front import TOKENIZE_FIELDS
from serve.gateway.upstream import forwarded

if TYPE_CHECKING:
    from serve.gateway.app import Gateway

# Of one answer; its beginning says enough.
MOST_CHARACTERS = 1_000


async def reading_loss(gateway: "Gateway", request: Request, answer: str) -> float | None:
    """Return how much less likely the expanded arm finds an answer of the base, in nats per character.

    Args:
        gateway: Its two engines are asked.
        request: A completion of one text, or a chat.
        answer: What the base arm answered.

    Returns:
        The loss, negative if the answer is likelier; None where it cannot be asked for.
    """
    question, answer = _question(request), answer[:MOST_CHARACTERS]
    if question is None or not answer:
        return None
    base, expanded, headers = gateway.arms[BASE], gateway.arms[EXPANDED], forwarded(request.headers)
    try:
        read_by_expanded, answer_ids = await asyncio.gather(
            _ids(gateway, expanded, question, headers), _answer_ids(gateway, base, answer, headers))
        read_by_base = (await _ids(gateway, base, question, headers) if base.front is None
                        else base.front.expansion.unmerge(read_by_expanded).tolist())
        before, after = await asyncio.gather(
            _log_probability(gateway, base, read_by_base, answer_ids, headers),
            _log_probability(gateway, expanded, read_by_expanded, answer_ids, headers))
    except (Refusal, ValueError, KeyError, TypeError, IndexError):
        return None  # the request itself was answered; what cannot be compared is not counted
    return (before - after) / len(answer)


def _question(request: Request) -> dict[str, Any] | None:
    """Return what to tokenize, None for requests whose prompt is no text."""
    document = request.document
    if (document.get("n") or 1) != 1 or document.get("echo"):
        return None
    if request.path == COMPLETIONS:
        prompt = document.get("prompt")
        return {"prompt": prompt} if isinstance(prompt, str) and prompt else None
    if request.path != CHAT or not document.get("messages"):
        return None
    return {name: document[name] for name in TOKENIZE_FIELDS if document.get(name) is not None}


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
        "prompt": [*prompt, *answer], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}, headers)  # fmt: skip
    steps = found["choices"][0]["prompt_logprobs"][-len(answer):]
    return sum(float(step[str(i)]["logprob"]) for step, i in zip(steps, answer, strict=True))
