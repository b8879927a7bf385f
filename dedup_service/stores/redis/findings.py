"""Judges the replies to the doctor, without I/O."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dedup_service.claims import Finding, Severity
from dedup_service.stores.redis.connection import MINIMUM_REDIS

_VERSION = re.compile(r"(\d+)\.(\d+)")

_SKEW_WARNING_S = 0.1
_SKEW_CRITICAL_S = 1.0
_SLOW_S = 0.02


@dataclass(frozen=True, slots=True)
class TimeSample:
    """One TIME command: its round trip, and Redis's lead over this host at the midpoint."""

    took_s: float
    ahead_s: float


def judge_info(info: Mapping[str, str], min_replicas: int = 0, *, is_node: bool = False) -> list[Finding]:
    """Return the findings from INFO alone, of a server or cluster node."""
    cluster = [] if is_node else [_cluster(info)]
    return [_version(info), _role(info), *cluster, _eviction(info), _evicted(info), _replicas(info, min_replicas)]


def _version(info: Mapping[str, str]) -> Finding:
    version = info.get("redis_version", "")
    match = _VERSION.match(version)
    if match is None:
        return Finding("version", Severity.INFO, "INFO does not tell which version this is; claims need Redis 7.0.")
    if (int(match[1]), int(match[2])) < MINIMUM_REDIS:
        return Finding(
            "version",
            Severity.CRITICAL,
            f"This is version {version}, which lacks SET with NX and GET together: every claim is refused.",
            "upgrade to Redis 7.0 or newer, or Valkey 7.2 or newer",
        )
    valkey = info.get("valkey_version")
    name = f"Valkey {valkey} (compatible with Redis {version})" if valkey else f"Redis {version}"
    return Finding("version", Severity.OK, f"This is {name}.")


def _role(info: Mapping[str, str]) -> Finding:
    if info.get("role") != "slave":
        return Finding("role", Severity.OK, "This is a primary.")
    primary = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
    return Finding(
        "role",
        Severity.CRITICAL,
        "This is a replica: it refuses every claim. A writable replica would keep claims the primary never receives.",
        f"let DEDUP_STORE_URL name the primary, {primary} according to the replica",
    )


def _cluster(info: Mapping[str, str]) -> Finding:
    if info.get("cluster_enabled") != "1" and info.get("redis_mode") != "cluster":
        return Finding("cluster", Severity.OK, "This is not a cluster node.")
    return Finding(
        "cluster",
        Severity.CRITICAL,
        "This is a cluster node, and the store URL names a single server: claims whose keys other nodes hold are "
        "refused, and after a failover every claim.",
        "let DEDUP_STORE_URL name the cluster: redis+cluster://host1:port,host2:port",
    )


def _eviction(info: Mapping[str, str]) -> Finding:
    policy, limit = info.get("maxmemory_policy"), info.get("maxmemory")
    if policy is None or limit is None:
        return Finding(
            "eviction", Severity.INFO, "INFO does not tell the maxmemory-policy: anything but noeviction loses claims."
        )
    if policy == "noeviction":
        return Finding("eviction", Severity.OK, "maxmemory-policy is noeviction: no claim is evicted.")
    remedy = "CONFIG SET maxmemory-policy noeviction, and maxmemory-policy noeviction in redis.conf"
    if limit == "0":
        return Finding(
            "eviction",
            Severity.WARNING,
            f"maxmemory-policy is {policy}. Nothing is evicted while maxmemory is 0; with a limit, claims are evicted "
            "before they expire, and one transaction is CLAIMED twice.",
            remedy,
        )
    return Finding(
        "eviction",
        Severity.CRITICAL,
        f"maxmemory-policy is {policy} with maxmemory {limit}: a full Redis evicts claims before they expire, and one "
        "transaction is CLAIMED twice.",
        remedy,
    )


def _evicted(info: Mapping[str, str]) -> Finding:
    evicted = info.get("evicted_keys", "")
    if evicted == "0":
        return Finding("evicted", Severity.OK, "Redis has evicted no keys since it started.")
    if not evicted.isdigit():
        return Finding("evicted", Severity.INFO, "INFO does not tell whether keys were evicted.")
    return Finding(
        "evicted",
        Severity.WARNING,
        f"Redis has evicted {evicted} keys since its start or the last CONFIG RESETSTAT; claims among them were lost "
        "before they expired.",
        "raise maxmemory, set maxmemory-policy noeviction, and then CONFIG RESETSTAT",
    )


