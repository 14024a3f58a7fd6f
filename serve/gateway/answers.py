"""Errors as OpenAI's clients expect them: a JSON body, in a stream an event."""

import json

Headers = list[tuple[bytes, bytes]]
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error",
         415: "invalid_request_error", 431: "invalid_request_error", 429: "rate_limit_error", 502: "upstream_error",
         503: "overloaded_error", 504: "timeout_error"}


class Refusal(Exception):  # noqa: N818 (an answer, not a fault of ours)
    """A request that is answered with an error.

    Attributes:
        status: The HTTP status.
        message: One line for the client.
        headers: Further headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: Headers | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or []


def error_body(status: int, message: str) -> bytes:
    """Return the JSON body of an error."""
    kind = KINDS.get(status, "server_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


def error_event(status: int, message: str) -> bytes:
    """Return the event that ends a stream which cannot go on; no `[DONE]` follows it.

    The blank line before it ends the event in whose midst the engine may have stopped.
    """
    return b"\n\ndata: " + error_body(status, message) + b"\n\n"
