"""A rehearsal without users: recorded requests on both arms, and the contract that clients rely on.

Runs against a gateway (both arms are reached by pinning) and never changes its policy. Each item of the contract
(contract.py) gets a verdict:

    pass          both arms keep it
    differs       both keep it, and the numbers differ by nature; says how
    FAIL          the expanded arm breaks what the base arm keeps; the base arm's own faults are none
    not checked   the base arm does not do it either, or it needs something that is not there; says what
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from serve.gateway.arms import ARMS, BASE, EXPANDED
from serve.gateway.calls import CHAT, COMPLETIONS
from serve.provenance import provenance
from vocabext.checkpoint.manifest import Manifest, read_manifest
from vocabext.errors import ServerError, UsageError
from vocabext.progress import Progress, no_progress

PASS, DIFFERS, FAIL, NOT_CHECKED = "pass", "differs", "FAIL", "not checked"
VERSION = 1


@dataclass(frozen=True)
class Item:
    """The verdict on one part of the contract.

    Attributes:
        name: What clients rely on.
        verdict: `pass`, `differs`, `FAIL` or `not checked`.
        detail: What was found, with numbers, and what it means for clients.
        checked: How many requests or tokens were tried.
        examples: What went wrong, at most three.
    """

    name: str
    verdict: str
    detail: str
    checked: int = 0
    examples: tuple[str, ...] = ()


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
        raise UsageError(f"{path} holds no request; record some with: vocabext serve gateway ... --record {path}")
    return requests[:limit]


def swap_test(
    requests_path: Path, url: str, expanded: Path, *, limit: int = 50, timeout_seconds: float = 300.0,
    api_key: str | None = None, progress: Progress = no_progress,
) -> dict[str, Any]:
    """Rehearse a swap.

    Args:
        requests_path: JSON Lines of requests.
        url: The gateway, with or without `/v1`.
        expanded: The expanded model's folder, for its vocabext.json.
        limit: How many requests to replay at most.
        timeout_seconds: How long one request may take.
        api_key: What the gateway wants to be told.
        progress: Told of every item.

    Returns:
        The content of swap.json.

    Raises:
        UsageError: If the requests or the folder cannot be used.
        ServerError: If there is no gateway.
    """
    from serve.gateway.contract import ITEMS

    requests, manifest = read_requests(requests_path, limit), read_manifest(expanded)
    url = url.rstrip("/").removesuffix("/v1")
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=timeout_seconds, trust_env=False) as client:
        model, context = _model(client, url)
        rehearsal = Rehearsal(client, requests, manifest, model, context)
        items = []
        with progress("rehearsing", len(ITEMS)) as task:
            for name, check in ITEMS.items():
                items.append(checked(name, check, rehearsal))
                task.advance(1)
    return {"artifact": "swap", "version": VERSION, "model": str(expanded), "url": url, "requests": len(requests),
            "new_tokens": len(manifest.tokens), "passed": all(item.verdict != FAIL for item in items),
            "items": [asdict(item) for item in items], "provenance": provenance()}


def checked(name: str, check: Callable[[Rehearsal], Item], rehearsal: Rehearsal) -> Item:
    """Check one item; an answer without the parts that it must have is a broken contract, not a crash."""
    try:
        return check(rehearsal)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return Item(name, FAIL, f"an answer could not be read ({type(error).__name__}: {error})")


def _model(client: httpx.Client, url: str) -> tuple[str, int]:
    try:
        answer = client.get("/v1/models")
        answer.raise_for_status()
        card = answer.json()["data"][0]
        return str(card["id"]), int(card.get("max_model_len") or 0)
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise ServerError(f"no gateway answers at {url} ({error}); start one with: vocabext serve gateway") from None


__all__ = ["ARMS", "BASE", "DIFFERS", "EXPANDED", "FAIL", "NOT_CHECKED", "PASS", "Item", "Rehearsal", "Reply",
           "swap_test"]
