"""The API keys of clients, and the one that the engines get."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vocabext.errors import UsageError
from vocabext.serve.gateway.answers import Refusal

KEYS_SECONDS = 1.0  # how often the file of keys is looked at


class Keys:
    """The API keys that clients may send."""

    def __init__(self, own: str | None, path: Path | None, note: Callable[[str], None] = lambda message: None) -> None:
        """Read the keys.

        Args:
            own: The engines' key; the clients' as well, unless there is a file.
            path: A file with one key per line; blank lines and those that begin with # are none. It is read again
                when it has changed.
            note: Told when the file cannot be read any more.

        Raises:
            UsageError: If a key has a character that no header can carry, or the file cannot be read or holds none.
        """
        self._path, self._note, self._looked, self._stamp, self._fault = path, note, 0.0, (0, 0), ""
        self.for_engines = own
        if own is not None:
            _check_key(own, "the key in VOCABEXT_API_KEY")
        self._names = {} if own is None else _named([own])
        if path is not None:
            self._names = self._read(path)
            if not self._names:
                raise UsageError(f"{path} holds no key; write one per line")

    @property
    def are_asked_for(self) -> bool:
        """Whether clients need a key."""
        return self._path is not None or bool(self._names)

    @property
    def are_several(self) -> bool:
        """Whether clients come with different keys."""
        return len(self._names) > 1

    def check(self, headers: dict[bytes, bytes]) -> str:
        """Return the name of a request's key, empty if none is needed.

        Raises:
            Refusal: 401 if the key is missing or wrong.
        """
        if not self.are_asked_for:
            return ""
        self._read_again()
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        name = self._names.get(hashlib.sha256(given.strip()).digest())  # what is compared is no prefix of a key
        if scheme.lower() != b"bearer" or name is None:
            raise Refusal(401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                          [(b"www-authenticate", b"Bearer")])
        return name

    def toward_engine(self, headers: dict[str, str]) -> dict[str, str]:
        """Return headers with the engines' key in place of a client's, where clients have keys of their own."""
        if self._path is None:
            return headers
        rest = {name: value for name, value in headers.items() if name != "authorization"}
        return rest if self.for_engines is None else {**rest, "authorization": f"Bearer {self.for_engines}"}

    def _read(self, path: Path) -> dict[bytes, str]:
        try:
            found = path.stat()
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the keys in {path} cannot be read ({getattr(error, 'strerror', None) or error})"
                             ) from None
        self._stamp = (found.st_mtime_ns, found.st_size)
        keys = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        for number, key in keys:
            if not key.startswith("#"):
                _check_key(key, f"the key in {path} line {number}")
        return _named([key for _, key in keys if not key.startswith("#")])

    def _read_again(self) -> None:
        """Read the file again if it has changed; keep the keys if it cannot be read."""
        now = time.monotonic()
        if self._path is None or now - self._looked < KEYS_SECONDS:
            return
        self._looked, fault = now, ""
        try:
            found = self._path.stat()
            if (found.st_mtime_ns, found.st_size) != self._stamp:
                self._names = self._read(self._path)
        except OSError as error:
            fault = f"the keys in {self._path} cannot be read ({error.strerror}); the keys stay as they were"
        except UsageError as error:
            fault = f"{error}; the keys stay as they were"
        if fault and fault != self._fault:
            self._note(fault)
        self._fault = fault


def _check_key(key: str, name: str) -> None:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{name} has a space, a line break or a character that is not ASCII; no client can send it")


def _named(keys: Sequence[str]) -> dict[bytes, str]:
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    return {digest: digest.hex()[:16] for digest in digests}
