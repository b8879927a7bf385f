"""Examines a Redis server or cluster over separate connections, and tries claims' commands on a scratch key.

It never scans keys, and prefers INFO to CONFIG, which managed services forbid. A refused question is a finding.
"""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from redis import exceptions
from redis.asyncio.connection import AbstractConnection
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from dedup_service.claims import (
    DEFAULT_NAMESPACE,
    Applied,
    Finding,
    Reason,
    Severity,
    StoreUnavailable,
    Transaction,
    system_clock_ms,
)
from dedup_service.stores import stored_value
from dedup_service.stores.redis.cluster import cluster_map, hash_tag_of
from dedup_service.stores.redis.connection import new_connection, parse_info
from dedup_service.stores.redis.findings import TimeSample, judge_info, judge_persistence, judge_time
from dedup_service.stores.redis.replies import time_ms_of
from dedup_service.stores.redis.scripts import RELEASE
from dedup_service.stores.redis.url import ClusterTarget, RedisTarget
from dedup_service.stores.stored_value import KeyLayout, raw_layout

_SAMPLES = 50
# Fewer samples from a distant Redis: the server's start waits for them.
_SAMPLING_S = 0.5

_SCRATCH_TTL_MS = 10_000


async def examine_redis(
    target: RedisTarget,
    layout: KeyLayout,
    timeout_ms: int,
    clock: Callable[[], float] = time.time,
    *,
    min_replicas: int = 0,
    hash_tag: str = "",
) -> list[Finding]:
    """Return the findings on one server. Each reply may take `timeout_ms`; `clock` is this host's.

    A `hash_tag` means that the server should be the cluster node that owns it.

    Raises StoreUnavailable when Redis cannot be reached, refuses the password, or disconnects.
    """
    try:
        async with _connected(target, timeout_ms / 1000) as connection:
            user = target.username or "default"
            return await _Examination(
                connection, user, layout, clock, min_replicas=min_replicas, hash_tag=hash_tag
            ).findings()
    except exceptions.NoPermissionError:
        # Raised only on connecting, where only SELECT requires a right.
        return [_missing_right(target.username or "default", "SELECT")]
    except exceptions.AuthenticationError as error:
        raise StoreUnavailable(
            Reason.STORE_NOT_AUTHENTICATED,
            f"Redis at {target} refused the user name or password of the store URL, correct it: {error}",
            Applied.NO,
        ) from error
    except (exceptions.RedisError, OSError) as error:
        raise StoreUnavailable(
            Reason.STORE_UNREACHABLE,
            f"Redis at {target} cannot be examined, check that it runs and the store URL: {error}",
            Applied.NO,
        ) from error


async def examine_cluster(
    target: ClusterTarget, layout: KeyLayout, timeout_ms: int, min_replicas: int = 0
) -> list[Finding]:
    """Return the findings on a cluster's coverage and masters. Findings on one master name it.

    Raises StoreUnavailable when no node answers, and StoreRefused for a server that is not a cluster node.
    """
    failures: list[str] = []
    for node in target.nodes:
        try:
            state, ranges = await cluster_map(node, timeout_ms / 1000)
        except (exceptions.RedisError, OSError, ValueError) as error:
            failures.append(f"{node.address}: {error or type(error).__name__}")
            continue
        lowest = {server: first for first, _, server in sorted(ranges, key=lambda found: found[0], reverse=True)}
        examinations = [
            _examine_node(server, layout, hash_tag_of(slot), timeout_ms, min_replicas)
            for server, slot in lowest.items()
        ]
        of_nodes = await asyncio.gather(*examinations)
        return [_coverage(state), *_merged(list(lowest), of_nodes)]
    raise StoreUnavailable(
        Reason.CLUSTER_UNREACHABLE,
        f"no node of the Redis cluster can be examined, check that they run ({'; '.join(failures)})",
        Applied.NO,
    )


