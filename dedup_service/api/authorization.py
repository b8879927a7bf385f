"""The gate of the rpcs: who calls, by the bearer token of the call or the certificate of its connection."""

import hmac
from collections.abc import Callable, Iterable
from hashlib import sha256

import grpc

from dedup_service.claims import Caller, CallerNotAllowed, CallerUnknown, Policies, present_caller

AUTHORIZATION = "authorization"
_SCHEME = "bearer "

Context = grpc.aio.ServicerContext[bytes, bytes]


class BearerTokens:
    """The callers' tokens, of which only the SHA-256 is kept."""

    def __init__(self, digests: Iterable[tuple[bytes, str]]) -> None:
        self._digests = tuple(digests)

    def __len__(self) -> int:
        return len(self._digests)

    def caller_of(self, token: str) -> str | None:
        """Return whose token this is, in a time that does not say how nearly it is somebody's."""
        digest = sha256(token.encode()).digest()
        found = None
        for known, caller in self._digests:
            if hmac.compare_digest(known, digest):
                found = caller
        return found


class CallerGate:
    """Lets known callers through, to what the rules in force allow them.

    Where there are tokens, a call that carries one is the caller's whose token it is, whatever its certificate says.
    """

    def __init__(self, rules: Callable[[], Policies], tokens: BearerTokens | None = None) -> None:
        self._rules = rules
        self.tokens = tokens
        """May be replaced at any time; None where there are none, so that certificates alone count."""

    def admit(self, rpc: str, context: Context) -> None:
        """Make the caller the present one of this context. Raises CallerUnknown and CallerNotAllowed."""
        names = self._names(context)
        callers = self._rules().callers
        name = names[0] if callers is None else next((name for name in names if name in callers), names[0])
        caller = Caller(name) if callers is None else callers.get(name)
        # Set first, so that the log says who was refused.
        present_caller.set(caller or Caller(name))
        if caller is None:
            raise CallerNotAllowed(f"{name!r} is not in the policy file of the service: add it as a caller")
        caller.check_rpc(rpc)

    def _names(self, context: Context) -> tuple[str, ...]:
        if self.tokens is not None and (header := _authorization(context)) is not None:
            if header[: len(_SCHEME)].lower() != _SCHEME:
                raise CallerUnknown(f"the metadata {AUTHORIZATION!r} is no bearer token: send 'Bearer TOKEN'")
            name = self.tokens.caller_of(header[len(_SCHEME) :].strip())
            if name is None:
                raise CallerUnknown("the bearer token is not known here: send the one that the service was given")
            return (name,)
        if names := _certified_names(context):
            return names
        if self.tokens is None:
            raise CallerUnknown("the client certificate has no name: give it a subject alternative name")
        raise CallerUnknown(f"the call does not say who makes it: send the metadata '{AUTHORIZATION}: Bearer TOKEN'")


def _authorization(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == AUTHORIZATION:
            return value if isinstance(value, str) else ""
    return None


def _certified_names(context: Context) -> tuple[str, ...]:
    facts = context.auth_context()
    # The common name is for certificates of before alternative names, as RFC 6125 has it.
    names = facts.get("x509_subject_alternative_name") or facts.get("x509_common_name") or ()
    return tuple(name.decode("utf-8", "backslashreplace") for name in names if name)
