"""Transaction ids, tested with the golden vectors of all clients and with random parts."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import new_claim_token, transaction_id

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "golden_vectors.json").read_text())

# Lone surrogates cannot be encoded as UTF-8.
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("%:\n\x85"), max_size=8)
PARTS = st.lists(TEXT, min_size=1, max_size=4).filter(lambda parts: parts != [""])


@pytest.mark.parametrize("vector", VECTORS["transaction_ids"]["valid"], ids=lambda vector: repr(vector["id"])[:30])
def test_the_ids_are_those_of_every_client(vector: dict[str, Any]) -> None:
    """The same parts make the same id in every language."""
    assert transaction_id(*vector["parts"]) == vector["id"]


@pytest.mark.parametrize("vector", VECTORS["transaction_ids"]["invalid"], ids=lambda vector: str(vector["why"]))
def test_invalid_parts_are_refused(vector: dict[str, Any]) -> None:
    """The error names the limit."""
    with pytest.raises(ValueError, match=r"at least one part|at least 1 byte|at most 512 bytes"):
        transaction_id(*vector["parts"])


@given(PARTS, PARTS)
def test_different_parts_make_different_ids(parts: list[str], others: list[str]) -> None:
    """Ids are equal exactly if their parts are."""
    assert (transaction_id(*parts) == transaction_id(*others)) == (parts == others)


@given(PARTS)
def test_an_id_can_be_read_back(parts: list[str]) -> None:
    """Splitting at ':' and unescaping returns the parts. The id has no control character."""
    joined = transaction_id(*parts)
    assert [unquote(part, errors="strict") for part in joined.split(":")] == parts
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", joined)


def test_a_number_is_refused() -> None:
    """It has several spellings."""
    with pytest.raises(TypeError, match="not int"):
        transaction_id("order", 5)  # type: ignore[arg-type]


def test_tokens_are_random() -> None:
    """Each has 22 characters of base64url."""
    tokens = {new_claim_token() for _ in range(1_000)}
    assert len(tokens) == 1_000
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{22}", token) for token in tokens)
