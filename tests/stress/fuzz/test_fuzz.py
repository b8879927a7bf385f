"""The corpus passes, and the fuzzer finds every removed protection."""

import asyncio
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.stress.fuzz.mutants import MUTATIONS
from tests.stress.fuzz.run import CORPUS, Plan, replay, search
from tests.stress.fuzz.targets import TARGETS

INPUTS = sorted(path.relative_to(CORPUS) for path in CORPUS.glob("*/*"))


def test_every_target_has_inputs() -> None:
    """Each target has inputs, and each input has a target."""
    assert {path.parent.name for path in INPUTS} == set(TARGETS)


@pytest.mark.parametrize("name", INPUTS, ids=str)
def test_a_corpus_input_passes(name: Path) -> None:
    """No input that the fuzzer starts from, or found earlier, breaks a promise."""
    replay(CORPUS / name)


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has wheels for Linux on x86_64 only")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_lost_protection_is_found(mutation: str, tmp_path: Path) -> None:
    """Without the protection the target fails and its input is saved; with it, the input passes."""
    target, _ = MUTATIONS[mutation]
    result = asyncio.run(search(Plan(seconds=30, seed=1, runs=20_000, mutation=mutation, found=tmp_path), target))
    assert result.error
    assert result.found is not None
    # This process has the protection.
    replay(Path(result.found))
