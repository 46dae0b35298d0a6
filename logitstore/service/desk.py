"""The teacher's desk: documents that stores lack wait here, and each is computed once, however many ask for it.

One thread owns the teacher. It takes documents in the order in which they came, those of one store together as one
batch, and an answer is told to those who wait for it only when it is on disk. A document that the teacher fails on
fails alone, with a reason. What waits is bounded in tokens: beyond that, `ask` refuses, and says when to come again.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from logitstore.errors import (
    ConfigError,
    CorruptStoreError,
    LogitstoreError,
    StoreError,
    first_line,
)
from logitstore.journal import ShardWriter
from logitstore.key import document_key
from logitstore.manifest import Manifest
from logitstore.plan import shard_positions
from logitstore.recipe import DocumentRecord, Recipe
from logitstore.service.keeping import Keeping, require_there
from logitstore.service.shelf import Served

TokenIds = npt.NDArray[np.int32]
BATCH_TOKENS = 2048
"""Padded tokens in one teacher batch, or one document."""
IDLE_S = 30.0
"""What was taught becomes a shard when nobody has asked for so long, or there is enough of it: between the steps of a
training run that asks for a few documents at a time, no shard of a few documents each is made."""
RATE_WEIGHT = 0.3
"""Of the newest batch in the mean speed by which waiting times are told."""


class Answering(Protocol):
    """See `teacher.Teacher`."""

    vocab_size: int

    def manifest(self, recipe: Recipe) -> Manifest: ...
    def records(self, documents: Sequence[TokenIds], recipe: Recipe) -> list[DocumentRecord]: ...


class QueueFullError(LogitstoreError):
    """More waits for the teacher than may."""

    def __init__(self, message: str, wait_s: int) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class CannotTeachError(LogitstoreError):
    """The teacher gives no answer about a document."""


class CannotKeepError(LogitstoreError):
    """An answer that could not be computed or written now, which may be otherwise later."""


STOPPED = CannotKeepError("the service is being stopped")


_Name = tuple[Served, bytes]
"""A document of a store: what takes a deleted store's place is another, whatever it is called."""


@dataclass
class _Asked:
    served: Served
    token_ids: TokenIds
    answer: "Future[DocumentRecord]" = field(default_factory=Future)

    @property
    def name(self) -> _Name:
        return self.served, document_key(self.token_ids)


