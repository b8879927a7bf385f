"""The generated parts of the documentation, and the files that the pages show."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import reference
from dedup_service import settings as settings_module
from dedup_service.config.policy_file import load_policies
from dedup_service.config.settings import Settings, load_settings
from dedup_service.config.token_file import load_tokens

ROOT = Path(__file__).parents[2]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()


def test_the_generated_parts_are_current() -> None:
    """What the pages say of settings, errors and decisions is what the sources say."""
    ended = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "reference.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert not ended.returncode, ended.stderr


@pytest.fixture
def remarks() -> dict[str, dict[str, dict[str, str]]]:
    """What the documentation says of each reason, by the exception that carries it."""
    return tomllib.loads(reference.REMARKS.read_text())


def test_a_reason_that_nobody_described_is_named(remarks: dict[str, dict[str, dict[str, str]]]) -> None:
    """So that no store can send a word that the documentation does not know."""
    del remarks["StoreUnavailable"]["STORE_STALLED"]
    with pytest.raises(SystemExit, match="does not describe STORE_STALLED"):
        list(reference.error_rows(remarks))


def test_a_reason_that_nothing_sends_is_named(remarks: dict[str, dict[str, dict[str, str]]]) -> None:
    """So that the page does not keep words of the past."""
    remarks["StoreUnavailable"]["STORE_ASLEEP"] = {"applied": "no", "means": "It sleeps.", "remedy": "Wake it."}
    with pytest.raises(SystemExit, match="describes STORE_ASLEEP, which nothing sends"):
        list(reference.error_rows(remarks))


def test_every_variable_has_its_place() -> None:
    """Settings by their row, and the variables that are no settings by name."""
    named = {f"{settings_module.ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    named |= {value for name, value in vars(settings_module).items() if name[0] != "_" and name.endswith("_VARIABLE")}
    assert {name for name in named if f"`{name}`" not in CONFIGURATION} == set()


def test_the_files_that_the_page_shows_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file of settings and its policy file are read as they stand."""
    monkeypatch.delenv("DEDUP_STORE_URL", raising=False)
    settings, policies = re.findall(r"```toml\n(.+?)```", CONFIGURATION, re.DOTALL)
    (tmp_path / "dedup.toml").write_text(settings)
    (tmp_path / "policies.toml").write_text(policies)
    loaded = load_settings({"policy_file": tmp_path / "policies.toml"}, tmp_path / "dedup.toml")
    assert (loaded.default_ttl, loaded.log_level) == (30_000, "warning")
    assert load_policies(loaded).of("pay.refunds").shadow


def test_the_files_of_callers_that_the_page_shows_can_be_used(tmp_path: Path) -> None:
    """Its tokens and its rules of callers are read as they stand."""
    shown = (ROOT / "docs" / "security.md").read_text()
    tokens, callers = re.findall(r"```toml\n(.+?)```", shown, re.DOTALL)
    (tmp_path / "tokens.toml").write_text(tokens)
    (tmp_path / "policies.toml").write_text(callers)
    assert load_tokens(tmp_path / "tokens.toml").caller_of("b1946ac92492d2347c62") == "support"
    flags = {"policy_file": tmp_path / "policies.toml", "auth_tokens": tmp_path / "tokens.toml"}
    policies = load_policies(load_settings(flags))
    assert policies.callers is not None
    assert policies.callers["lucky-box-api"].namespaces == frozenset({"pay", "default"})
