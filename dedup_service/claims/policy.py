"""What applies to the claims of a namespace: how long they live, whether the guard bites yet, and who may use it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dedup_service.claims.callers import Caller, present_caller
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
    """The rules of every namespace: `default` for those without their own, where `allow_unknown` lets them in.

    `callers` has what each caller may ask for, by name; None where every known caller may ask for everything.
    """

    default: Policy
    namespaces: Mapping[str, Policy] = field(default_factory=dict)
    allow_unknown: bool = True
    callers: Mapping[str, Caller] | None = None

    def of(self, namespace: str) -> Policy:
        """Return the policy of a namespace, without which nothing can be asked of it.

        Raises CallerNotAllowed when the present caller may not touch it, and InvalidRequest for an unknown one where
        they are refused.
        """
        if self.callers is not None and (caller := present_caller.get()) is not None:
            caller.check_namespace(namespace)
        policy = self.namespaces.get(namespace)
        if policy is not None:
            return policy
        if self.allow_unknown:
            return self.default
        raise InvalidRequest(
            FieldViolation("namespace", f"{namespace!r} is not known here: add it to the policy file of the service")
        )