def _replicas(info: Mapping[str, str], min_replicas: int) -> Finding:
    count = info.get("connected_slaves", "")
    if count.isdigit() and int(count) < min_replicas and info.get("role") != "slave":
        return Finding(
            "replicas",
            Severity.CRITICAL,
            f"{count} connected, and DEDUP_MIN_REPLICAS requires {min_replicas}: every claim fails with "
            "STORE_NOT_REPLICATED.",
            f"connect {min_replicas} replicas, or lower DEDUP_MIN_REPLICAS",
        )
    if not count.isdigit() or info.get("role") == "slave":
        return Finding("replicas", Severity.INFO, "The number of replicas of the primary is unknown here.")
    if count == "0":
        return Finding(
            "replicas", Severity.INFO, "No replica is connected: if this server is lost, its claims are lost."
        )
    # INFO shows this field only with min-replicas-to-write set, so CONFIG is not needed.
    if "min_slaves_good_slaves" in info:
        return Finding(
            "replicas", Severity.OK, f"{count} connected, and min-replicas-to-write bounds the losses of a failover."
        )
    return Finding(
        "replicas",
        Severity.WARNING,
        f"{count} connected, and min-replicas-to-write is 0: an isolated primary continues to acknowledge claims, and "
        "a failover loses them.",
        "CONFIG SET min-replicas-to-write 1 and CONFIG SET min-replicas-max-lag 10, and both lines in redis.conf",
    )


def judge_persistence(info: Mapping[str, str], save: str | None, appendfsync: str | None, user: str) -> Finding:
    """Return the finding on persistence. Without CONFIG GET, `save` and `appendfsync` are None."""
    may_read = f"ACL SETUSER {user} +config|get, or read the settings of the managed service"
    appendonly = "appendonly yes in redis.conf, or CONFIG SET appendonly yes"
    if info.get("aof_enabled") == "1":
        return _append_only(appendfsync, may_read)
    if "aof_enabled" not in info:
        return Finding("persistence", Severity.INFO, "INFO does not tell whether claims survive a restart.", may_read)
    if save is None:
        return Finding(
            "persistence",
            Severity.WARNING,
            "Redis has no append-only file: a restart loses at least the claims since the last snapshot. Without "
            "CONFIG GET it is unknown whether snapshots are enabled.",
            f"{appendonly}. To check snapshots: {may_read}",
        )
    if save:
        return Finding(
            "persistence",
            Severity.WARNING,
            f"Redis has only snapshots (save {save}): a restart loses the claims since the last one.",
            appendonly,
        )
    replicas = "" if info.get("connected_slaves", "0") == "0" else " It also empties its replicas."
    return Finding(
        "persistence",
        Severity.CRITICAL,
        f"Redis has neither an append-only file nor snapshots: a restart loses every claim.{replicas}",
        appendonly,
    )


def _append_only(appendfsync: str | None, may_read: str) -> Finding:
    if appendfsync is None:
        return Finding(
            "persistence",
            Severity.INFO,
            "Redis has an append-only file. Without CONFIG GET its appendfsync is unknown.",
            may_read,
        )
    if appendfsync == "no":
        return Finding(
            "persistence",
            Severity.WARNING,
            "Redis has an append-only file with appendfsync no: a crash of the host loses about half a minute of "
            "claims, which the kernel had not written yet.",
            "CONFIG SET appendfsync everysec (or always), and the same line in redis.conf",
        )
    if appendfsync == "everysec":
        return Finding(
            "persistence",
            Severity.INFO,
            "Redis has an append-only file with appendfsync everysec: a crash of the host loses about a second of "
            "claims.",
            "if a second is too much: CONFIG SET appendfsync always, and the same line in redis.conf",
        )
    return Finding("persistence", Severity.OK, f"Redis has an append-only file with appendfsync {appendfsync}.")


def judge_time(samples: Sequence[TimeSample]) -> list[Finding]:
    """Return the findings on Redis's clock and latency."""
    best = min(samples, key=lambda sample: sample.took_s)
    # Redis read its clock at an unknown moment, so half the round trip may not be skew.
    certain_s = abs(best.ahead_s) - best.took_s / 2
    measured = f"The clock of Redis is {abs(best.ahead_s) * 1000:.0f} ms {'ahead of' if best.ahead_s > 0 else 'behind'}"
    if certain_s <= _SKEW_WARNING_S:
        clock = Finding("clock", Severity.OK, f"{measured} that of this host.")
    else:
        clock = Finding(
            "clock",
            Severity.CRITICAL if certain_s > _SKEW_CRITICAL_S else Severity.WARNING,
            f"{measured} that of this host: claims with an expire_time end that much too late or too early, and "
            "duplicates show wrong times.",
            "synchronise both hosts with one time source: systemctl enable --now chronyd (or systemd-timesyncd)",
        )
    typical_s, worst_s = median(s.took_s for s in samples), max(s.took_s for s in samples)
    took = f"Redis answers in {typical_s * 1000:.1f} ms (median of {len(samples)}; the slowest {worst_s * 1000:.1f} ms)"
    if typical_s <= _SLOW_S:
        return [clock, Finding("latency", Severity.OK, f"{took}.")]
    return [
        clock,
        Finding(
            "latency",
            Severity.WARNING,
            f"{took}: every claim takes at least that long, and calls with short deadlines are refused.",
            "run the service near its Redis, and check SLOWLOG GET and LATENCY DOCTOR there",
        ),
    ]
