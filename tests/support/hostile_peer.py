"""A peer that sends arbitrary HTTP/2 frames, valid or not, directly on a socket."""

import socket
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Self

from hpack import Decoder, Encoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame, SettingsFrame

from tests.support.polling import wait_until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CLAIM_PATH = "/dedup.v1.DedupService/ClaimTransaction"
# The default maximum frame size of HTTP/2.
FRAME_BYTES = 16_384
# A server with many new connections takes its time.
_CONNECT_TIMEOUT_S = 60.0
# Timeout of one write to a server that does not read.
_WRITE_TIMEOUT_S = 2.0

Header = tuple[str, str]


class HostilePeer:
    """One connection to a server at host:port, as a context manager that closes it."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.socket = socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S)
        self.socket.settimeout(_WRITE_TIMEOUT_S)
        self._encoder = Encoder()
        # grpcio's rejection of a header list that is too long names every header.
        self._decoder = Decoder(max_header_list_size=2**24)
        self._received = b""
        self.messages: list[str] = []
        """The grpc-message of each status."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def shake_hands(self, settings: dict[int, int] | None = None) -> Self:
        """Send the preface and the settings."""
        self.send(PREFACE, SettingsFrame(0, settings=settings or {}).serialize())
        return self

    def send(self, *chunks: bytes) -> bool:
        """Send all chunks; return False if the server closed the connection or does not read."""
        try:
            self.socket.sendall(b"".join(chunks))
        except OSError:
            return False
        return True

    def block(self, *extra: Header, path: str = CLAIM_PATH) -> bytes:
        """Return the compressed headers of a call. Blocks must be sent in the order of their creation."""
        headers = [
            *((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "hostile")),
            *(("content-type", "application/grpc"), ("te", "trailers")),
        ]
        encoded: bytes = self._encoder.encode([*headers, *extra])
        return encoded

    def headers(self, stream: int, *extra: Header, path: str = CLAIM_PATH) -> bytes:
        """Return the HEADERS frame of a call."""
        return HeadersFrame(stream, self.block(*extra, path=path), flags=["END_HEADERS"]).serialize()

    def call(self, stream: int, payload: bytes) -> bytes:
        """Return the frames of a complete claim."""
        return self.headers(stream) + data(stream, grpc_message(payload), end_stream=True)

    def frames(self, silence_s: float) -> Iterator[Frame]:
        """Yield frames of the server until it closes the connection or sends nothing for `silence_s`."""
        while self._buffer(9, silence_s):
            frame, length = Frame.parse_frame_header(memoryview(self._received[:9]))
            if not self._buffer(9 + length, silence_s):
                return
            frame.parse_body(memoryview(self._received[9 : 9 + length]))
            self._received = self._received[9 + length :]
            yield frame

    def answers(self, silence_s: float) -> Counter[str]:
        """Count the answers by code until the server closes the connection or sends nothing for `silence_s`."""
        answers: Counter[str] = Counter()
        for frame in self.frames(silence_s):
            if isinstance(frame, HeadersFrame):
                fields = {name.decode(): value.decode() for name, value in self._decoder.decode(frame.data, raw=True)}
                if (status := fields.get(":status", "200")) != "200":
                    answers[f"http {status}"] += 1
                if "grpc-status" in fields:
                    answers[f"status {fields['grpc-status']}"] += 1
                    self.messages.append(fields.get("grpc-message", ""))
            elif isinstance(frame, RstStreamFrame):
                answers[f"reset {frame.error_code}"] += 1
            elif isinstance(frame, GoAwayFrame):
                answers[f"goaway {frame.error_code}"] += 1
        return answers

    def answer(self) -> Counter[str]:
        """Wait for an answer, and return the answers."""
        answers: Counter[str] = Counter()
        wait_until(lambda: answers.update(self.answers(0.1)) or answers, what="an answer")
        return answers

    def _buffer(self, length: int, silence_s: float) -> bool:
        self.socket.settimeout(silence_s)
        try:
            while len(self._received) < length:
                chunk = self.socket.recv(65_536)
                if not chunk:
                    return False
                self._received += chunk
        except OSError:
            return False
        finally:
            self.socket.settimeout(_WRITE_TIMEOUT_S)
        return True


def grpc_message(payload: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """Return a message in gRPC framing; `flag` and `length` can make the frame invalid."""
    return struct.pack(">BI", flag, len(payload) if length is None else length) + payload


def data(stream: int, payload: bytes, *, end_stream: bool = False) -> bytes:
    """Return one DATA frame."""
    return DataFrame(stream, payload, flags=["END_STREAM"] if end_stream else []).serialize()


def streams(count: int) -> range:
    """Return the ids of `count` client streams."""
    return range(1, 2 * count, 2)
