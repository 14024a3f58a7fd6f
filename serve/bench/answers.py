"""How many tokens an answer of so many characters takes, asked of the server that will give it.

With an equal `max_tokens`, two vocabularies write different amounts of text. So each server answers every prompt
once, greedily, before anything is timed. The offsets of its tokens say how many of them reach the wanted number of
characters; `max_tokens` of this prompt is that many in every pass.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vocabext.errors import ServerError
from vocabext.serve.engine import Server

TYPICAL_CHARACTERS_PER_TOKEN = 3
ANSWER_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class AnswerPlan:
    """The `max_tokens` of every prompt of a scenario on one server.

    Attributes:
        tokens: One number per prompt.
        characters: Characters that so many tokens had.
    """

    tokens: tuple[int, ...]
    characters: tuple[int, ...]

    def num_short(self, wanted: int) -> int:
        """Count the prompts whose answer stays below the wanted characters."""
        return sum(count < wanted for count in self.characters)


def plan_answers(
    server: Server, model: str, prompts: Sequence[str], output_characters: int, *, most_tokens: int
) -> AnswerPlan:
    """Ask a server how many tokens its answer to each prompt needs.

    An answer that has not reached `output_characters` after `most_tokens` stays short.

    Raises:
        ServerError: If the server does not answer.
    """
    found = [_plan_one(server, model, prompt, output_characters, most_tokens) for prompt in prompts]
    return AnswerPlan(tuple(tokens for tokens, _ in found), tuple(characters for _, characters in found))


def _plan_one(server: Server, model: str, prompt: str, wanted: int, most: int) -> tuple[int, int]:
    tokens = min(most, 1 + wanted // TYPICAL_CHARACTERS_PER_TOKEN)
    while True:
        ends = _token_ends(_complete(server, model, prompt, tokens))
        reached = next((i for i, end in enumerate(ends) if end >= wanted), None)
        if reached is not None:
            return reached + 1, ends[reached]
        if tokens == most:
            return most, ends[-1] if ends else 0
        tokens = min(most, 2 * tokens)


def _token_ends(choice: dict[str, Any]) -> list[int]:
    """Return how many characters of the answer are written after each of its tokens."""
    offsets = choice["logprobs"]["text_offset"]
    start = offsets[0] if offsets else 0
    return [*(offset - start for offset in offsets[1:]), len(choice["text"])][: len(offsets)]


def _complete(server: Server, model: str, prompt: str, tokens: int) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0.0,
            "ignore_eos": True, "logprobs": 0}
    answer = server.ask("/v1/completions", body, timeout_seconds=ANSWER_TIMEOUT_SECONDS)
    choices = answer.get("choices")
    if not choices or not isinstance(choices[0].get("logprobs"), dict):
        raise ServerError(f"{server.name} gave no token offsets; its answer begins {json.dumps(answer)[:200]}")
    return dict(choices[0])
