"""The rules of each namespace, and what each caller may ask for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dedup_service.claims.errors import CallerNotAllowed, FieldViolation, InvalidRequest

# Errors travel in metadata, which has narrow limits. No valid namespace is longer.
_SHOWN = 63


@dataclass(frozen=True, slots=True)
class Caller:
    """An identified caller; None allows every namespace, or every rpc."""

    name: str
    namespaces: frozenset[str] | None = None
    rpcs: frozenset[str] | None = None

    def check_rpc(self, rpc: str) -> None:
        """Raise CallerNotAllowed for an rpc this caller may not call."""
        if self.rpcs is not None and rpc not in self.rpcs:
            raise CallerNotAllowed(f"{self.name!r} may not call {rpc}: allow it in the policy file of the service")

    def check_namespace(self, namespace: str) -> None:
        """Raise CallerNotAllowed for a namespace this caller may not use."""
        if self.namespaces is not None and namespace not in self.namespaces:
            raise CallerNotAllowed(
                f"{self.name!r} may not use the namespace {namespace[:_SHOWN]!r}: allow it in the policy file of the "
                "service"
            )


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one namespace; times are milliseconds.

    `retention_ms` applies where the holder sets none. In shadow mode a duplicate receives CLAIMED, marked as one that
    enforce mode would have refused.
    """

    default_ttl_ms: int
    max_ttl_ms: int
    retention_ms: int
    shadow: bool = False


@dataclass(frozen=True, slots=True)
class Policies:
    """The rules of every namespace; `default` is for those without their own, if `allow_unknown` admits them.

    `callers` maps names to rights; None where every identified caller may ask for everything.
    """

    default: Policy
    namespaces: Mapping[str, Policy] = field(default_factory=dict)
    allow_unknown: bool = True
    callers: Mapping[str, Caller] | None = None

    def of(self, namespace: str, caller: Caller | None = None) -> Policy:
        """Return the policy of a namespace for a caller; None is a caller without a name and without limits.

        Raises CallerNotAllowed when the caller may not use the namespace, and InvalidRequest for an unknown namespace
        where those are rejected.
        """
        if self.callers is not None and caller is not None:
            caller.check_namespace(namespace)
        policy = self.namespaces.get(namespace)
        if policy is not None:
            return policy
        if self.allow_unknown:
            return self.default
        unknown = f"{namespace[:_SHOWN]!r} is not known here: add it to the policy file of the service"
        raise InvalidRequest(FieldViolation("namespace", unknown))
