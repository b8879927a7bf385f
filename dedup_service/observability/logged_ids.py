"""How a transaction id stands in the log: so that who has the id finds its lines, and who has a line not the id."""

import hashlib
import hmac


class LoggedIds:
    """How transaction ids stand in the log.

    Plain, or as the first 16 hexadecimal digits of their HMAC-SHA-256 with `key`, without one of their SHA-256. Either
    tells ids apart without showing them, but without a key whoever can list the ids that there may be finds them out.
    """

    def __init__(self, *, plain: bool, key: bytes | None = None) -> None:
        self._plain = plain
        self._key = key

    def shown(self, transaction_id: str) -> str:
        """Return what stands in the log for this id."""
        if self._plain:
            return transaction_id
        spelled = transaction_id.encode("utf-8", "surrogatepass")
        if self._key is None:
            return hashlib.sha256(spelled).hexdigest()[:16]
        return hmac.digest(self._key, spelled, "sha256").hex()[:16]
