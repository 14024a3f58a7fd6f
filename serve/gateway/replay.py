"""Recorded requests, sent again to either arm of a gateway."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from vocabext.checkpoint.manifest import Manifest
from vocabext.errors import ServerError, UsageError
from vocabext.serve.gateway.calls import CHAT, COMPLETIONS


@dataclass(frozen=True)
class Reply:
    """An answer of one arm.

    Attributes:
        status: The HTTP status.
        document: The answer; for a stream, its events put together as one completion would be.
        error: The error's message, if it is one.
    """

    status: int
    document: dict[str, Any]
    error: str = ""

    @property
    def choice(self) -> dict[str, Any]:
        """The first choice."""
        return dict(self.document["choices"][0])

    @property
    def text(self) -> str:
        """The text of the first choice."""
        choice = self.choice
        return str((choice["message"].get("content") if "message" in choice else choice.get("text")) or "")

    @property
    def usage(self) -> dict[str, Any]:
        """How many tokens were counted."""
        return dict(self.document.get("usage") or {})


@dataclass
class Rehearsal:
    """What the items of the contract have at hand.

    Attributes:
        client: Talks to the gateway.
        requests: What is replayed, as (path, body).
        manifest: The new tokens.
        model: What the gateway calls the model.
        context: The model's context in tokens; 0 if the server does not say.
    """

    client: httpx.Client
    requests: Sequence[tuple[str, dict[str, Any]]]
    manifest: Manifest
    model: str
    context: int
    _cache: dict[str, Reply] = field(default_factory=dict)

    def ask(self, arm: str, path: str, **body: Any) -> Reply:
        """Send one request to one arm."""
        body = {"model": self.model, **body}
        try:
            answer = self.client.post(path, json=body, headers={"x-vocabext-arm": arm})
        except httpx.HTTPError as error:
            raise ServerError(f"the gateway does not answer ({type(error).__name__}: {error})") from None
        if answer.status_code == 200 and answer.headers.get("x-vocabext-arm") != arm:
            raise ServerError("the gateway does not let requests be pinned; start it without --no-pin")
        if answer.status_code != 200:
            return Reply(answer.status_code, {}, _message(answer))
        if "text/event-stream" in answer.headers.get("content-type", ""):
            return Reply(200, {"stream": answer.content})
        try:
            document = answer.json()
        except ValueError:
            document = None
        return Reply(200, document if isinstance(document, dict) else {})

    def complete(self, arm: str, prompt: Any, **body: Any) -> Reply:
        """Ask for a greedy completion."""
        return self.ask(arm, COMPLETIONS, **{"prompt": prompt, "max_tokens": 16, "temperature": 0, **body})

    def replay(self, arm: str, index: int, *, fresh: bool = False, **changes: Any) -> Reply:
        """Send a recorded request, greedy, at most 64 tokens long, and not streamed unless it is said.

        Args:
            arm: Who is asked.
            index: Which request.
            fresh: Whether to ask again what was asked before.
            changes: What to change about it.
        """
        path, body = self.requests[index]
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 64
        changed = {**body, "temperature": 0, "stream": False, "max_tokens": min(int(limit), 64), "model": self.model,
                   **changes}
        changed = {key: value for key, value in changed.items() if key not in ("stream_options", "seed",
                   "max_completion_tokens")} | ({"stream_options": changed["stream_options"]}
                                                if changed["stream"] and "stream_options" in changed else {})
        key = json.dumps([arm, index, changes], sort_keys=True)
        if fresh or key not in self._cache:
            self._cache[key] = self.ask(arm, path, **changed)
        return self._cache[key]

    def prompts(self) -> list[str]:
        """Return the text of what is asked in the requests."""
        found = []
        for _, body in self.requests:
            prompt = body.get("prompt")
            if isinstance(prompt, str):
                found.append(prompt)
            found += [m["content"] for m in body.get("messages") or () if isinstance(m.get("content"), str)]
        return [text for text in found if text.strip()] or ["Hello"]


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]


def read_requests(path: Path, limit: int) -> list[tuple[str, dict[str, Any]]]:
    """Read requests: lines of `{"path": ..., "body": ...}` as `--record` writes them, or bare bodies.

    Raises:
        UsageError: If there are none, or a line is something else.
    """
    requests: list[tuple[str, dict[str, Any]]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            body = row.get("body", row)
            where = row.get("path") or (CHAT if "messages" in body else COMPLETIONS)
            if where not in (CHAT, COMPLETIONS) or not ("messages" in body or "prompt" in body):
                raise ValueError("no messages and no prompt")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} line {number} is no request to {COMPLETIONS} or {CHAT} ({error})") from None
        requests.append((where, body))
    if not requests:
        raise UsageError(f"{path} holds no request; record some with: vocabext serve gateway ... --record "
                         f"{shlex.quote(str(path))}")
    return requests[:limit]
