"""Policies and tokens from the operator's files, read at the start and again on SIGHUP."""

import asyncio
from collections.abc import Iterator

from dedup_service.api.authorization import Authorization, BearerTokens
from dedup_service.api.servicer import METHODS
from dedup_service.claims import Caller, ClaimService, Policies, Policy
from dedup_service.claims.limits import namespace_fault
from dedup_service.config.durations import format_duration
from dedup_service.config.errors import BadSettings
from dedup_service.config.files import read_tokens
from dedup_service.config.policy_file import NamespaceRules, read_policy_file, unusable
from dedup_service.config.settings import ENV_PREFIX, Settings
from dedup_service.observability.logs import Logger


def load_policies(settings: Settings) -> Policies:
    """Return the rules of every namespace: those of the policy file over those of the settings.

    Raises BadSettings with one sentence that names the file and every fault in it; then nothing of it applies.
    """
    default = Policy(settings.default_ttl, settings.max_ttl, settings.retention_under(settings.max_ttl))
    path = settings.policy_file
    if path is None:
        return Policies(default)
    file = read_policy_file(path, namespace_fault=namespace_fault, rpcs=METHODS)
    policies = {name: _policy(rules, settings) for name, rules in file.namespaces.items()}
    if sentences := [
        text for name, rules in file.namespaces.items() for text in _contradictions(name, rules, policies[name])
    ]:
        raise unusable(path, "; ".join(sentences))
    if file.callers is None:
        return Policies(default, policies, file.allow_unknown_namespaces)
    if not settings.authenticates:
        raise unusable(
            path,
            f"it has callers, but callers are not authenticated: set {ENV_PREFIX}TLS_CLIENT_CA or "
            f"{ENV_PREFIX}AUTH_TOKENS",
        )
    callers = {name: Caller(name, rules.namespaces, rules.rpcs) for name, rules in file.callers.items()}
    return Policies(default, policies, file.allow_unknown_namespaces, callers)


def make_authorization(settings: Settings, claims: ClaimService) -> Authorization | None:
    """Return the authorization of the settings, under the policies in force; None where callers are not identified."""
    if not settings.authenticates:
        return None
    tokens = None if settings.auth_tokens is None else BearerTokens(read_tokens(settings.auth_tokens).items())
    return Authorization(lambda: claims.policies, tokens)


def log_policies(settings: Settings, claims: ClaimService, log: Logger) -> None:
    """Log the rules in force, and what shadow mode has let through so far; nothing without a policy file."""
    if settings.policy_file is None:
        return
    log.info(
        "policy_loaded",
        file=str(settings.policy_file),
        namespaces=sorted(claims.policies.namespaces),
        allow_unknown_namespaces=claims.policies.allow_unknown,
        shadow_duplicates=dict(claims.shadow_duplicates),
        **({} if claims.policies.callers is None else {"callers": sorted(claims.policies.callers)}),
    )


async def reload_when_requested(
    requested: asyncio.Event,
    settings: Settings,
    claims: ClaimService,
    authorization: Authorization | None,
    log: Logger,
) -> None:
    """Reload tokens and policies at each request, for ever; a file that is not usable is logged and changes nothing."""
    while True:
        await requested.wait()
        # Before reading: a signal during it may be about a newer file.
        requested.clear()
        # In threads, since calls must not wait for a slow disk.
        if authorization is not None and settings.auth_tokens is not None:
            try:
                digests = await asyncio.to_thread(read_tokens, settings.auth_tokens)
            except BadSettings as error:
                log.error("tokens_reload_failed", file=str(settings.auth_tokens), message=str(error))  # noqa: TRY400 - one sentence
            else:
                authorization.tokens = BearerTokens(digests.items())
                log.info("tokens_loaded", file=str(settings.auth_tokens), tokens=len(authorization.tokens))
        if settings.policy_file is not None:
            try:
                claims.policies = await asyncio.to_thread(load_policies, settings)
            except BadSettings as error:
                log.error("policy_reload_failed", file=str(settings.policy_file), message=str(error))  # noqa: TRY400 - as above
            else:
                log_policies(settings, claims, log)
        elif settings.auth_tokens is None:
            log.info("policy_reload_skipped", message="SIGHUP changes nothing: no policy file is set")


def _policy(rules: NamespaceRules, settings: Settings) -> Policy:
    max_ttl = rules.max_ttl or settings.max_ttl
    return Policy(
        default_ttl_ms=rules.default_ttl or settings.default_ttl,
        max_ttl_ms=max_ttl,
        retention_ms=rules.retention or settings.retention_under(max_ttl),
        shadow=rules.mode == "shadow",
    )


def _contradictions(name: str, rules: NamespaceRules, policy: Policy) -> Iterator[str]:
    longest = _value("max_ttl", rules.max_ttl, policy.max_ttl_ms)
    for key, written, ms in (
        ("default_ttl", rules.default_ttl, policy.default_ttl_ms),
        ("retention", rules.retention, policy.retention_ms),
    ):
        if ms > policy.max_ttl_ms:
            yield (
                f"namespace {name!r}: {_value(key, written, ms)} is longer than {longest}: "
                f"write a {key} of at most {format_duration(policy.max_ttl_ms)}, or a longer max_ttl"
            )


def _value(key: str, written: int | None, ms: int) -> str:
    origin = f", from {ENV_PREFIX}{key.upper()}" if written is None else ""
    return f"{key} ({format_duration(ms)}{origin})"
