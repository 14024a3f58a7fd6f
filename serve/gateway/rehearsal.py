"""A rehearsal without users: recorded requests on both arms, and the contract that clients rely on.

Runs against a gateway (both arms are reached by pinning) and never changes its policy.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from vocabext.checkpoint.manifest import read_manifest
from vocabext.errors import ServerError
from vocabext.progress import Progress, no_progress
from vocabext.serve.gateway.contract import FAIL, ITEMS, Item
from vocabext.serve.gateway.replay import Rehearsal, read_requests
from vocabext.serve.provenance import provenance

VERSION = 1


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
