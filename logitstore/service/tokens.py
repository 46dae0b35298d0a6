"""Bearer tokens: who may read, upload or ask the teacher. Kept as hashes, in a file that only its owner can read.

A token is `ls_ID_SECRET`: eight hex digits that name it, and 32 random bytes, of which the file keeps the sha256; of
so much chance no slower hash is needed. The file is read again whenever it changes, so a token that is revoked is
refused from the next request on.
"""

import hmac
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from logitstore.durable import alone_in, cannot_write, sync
from logitstore.errors import ConfigError

SCOPES = ("read", "write", "teach")
PREFIX = "ls"
MOST_FILE_BYTES = 4 << 20
_HASH = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Grant:
    """What a token allows."""

    id: str
    name: str
    """Who holds it, for people."""
    scopes: tuple[str, ...]
    """Of `SCOPES`: read stores, write (upload) into them, have the teacher teach misses."""
    stores: tuple[str, ...]
    """By name; empty: all."""
    created: int
    """Seconds since 1970."""
    hash: str
    """sha256 of the secret, in hex."""

    def allows(self, scope: str, store: str | None = None) -> bool:
        """Whether it covers a scope, of a store if one is named."""
        return scope in self.scopes and (store is None or not self.stores or store in self.stores)


EVERYTHING = Grant("", "anyone", SCOPES, (), 0, "")
"""Where there are no tokens."""


class TokenFile:
    """The tokens of a service. Safe for several threads."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigError: it is missing, or no file of tokens.
        """
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._grants: dict[str, Grant] = {}
        self.grants()

    def grants(self) -> dict[str, Grant]:
        """All tokens, by their ids.

        Raises:
            ConfigError: the file cannot be read.
        """
        with self._lock:
            try:
                stat = self._path.stat()
                seen = stat.st_mtime_ns, stat.st_size, stat.st_ino
                if seen != self._seen:
                    self._grants, self._seen = {grant.id: grant for grant in read_grants(self._path)}, seen
            except FileNotFoundError as error:
                raise ConfigError(
                    f"there is no file {self._path}; type `logitstore token new --tokens {self._path} --name NAME` to "
                    "begin it"
                ) from error
            except OSError as error:
                raise ConfigError(
                    f"{self._path} cannot be read ({error.strerror}); type the path of a file that this user may read"
                ) from error
            return self._grants

    def grant(self, token: str) -> Grant | None:
        """What a token allows; None of one that is unknown or revoked.

        Raises:
            ConfigError: the file cannot be read.
        """
        prefix, _, rest = token.partition("_")
        name, _, secret = rest.partition("_")
        found = self.grants().get(name)
        # Compared against something in any case: the time taken does not tell which ids exist.
        same = hmac.compare_digest(_hash(secret), (found or EVERYTHING).hash or _hash("nothing"))
        return found if found is not None and same and prefix == PREFIX else None


def read_grants(path: Path) -> list[Grant]:
    """The tokens in a file.

    Raises:
        ConfigError: it is no file of tokens.
        OSError: it cannot be read.
    """
    try:
        if path.stat().st_size > MOST_FILE_BYTES:
            raise ValueError
        rows = json.loads(path.read_bytes())
        if not (isinstance(rows, list) and all(_is_whole(row) for row in rows)):
            raise ValueError
        grants = [Grant(**row | {"scopes": tuple(row["scopes"]), "stores": tuple(row["stores"])}) for row in rows]
        if len({grant.id for grant in grants}) < len(grants):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no file of tokens; `logitstore token new --tokens FILE` writes one: type another path"
        ) from error
    return grants


def new_token(path: Path, name: str, scopes: Sequence[str], stores: Sequence[str] = ()) -> str:
    """Add a token to a file, which is begun if need be; the token, which is told this once.

    Raises:
        ConfigError: no scope, an unknown one, or no file of tokens.
        StoreWriteError: it cannot be written.
    """
    for scope in scopes:
        if scope not in SCOPES:
            raise ConfigError(f"there is no scope {scope!r}; type --scope with one of {', '.join(SCOPES)}")
    if not scopes:
        raise ConfigError("a token without a scope opens nothing; type --scope read")
    secret = secrets.token_urlsafe(32)
    with _editing(path) as grants:
        taken = {grant.id for grant in grants}
        number = next(n for n in iter(lambda: secrets.token_hex(4), None) if n not in taken)
        ordered = tuple(scope for scope in SCOPES if scope in scopes)
        grants.append(Grant(number, name, ordered, tuple(stores), int(time.time()), _hash(secret)))
    return f"{PREFIX}_{number}_{secret}"


def revoke_token(path: Path, number: str) -> Grant:
    """Take a token out of a file, by its id.

    Raises:
        ConfigError: there is none, or no file of tokens.
        StoreWriteError: it cannot be written.
    """
    with _editing(path) as grants:
        found = [grant for grant in grants if grant.id == number]
        if not found:
            ids = ", ".join(grant.id for grant in grants) or "none"
            raise ConfigError(f"{path} has no token {number}; it has {ids}")
        grants.remove(found[0])
    return found[0]


@contextmanager
def _editing(path: Path) -> Iterator[list[Grant]]:
    """The tokens of a file, to be changed: one process at a time, and the file is replaced as a whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(path.parent):
            grants = read_grants(path) if path.exists() else []
            yield grants
            _replace(path, grants)
    except OSError as error:
        raise cannot_write(path, error) from error


def _replace(path: Path, grants: Sequence[Grant]) -> None:
    partial = path.with_name(f".partial-{uuid4().hex}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            with suppress(OSError):  # root edits the file of a service that runs as another user; only root may
                stat = path.stat()
                os.chown(file.fileno(), stat.st_uid, stat.st_gid)
            json.dump([asdict(grant) for grant in grants], file, indent=1)
            file.write("\n")
        sync(partial)
        partial.rename(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _hash(secret: str) -> str:
    return sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _is_whole(row: dict[str, Any]) -> bool:
    lists = row["scopes"], row["stores"]
    return (
        all(isinstance(value, list) for value in lists)
        and all(isinstance(text, str) for text in (row["id"], row["name"], row["hash"], *row["scopes"], *row["stores"]))
        and set(row["scopes"]) <= set(SCOPES)
        and type(row["created"]) is int
        and _HASH.fullmatch(row["hash"]) is not None
    )
