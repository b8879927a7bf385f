"""Claims in Redis or Valkey. One command decides a claim; one script per change compares the token."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import hiredis

from dedup_service.claims import (
    Applied,
    CheckFailed,
    ClaimError,
    Completion,
    Expiry,
    Extension,
    Reason,
    Release,
    StoreNotice,
    StoreUnavailable,
    Transaction,
    UnreadableValue,
)
from dedup_service.stores import stored_value
from dedup_service.stores.redis.canary import RedisCanary
from dedup_service.stores.redis.channel import Command, RedisChannel
from dedup_service.stores.redis.link import RedisLink, RedisNodes, unexpected_failure
from dedup_service.stores.redis.replies import (
    KeyForbidden,
    ScriptForgotten,
    checked,
    error_of_reply,
    number_of,
    value_of,
)
from dedup_service.stores.redis.scripts import (
    GET,
    ScriptCall,
    claim_call,
    complete_call,
    confirm_call,
    expiry_arguments,
    extend_call,
    release_call,
)
from dedup_service.stores.stored_value import KeyLayout, raw_layout

# Followed where the nodes know the target. Neither server has carried the command out.
_REDIRECTIONS = ("MOVED", "ASK")
_MAX_REDIRECTIONS = 5


class RedisStore:
    """A ClaimStore on Redis >= 7.0 or Valkey >= 7.2.

    Guarantees: one command per claim, an expiry on every key, no command ever sent twice.
    """

    def __init__(
        self, nodes: RedisNodes, key_layout: KeyLayout, description: str, *, canary: RedisCanary, min_replicas: int = 0
    ) -> None:
        self._nodes = nodes
        self._key = key_layout
        # Other programs write values of any length under the same keys.
        self._shares_keys = key_layout is raw_layout
        self._description = description
        self._canary = canary
        self._min_replicas = min_replicas

    @property
    def description(self) -> str:
        """Implement ClaimStore."""
        return self._description

    async def open(self) -> None:
        """Implement ClaimStore."""
        await self._nodes.open()

    async def close(self) -> None:
        """Implement ClaimStore."""
        await self._nodes.close()

    async def check(self) -> Sequence[StoreNotice]:
        """Write to every server as a claim does.

        A cluster serves while any of its servers takes claims: the others fail only the claims they hold.
        """
        failures = await asyncio.gather(
            *(self._check(hash_tag, link) for hash_tag, link in self._nodes.masters()), return_exceptions=True
        )
        if all(failures):
            failure = next(filter(None, failures))
            if not isinstance(failure, ClaimError):
                failure = unexpected_failure("checking Redis", failure)
            if isinstance(failure, StoreUnavailable):
                raise CheckFailed(failure, self._canary.take_notices())
            raise failure
        return self._canary.take_notices()

    async def _check(self, hash_tag: bytes, link: RedisLink) -> None:
        """Write the canary: a server can answer reads and refuse every write."""
        await link.connected()
        try:
            await self._probe(hash_tag, link)
        except UnreadableValue as error:
            raise StoreUnavailable(error.reason, str(error), Applied.NO) from error

    async def _probe(self, hash_tag: bytes, link: RedisLink) -> None:
        key, command, count = self._canary.next_count(hash_tag, link)
        try:
            reply, acknowledged = await self._write(key, *command, past_limit=True)
        except StoreUnavailable as refusal:
            if not isinstance(refusal.__cause__, KeyForbidden):
                raise
            self._canary.refuse(hash_tag, refusal)
            # The user may have the right to claims alone.
            if (other := stored_value.probe_key(self._key, hash_tag)) is not None:
                _, acknowledged = await self._write(other, "SET", other, b"", "NX", "GET", "PX", 1, past_limit=True)
                self._require_replicas(acknowledged)
            return
        self._canary.compare(hash_tag, None if reply is None else value_of(reply))
        # Without the replicas a failover loses the count, and no claim that was acknowledged.
        self._require_replicas(acknowledged)
        self._canary.acknowledge(hash_tag, count)

    async def claim(self, claim: Transaction, expiry: Expiry) -> Transaction | None:
        """Implement ClaimStore."""
        key, command = self._claim_command(claim, expiry)
        reply, acknowledged = await self._write(key, *command)
        if reply is None:
            self._require_replicas(acknowledged)
            return None
        holder = stored_value.decode(value_of(reply), claim.namespace, claim.transaction_id)
        if self._min_replicas and holder.claim_token == claim.claim_token:
            return await self._confirmed(key, claim, expiry, holder)
        return holder

    async def claim_all(self, claims: Sequence[tuple[Transaction, Expiry]]) -> Sequence[Transaction | Exception | None]:
        """Implement ClaimStore. The claims leave in one write."""
        begun: list[_Begun] = []
        try:
            for one in claims:
                begun.append(await self._begin_claim(*one))  # noqa: PERF401 - kept if cancelled
            # In turn: a task for each claim would add half as much again to its cost.
            return [await self._end_claim(claim, sent) for (claim, _), sent in zip(claims, begun, strict=True)]
        except BaseException:
            for sent in begun:
                if not isinstance(sent, Exception):
                    _abandon(sent.reply if isinstance(sent, _Sent) else sent)
            raise

    async def _begin_claim(self, claim: Transaction, expiry: Expiry) -> "_Begun":
        """Send a claim, or make it a task if it needs replicas."""
        try:
            key, command = self._claim_command(claim, expiry)
            link = self._nodes.link_of(key)
            channel = link.channel or await link.connected()
        except Exception as error:  # noqa: BLE001 - a fault of one claim must not fail the others
            return error
        if link.quorum is not None:
            return asyncio.ensure_future(self.claim(claim, expiry))
        return _Sent(key, command, link, channel, channel.send(*command))

    async def _end_claim(self, claim: Transaction, begun: "_Begun") -> Transaction | Exception | None:
        if isinstance(begun, Exception):
            return begun
        try:
            if not isinstance(begun, _Sent):
                return await begun
            reply = await begun.reply
            if type(reply) is hiredis.ReplyError:
                reply, _ = await self._follow(begun.key, begun.link, begun.channel, reply, begun.command)
            if reply is None:
                return None
            return stored_value.decode(value_of(reply), claim.namespace, claim.transaction_id)
        except Exception as error:  # noqa: BLE001 - as above
            return error

    def _claim_command(self, claim: Transaction, expiry: Expiry) -> tuple[bytes, Command]:
        key = self._key(claim.namespace, claim.transaction_id)
        value = stored_value.encode(claim)
        if expiry.ttl_ms is not None and not self._shares_keys:
            return key, ("SET", key, value, "NX", "GET", *expiry_arguments(expiry))
        # Redis accepts an expire time in the past and keeps nothing, and GET returns a foreign value of any length. The
        # script checks both. Sent by its text: there is no digest that Redis could have forgotten.
        script, arguments = claim_call(value, expiry)
        return key, ("EVAL", script.text, 1, key, *arguments)

    async def complete(self, completion: Completion) -> Transaction | None:
        """Implement ClaimStore."""
        return await self._change(completion, complete_call(completion))

    async def release(self, release: Release) -> bool:
        """Implement ClaimStore."""
        key = self._key(release.namespace, release.transaction_id)
        # Replicas are not required: a release lost in a failover costs time, and never pays twice.
        released, _ = await self._run(key, release_call(release))
        return bool(released)

    async def extend(self, extension: Extension) -> Transaction | None:
        """Implement ClaimStore."""
        return await self._change(extension, extend_call(extension))

    async def get(self, namespace: str, transaction_id: str) -> Transaction | None:
        """Implement ClaimStore. Only a claim by an unknown holder costs a second command."""
        key = self._key(namespace, transaction_id)
        look = ("EVAL", GET.text, 1, key) if self._shares_keys else ("GET", key)
        reply = await self._execute(key, *look)
        if reply is None:
            return None
        transaction = stored_value.decode(value_of(reply), namespace, transaction_id)
        if transaction.claim_token is not None:
            return transaction
        expire_time_ms = number_of(await self._execute(key, "PEXPIRETIME", key))
        if expire_time_ms == _NO_SUCH_KEY:
            return None
        return stored_value.unknown_holder(
            namespace, transaction_id, None if expire_time_ms == _NO_EXPIRY else expire_time_ms
        )

    async def _change(self, change: Completion | Extension, call: ScriptCall) -> Transaction | None:
        key = self._key(change.namespace, change.transaction_id)
        reply, acknowledged = await self._run(key, call)
        if reply is None:
            return None
        self._require_replicas(acknowledged)
        return stored_value.decode(value_of(reply), change.namespace, change.transaction_id)

    async def _confirmed(
        self, key: bytes, claim: Transaction, expiry: Expiry, holder: Transaction
    ) -> Transaction | None:
        """Return the holder once replicas have it too: this attempt wrote nothing that WAIT would answer for."""
        with _doubt_only():
            held, acknowledged = await self._run(key, confirm_call(holder.claim_token or ""))
        if not held:
            # The claim ended between the two commands.
            return await self.claim(claim, expiry)
        self._require_replicas(acknowledged)
        return holder

    def _require_replicas(self, acknowledged: Any) -> None:  # noqa: ANN401 - any reply of Redis
        if not self._min_replicas:
            return
        if type(acknowledged) is hiredis.ReplyError:
            failure = error_of_reply(str(acknowledged))
            raise StoreUnavailable(failure.reason, f"Redis refused WAIT: {failure}", Applied.UNKNOWN)
        if number_of(acknowledged) < self._min_replicas:
            raise StoreUnavailable(
                Reason.STORE_NOT_REPLICATED,
                f"{acknowledged} of {self._min_replicas} replicas (DEDUP_MIN_REPLICAS) acknowledged in time, and a "
                "failover could lose the claim: try again with the same token",
                Applied.UNKNOWN,
            )

    async def _run(self, key: bytes, call: ScriptCall) -> tuple[Any, Any]:
        script, arguments = call
        try:
            return await self._write(key, "EVALSHA", script.sha, 1, key, *arguments)
        except ScriptForgotten:
            # Redis did not run it, so this repeats nothing; EVAL also caches the script again.
            return await self._write(key, "EVAL", script.text, 1, key, *arguments)

    async def _write(self, key: bytes, *command: bytes | str | int, past_limit: bool = False) -> tuple[Any, Any]:
        """Return the reply, and with DEDUP_MIN_REPLICAS the reply to WAIT."""
        link = self._nodes.link_of(key)
        channel = link.channel or await link.connected()
        acknowledged = None
        if link.quorum is None:
            reply = await channel.send(*command, past_limit=past_limit)
        else:
            reply, acknowledged = await link.quorum.send(*command, past_limit=past_limit)
        if type(reply) is not hiredis.ReplyError:
            return reply, acknowledged
        return await self._follow(key, link, channel, reply, command)

    async def _execute(self, key: bytes, *command: bytes | str | int) -> Any:  # noqa: ANN401 - any reply of Redis
        link = self._nodes.link_of(key)
        channel = link.channel or await link.connected()
        reply = await channel.send(*command)
        if type(reply) is not hiredis.ReplyError:
            return reply
        reply, _ = await self._follow(key, link, channel, reply, command)
        return reply

    async def _follow(
        self, key: bytes, link: RedisLink, channel: RedisChannel, reply: object, command: Command
    ) -> tuple[Any, Any]:
        """Send a redirected command to its target, and raise any other error. The first server did not carry it out."""
        acknowledged = None
        for _ in range(_MAX_REDIRECTIONS):
            if type(reply) is not hiredis.ReplyError:
                return reply, acknowledged
            word = str(reply).partition(" ")[0]
            target = self._nodes.redirected(key, link, str(reply)) if word in _REDIRECTIONS else None
            if target is None:
                break
            link, channel = target, target.channel or await target.connected()
            quorum = link.quorum
            # Without an await between them they arrive together: ASKING holds for the next command.
            sent = [channel.send("ASKING")] if word == "ASK" else []
            *_, reply = await asyncio.gather(*sent, channel.send(*command))
            if quorum is not None and type(reply) is not hiredis.ReplyError:
                with _doubt_only():
                    _, acknowledged = await quorum.send("TIME")
        return checked(reply, channel), acknowledged


class _Sent(NamedTuple):
    """A claim in flight: its command, where that went, and the future of the reply."""

    key: bytes
    command: Command
    link: RedisLink
    channel: RedisChannel
    reply: asyncio.Future[Any]


_Begun = _Sent | asyncio.Task[Transaction | None] | Exception


def _abandon(future: asyncio.Future[Any]) -> None:
    """Cancel a future, or mark its exception as retrieved."""
    if not future.cancel() and not future.cancelled():
        future.exception()


@contextmanager
def _doubt_only() -> Iterator[None]:
    """Report a failure after a write as unknown: the write may have been carried out."""
    try:
        yield
    except StoreUnavailable as error:
        raise error.with_applied(Applied.UNKNOWN) from error


# The replies to PEXPIRETIME for a missing key, and for a key without an expiry.
_NO_SUCH_KEY = -2
_NO_EXPIRY = -1
