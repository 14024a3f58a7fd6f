"""One request as the gateway understands it, and as an engine gets it."""

import json
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Protocol

from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.arms import ARMS, Arm

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
GENERATIONS = (COMPLETIONS, CHAT)
PIN_HEADER, USER_HEADER, ARM_HEADER = b"x-vocabext-arm", b"x-vocabext-user", b"x-vocabext-arm"


class Converter(Protocol):
    """Turns an engine's answer into the one that the client asked for."""

    def whole(self, body: bytes) -> bytes:
        """Convert an answer that is no stream."""

    def event(self, data: bytes) -> bytes:
        """Convert the data of one event into no, one or several whole events."""


@dataclass(frozen=True)
class Request:
    """A client's request.

    Attributes:
        path: Such as `/v1/completions`.
        headers: As they came, names in lower case.
        body: As it came.
        document: The body, read.
        started: `time.perf_counter()` on arrival.
    """

    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    document: dict[str, Any]
    started: float

    @property
    def is_generation(self) -> bool:
        """Whether it asks the model for text."""
        return self.path in GENERATIONS

    @property
    def is_greedy(self) -> bool:
        """Whether the same question must have the same answer."""
        return self.document.get("temperature") == 0 and (self.document.get("n") or 1) == 1

    def pin(self) -> str | None:
        """Return the arm that the request asks for, if it does.

        Raises:
            Refusal: 400 if there is no such arm.
        """
        name = dict(self.headers).get(PIN_HEADER)
        if name is None:
            return None
        arm = name.decode("latin-1").strip().lower()
        if arm not in ARMS:
            raise Refusal(400, f"{PIN_HEADER.decode()} is {arm[:40]!r}; it must be {' or '.join(ARMS)}")
        return arm

    def user(self) -> str | None:
        """Return who asks, if the header or the body says it."""
        name = dict(self.headers).get(USER_HEADER)
        if name is not None:
            return name.decode("latin-1")
        user = self.document.get("user")
        return user if isinstance(user, str) and user else None


@dataclass(frozen=True)
class Call:
    """What is sent to an engine.

    Attributes:
        path: Such as `/v1/completions`.
        body: JSON.
        converter: What to do with the answer; None to pass it on as it is.
    """

    path: str
    body: bytes
    converter: Converter | None = None


def parse(body: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        Refusal: 400 if it is none, or names the model by something else than a string.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is no JSON document") from None
    if not isinstance(document, dict):
        raise Refusal(400, f"the body is a JSON {type(document).__name__}, it must be an object")
    if not isinstance(model := document.get("model"), str | None):
        raise Refusal(400, f"model is a JSON {type(model).__name__}, it must be a string")
    return document


def plain_call(request: Request, arm: Arm, names: Container[str]) -> Call:
    """Return a request as an arm's own server gets it: untouched, but for the model's name.

    Args:
        request: The request.
        arm: Who will answer.
        names: The names under which clients may ask for the model.
    """
    asked = request.document.get("model")
    if asked == arm.model or asked not in names:
        return Call(request.path, request.body)
    return Call(request.path, json.dumps({**request.document, "model": arm.model}).encode())
