"""Server-sent events, cut out of bytes as they come: the one place that knows the format.

As the HTML standard has it: a line ends with CR LF, LF or CR, a blank line ends an event, the `data` lines of an event
belong together, and whatever else an event says is not for us. In one point we are more generous: an event that
nothing but the end of the stream ends counts, too.
"""

import re

DONE = b"[DONE]"
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventSplitter:
    """Cuts a stream into the data of its events, wherever the network cuts the bytes."""

    def __init__(self) -> None:
        """Begin before the first byte."""
        self._rest = b""
        self._data: list[bytes] = []
        self._after_cr = False

    def feed(self, part: bytes) -> list[bytes]:
        """Take the next bytes; returns the data of the events that they complete, without white space around it."""
        if not part:
            return []
        if self._after_cr:  # the line has ended already; this is the other half of its CR LF
            part = part.removeprefix(b"\n")
        self._after_cr = part.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + part)
        return [event for line in lines if (event := self._take(line)) is not None]

    def close(self) -> list[bytes]:
        """End the stream; returns the data of the event that no blank line has ended, if there is one."""
        lines, self._rest = (self._rest, b""), b""
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: bytes) -> bytes | None:
        """Take one line; a blank one gives the data of the event that it ends, if that has any."""
        if line:
            name, _, value = line.removeprefix(_BYTE_ORDER_MARK).partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        found, self._data = self._data, []
        return b"\n".join(found).strip() if found else None
