"""Every error that a user can meet, as one tree.

::

    LogitstoreError
    ├── ConfigError               a flag or a config key that cannot be used
    ├── DatasetError              a dataset that is missing, empty or malformed
    ├── ModelError                a teacher or student that does not load
    │   └── UnusableLogitsError   a teacher that cannot be used on a document: no numbers, or too long for it
    ├── TeacherLostError          a live teacher that answers no more
    ├── ProcessLostError          one of several processes that train together is gone
    ├── MissingTargetsError       the store has no answer and nobody else may give one
    ├── ServiceError              a service that refuses, or answers what no service says
    │   ├── ServiceLostError      one that does not answer
    │   └── WireError             an answer that was cut or damaged on its way
    └── StoreError
        ├── StoreNotFoundError    no store at this path
        ├── StoreFormatError      a store of a newer format, or not a store at all
        ├── CorruptStoreError     bytes that differ from those that were written
        ├── IncompatibleStoreError  built by another teacher, tokenizer or selection
        ├── StoreLostError        a store that cannot be read now: no answer, no permission
        └── StoreWriteError       full disk, no permission, another writer

A message says what was found, what was expected and what to type next. The commands print it on one line and exit with
code 2.
"""

MOST_FOREIGN = 400
"""Characters of another library's error in a message."""


class LogitstoreError(Exception):
    """Base of all errors raised for the user's input, files or machine."""


class ConfigError(LogitstoreError):
    """A flag or config value that cannot be used."""


class DatasetError(LogitstoreError):
    """A dataset that is missing, empty or malformed."""


class ModelError(LogitstoreError):
    """A teacher or student that does not load."""


class UnusableLogitsError(ModelError):
    """A teacher's logits are NaN or infinite on a document, or it cannot read so long a one."""


class TeacherLostError(LogitstoreError):
    """A live teacher that answers no more."""


class ProcessLostError(LogitstoreError):
    """One of several processes that train together is gone."""


class MissingTargetsError(LogitstoreError):
    """The store has no answer and the run may not ask a teacher."""


class ServiceError(LogitstoreError):
    """A service refuses what it was asked for, or answers what no service says."""


class ServiceLostError(ServiceError):
    """A service that does not answer, asked again for as long as is worth waiting."""


class WireError(ServiceError):
    """An answer of a service that was cut or damaged on its way."""


class StoreError(LogitstoreError):
    """Something about a store."""


class StoreNotFoundError(StoreError):
    """No store at this path."""


class StoreFormatError(StoreError):
    """Not a store, or one of a newer format."""


class CorruptStoreError(StoreError):
    """Bytes on disk differ from the bytes that were written."""


class IncompatibleStoreError(StoreError):
    """The store was made by something else than what was asked for."""


class StoreLostError(StoreError):
    """A store cannot be read now: its place answers no more, or the machine gives no access."""


class StoreWriteError(StoreError):
    """A store that cannot be written: full disk, no permission, another writer."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, without its full stop and no longer than a reader's patience."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".;:")
    return line if len(line) <= MOST_FOREIGN else f"{line[:MOST_FOREIGN]}..."
