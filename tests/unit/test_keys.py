"""Keys: no two transactions share one."""

from hypothesis import given
from hypothesis import strategies as st

from dedup_service.stores.stored_value import prefixed_layout, raw_layout

NAMESPACES = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,62}", fullmatch=True)
IDS = st.text(min_size=1, max_size=60)


@given(NAMESPACES, IDS, NAMESPACES, IDS, st.text(max_size=10))
def test_different_pairs_make_different_keys(space: str, text: str, other_space: str, other: str, prefix: str) -> None:
    """The prefixed layout is injective, colons and control characters in ids included.

    Protection: a namespace has no colon, so the first one after the prefix ends it.
    """
    key = prefixed_layout(prefix)
    assert (key(space, text) == key(other_space, other)) == ((space, text) == (other_space, other))


@given(NAMESPACES, NAMESPACES, st.text(alphabet="ab:.", min_size=1, max_size=8), st.text(alphabet="ab:.", max_size=8))
def test_naive_joins_that_collide_are_kept_apart(space: str, other_space: str, text: str, more: str) -> None:
    """`a` + `b:c` and `a:b` + `c` have different keys. Protection: a namespace has no colon."""
    key = prefixed_layout("dedup:")
    if space != other_space:
        assert key(space, f"{more}:{text}") != key(other_space, text)


def test_the_layouts_are_as_documented() -> None:
    """`{prefix}{namespace}:{id}`, and the id alone."""
    assert prefixed_layout("dedup:")("pay", "a:b") == b"dedup:pay:a:b"
    assert raw_layout("default", "lucky_box:1") == b"lucky_box:1"
