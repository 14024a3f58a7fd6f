"""One request as the gateway understands it, and as an engine gets it."""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from msgspec import Raw

from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.arms import ARMS, Arm

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
GENERATIONS = (COMPLETIONS, CHAT)
# What one request may hold. An empty object takes 3 bytes on the wire and some 70 in memory.
MAX_DEPTH, MAX_CONTAINERS = 64, 10_000
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
PIN_HEADER, USER_HEADER, ARM_HEADER = b"x-vocabext-arm", b"x-vocabext-user", b"x-vocabext-arm"


class Converter(Protocol):
    """Turns an engine's answer into the one that the client asked for."""

    def whole(self, body: bytes) -> bytes:
        """Convert an answer that is no stream."""

    def event(self, data: bytes) -> bytes:
        """Convert the data of one event into no, one or several whole events."""


class Fields(Mapping[str, Any]):
    """A JSON object whose values are read when somebody asks for them.

    A body of 1 MiB takes 2 ms and no memory that way; as Python objects up to 18 ms, and 28 times its size.
    """

    def __init__(self, raw: dict[str, Raw]) -> None:
        """Take over fields that have not been read."""
        self._raw = raw

    def __getitem__(self, name: str) -> Any:
        """Read a field.

        Raises:
            Refusal: 400 if its text is not UTF-8, or a number has too many digits.
        """
        try:
            return msgspec.json.decode(self._raw[name])
        except (ValueError, RecursionError):
            raise Refusal(400, f"the field {name[:40]!r} cannot be read: text must be UTF-8 without half surrogate "
                               "pairs, numbers must fit into 64 bits") from None

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._raw)

    def __len__(self) -> int:
        """Count the fields."""
        return len(self._raw)

    def rows(self, name: str) -> int:
        """Count the values of a field that is a list of texts or lists, without reading them; 1 for anything else."""
        text = bytes(self._raw.get(name, b""))
        if not text.startswith(b"[") or text.find(b'"') < 0 > text.find(b"[", 1):
            return 1
        return len(msgspec.json.decode(text, type=list[Raw]))

    def with_value(self, name: str, value: str) -> bytes:
        """Return the object as JSON, with one field changed."""
        return msgspec.json.encode({**self._raw, name: value})


@dataclass(frozen=True)
class Request:
    """A client's request.

    Attributes:
        path: Such as `/v1/completions`.
        headers: As they came, names in lower case.
        body: As it came.
        document: The body's fields.
        started: `time.perf_counter()` on arrival.
        forwarded: The headers that the engine gets.
        key: Names the API key that it came with; empty where there is but one, or none.
    """

    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    document: Fields
    started: float
    forwarded: dict[str, str] = field(default_factory=dict)
    key: str = ""

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


def parse(body: bytes, max_prompts: int) -> Fields:
    """Read the names of a JSON object's fields, and check what can be checked without reading their values.

    Args:
        body: The object.
        max_prompts: How many prompts one request may have.

    Raises:
        Refusal: 400 if it is none, nests deeply, holds too many objects, lists or prompts, or names the model by
            something else than a string.
    """
    try:
        fields = Fields(_FIELDS.decode(body))
        num_prompts = fields.rows("prompt")
    except msgspec.ValidationError:
        raise Refusal(400, f"the body is a JSON {type(_first_value(body)).__name__}, it must be an object") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON document ({error})") from None
    _check_shape(body)
    if num_prompts > max_prompts:
        raise Refusal(400, f"the request has {num_prompts} prompts, the limit is {max_prompts}; send several requests")
    if not isinstance(model := fields.get("model"), str | None):
        raise Refusal(400, f"model is a JSON {type(model).__name__}, it must be a string")
    return fields


_FIELDS = msgspec.json.Decoder(dict[str, Raw])


def _first_value(body: bytes) -> Any:
    """Return a value of the kind of a document, which may be large."""
    start = body.lstrip()[:1]
    return [] if start == b"[" else msgspec.json.decode(body)


def _check_shape(body: bytes) -> None:
    """Refuse a document that nests deeply, or holds very many objects and lists.

    Raises:
        Refusal: 400.
    """
    if body.count(b"{") + body.count(b"[") <= MAX_DEPTH:
        return
    bare = _STRING.sub(b"", body)
    if (number := bare.count(b"{") + bare.count(b"[")) > MAX_CONTAINERS:
        raise Refusal(400, f"the body has {number} objects and lists, the limit is {MAX_CONTAINERS}")
    depth = deepest = 0
    for found in _BRACKET.finditer(bare):
        depth += 1 if found[0] in b"{[" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise Refusal(400, f"the body nests {deepest} deep, the limit is {MAX_DEPTH}")


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
    return Call(request.path, request.document.with_value("model", arm.model))
