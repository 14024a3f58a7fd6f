"""uvicorn's servers, with two changes: headers have a limit while they arrive, and signals are ours."""

import contextlib
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vocabext.serve.gateway.answers import error_body


def limited_protocol(header_bytes: int) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with a limit on the bytes of headers that are not complete.

    uvicorn's parser in C keeps an endless header in memory; a check after parsing would come too late.
    """

    class Limited(HttpToolsProtocol):
        _head_bytes = 0
        _part_bytes = 0
        _in_head = True

        def data_received(self, data: bytes) -> None:
            self._part_bytes = len(data)
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > header_bytes and not self.transport.is_closing():
                body = error_body(431, f"the headers have more than {header_bytes} bytes")
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
                    b"connection: close\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            # The part in which it begins counts as a whole: where in it the message begins is not told.
            self._head_bytes, self._in_head = self._part_bytes, True

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

    return Limited


class QuietServer(uvicorn.Server):
    """A server that leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
