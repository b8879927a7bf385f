"""What answers of Redis mean for claims: judges them, and asks nothing itself."""

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
    """One TIME command: how long its answer took, and how far Redis was ahead of this host by its midpoint."""

    took_s: float
    ahead_s: float


def judge_info(info: Mapping[str, str], min_replicas: int = 0, *, is_node: bool = False) -> list[Finding]:
    """Return the findings that the reply to INFO is enough for, of a server or of a node of a cluster."""
    cluster = [] if is_node else [_cluster(info)]
    return [_version(info), _role(info), *cluster, _eviction(info), _evicted(info), _replicas(info, min_replicas)]


def _version(info: Mapping[str, str]) -> Finding:
    version = info.get("redis_version", "")
    match = _VERSION.match(version)
    if match is None:
        return Finding("version", Severity.INFO, "INFO does not say which version this is; Redis 7.0 is the oldest.")
    if (int(match[1]), int(match[2])) < MINIMUM_REDIS:
        return Finding(
            "version",
            Severity.CRITICAL,
            f"This is version {version}, and a claim needs SET with NX and GET together: every claim will be refused.",
            "upgrade to Redis 7.0 or newer, or Valkey 7.2 or newer",
        )
    valkey = info.get("valkey_version")
    name = f"Valkey {valkey} (compatible with Redis {version})" if valkey else f"Redis {version}"
    return Finding("version", Severity.OK, f"This is {name}.")


def _role(info: Mapping[str, str]) -> Finding:
    if info.get("role") != "slave":
        return Finding("role", Severity.OK, "This is no replica.")
    primary = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
    return Finding(
        "role",
        Severity.CRITICAL,
        "This is a replica: it refuses every claim, and one that may be written to keeps claims that the primary "
        "never hears of.",
        f"let DEDUP_STORE_URL name the primary, which is {primary} as the replica knows it",
    )


def _cluster(info: Mapping[str, str]) -> Finding:
    if info.get("cluster_enabled") != "1" and info.get("redis_mode") != "cluster":
        return Finding("cluster", Severity.OK, "This is no node of a cluster.")
    return Finding(
        "cluster",
        Severity.CRITICAL,
        "This is one node of a cluster, and the store URL is one for a single server: claims whose keys other nodes "
        "hold are refused, and after a failover all of them.",
        "let DEDUP_STORE_URL name the cluster: redis+cluster://host1:port,host2:port",
    )


def _eviction(info: Mapping[str, str]) -> Finding:
    policy, limit = info.get("maxmemory_policy"), info.get("maxmemory")
    if policy is None or limit is None:
        return Finding(
            "eviction", Severity.INFO, "INFO does not say the maxmemory-policy: anything but noeviction forgets claims."
        )
    if policy == "noeviction":
        return Finding("eviction", Severity.OK, "maxmemory-policy is noeviction: no claim is forgotten for its memory.")
    remedy = "CONFIG SET maxmemory-policy noeviction, and maxmemory-policy noeviction in redis.conf"
    if limit == "0":
        return Finding(
            "eviction",
            Severity.WARNING,
            f"maxmemory-policy is {policy}. Nothing is evicted while maxmemory is 0; once somebody sets a limit, "
            "claims are forgotten before they expire, and callers are told CLAIMED twice.",
            remedy,
        )
    return Finding(
        "eviction",
        Severity.CRITICAL,
        f"maxmemory-policy is {policy} with maxmemory {limit}: a full Redis forgets claims before they expire, and "
        "callers are told CLAIMED twice.",
        remedy,
    )


def _evicted(info: Mapping[str, str]) -> Finding:
    evicted = info.get("evicted_keys", "")
    if evicted == "0":
        return Finding("evicted", Severity.OK, "Redis has evicted no key since it started.")
    if not evicted.isdigit():
        return Finding("evicted", Severity.INFO, "INFO does not say whether keys were evicted.")
    return Finding(
        "evicted",
        Severity.WARNING,
        f"Redis has evicted {evicted} keys since it started or its counts were reset; claims among them were forgotten "
        "before they expired.",
        "raise maxmemory, set maxmemory-policy noeviction, and then CONFIG RESETSTAT",
    )


