"""What applies to the claims of a namespace: how long they live, and whether the guard bites yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dedup_service.claims.errors import FieldViolation, InvalidRequest


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one namespace; times are milliseconds.

    `retention_ms` is how long a completed transaction is remembered when its holder does not say. In shadow mode a
    duplicate is told CLAIMED, marked as one that enforce mode would have refused.
    """

    default_ttl_ms: int
    max_ttl_ms: int
    retention_ms: int
    shadow: bool = False


@dataclass(frozen=True, slots=True)
class Policies:
    """The rules of every namespace: `default` for those without their own, where `allow_unknown` lets them in."""

    default: Policy
    namespaces: Mapping[str, Policy] = field(default_factory=dict)
    allow_unknown: bool = True

    def of(self, namespace: str) -> Policy:
        """Return the policy of a namespace; raise InvalidRequest for an unknown one where they are refused."""
        policy = self.namespaces.get(namespace)
        if policy is not None:
            return policy
        if self.allow_unknown:
            return self.default
        raise InvalidRequest(
            FieldViolation("namespace", f"{namespace!r} is not known here: add it to the policy file of the service")
        )
