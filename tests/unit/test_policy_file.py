"""The policy file: its rules, the defaults from the settings, and the errors of a broken one."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dedup_service.claims import Caller, ClaimService, ClaimStore, InvalidRequest, Policies, Policy
from dedup_service.claims.limits import identity_violations
from dedup_service.config.durations import format_duration
from dedup_service.config.settings import BadSettings, Settings, load_settings
from dedup_service.observability.logs import logger
from dedup_service.server import policies as reloading
from dedup_service.server.policies import load_policies, reload_when_requested
from tests.support.polling import eventually

Load = Callable[..., Policies]

SECOND = 1_000
HOUR = 3_600 * SECOND
DAY = 24 * HOUR


@pytest.fixture(autouse=True)
def _no_settings_of_this_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "STORE_URL", "LISTEN", "POLICY_FILE", "RETENTION", "DEFAULT_TTL", "MAX_TTL"):
        monkeypatch.delenv(f"DEDUP_{name}", raising=False)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load the policies of a file with this content, over settings with these flags."""

    def loaded(text: str | bytes, **flags: str) -> Policies:
        file = tmp_path / "policies.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_policies(load_settings({"policy_file": str(file), **flags}))

    return loaded


def test_every_key_of_a_namespace_applies(load: Load) -> None:
    """A namespace has its own default ttl, maximum, retention and mode, and the others have the defaults."""
    policies = load(
        """
        [namespaces.pay]
        default_ttl = "2m"
        max_ttl = "7d"
        retention = "3d"
        mode = "shadow"

        [namespaces."pay.eu"]
        mode = "enforce"
        """
    )
    everyday = Policy(60 * SECOND, 7 * DAY, DAY)
    assert policies.of("pay") == Policy(120 * SECOND, 7 * DAY, 3 * DAY, shadow=True)
    assert policies.of("pay.eu") == policies.of("default") == policies.of("other") == everyday
    assert policies.allow_unknown


def test_the_settings_supply_missing_keys_of_a_namespace(load: Load) -> None:
    """Each key a namespace leaves out has the value of the settings."""
    policies = load(
        '[namespaces.a]\ndefault_ttl = "1s"\n[namespaces.b]\nmax_ttl = "6d"\n[namespaces.c]\nretention = "1h"\n',
        default_ttl="5s",
        max_ttl="5d",
        retention="2d",
    )
    assert policies.default == Policy(5 * SECOND, 5 * DAY, 2 * DAY)
    assert policies.namespaces == {
        "a": Policy(1 * SECOND, 5 * DAY, 2 * DAY),
        "b": Policy(5 * SECOND, 6 * DAY, 2 * DAY),
        "c": Policy(5 * SECOND, 5 * DAY, 1 * HOUR),
    }


def test_the_default_retention_is_cut_to_the_maximum_of_the_namespace(load: Load) -> None:
    """A namespace with a maximum ttl below 24 hours needs no retention of its own."""
    assert load('[namespaces.short]\nmax_ttl = "1h"\n').of("short").retention_ms == HOUR


@pytest.mark.parametrize("flags", [{}, {"default_ttl": "3s", "max_ttl": "1h"}])
def test_without_a_file_all_namespaces_have_the_same_rules(flags: dict[str, str]) -> None:
    """Without a policy file every namespace is admitted under the rules of the settings."""
    settings: Settings = load_settings(flags)
    rules = Policy(settings.default_ttl, settings.max_ttl, settings.retention_under(settings.max_ttl))
    assert load_policies(settings) == Policies(rules)
    assert not rules.shadow


def test_an_empty_file_changes_nothing(load: Load) -> None:
    """An empty policy file has the effect of none."""
    assert load("") == load_policies(load_settings())


def test_unknown_namespaces_are_refused_if_the_file_says_so(load: Load) -> None:
    """With allow_unknown_namespaces = false only the listed ones are known, `default` included."""
    policies = load("allow_unknown_namespaces = false\n[namespaces.pay]\n")
    assert policies.of("pay") == policies.default
    for namespace in ("default", "other"):
        with pytest.raises(InvalidRequest, match=f"'{namespace}' is not known here"):
            policies.of(namespace)


