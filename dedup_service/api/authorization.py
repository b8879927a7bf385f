"""Identification of callers, by bearer token or client certificate, and their right to an rpc."""

import hmac
from collections.abc import Callable, Iterable
from hashlib import sha256

import grpc

from dedup_service.claims import Caller, CallerNotAllowed, CallerUnknown, Policies

AUTHORIZATION = "authorization"
_SCHEME = "bearer "

Context = grpc.aio.ServicerContext[bytes, bytes]


class BearerTokens:
    """The callers' tokens, kept as SHA-256 digests."""

    def __init__(self, digests: Iterable[tuple[bytes, str]]) -> None:
        self._digests = tuple(digests)

    def __len__(self) -> int:
        return len(self._digests)

    def caller_of(self, token: str) -> str | None:
        """Return the caller of a token, in a time that does not depend on the token."""
        digest = sha256(token.encode()).digest()
        found = None
        for known, caller in self._digests:
            if hmac.compare_digest(known, digest):
                found = caller
        return found


class Authorization:
    """Identifies callers, and admits them to the rpcs the policies allow.

    A call with a token belongs to the caller of that token, whatever its certificate says.
    """

    def __init__(self, policies: Callable[[], Policies], tokens: BearerTokens | None = None) -> None:
        self._policies = policies
        self.tokens = tokens
        """May be replaced at any time; None where only certificates count."""

    def identify(self, context: Context) -> Caller:
        """Return the caller, with the rights of the policies in force. Raises CallerUnknown."""
        names = self._names(context)
        callers = self._policies().callers
        if callers is None:
            return Caller(names[0])
        return next((callers[name] for name in names if name in callers), Caller(names[0]))

    def check(self, caller: Caller, rpc: str) -> None:
        """Raise CallerNotAllowed unless the policies allow the caller this rpc."""
        callers = self._policies().callers
        if callers is not None and caller.name not in callers:
            raise CallerNotAllowed(f"{caller.name!r} is not in the policy file of the service: add it as a caller")
        caller.check_rpc(rpc)

    def _names(self, context: Context) -> tuple[str, ...]:
        if self.tokens is not None and (header := _authorization(context)) is not None:
            if header[: len(_SCHEME)].lower() != _SCHEME:
                raise CallerUnknown(f"the metadata {AUTHORIZATION!r} is not a bearer token: send 'Bearer TOKEN'")
            name = self.tokens.caller_of(header[len(_SCHEME) :].strip())
            if name is None:
                raise CallerUnknown("the bearer token is not known here: send one from the token file of the service")
            return (name,)
        if names := _certified_names(context):
            return names
        if self.tokens is None:
            raise CallerUnknown("the client certificate has no name: give it a subject alternative name")
        raise CallerUnknown(f"the call does not identify its caller: send the metadata '{AUTHORIZATION}: Bearer TOKEN'")


def _authorization(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == AUTHORIZATION:
            return value if isinstance(value, str) else ""
    return None


def _certified_names(context: Context) -> tuple[str, ...]:
    facts = context.auth_context()
    # RFC 6125: the common name counts only for certificates without alternative names.
    names = facts.get("x509_subject_alternative_name") or facts.get("x509_common_name") or ()
    return tuple(name.decode("utf-8", "backslashreplace") for name in names if name)
