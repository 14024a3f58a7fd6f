"""What an answer was: read from the bytes that were passed on, after they were passed on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vocabext.serve.gateway.events import DONE, EventSplitter

KEPT_BYTES = 8 * 2**20  # of one answer; what is longer is served all the same, and not looked into


@dataclass(frozen=True)
class Observation:
    """One answer, as the canary sees it.

    Attributes:
        arm: Who answered.
        failed: Whether the engine failed: a status from 500 on, silence, an answer that broke off.
        refused: Whether the engine refused the request: a status from 400 on, but for 429, which is about the client.
        seconds: From the request's arrival to the last byte.
        first_text_seconds: To the first character of the answer; None where it was not streamed, or had no text.
        characters: Of all choices together.
        text: The text of the first choice.
        finish_reason: Of the first choice.
        counted: Whether it was a generation with status 200 that could be read.
        left: Whether the client left, after it had waited in vain; then `failed` is true as well.
        alike: Whether both arms bore like loads while it was made (load.py): else its times are not compared.
    """

    arm: str
    failed: bool
    seconds: float
    first_text_seconds: float | None = None
    characters: int = 0
    text: str = ""
    finish_reason: str | None = None
    counted: bool = False
    refused: bool = False
    alike: bool = True
    left: bool = False

    @property
    def tells(self) -> bool:
        """Whether it says something about its arm."""
        return self.failed or self.refused or self.counted


def failure(arm: str, seconds: float, *, left: bool = False) -> Observation:
    """Return the observation of an answer that an engine failed to give, or that a client did not wait for."""
    return Observation(arm, True, seconds, left=left)


def observe(
    arm: str, status: int, parts: Sequence[tuple[float, bytes]], seconds: float, *, streamed: bool
) -> Observation:
    """Read an answer.

    Args:
        arm: Who answered.
        status: The HTTP status.
        parts: The body in parts, each with the seconds after which it came.
        seconds: The seconds after which it was complete.
        streamed: Whether the body is a stream of events.
    """
    if status != 200:
        return Observation(arm, status >= 500, seconds, refused=400 <= status < 500 and status != 429)
    if not streamed:
        return _from_document(arm, b"".join(part for _, part in parts), seconds)
    return _from_events(arm, parts, seconds)


def _from_document(arm: str, body: bytes, seconds: float) -> Observation:
    try:
        choices = json.loads(body)["choices"]
        texts = [choice_text(choice) for choice in choices]
        return Observation(arm, False, seconds, None, sum(map(len, texts)), texts[0], choices[0].get("finish_reason"),
                           True)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return Observation(arm, True, seconds)


def _from_events(arm: str, parts: Sequence[tuple[float, bytes]], seconds: float) -> Observation:
    texts: dict[int, list[str]] = {}
    first, reason, failed, done = None, None, False, False
    for when, event in events_of(parts):
        if event == DONE:
            done = True
            continue
        try:
            document = json.loads(event)
            failed = failed or "error" in document
            for choice in document.get("choices") or ():
                text = choice_text(choice)
                texts.setdefault(choice.get("index", 0), []).append(text)
                first = when if text and first is None else first
                if choice.get("index", 0) == 0:
                    reason = choice.get("finish_reason") or reason
        except (ValueError, TypeError, AttributeError):
            failed = True
    whole = {index: "".join(written) for index, written in texts.items()}
    if failed or not done:
        return Observation(arm, True, seconds)
    return Observation(arm, False, seconds, first, sum(map(len, whole.values())), whole.get(0, ""), reason, True)


def choice_text(choice: dict[str, Any]) -> str:
    """Return the text of a choice of any kind: of a completion, a chat, or a part of a streamed chat."""
    if "text" in choice:
        return choice["text"] or ""
    message = choice.get("message") or choice.get("delta") or {}
    calls = message.get("tool_calls") or ()
    return (message.get("content") or "") + "".join((c.get("function") or {}).get("arguments") or "" for c in calls)


def events_of(parts: Sequence[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """Cut a stream into the data of its events, each with the time at which it was complete."""
    splitter, found, when = EventSplitter(), [], 0.0
    for when, part in parts:
        found += [(when, data) for data in splitter.feed(part)]
    return found + [(when, data) for data in splitter.close()]