class Desk:
    """A teacher that answers for the stores that it built.

    Args:
        load: loads the teacher, in the desk's own thread, where MLX then stays.
        most_tokens: so many may wait.
        say: takes a line of text for the log.
        stores: those that are there when it has loaded; whether it is theirs is known before anybody asks.
    """

    def __init__(
        self,
        load: Callable[[], Answering],
        most_tokens: int,
        say: Callable[[str], object] = lambda _: None,
        stores: Callable[[], Sequence[Served]] = tuple,
    ) -> None:
        self.most_tokens = most_tokens
        self.state = "loading"
        self.taught = 0
        """Documents that the teacher has computed."""
        self.failed = 0
        self._load, self._say, self._stores = load, say, stores
        self._waiting: OrderedDict[_Name, _Asked] = OrderedDict()
        self._working: dict[_Name, _Asked] = {}
        self._identity: Manifest | None = None
        self._vocab_size = 0
        self._keeping = Keeping(say)
        self._misfits: dict[Served, str] = {}
        self._tokens = 0
        self._per_s = 100.0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="teacher", daemon=True)

    def start(self) -> None:
        """Begin to load the teacher, and then to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End after the batch that is being computed; what is kept is in shards then, what waits is refused."""
        with self._changed:
            self._stopping = True
            loading = self.state == "loading"
            self._changed.notify_all()
        if loading:  # which may take minutes, and nothing is lost by it
            self._lose(STOPPED)
        elif self._thread.is_alive():
            self._thread.join()

    @property
    def waiting(self) -> tuple[int, int]:
        """Documents and tokens that wait or are being computed."""
        with self._changed:
            return len(self._waiting) + len(self._working), self._tokens

    def teaches(self, served: Served) -> bool:
        """Whether the teacher is the one of this store, as far as is known while it loads."""
        return self.state in ("loading", "ready") and served.writable and not self._misfit(served)

    def kept(self, served: Served, key: bytes) -> DocumentRecord | None:
        """An answer that is on disk and not yet in a shard."""
        return self._keeping.pending(served, key)

    def ask(self, served: Served, documents: Sequence[tuple[bytes, TokenIds]]) -> "list[Future[DocumentRecord]]":
        """Have documents computed; whoever asks for one that waits already waits for the same answer.

        The results raise CannotTeachError or CannotKeepError.

        Args:
            documents: keys and token ids [L].

        Raises:
            QueueFullError: the new ones are more than may wait; none of them does then.
            CannotTeachError: this teacher does not teach this store.
        """
        with self._changed:
            if self._stopping or not self.teaches(served):
                raise CannotTeachError(self.refusal(served))
            found = [self._find(served, key) for key, _ in documents]
            fresh = {key: ids for (key, ids), asked in zip(documents, found, strict=True) if asked is None}
            tokens = sum(map(len, fresh.values()))
            if tokens and self._tokens and self._tokens + tokens > self.most_tokens:
                raise QueueFullError(
                    f"{self._tokens:,} tokens wait for the teacher and {self.most_tokens:,} may; ask again later",
                    max(1, round(self._tokens / self._per_s / 2)),
                )
            for key, token_ids in fresh.items():
                self._waiting[served, key] = _Asked(served, token_ids)
            self._tokens += tokens
            self._changed.notify_all()
            answers = [self._find(served, key) for key, _ in documents]
            return [asked.answer for asked in answers if asked is not None]

    def refusal(self, served: Served) -> str:
        """Why a store is not taught here."""
        if self._stopping:
            return str(STOPPED)
        if not served.path.exists():
            return f"{served.name} is gone"
        if not served.writable:
            return f"{served.name} is a zip file, which cannot be added to"
        return self._misfit(served) or f"the teacher is {self.state}"

    def _find(self, served: Served, key: bytes) -> _Asked | None:
        return self._waiting.get((served, key)) or self._working.get((served, key))

    def _run(self) -> None:
        try:
            teacher = self._load()
            for served in self._stores():
                try:
                    self._require_fit(teacher, served)
                except CannotTeachError as error:
                    self._say(str(error))
        except Exception as error:  # whatever a model, a disk or a device gives
            self._lose(CannotTeachError(f"the teacher does not load: {first_line(error)}"))
            return
        with self._changed:
            if self._stopping:
                return
            self.state = "ready"
        self._say("the teacher is ready")
        try:
            while (batch := self._next()) is not None:
                if batch:
                    self._answer(teacher, batch)
                else:
                    self._keeping.commit()
            self._keeping.commit()
        finally:
            self._lose(STOPPED)
            self._keeping.close()

    def _next(self) -> list[_Asked] | None:
        """The next batch, once there is one; an empty one after a while without, None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping, IDLE_S)
            if self._stopping:
                return None
            batch: list[tuple[_Name, _Asked]] = []
            longest = 0
            for name, asked in self._waiting.items():
                longest = max(longest, len(asked.token_ids))
                if batch and (asked.served is not batch[0][1].served or longest * (len(batch) + 1) > BATCH_TOKENS):
                    break
                batch.append((name, asked))
            for name, asked in batch:
                del self._waiting[name]
                self._working[name] = asked
            return [asked for _, asked in batch]

    def _answer(self, teacher: Answering, batch: list[_Asked]) -> None:
        """Answer a batch: from the store where it knows by now, else by the teacher, and keep that."""
        served, started = batch[0].served, time.monotonic()
        try:
            require_there(served)
            self._require_fit(teacher, served)
            writer = self._keeping.writer(served)
            left = [asked for asked in batch if not self._known(writer, asked, fresh=asked is batch[0])]
            found = self._records(teacher, left, served.store.manifest.recipe)
            writer.append([record for _, record in found])
            require_there(served)
            self.taught += len(found)
            for asked, record in found:
                self._finish(asked, record)
            tokens = sum(len(asked.token_ids) for asked, _ in found)
            if tokens:
                speed = tokens / max(time.monotonic() - started, 1e-6)
                self._per_s += RATE_WEIGHT * (speed - self._per_s)
            if sum(len(r.records) for r in writer.pending.values()) >= shard_positions(served.store.manifest.recipe):
                self._keeping.commit()
        except StoreError as error:
            self._say(f"{served.name}: {error}")
            for asked in batch:
                self._finish(asked, CannotKeepError(f"the answer could not be kept: {first_line(error)}"))
        except CannotTeachError as error:
            for asked in batch:
                self._finish(asked, error)
        except Exception as error:  # a fault of our own: nobody waits for ever, and the next is answered
            self._say(f"{served.name}: the service failed: {type(error).__name__}")
            for asked in batch:
                self._finish(asked, CannotKeepError(f"the service failed: {type(error).__name__}"))

    def _known(self, writer: ShardWriter, asked: _Asked, *, fresh: bool) -> bool:
        """Whether the store has learned a document since it was asked for; it is answered then."""
        record = writer.pending.get(asked.name[1])
        if record is None:
            try:
                with asked.served.reading(fresh=fresh) as store:
                    record = store.answer(asked.token_ids)
            except CorruptStoreError as error:  # whoever asks again has the shard put aside
                self._finish(asked, CannotKeepError(first_line(error)))
                return True
        if record is None or len(record.token_ids) < len(asked.token_ids):
            return False
        self._finish(asked, record)
        return True

    def _records(self, teacher: Answering, batch: list[_Asked], recipe: Recipe) -> list[tuple[_Asked, DocumentRecord]]:
        """What the teacher says; a document on which it fails is told so, and the others go on without it."""
        if not batch:
            return []
        try:
            records = teacher.records([asked.token_ids for asked in batch], recipe)
            return list(zip(batch, records, strict=True))
        except Exception as error:  # no memory, a device that is gone, logits that are no numbers
            if len(batch) > 1:
                return [pair for asked in batch for pair in self._records(teacher, [asked], recipe)]
            self.failed += 1
            reason = f"the teacher fails on this document: {type(error).__name__}: {first_line(error)}"
            self._finish(batch[0], CannotTeachError(reason))
            return []

    def _finish(self, asked: _Asked, result: DocumentRecord | LogitstoreError) -> None:
        with self._changed:
            if self._working.pop(asked.name, None) is None:
                return
            self._tokens -= len(asked.token_ids)
        if isinstance(result, DocumentRecord):
            asked.answer.set_result(result)
        else:
            asked.answer.set_exception(result)

    def _require_fit(self, teacher: Answering, served: Served) -> None:
        """Raise CannotTeachError where a store was built by another teacher."""
        if self._identity is None:
            self._vocab_size = teacher.vocab_size
            self._identity = teacher.manifest(served.store.manifest.recipe)  # which reads all weights
        why = self._misfit(served)
        if why:
            raise CannotTeachError(f"this service's teacher does not teach {served.name}: {why}")

    def _misfit(self, served: Served) -> str:
        """Why a store is another teacher's; nothing where it is this one's, or where that is not known yet."""
        if self._identity is not None and served not in self._misfits:
            manifest = served.store.manifest
            try:
                recipe = replace(manifest.recipe, vocab_size=self._vocab_size)  # ConfigError: what its head cannot give
                manifest.require_teacher(replace(self._identity, recipe=recipe), served.name)
                self._misfits[served] = ""
            except (ConfigError, StoreError) as error:
                self._misfits[served] = str(error)
        return self._misfits.get(served, "")

    def _lose(self, why: LogitstoreError) -> None:
        """Refuse all that waits."""
        with self._changed:
            if self.state == "lost":
                return
            self.state = "lost"
            left, self._waiting = list(self._waiting.items()), OrderedDict()
            self._working.update(left)
        self._say(str(why))
        for _, asked in left:
            self._finish(asked, why)
