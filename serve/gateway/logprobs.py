"""Log-probabilities of the base arm on an expanded engine: by token id, so that new tokens can be left out.

Those of the prompt (`prompt_logprobs`) come by id in any case, with the text and the rank of each token.

vLLM computes log-probabilities over all rows, before any ban. The ones that are returned are those of the
expanded model, less the new tokens: together they miss the probability that the new tokens had, and there may
be fewer than were asked for. An engine with `--logprobs-mode processed_logprobs` computes them after the ban.
"""

import json
from collections.abc import Callable
from typing import Any

_PREFIX = "token_id:"


class LogprobsConverter:
    """Puts the text of tokens back where vLLM was asked for ids, and leaves out new tokens."""

    def __init__(self, decode: Callable[[int], str], first_new_id: int, *, as_ids: bool = False) -> None:
        """Convert with a tokenizer.

        Args:
            decode: The text of one token.
            first_new_id: The first id to leave out.
            as_ids: Whether the client asked for ids in place of text, too.
        """
        self._decode = decode
        self._first = first_new_id
        self._as_ids = as_ids
        self._offsets: dict[int, int] = {}

    def whole(self, body: bytes) -> bytes:
        """Convert a completion."""
        return json.dumps(self._converted(json.loads(body))).encode()

    def event(self, data: bytes) -> bytes:
        """Convert one part of a streamed completion."""
        if data == b"[DONE]":
            return b"data: [DONE]\n\n"
        return b"data: " + json.dumps(self._converted(json.loads(data))).encode() + b"\n\n"

    def _converted(self, document: dict[str, Any]) -> dict[str, Any]:
        for choice in document.get("choices") or ():
            if logprobs := choice.get("logprobs"):
                self._convert(logprobs, choice.get("index", 0))
            if choice.get("prompt_logprobs"):
                choice["prompt_logprobs"] = without_new(choice["prompt_logprobs"], self._first)
        return document

    def _convert(self, logprobs: dict[str, Any], index: int) -> None:
        known = [row and {token: value for token, value in row.items() if id_of(token) < self._first}
                 for row in logprobs.get("top_logprobs") or ()]
        if self._as_ids:
            logprobs["top_logprobs"] = known
            return
        tokens = [text_of(token, self._decode) for token in logprobs.get("tokens") or ()]
        offset, offsets = self._offsets.get(index, 0), []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        logprobs.update(tokens=tokens, text_offset=offsets, top_logprobs=[
            row and {text_of(token, self._decode): value for token, value in row.items()} for row in known])


def without_new(rows: list[dict[str, Any] | None], first_new_id: int) -> list[dict[str, Any] | None]:
    """Return the log-probabilities of a prompt, by id as vLLM writes them, without new tokens."""
    return [row and {token_id: value for token_id, value in row.items() if int(token_id) < first_new_id}
            for row in rows]


def id_of(token: str) -> int:
    """Return the id that vLLM wrote in place of a token."""
    return int(token.removeprefix(_PREFIX))


def text_of(token: str, decode: Callable[[int], str]) -> str:
    """Return the text of a token that vLLM wrote as an id."""
    return decode(id_of(token))