def _replicas(info: Mapping[str, str], min_replicas: int) -> Finding:
    count = info.get("connected_slaves", "")
    if count.isdigit() and int(count) < min_replicas and info.get("role") != "slave":
        return Finding(
            "replicas",
            Severity.CRITICAL,
            f"{count} connected, and DEDUP_MIN_REPLICAS asks for {min_replicas} that acknowledge a claim: every claim "
            "fails with STORE_NOT_REPLICATED.",
            "connect as many replicas, or lower DEDUP_MIN_REPLICAS",
        )
    if not count.isdigit() or info.get("role") == "slave":
        return Finding("replicas", Severity.INFO, "How many replicas the primary has is not known here.")
    if count == "0":
        return Finding(
            "replicas", Severity.INFO, "No replica is connected: when this server is lost, so are its claims."
        )
    # INFO shows this field only while min-replicas-to-write is in force, so that CONFIG need not be asked.
    if "min_slaves_good_slaves" in info:
        return Finding(
            "replicas", Severity.OK, f"{count} connected, and min-replicas-to-write bounds what a failover loses."
        )
    return Finding(
        "replicas",
        Severity.WARNING,
        f"{count} connected, and min-replicas-to-write is 0: a primary that is cut off goes on acknowledging claims, "
        "and a failover loses them.",
        "CONFIG SET min-replicas-to-write 1 and CONFIG SET min-replicas-max-lag 10, and both lines in redis.conf",
    )


def judge_persistence(info: Mapping[str, str], save: str | None, appendfsync: str | None, user: str) -> Finding:
    """Return the finding on persistence; `save` and `appendfsync` are None where CONFIG GET is not to be had."""
    may_read = f"ACL SETUSER {user} +config|get, or look into the settings of the managed service"
    appendonly = "appendonly yes in redis.conf, or CONFIG SET appendonly yes"
    if info.get("aof_enabled") == "1":
        return _append_only(appendfsync, may_read)
    if "aof_enabled" not in info:
        return Finding("persistence", Severity.INFO, "INFO does not say whether claims outlive a restart.", may_read)
    if save is None:
        return Finding(
            "persistence",
            Severity.WARNING,
            "There is no append-only file, so a restart forgets the claims since the last snapshot at least; whether "
            "there are snapshots at all could not be read for want of CONFIG GET.",
            f"{appendonly}. To have it read: {may_read}",
        )
    if save:
        return Finding(
            "persistence",
            Severity.WARNING,
            f"There are snapshots alone (save {save}): a restart forgets the claims since the last one.",
            appendonly,
        )
    replicas = "" if info.get("connected_slaves", "0") == "0" else " It empties its replicas as well."
    return Finding(
        "persistence",
        Severity.CRITICAL,
        f"There is neither an append-only file nor a snapshot: a restart forgets every claim.{replicas}",
        appendonly,
    )


def _append_only(appendfsync: str | None, may_read: str) -> Finding:
    if appendfsync is None:
        return Finding(
            "persistence",
            Severity.INFO,
            "There is an append-only file; how often it reaches the disk could not be read for want of CONFIG GET.",
            may_read,
        )
    if appendfsync == "no":
        return Finding(
            "persistence",
            Severity.WARNING,
            "There is an append-only file with appendfsync no: a crash of the host loses whatever the kernel had not "
            "written yet, about half a minute of claims.",
            "CONFIG SET appendfsync everysec (or always), and the same line in redis.conf",
        )
    if appendfsync == "everysec":
        return Finding(
            "persistence",
            Severity.INFO,
            "There is an append-only file with appendfsync everysec: a crash of the host loses about a second of "
            "claims.",
            "where a second is too much: CONFIG SET appendfsync always, and the same line in redis.conf",
        )
    return Finding("persistence", Severity.OK, f"There is an append-only file with appendfsync {appendfsync}.")


def judge_time(samples: Sequence[TimeSample]) -> list[Finding]:
    """Return the findings on the clock of Redis and on how fast it answers."""
    best = min(samples, key=lambda sample: sample.took_s)
    # The clock of Redis was read at an unknown moment of the round trip, so that much of the difference is no skew.
    certain_s = abs(best.ahead_s) - best.took_s / 2
    measured = f"The clock of Redis is {abs(best.ahead_s) * 1000:.0f} ms {'ahead of' if best.ahead_s > 0 else 'behind'}"
    if certain_s <= _SKEW_WARNING_S:
        clock = Finding("clock", Severity.OK, f"{measured} that of this host.")
    else:
        clock = Finding(
            "clock",
            Severity.CRITICAL if certain_s > _SKEW_CRITICAL_S else Severity.WARNING,
            f"{measured} that of this host: a claim with an expire_time lives that much longer or shorter than meant, "
            "and the times that a duplicate is shown are off.",
            "let both hosts follow one time source: systemctl enable --now chronyd (or systemd-timesyncd)",
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
            f"{took}: every claim waits at least that long, and callers with short deadlines are refused.",
            "run the service near its Redis, and look at SLOWLOG GET and LATENCY DOCTOR there",
        ),
    ]
