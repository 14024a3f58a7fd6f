"""Calls to servers on this machine, past any proxy."""

import urllib.request
from collections.abc import Mapping
from http.client import HTTPResponse


def open_url_with(
    url: str, headers: Mapping[str, str], *, body: bytes | None = None, timeout_seconds: float = 60.0
) -> HTTPResponse:
    """Open a URL with headers; with a body it is a POST of JSON."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    response: HTTPResponse = opener.open(request, timeout=timeout_seconds)
    return response
