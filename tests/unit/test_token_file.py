"""The file of bearer tokens: what may be in it, and what a bad one says without showing a token."""

from hashlib import sha256
from pathlib import Path

import pytest

from dedup_service.config.files import load_tokens
from dedup_service.config.settings import BadSettings

TOKEN = "a-token-of-twenty-21"


def write(folder: Path, text: str | bytes) -> Path:
    """Write a token file."""
    path = folder / "tokens.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("written", [TOKEN, f"sha256:{sha256(TOKEN.encode()).hexdigest()}"])
def test_a_token_is_its_callers_however_it_is_written(tmp_path: Path, written: str) -> None:
    """As it is, or as the digest, of which nobody can make the token; several for one caller let it change them."""
    tokens = load_tokens(
        write(tmp_path, f'box = ["{written}", "another-token-012345"]\nother = "others-token-0123456"')
    )
    assert (tokens.caller_of(TOKEN), tokens.caller_of("others-token-0123456")) == ("box", "other")
    assert tokens.caller_of(written.upper()) is None
    assert len(tokens) == 3


def test_the_digest_is_no_token(tmp_path: Path) -> None:
    """Who has read the digests cannot send one of them."""
    digest = f"sha256:{sha256(TOKEN.encode()).hexdigest()}"
    tokens = load_tokens(write(tmp_path, f'box = "{digest}"'))
    assert tokens.caller_of(digest) is None


def test_memory_holds_no_token(tmp_path: Path) -> None:
    """What is kept shows no token in its representation, nor in its fields."""
    tokens = load_tokens(write(tmp_path, f'box = "{TOKEN}"'))
    assert TOKEN not in repr(vars(tokens))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it has no token: write lines such as"),
        (f'box = "{TOKEN}', "it is not TOML"),
        (b'box = "\xff"', "it is not UTF-8 at byte 7"),
        ("box = " + "[" * 5_000, "nested too deep"),
        ('box = "secret-too-shor"', "'box' has something that is no token: write at least 16"),
        ('box = "secret with white space"', "'box' has something that is no token"),
        ("box = 1234567890123456", "'box' has something that is no token"),
        (f'pay.eu = "{TOKEN}"', "a name with a dot is quoted too"),
        ("box = []", "'box' is no name with a token"),
        (f'"" = "{TOKEN}"', "'' is no name with a token"),
        ('box = "sha256:0123456789"', "'box' has a sha256: without 64 hexadecimal digits"),
        (f'box = "{TOKEN}"\nother = "{TOKEN}"', "'other' has a token of 'box': give each caller tokens of its own"),
    ],
)
def test_a_bad_file_is_one_sentence_without_a_secret(tmp_path: Path, text: str | bytes, words: str) -> None:
    """It names the file and the caller at fault, and shows nothing of what may be a token."""
    with pytest.raises(BadSettings) as caught:
        load_tokens(write(tmp_path, text))
    sentence = str(caught.value)
    assert words in sentence
    assert "\n" not in sentence
    assert not any(secret in sentence for secret in (TOKEN, TOKEN[:12], "secret", "12345678"))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """The sentence has the path."""
    with pytest.raises(BadSettings, match=r"nowhere\.toml' is not usable: it cannot be read: No such file"):
        load_tokens(tmp_path / "nowhere.toml")
