"""Chat answers, made from completions of ids."""

import json
from collections.abc import Callable
from typing import Any

from vocabext.serve.gateway.logprobs import id_of, text_of, without_new


class ChatConverter:
    """Turns the answer to `/v1/completions` into the answer to `/v1/chat/completions`."""

    def __init__(self, decode: Callable[[int], str], first_new_id: int, top_logprobs: int | None) -> None:
        """Convert with a tokenizer.

        Args:
            decode: The text of one token.
            first_new_id: The first id to leave out of the log-probabilities.
            top_logprobs: How many alternatives the client asked for, -1 for all; None for no log-probabilities.
        """
        self._decode = decode
        self._first = first_new_id
        self._top = top_logprobs
        self._begun: set[int] = set()

    def whole(self, body: bytes) -> bytes:
        """Convert an answer that is no stream."""
        document = self._framed(json.loads(body), "chat.completion")
        if document["choices"] and (rows := document["choices"][0].get("prompt_logprobs")):
            document["prompt_logprobs"] = without_new(rows, self._first)  # a chat has one prompt
        document["choices"] = [
            {"index": choice["index"], "message": {"role": "assistant", "content": choice["text"], "refusal": None,
                                                   "tool_calls": []},
             **self._rest(choice)} for choice in document["choices"]]
        return json.dumps(document).encode()

    def event(self, data: bytes) -> bytes:
        """Convert one part of a stream; before the first part of each choice comes its role."""
        if data == b"[DONE]":
            return b"data: [DONE]\n\n"
        document = json.loads(data)
        if "error" in document:
            return b"data: " + data + b"\n\n"
        document = self._framed(document, "chat.completion.chunk")
        choices, documents = document["choices"], []
        new = [choice["index"] for choice in choices if choice["index"] not in self._begun]
        if new:
            self._begun.update(new)
            roles = [{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                      "finish_reason": None} for index in new]
            documents.append({**document, "choices": roles, "usage": None})
        parts = [{"index": choice["index"], "delta": {"content": choice["text"]}, **self._rest(choice)}
                 for choice in choices]
        documents.append({**document, "choices": parts})
        return b"".join(b"data: " + json.dumps(document).encode() + b"\n\n" for document in documents)

    def _framed(self, document: dict[str, Any], kind: str) -> dict[str, Any]:
        return {**document, "id": f"chat{document['id']}", "object": kind}

    def _rest(self, choice: dict[str, Any]) -> dict[str, Any]:
        logprobs = choice.get("logprobs")
        rest = {"logprobs": None if logprobs is None or self._top is None else {"content": self._logprobs(logprobs)},
                "finish_reason": choice.get("finish_reason"), "stop_reason": choice.get("stop_reason")}
        return rest | ({"token_ids": choice["token_ids"]} if choice.get("token_ids") is not None else {})

    def _logprobs(self, logprobs: dict[str, Any]) -> list[dict[str, Any]]:
        assert self._top is not None
        rows, shown = [], None if self._top < 0 else self._top
        for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"],
                                     strict=True):
            known = sorted(((t, v) for t, v in (top or {}).items() if id_of(t) < self._first), key=lambda p: -p[1])
            rows.append({**self._entry(token, value),
                         "top_logprobs": [self._entry(t, v) for t, v in known[:shown]]})
        return rows

    def _entry(self, token: str, logprob: float) -> dict[str, Any]:
        text = text_of(token, self._decode)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", errors="replace"))}