ASKED = {"auth_tokens": "tokens.toml"}


def test_callers_have_the_rights_of_the_file(load: Load) -> None:
    """A caller has the namespaces and rpcs of its table: a missing key allows all, an empty list none."""
    policies = load(
        """
        [callers."spiffe://example.org/pay"]
        namespaces = ["pay", "pay.eu"]
        [callers.support]
        rpcs = ["GetTransaction"]
        namespaces = []
        """,
        **ASKED,
    )
    assert policies.callers == {
        "spiffe://example.org/pay": Caller("spiffe://example.org/pay", frozenset({"pay", "pay.eu"})),
        "support": Caller("support", frozenset(), frozenset({"GetTransaction"})),
    }
    assert load("[callers]", **ASKED).callers == {}
    assert load("", **ASKED).callers is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("callers = ['me']", "callers is ['me'], which is not a table: write [callers.NAME] above the keys of each"),
        ("[callers]\nme = 'all'", "caller 'me': 'all' is not a table: write [callers.NAME] above its keys"),
        ("[callers.me]\nnamespace = ['pay']", "caller 'me': there is no key 'namespace': write namespaces or rpcs"),
        ("[callers.pay.eu]", '(quote a name with a dot, as in [callers."pay.example"])'),
        ("[callers.me]\nnamespaces = 'pay'", "caller 'me': namespaces: 'pay' is not a list of names: write it as"),
        ("[callers.me]\nnamespaces = ['Pay']", "caller 'me': namespaces: the name must be 1 to 63 of the characters"),
        (
            "[callers.me]\nrpcs = ['Claim']",
            "caller 'me': rpcs: there is no rpc 'Claim': write one or more of Claim",
        ),
        ("[callers.me]\nnamespaces = ['Pay']", "begin with a letter or digit, unlike 'Pay'"),
        ("[callers.me]\nrpcs = [1]", "caller 'me': rpcs: [1] is not a list of names"),
        (
            "[callers.me]\nrpcs = ['Claim', 'Read']",
            "there is no rpc 'Claim': write one or more of ClaimTransaction, CompleteTransaction, ReleaseTransaction",
        ),
        ("[callers.me]\nrpcs = ['Claim', 'Read']", "; there is no rpc 'Read': write one or more of Claim"),
    ],
)
def test_a_broken_table_of_a_caller_is_one_clear_sentence(load: Load, text: str, words: str) -> None:
    """The sentence names the caller, the key at fault and the remedy."""
    with pytest.raises(BadSettings) as caught:
        load(text, **ASKED)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


