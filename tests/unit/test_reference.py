"""The generated parts of the documentation, and the example files on its pages."""

import re
import subprocess
import sys
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

import reference
from dedup_service.config import settings as settings_module
from dedup_service.config.files import read_tokens
from dedup_service.config.settings import SETTINGS, load_settings, variable_of
from dedup_service.server.policies import load_policies

ROOT = Path(__file__).parents[2]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()


def test_the_generated_parts_are_current() -> None:
    """The tables of settings, errors and decisions match the sources."""
    ended = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "reference.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert not ended.returncode, ended.stderr


@pytest.fixture
def remarks() -> dict[str, dict[str, dict[str, str]]]:
    """The content of docs/errors.toml: a description of each reason, by exception."""
    return tomllib.loads(reference.REMARKS.read_text())


def test_an_undescribed_reason_is_an_error(remarks: dict[str, dict[str, dict[str, str]]]) -> None:
    """Every reason that the service can send must be documented."""
    del remarks["StoreUnavailable"]["STORE_STALLED"]
    with pytest.raises(SystemExit, match="does not describe STORE_STALLED"):
        list(reference.error_rows(remarks))


def test_a_described_reason_that_does_not_exist_is_an_error(remarks: dict[str, dict[str, dict[str, str]]]) -> None:
    """Removed reasons must leave the documentation."""
    remarks["StoreUnavailable"]["STORE_ASLEEP"] = {"applied": "no", "means": "It sleeps.", "remedy": "Wait."}
    with pytest.raises(SystemExit, match="describes STORE_ASLEEP, which is not a Reason"):
        list(reference.error_rows(remarks))


def test_a_reason_under_the_wrong_exception_is_an_error(remarks: dict[str, dict[str, dict[str, str]]]) -> None:
    """The row would show the code and retry of another exception."""
    remarks["StoreUnavailable"]["SERVER_STOPPING"] = remarks["ServerStopping"].pop("SERVER_STOPPING")
    with pytest.raises(SystemExit, match="must describe SERVER_STOPPING, and nothing else, under ServerStopping"):
        list(reference.error_rows(remarks))


def test_an_unknown_exception_is_an_error(remarks: dict[str, dict[str, dict[str, str]]]) -> None:
    """An entry must name an exception of the error table."""
    remarks["StoreGone"] = remarks.pop("StoreUnavailable")
    with pytest.raises(SystemExit, match="StoreGone, which is not in the error table"):
        list(reference.error_rows(remarks))


def test_every_variable_is_documented() -> None:
    """Settings and the other variables are on the configuration page."""
    named = {variable_of(name) for name in SETTINGS}
    named |= {value for name, value in vars(settings_module).items() if name[0] != "_" and name.endswith("_VARIABLE")}
    assert {name for name in named if f"`{name}`" not in CONFIGURATION} == set()


def test_the_example_files_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings file and the policy file of the configuration page can be loaded unchanged."""
    monkeypatch.delenv("DEDUP_STORE_URL", raising=False)
    settings, policies = re.findall(r"```toml\n(.+?)```", CONFIGURATION, re.DOTALL)
    (tmp_path / "dedup.toml").write_text(settings)
    (tmp_path / "policies.toml").write_text(policies)
    loaded = load_settings({"policy_file": tmp_path / "policies.toml"}, tmp_path / "dedup.toml")
    assert (loaded.default_ttl, loaded.log_level) == (30_000, "warning")
    assert load_policies(loaded).of("pay.refunds").shadow


def test_the_example_files_of_callers_are_valid(tmp_path: Path) -> None:
    """The token file and the policy file of the security page can be loaded unchanged."""
    shown = (ROOT / "docs" / "security.md").read_text()
    tokens, callers = re.findall(r"```toml\n(.+?)```", shown, re.DOTALL)
    (tmp_path / "tokens.toml").write_text(tokens)
    (tmp_path / "policies.toml").write_text(callers)
    assert read_tokens(tmp_path / "tokens.toml")[sha256(b"b1946ac92492d2347c62").digest()] == "support"
    flags = {"policy_file": tmp_path / "policies.toml", "auth_tokens": tmp_path / "tokens.toml"}
    policies = load_policies(load_settings(flags))
    assert policies.callers is not None
    assert policies.callers["lucky-box-api"].namespaces == frozenset({"pay", "default"})
