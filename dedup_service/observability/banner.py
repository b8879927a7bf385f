"""The greeting of a server started by hand."""

from collections.abc import Sequence

from dedup_service import __version__


def banner(addresses: Sequence[str]) -> str:
    """Return the addresses, and two commands to try."""
    first = addresses[0]
    # grpcurl takes a Unix socket by its path and a flag.
    where = f"-unix {first.removeprefix('unix://')}" if first.startswith("unix:") else first
    return f"""
dedup-service {__version__} is serving on {", ".join(addresses)}. Claim a transaction, then claim it again:

  .venv/bin/dedup-service claim order-1234 --target {first}
  grpcurl -plaintext -d '{{"transaction_id": "order-1234"}}' {where} dedup.v1.DedupService/ClaimTransaction

Stop it with Ctrl-C. Its log follows.

"""
