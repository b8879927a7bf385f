"""The inputs that are kept come to what they should, and the fuzzer notices a lost protection."""

import asyncio
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.stress.fuzz.mutants import MUTATIONS
from tests.stress.fuzz.run import CORPUS, Plan, replay, search
from tests.stress.fuzz.targets import TARGETS

INPUTS = sorted(path.relative_to(CORPUS) for path in CORPUS.glob("*/*"))


def test_every_target_has_inputs() -> None:
    """Each target has inputs to begin with, and no input is without a target."""
    assert {path.parent.name for path in INPUTS} == set(TARGETS)


@pytest.mark.parametrize("name", INPUTS, ids=str)
def test_a_kept_input_comes_to_what_it_should(name: Path) -> None:
    """Whatever the fuzzer begins with, or has found before, breaks no promise."""
    replay(CORPUS / name)


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has wheels for Linux on x86_64 alone")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_lost_protection_is_found(mutation: str, tmp_path: Path) -> None:
    """A reader without one of its protections fails, and the input that showed it is saved and shows it again."""
    target, _ = MUTATIONS[mutation]
    result = asyncio.run(search(Plan(seconds=30, seed=1, runs=20_000, mutation=mutation, found=tmp_path), target))
    assert result.error
    assert result.found is not None
    # With the protection in its place there is nothing to see.
    replay(Path(result.found))
