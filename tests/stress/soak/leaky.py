"""The service with a memory leak: `python -m tests.stress.soak.leaky serve …` keeps the bytes of every request."""

from typing import Any

from dedup_service import cli
from dedup_service.api.endpoint import Context, Endpoint

_serve = Endpoint.serve
_kept: list[bytes] = []


async def _serve_and_keep(self: Endpoint[Any], raw: bytes, context: Context) -> bytes:
    _kept.append(raw)
    return await _serve(self, raw, context)


if __name__ == "__main__":
    Endpoint.serve = _serve_and_keep  # type: ignore[method-assign]
    cli.main()
