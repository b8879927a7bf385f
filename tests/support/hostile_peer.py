"""A peer that speaks HTTP/2 frame by frame, right or wrong, with nothing between it and the socket."""

import socket
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Self

from hpack import Decoder, Encoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame, SettingsFrame

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CLAIM_PATH = "/dedup.v1.DedupService/ClaimTransaction"
# The longest frame that a peer may send unasked.
FRAME_BYTES = 16_384
# What one write may wait for a server that does not read.
_WRITE_TIMEOUT_S = 2.0

Header = tuple[str, str]


class HostilePeer:
    """One connection to a server at host:port, on which anything can be sent; a context manager that closes it."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.socket = socket.create_connection((host.strip("[]"), int(port)), _WRITE_TIMEOUT_S)
        self._encoder = Encoder()
        self._received = b""
        self.messages: list[str] = []
        """The text that came with each status."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def shake_hands(self, settings: dict[int, int] | None = None) -> Self:
        """Send the preface and the settings."""
        self.send(PREFACE, SettingsFrame(0, settings=settings or {}).serialize())
        return self

    def send(self, *chunks: bytes) -> bool:
        """Send all, and tell whether the server took it: not when it hung up or does not read."""
        try:
            self.socket.sendall(b"".join(chunks))
        except OSError:
            return False
        return True

    def block(self, *extra: Header, path: str = CLAIM_PATH) -> bytes:
        """Return the compressed headers of a call. Blocks have to be sent in the order in which they were made."""
        headers = [
            *((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "hostile")),
            *(("content-type", "application/grpc"), ("te", "trailers")),
        ]
        encoded: bytes = self._encoder.encode([*headers, *extra])
        return encoded

    def headers(self, stream: int, *extra: Header, path: str = CLAIM_PATH) -> bytes:
        """Return the frame that begins a call."""
        return HeadersFrame(stream, self.block(*extra, path=path), flags=["END_HEADERS"]).serialize()

    def call(self, stream: int, payload: bytes) -> bytes:
        """Return the frames of a whole claim."""
        return self.headers(stream) + data(stream, grpc_message(payload), end_stream=True)

    def frames(self, silence_s: float) -> Iterator[Frame]:
        """Yield what the server sends, until it hangs up or says nothing for `silence_s`."""
        while self._buffer(9, silence_s):
            frame, length = Frame.parse_frame_header(memoryview(self._received[:9]))
            if not self._buffer(9 + length, silence_s):
                return
            frame.parse_body(memoryview(self._received[9 : 9 + length]))
            self._received = self._received[9 + length :]
            yield frame

    def answers(self, silence_s: float) -> Counter[str]:
        """Return how often the server said what, by its code, until it hangs up or says nothing for `silence_s`."""
        said: Counter[str] = Counter()
        # grpcio names every header of a list that it finds too long.
        decoder = Decoder(max_header_list_size=2**24)
        for frame in self.frames(silence_s):
            if isinstance(frame, HeadersFrame):
                fields = {name.decode(): value.decode() for name, value in decoder.decode(frame.data, raw=True)}
                if (status := fields.get(":status", "200")) != "200":
                    said[f"http {status}"] += 1
                if "grpc-status" in fields:
                    said[f"status {fields['grpc-status']}"] += 1
                    self.messages.append(fields.get("grpc-message", ""))
            elif isinstance(frame, RstStreamFrame):
                said[f"reset {frame.error_code}"] += 1
            elif isinstance(frame, GoAwayFrame):
                said[f"goaway {frame.error_code}"] += 1
        return said

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
    """Return a message as gRPC frames it, or as nobody should: with a flag or a length that is wrong."""
    return struct.pack(">BI", flag, len(payload) if length is None else length) + payload


def data(stream: int, payload: bytes, *, end_stream: bool = False) -> bytes:
    """Return one DATA frame."""
    return DataFrame(stream, payload, flags=["END_STREAM"] if end_stream else []).serialize()


def streams(count: int) -> range:
    """Return the ids of so many streams of a client."""
    return range(1, 2 * count, 2)