PAY = "[namespaces.pay]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("default_ttl = '1s'", "there is no key 'default_ttl': write allow_unknown_namespaces, or a table"),
        ("allow_unknown_namespaces = 'no'", "allow_unknown_namespaces is 'no': write true or false"),
        ("allow_unknown_namespaces = 0", "allow_unknown_namespaces is 0: write true or false"),
        ("namespaces = ['pay']", "namespaces is ['pay'], which is not a table: write [namespaces.NAME]"),
        ("[namespaces]\npay = 'shadow'", "namespace 'pay': 'shadow' is not a table: write [namespaces.NAME] above"),
        (f"namespaces = 0x{'f' * 10_000}", "namespaces is the number, which is not a table: write [namespaces.NAME]"),
        (PAY + "ttl = '1s'", "namespace 'pay': there is no key 'ttl': write default_ttl, max_ttl, retention or mode"),
        (
            "[namespaces.pay.eu]",
            "there is no key 'eu': write default_ttl, max_ttl, retention or mode (quote a name with a dot",
        ),
        ("[namespaces.pay.eu]", '(quote a name with a dot, as in [namespaces."pay.eu"])'),
        ("[namespaces.Pay]", "namespace 'Pay': the name must be 1 to 63 of the characters a-z, 0-9, '_', '.' and '-'"),
        ("[namespaces.-pay]", "namespace '-pay': the name must be 1 to 63 of the characters"),
        ('[namespaces.""]', "namespace '': the name must be 1 to 63 of the characters"),
        ('[namespaces."pay\\n"]', "namespace 'pay\\n': the name must be 1 to 63 of the characters"),
        (f"[namespaces.{'x' * 64}]", "the name must be 1 to 63 of the characters"),
        (PAY + "mode = 'loud'", "namespace 'pay': mode is 'loud': write \"enforce\" or \"shadow\""),
        (PAY + "mode = true", 'namespace \'pay\': mode is True: write "enforce" or "shadow"'),
        (
            PAY + "default_ttl = '60'",
            "namespace 'pay': default_ttl: '60' is not a duration: write a whole number and a",
        ),
        (
            PAY + "default_ttl = 60",
            "namespace 'pay': default_ttl: 60 is not a duration: write it in quotes with a unit",
        ),
        (PAY + "max_ttl = true", "namespace 'pay': max_ttl: True is not a duration"),
        (PAY + "retention = 1.5", "namespace 'pay': retention: 1.5 is not a duration"),
        (PAY + "retention = '0s'", "namespace 'pay': retention: '0s' is zero: write at least 1ms"),
        (PAY + "max_ttl = '36501d'", "namespace 'pay': max_ttl: '36501d' is too long: write at most 36500d"),
        (
            PAY + "default_ttl = '2h'\nmax_ttl = '1h'",
            "namespace 'pay': default_ttl (2h) is longer than max_ttl (1h): write a default_ttl of at most 1h, or a",
        ),
        (PAY + "retention = '7d'\nmax_ttl = '1h'", "namespace 'pay': retention (7d) is longer than max_ttl (1h)"),
        (PAY + "default_ttl = '8d'", "default_ttl (8d) is longer than max_ttl (7d, from DEDUP_MAX_TTL)"),
        (PAY + "max_ttl = '1s'", "default_ttl (60s, from DEDUP_DEFAULT_TTL) is longer than max_ttl (1s)"),
        ("[namespaces.pay", "it is not valid TOML: "),
        (PAY + PAY, "it is not valid TOML: "),
        ("x = " + "[" * 20_000, "nested too deep"),
        (b"# gru\xdf\n", "it is not UTF-8 at byte 5: save it as UTF-8"),
        ("\N{BYTE ORDER MARK}" + PAY, "it is not valid TOML: "),
    ],
)
def test_a_broken_file_is_one_clear_sentence(load: Load, tmp_path: Path, text: str | bytes, words: str) -> None:
    """The sentence names the file, the namespace, the key at fault, the limit and the remedy."""
    with pytest.raises(BadSettings) as caught:
        load(text)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"the policy file '{tmp_path / 'policies.toml'}' is not usable: ")
    assert "\n" not in str(caught.value)


def test_a_retention_of_the_settings_may_be_too_long_for_a_namespace(load: Load) -> None:
    """A retention the operator set is not silently cut to the maximum."""
    words = r"retention \(2d, from DEDUP_RETENTION\) is longer than max_ttl \(1h\): write a retention of at most 1h"
    with pytest.raises(BadSettings, match=words):
        load('[namespaces.pay]\nmax_ttl = "1h"\n', retention="2d")


def test_every_fault_is_reported_at_once(load: Load) -> None:
    """One error reports several faults, of several namespaces."""
    with pytest.raises(BadSettings) as caught:
        load('[namespaces.a]\nmode = "x"\nmax_ttl = "y"\n[namespaces.B]\n')
    assert [part in str(caught.value) for part in ("'a': mode", "'a': max_ttl", "namespace 'B'")] == [True] * 3
    with pytest.raises(BadSettings) as caught:
        load("x = 1\nallow_unknown_namespaces = 1\n[namespaces.a]\ny = 1\n[callers]\nme = 1\n")
    assert [part in str(caught.value) for part in ("key 'x'", "namespaces is 1", "'a': there", "'me': 1")] == [True] * 4
    with pytest.raises(BadSettings) as caught:
        load('[namespaces.a]\ndefault_ttl = "8d"\nretention = "8d"\n[namespaces.b]\nretention = "9d"\n')
    assert [part in str(caught.value) for part in ("'a': default_ttl", "'a': retention", "'b': retention")] == [
        True
    ] * 3


