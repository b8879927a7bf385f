"""Examines a Redis Cluster: whether it covers all keys and can lose a node, and each of its masters as a server."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from redis import exceptions
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from dedup_service.claims import Applied, Finding, Reason, Severity, StoreUnavailable
from dedup_service.stores.keys import KeyLayout
from dedup_service.stores.redis.cluster import cluster_map, mark_of
from dedup_service.stores.redis.doctor import examine_redis
from dedup_service.stores.redis.url import ClusterTarget, RedisTarget


async def examine_cluster(
    target: ClusterTarget, layout: KeyLayout, timeout_ms: int, min_replicas: int = 0
) -> list[Finding]:
    """Return what is found in the cluster; findings of one of its masters name it.

    Raises StoreUnavailable when no node answers, and StoreRefused when one is no node of a cluster.
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
            _examine_node(server, layout, mark_of(slot), timeout_ms, min_replicas) for server, slot in lowest.items()
        ]
        of_nodes = await asyncio.gather(*examinations)
        return [_coverage(state), *_merged(list(lowest), of_nodes)]
    raise StoreUnavailable(
        Reason.CLUSTER_UNREACHABLE, f"no node of the Redis cluster can be examined ({'; '.join(failures)})", Applied.NO
    )


async def _examine_node(
    server: RedisTarget, layout: KeyLayout, mark: bytes, timeout_ms: int, min_replicas: int
) -> list[Finding]:
    try:
        return await examine_redis(server, layout, timeout_ms, min_replicas=min_replicas, mark=mark.decode())
    except StoreUnavailable as error:
        return [Finding("node", Severity.CRITICAL, f"{error}: claims of its keys are refused.", "see its log")]


def _coverage(state: Mapping[str, str]) -> Finding:
    covered = int(state.get("cluster_slots_ok", "0"))
    if state.get("cluster_state") == "ok" and covered == REDIS_CLUSTER_HASH_SLOTS:
        masters = state.get("cluster_size", "?")
        return Finding("coverage", Severity.OK, f"The cluster is in order: {masters} masters cover all slots.")
    return Finding(
        "coverage",
        Severity.CRITICAL,
        f"The cluster covers {covered} of {REDIS_CLUSTER_HASH_SLOTS} slots (cluster_state "
        f"{state.get('cluster_state', 'unknown')}): claims of the other keys are refused.",
        "redis-cli --cluster check HOST:PORT says which, and redis-cli --cluster fix HOST:PORT covers them",
    )


def _merged(servers: Sequence[RedisTarget], of_nodes: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Return each finding that all masters share once, and the others with the name of their master."""
    counted = Counter(finding for findings in of_nodes for finding in findings)
    merged: dict[Finding, None] = {}
    for server, findings in zip(servers, of_nodes, strict=True):
        for finding in findings:
            if counted[finding] == len(servers):
                merged[finding] = None
            else:
                merged[replace(finding, message=f"{server.address}: {finding.message}")] = None
    return list(merged)
