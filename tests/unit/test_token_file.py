"""The file of bearer tokens: its content, and errors that show no token."""

from hashlib import sha256
from pathlib import Path

import pytest

from dedup_service.api.authorization import BearerTokens
from dedup_service.config.errors import BadSettings
from dedup_service.config.files import read_tokens

TOKEN = "a-token-of-twenty-21"


def write(folder: Path, text: str | bytes) -> Path:
    """Write a token file."""
    path = folder / "tokens.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def load(folder: Path, text: str) -> BearerTokens:
    """Return the tokens of a file with this text."""
    return BearerTokens(read_tokens(write(folder, text)).items())


@pytest.mark.parametrize("written", [TOKEN, f"sha256:{sha256(TOKEN.encode()).hexdigest()}"])
def test_a_token_identifies_its_caller_in_either_spelling(tmp_path: Path, written: str) -> None:
    """A token is written as it is or as its digest, and a caller may have several, for rotation."""
    tokens = load(tmp_path, f'box = ["{written}", "another-token-012345"]\nother = "others-token-0123456"')
    assert (tokens.caller_of(TOKEN), tokens.caller_of("others-token-0123456")) == ("box", "other")
    assert tokens.caller_of(written.upper()) is None
    assert len(tokens) == 3


def test_a_digest_is_not_accepted_as_a_token(tmp_path: Path) -> None:
    """A digest that somebody read in the file does not authenticate a call."""
    digest = f"sha256:{sha256(TOKEN.encode()).hexdigest()}"
    tokens = load(tmp_path, f'box = "{digest}"')
    assert tokens.caller_of(digest) is None


def test_tokens_do_not_stay_in_memory(tmp_path: Path) -> None:
    """Neither the content of the file nor the object made of it holds a token."""
    digests = read_tokens(write(tmp_path, f'box = "{TOKEN}"'))
    assert TOKEN not in repr(digests)
    assert TOKEN not in repr(vars(BearerTokens(digests.items())))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it has no token: write lines such as"),
        (f'box = "{TOKEN}', "it is not valid TOML"),
        (b'box = "\xff"', "it is not UTF-8 at byte 7"),
        ("box = " + "[" * 5_000, "nested too deep"),
        ('box = "secret-too-shor"', "'box' has an invalid token: write at least 16"),
        ('box = "secret with white space"', "'box' has an invalid token"),
        ("box = 1234567890123456", "'box' has an invalid token"),
        (f'pay.eu = "{TOKEN}"', "quote a name that contains a dot, too"),
        ("box = []", "'box' is not a name with a token"),
        (f'"" = "{TOKEN}"', "'' is not a name with a token"),
        ('box = "sha256:0123456789"', "'box' has a sha256: without 64 hexadecimal digits"),
        (f'box = "{TOKEN}"\nother = "{TOKEN}"', "'other' has a token of 'box': give each caller tokens of its own"),
    ],
)
def test_a_bad_file_is_one_sentence_without_a_secret(tmp_path: Path, text: str | bytes, words: str) -> None:
    """The sentence names the caller at fault and shows nothing that may be a token."""
    with pytest.raises(BadSettings) as caught:
        read_tokens(write(tmp_path, text))
    sentence = str(caught.value)
    assert words in sentence
    assert "\n" not in sentence
    assert not any(secret in sentence for secret in (TOKEN, TOKEN[:12], "secret", "12345678"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """The sentence contains the path."""
    with pytest.raises(BadSettings, match=r"nowhere\.toml' is not usable: it cannot be read: No such file"):
        read_tokens(tmp_path / "nowhere.toml")