@pytest.mark.parametrize(("name", "words"), [("none.toml", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, words: str) -> None:
    """A path that cannot be read is an error, not the same as no policy file."""
    with pytest.raises(
        BadSettings, match=f"the policy file '{tmp_path / name}' is not usable: it cannot be read: {words}"
    ):
        load_policies(load_settings({"policy_file": str(tmp_path / name)}))


async def test_a_reload_requested_during_a_reload_is_not_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A SIGHUP during a reload causes another one, since the file may have changed meanwhile.

    Protection: the request is cleared before reading, not after.
    """
    older, newer = (Policies(Policy(ms, DAY, DAY)) for ms in (1, 2))
    loop = asyncio.get_running_loop()
    settings = load_settings({"policy_file": str(tmp_path / "policies.toml")})
    requested = asyncio.Event()
    claims = ClaimService(cast("ClaimStore", None), older)
    readings: list[Policies] = []

    async def request() -> None:
        requested.set()

    def read_while_it_changes(_: Settings) -> Policies:
        readings.append(newer if readings else older)
        if len(readings) == 1:
            asyncio.run_coroutine_threadsafe(request(), loop).result()
        return readings[-1]

    async def newer_applies() -> bool:
        return claims.policies is newer

    monkeypatch.setattr(reloading, "load_policies", read_while_it_changes)
    reloads = asyncio.create_task(reload_when_requested(requested, settings, claims, None, logger()))
    try:
        await request()
        await eventually(newer_applies, what="the newer rules")
    finally:
        reloads.cancel()
    assert len(readings) == 2


SCALARS = st.one_of(
    st.sampled_from(
        ['"1s"', '"2d"', '"9d"', '"0s"', '"shadow"', '"enforce"', "true", "false", "1", "-1.5", "[]", "{}"]
    ),
    st.sampled_from(["inf", "1979-05-27", '"\\n"', '"\\u2028"', "[[]]", "{ a = 1 }"]),
)
KEYS = st.sampled_from(
    ["default_ttl", "max_ttl", "retention", "mode", "allow_unknown_namespaces", "namespaces", '"\\n"']
)
NAMES = st.sampled_from(["a", "b", "B", '"a.b"', "a.b", '"\\u0001"', '""'])
LINES = st.one_of(
    st.builds("{} = {}".format, KEYS, SCALARS), st.builds("[namespaces.{}]".format, NAMES), st.text(max_size=10)
)


@given(st.one_of(st.binary(max_size=60), st.lists(LINES, max_size=8).map(lambda lines: "\n".join(lines).encode())))
@examples(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_gives_consistent_rules_or_one_sentence(load: Load, raw: bytes) -> None:
    """Any content is either refused with one printable line, or gives rules without contradiction."""
    try:
        policies = load(raw)
    except BadSettings as error:
        assert str(error).isprintable()  # noqa: PT017 - either end is a pass
        return
    for name, policy in policies.namespaces.items():
        assert not list(identity_violations("any", name))
        assert 0 < policy.default_ttl_ms <= policy.max_ttl_ms
        assert 0 < policy.retention_ms <= policy.max_ttl_ms


@given(
    st.fixed_dictionaries(
        {key: st.none() | st.integers(1, 20 * DAY) for key in ("default_ttl", "max_ttl", "retention")},
    )
)
@examples(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_written_times_apply(load: Load, written: dict[str, int | None]) -> None:
    """A file is refused exactly when a time in force exceeds the maximum in force, and applies otherwise."""
    text = PAY + "".join(f'{key} = "{format_duration(ms)}"\n' for key, ms in written.items() if ms is not None)
    maximum = written["max_ttl"] or 7 * DAY
    default, retention = written["default_ttl"] or 60 * SECOND, written["retention"] or min(DAY, maximum)
    if default > maximum or retention > maximum:
        with pytest.raises(BadSettings, match="is longer than"):
            load(text)
    else:
        assert load(text).of("pay") == Policy(default, maximum, retention)
