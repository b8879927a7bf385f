"""Who calls, and what they may ask for. How a caller is known is not its business."""

from contextvars import ContextVar
from dataclasses import dataclass

from dedup_service.claims.errors import CallerNotAllowed


@dataclass(frozen=True, slots=True)
class Caller:
    """A known caller; None stands for every namespace, and for every rpc."""

    name: str
    namespaces: frozenset[str] | None = None
    rpcs: frozenset[str] | None = None

    def check_rpc(self, rpc: str) -> None:
        """Raise CallerNotAllowed for an rpc that this caller may not call."""
        if self.rpcs is not None and rpc not in self.rpcs:
            raise CallerNotAllowed(f"{self.name!r} may not call {rpc}: allow it in the policy file of the service")

    def check_namespace(self, namespace: str) -> None:
        """Raise CallerNotAllowed for a namespace that this caller may not touch."""
        if self.namespaces is not None and namespace not in self.namespaces:
            raise CallerNotAllowed(
                f"{self.name!r} may not use the namespace {namespace!r}: allow it in the policy file of the service"
            )


present_caller: ContextVar[Caller | None] = ContextVar("present_caller", default=None)
"""Who makes the call that is served in this context; None where nobody is asked."""
