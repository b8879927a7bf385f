"""A real Redis Cluster of six nodes, or of fewer: masters with one replica each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, free_port

MASTERS = 3


class ClusterNode(RedisProcess):
    """One node; `options` configure TLS, also between the nodes."""

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        folder.mkdir()
        super().__init__(folder, *options, tls=tls)
        self.bus_port = 0

    def _options(self) -> list[str]:
        self.bus_port = self.bus_port or free_port()
        return [
            *super()._options(),
            *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-node-timeout", "1000"),
            *("--cluster-port", str(self.bus_port), "--repl-diskless-sync-delay", "0"),
            # A master without slots stays a master, so that tests can give it slots again.
            *("--cluster-replica-validity-factor", "0", "--cluster-allow-replica-migration", "no"),
        ]

    def ask(self, *command: str | int) -> object:
        """Return the reply of this node."""
        with redis.Redis(port=self.port, protocol=2, decode_responses=True) as client:
            return client.execute_command(*command)

    @property
    def node_id(self) -> str:
        """The id of the node in the cluster."""
        return str(self.ask("CLUSTER", "MYID"))


class ClusterDeployment:
    """Masters that share all slots equally, by default with one replica each."""

    def __init__(self, folder: Path, *options: str, replicas: bool = True, tls: bool = False) -> None:
        self._folder = folder
        self._options = options
        self._with_replicas = replicas
        self._tls = tls
        self.masters: list[ClusterNode] = []
        self.replicas: list[ClusterNode] = []

    def start(self) -> Self:
        """Start all nodes, and return when each reports a working cluster."""
        for number in range(MASTERS):
            self.masters.append(self._start(f"master-{number}"))
        share = REDIS_CLUSTER_HASH_SLOTS // MASTERS + 1
        for number, master in enumerate(self.masters):
            last = min((number + 1) * share, REDIS_CLUSTER_HASH_SLOTS) - 1
            master.ask("CLUSTER", "ADDSLOTSRANGE", number * share, last)
            # Without separate epochs two masters could claim one slot after a failover.
            master.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for master in self.masters[1:]:
            self._meet(master)
        if self._with_replicas:
            for number, master in enumerate(self.masters):
                replica = self._start(f"replica-{number}")
                self.replicas.append(replica)
                self._meet(replica)
                wait_until(lambda r=replica, m=master: m.node_id in str(r.ask("CLUSTER", "NODES")), what="the gossip")  # type: ignore[misc]
                replica.ask("CLUSTER", "REPLICATE", master.node_id)
        wait_until(self.in_order, what="the cluster to be in order")
        return self

    def add_master(self) -> ClusterNode:
        """Add a master without slots, and return it once every other node knows it."""
        node = self._start(f"master-{len(self.masters)}")
        self._meet(node)
        self.masters.append(node)
        wait_until(lambda: all(node.node_id in str(n.ask("CLUSTER", "NODES")) for n in self.masters), what="the gossip")
        wait_until(self.in_order, what="the cluster to be in order")
        return node

    def stop(self) -> None:
        """Stop all nodes."""
        for node in (*self.replicas, *self.masters):
            node.stop()

    @property
    def url(self) -> str:
        """The store URL, with two of the nodes."""
        ports = (node.tls_port if self._tls else node.port for node in self.masters[:2])
        return f"redis{'s' if self._tls else ''}+cluster://{','.join(f'127.0.0.1:{port}' for port in ports)}"

    def in_order(self) -> bool:
        """Whether every node reports that all slots are covered, and every replica follows its master."""
        states = [str(node.ask("CLUSTER", "INFO")) for node in (*self.masters, *self.replicas)]
        following = [str(replica.ask("INFO", "replication")) for replica in self.replicas]
        return all("cluster_state:ok" in state and "cluster_slots_ok:16384" in state for state in states) and all(
            "'master_link_status': 'up'" in state for state in following
        )

    def move(self, slots: Sequence[int], source: ClusterNode, target: ClusterNode) -> None:
        """Move these slots with their keys, as `redis-cli --cluster reshard` does."""
        source_id, target_id = source.node_id, target.node_id
        for slot in slots:
            target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
            source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
            with redis.Redis(port=source.port, protocol=2) as client:
                while keys := client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                    client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
            for node in (target, source, *(m for m in self.masters if m not in {source, target})):
                node.ask("CLUSTER", "SETSLOT", slot, "NODE", target_id)

    def _start(self, name: str) -> ClusterNode:
        return ClusterNode(self._folder / name, *self._options, tls=self._tls).start()

    def _meet(self, node: ClusterNode) -> None:
        first = self.masters[0]
        port = first.tls_port if self._tls else first.port
        node.ask("CLUSTER", "MEET", "127.0.0.1", port, first.bus_port)
