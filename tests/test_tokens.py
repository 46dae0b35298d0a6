"""Tokens: hashed, revoked at once, and a file that is gone or malformed opens nothing."""

import hmac
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from logitstore.errors import ConfigError
from logitstore.service import tokens
from logitstore.service.tokens import TokenFile, new_token, revoke_token


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def test_the_file_holds_the_sha256_of_the_secret_and_only_its_owner_reads_it(path: Path) -> None:
    token = new_token(path, "ada", ["read"])
    _, number, secret = token.split("_", 2)
    (row,) = json.loads(path.read_text())
    assert (row["id"], row["hash"]) == (number, sha256(secret.encode()).hexdigest())
    assert secret not in path.read_text() and len(secret) >= 43
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_token_opens_what_it_was_made_for_and_nothing_else(path: Path) -> None:
    grant = TokenFile(path).grant(token) if (token := new_token(path, "ada", ["teach", "read"], ["a"])) else None
    assert grant is not None and grant.scopes == ("read", "teach")
    allowed = [
        (scope, store) for scope in ("read", "write", "teach") for store in ("a", "b") if grant.allows(scope, store)
    ]
    assert allowed == [("read", "a"), ("teach", "a")]


@pytest.mark.parametrize("change", ["", "x", "no_token", "ls__", "ls_{id}_", "ls_{id}_wrong", "xx_{id}_{secret}"])
def test_what_only_looks_like_a_token_opens_nothing(path: Path, change: str) -> None:
    _, number, secret = new_token(path, "ada", ["read"]).split("_", 2)
    assert TokenFile(path).grant(change.format(id=number, secret=secret)) is None
    assert TokenFile(path).grant("ls_00000000_nothing") is None
    assert TokenFile(path).grant("ls_\xff\ud800_\udcff") is None


def test_a_revoked_token_is_refused_by_a_file_that_was_read_before(path: Path) -> None:
    kept, gone = new_token(path, "ada", ["read"]), new_token(path, "bob", ["read"])
    file = TokenFile(path)
    assert file.grant(kept) and file.grant(gone)
    revoke_token(path, gone.split("_")[1])
    assert file.grant(kept) and file.grant(gone) is None


def test_secrets_are_compared_in_constant_time_whether_or_not_the_id_is_known(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, compared = new_token(path, "ada", ["read"]), []
    monkeypatch.setattr(tokens.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    file = TokenFile(path)
    assert [file.grant(t) is None for t in (token, token + "x", "ls_00000000_x")] == [False, True, True]
    assert len(compared) == 3 and all(len(a) == len(b) == 64 for a, b in compared)
    assert tokens.hmac is hmac


WHOLE = {"id": "1" * 8, "name": "n", "scopes": ["read"], "stores": ["a"], "created": 1, "hash": "0" * 64}


@pytest.mark.parametrize(
    "row",
    [
        {"hash": "é" * 64},
        {"hash": ""},
        {"hash": "A" * 64},
        {"stores": ""},
        {"stores": "a"},
        {"scopes": "read"},
        {"scopes": ["all"]},
        {"created": "now"},
        {"created": True},
        {"more": 1},
        {"id": 7},
        {"id": "2" * 8},
    ],
)
def test_a_row_that_no_command_writes_makes_the_whole_file_unreadable(path: Path, row: dict[str, Any]) -> None:
    other = WHOLE | {"id": "2" * 8}
    path.write_text(json.dumps([other, WHOLE]))
    assert len(TokenFile(path).grants()) == 2
    path.write_text(json.dumps([other, WHOLE | row]))
    with pytest.raises(ConfigError, match="no file of tokens"):
        TokenFile(path)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b"[" * 100_000, b'[{"id":1}]', b"null"])
def test_a_file_that_is_damaged_while_it_is_used_opens_nothing(path: Path, data: bytes) -> None:
    token = new_token(path, "ada", ["read"])
    file = TokenFile(path)
    path.write_bytes(data)
    for _ in range(2):  # and does not go back to what it was
        with pytest.raises(ConfigError):
            file.grant(token)
    path.unlink()
    with pytest.raises(ConfigError, match="there is no file"):
        file.grant(token)


def test_two_who_make_tokens_at_once_lose_none(path: Path) -> None:
    from tests.guessing import at_once

    made = at_once(8, lambda n: new_token(path, str(n), ["read"]))
    assert len(TokenFile(path).grants()) == 8 and all(TokenFile(path).grant(token) for token in made)


def test_what_cannot_be_made_or_revoked_is_said(path: Path) -> None:
    for scopes, word in (([], "without a scope"), (["rad"], "no scope 'rad'")):
        with pytest.raises(ConfigError, match=word):
            new_token(path, "ada", scopes)
    new_token(path, "ada", ["read"])
    with pytest.raises(ConfigError, match="has no token 12345678"):
        revoke_token(path, "12345678")