async def _examine_node(
    server: RedisTarget, layout: KeyLayout, hash_tag: bytes, timeout_ms: int, min_replicas: int
) -> list[Finding]:
    try:
        return await examine_redis(server, layout, timeout_ms, min_replicas=min_replicas, hash_tag=hash_tag.decode())
    except StoreUnavailable as error:
        return [Finding("node", Severity.CRITICAL, f"{error}: claims of its keys are refused.", "read its log")]


def _coverage(state: Mapping[str, str]) -> Finding:
    covered = int(state.get("cluster_slots_ok", "0"))
    if state.get("cluster_state") == "ok" and covered == REDIS_CLUSTER_HASH_SLOTS:
        masters = state.get("cluster_size", "?")
        return Finding("coverage", Severity.OK, f"{masters} masters cover all slots.")
    return Finding(
        "coverage",
        Severity.CRITICAL,
        f"The cluster covers {covered} of {REDIS_CLUSTER_HASH_SLOTS} slots (cluster_state "
        f"{state.get('cluster_state', 'unknown')}): claims of the other keys are refused.",
        "redis-cli --cluster check HOST:PORT shows the slots, and redis-cli --cluster fix HOST:PORT covers them",
    )


def _merged(servers: Sequence[RedisTarget], of_nodes: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Return findings shared by all masters once, others with their master's address."""
    counted = Counter(finding for findings in of_nodes for finding in findings)
    merged: dict[Finding, None] = {}
    for server, findings in zip(servers, of_nodes, strict=True):
        for finding in findings:
            if counted[finding] == len(servers):
                merged[finding] = None
            else:
                merged[replace(finding, message=f"{server.address}: {finding.message}")] = None
    return list(merged)


@asynccontextmanager
async def _connected(target: RedisTarget, timeout_s: float) -> AsyncIterator[AbstractConnection]:
    connection = new_connection(target, timeout_s)
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        yield connection
    finally:
        await connection.disconnect(nowait=True)


def _missing_right(user: str, command: str) -> Finding:
    return Finding(
        "rights",
        Severity.CRITICAL,
        f"The Redis user {user} may not run {command}: calls that need it fail with STORE_NOT_PERMITTED.",
        f"ACL SETUSER {user} +{command.lower()}",
    )


class _Examination:
    """One examination over an open connection."""

    def __init__(
        self,
        connection: AbstractConnection,
        user: str,
        layout: KeyLayout,
        clock: Callable[[], float],
        *,
        min_replicas: int,
        hash_tag: str,
    ) -> None:
        self._connection = connection
        self._user = user
        self._clock = clock
        self._raw = layout is raw_layout
        self._token = secrets.token_urlsafe(16)
        # Unique, and in the default namespace, which every layout accepts.
        self._id = f"dedup-doctor-{secrets.token_hex(8)}{hash_tag}"
        self._min_replicas = min_replicas
        self._is_node = bool(hash_tag)
        self._key = layout(DEFAULT_NAMESPACE, self._id)
        self._refused: dict[str, exceptions.ResponseError] = {}

    async def findings(self) -> list[Finding]:
        info = await self._info()
        if info is None:
            findings = [
                Finding(
                    "info",
                    Severity.INFO,
                    "Version, role, cluster, eviction, persistence and replicas were not checked: the Redis user "
                    f"{self._user} may not run INFO.",
                    f"ACL SETUSER {self._user} +info",
                )
            ]
        else:
            findings = [
                *judge_info(info, self._min_replicas, is_node=self._is_node),
                await self._persistence(info),
            ]
        samples = await self._time_samples()
        not_measured = Finding("clock", Severity.INFO, "Clock and latency were not measured: TIME was refused.")
        return [*findings, *await self._rights(info or {}), *(judge_time(samples) if samples else [not_measured])]

    async def _ask(self, *command: bytes | str | int) -> Any:  # noqa: ANN401 - any reply of Redis
        await self._connection.send_command(*command)
        return await self._connection.read_response()

    async def _info(self) -> dict[str, str] | None:
        try:
            reply: bytes = await self._ask("INFO")
        except exceptions.ResponseError:
            return None
        return parse_info(reply)

    async def _persistence(self, info: dict[str, str]) -> Finding:
        append_only = info.get("aof_enabled") == "1"
        setting = await self._setting("appendfsync" if append_only else "save")
        save, appendfsync = (None, setting) if append_only else (setting, None)
        return judge_persistence(info, save, appendfsync, self._user)

    async def _setting(self, name: str) -> str | None:
        try:
            reply = await self._ask("CONFIG", "GET", name)
        except exceptions.ResponseError:
            return None
        return reply[1].decode() if len(reply) == 2 else None

    async def _time_samples(self) -> list[TimeSample]:
        samples: list[TimeSample] = []
        end = time.monotonic() + _SAMPLING_S
        while len(samples) < _SAMPLES and (not samples or time.monotonic() < end):
            began, began_s = self._clock(), time.monotonic()
            reply = await self._try("TIME")
            if reply is None:
                break
            took_s = time.monotonic() - began_s
            samples.append(TimeSample(took_s, time_ms_of(reply) / 1_000 - (began + took_s / 2)))
        return samples

    async def _try(self, *command: bytes | str | int) -> Any:  # noqa: ANN401 - as _ask
        try:
            return await self._ask(*command)
        except exceptions.NoScriptError:
            # Only the right was tried.
            return None
        except exceptions.ResponseError as error:
            self._refused[str(command[0])] = error
            return None

    async def _rights(self, info: dict[str, str]) -> list[Finding]:
        """Try each command of claims on an expiring scratch key of the layout."""
        now_ms = system_clock_ms()
        scratch = Transaction(
            DEFAULT_NAMESPACE, self._id, self._token, "dedup-service doctor", now_ms, now_ms + _SCRATCH_TTL_MS
        )
        await self._try("SET", self._key, stored_value.encode(scratch), "NX", "GET", "PX", _SCRATCH_TTL_MS)
        await self._try("GET", self._key)
        await self._try("PEXPIRETIME", self._key)
        await self._try("PEXPIREAT", self._key, now_ms + _SCRATCH_TTL_MS)
        if self._min_replicas:
            # With zero replicas it replies at once.
            await self._try("WAIT", 0, 1)
        # Another token releases nothing, and leaves the key to EVAL.
        await self._try("EVALSHA", RELEASE.sha, 1, self._key, secrets.token_urlsafe(16))
        await self._try("EVAL", RELEASE.text, 1, self._key, self._token)
        # The script may have failed to DEL; tried alone, the missing right is clearer.
        await self._try("DEL", self._key)
        denied = {
            name: str(error) for name, error in self._refused.items() if isinstance(error, exceptions.NoPermissionError)
        }
        findings = [_missing_right(self._user, name) for name, text in denied.items() if " key" not in text]
        if len(findings) < len(denied):
            findings.append(self._keys_denied())
        # Other findings already report the refusal of a replica or cluster.
        elsewhere = info.get("role") == "slave" or (info.get("redis_mode") == "cluster" and not self._is_node)
        if self._refused and not denied and not elsewhere:
            name, error = next(iter(self._refused.items()))
            findings.append(
                Finding(
                    "write",
                    Severity.CRITICAL,
                    f"Redis refuses {name} now, which claims need: {error}",
                    "see docs/errors.md and the log of Redis",
                )
            )
        return findings or [Finding("rights", Severity.OK, "The Redis user may run every command of claims.")]

    def _keys_denied(self) -> Finding:
        if self._raw:
            return Finding(
                "rights",
                Severity.INFO,
                f"The Redis user {self._user} may not use the scratch key {self._key.decode()}, so not every right "
                "was tried. In the raw layout its key pattern must cover the ids of the transactions.",
                f"ACL SETUSER {self._user} ~dedup-doctor-*",
            )
        prefix = self._key.decode().removesuffix(f"{DEFAULT_NAMESPACE}:{self._id}")
        return Finding(
            "rights",
            Severity.CRITICAL,
            f"The Redis user {self._user} may not use keys that begin with {prefix}: every claim is refused.",
            f"ACL SETUSER {self._user} ~{prefix}*",
        )
