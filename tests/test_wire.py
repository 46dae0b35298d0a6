"""Answers as bytes: what was sent is what is read, and what was cut or changed on its way is never believed."""

import struct
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.errors import WireError
from logitstore.wire import Answer, Kind, read_answers
from tests.stores import manifest, tokens
from tests.stubs import answer

RECIPE = manifest().recipe
DOCUMENTS = [tokens(seed, length) for seed, length in enumerate((2, 40, 9))]
ANSWERS = [
    Answer(1, Kind.HIT, answer(DOCUMENTS[1], RECIPE)),
    Answer(0, Kind.TAUGHT, answer(DOCUMENTS[0], RECIPE)),
    Answer(0, Kind.WAIT),
    Answer(2, Kind.FAILED, reason="no\nmemory \ud800"),
    Answer(0, Kind.END),
]
WHOLE = b"".join(a.to_bytes(RECIPE) for a in ANSWERS)


def frame(document: int, kind: int, payload: bytes) -> bytes:
    """One written by hand, as the first lines of wire.py have it."""
    head = struct.pack("<IBI", document, kind, len(payload))
    return head + blake2b(head + payload, digest_size=16).digest() + payload


def read(*pieces: bytes, recipe: Any = RECIPE) -> list[Answer]:
    return list(read_answers(pieces, DOCUMENTS, recipe))


@pytest.mark.parametrize("size", [1, 7, 1000, len(WHOLE)])
def test_what_was_sent_is_read_however_it_was_cut_into_pieces(size: int) -> None:
    found = read(*(WHOLE[at : at + size] for at in range(0, len(WHOLE), size)))
    assert [(a.document, a.kind) for a in found] == [(1, Kind.HIT), (0, Kind.TAUGHT), (2, Kind.FAILED)]
    for got, sent in zip(found[:2], ANSWERS[:2], strict=True):
        assert got.record is not None and sent.record is not None
        assert np.array_equal(got.record.token_ids, sent.record.token_ids)
        assert np.array_equal(got.record.records, sent.record.records)
    assert found[2].reason == "no memory ?"


@pytest.mark.parametrize("recipe", [{"temperatures": (1.0, 2.0), "replicas": 2}, {"log_z": (3.0,)}])
@pytest.mark.parametrize("select", ["top-k:5", "top-p:0.9:8", "random:6", "threshold:4"])
def test_records_of_every_selection_come_back_as_they_were(select: str, recipe: dict[str, Any]) -> None:
    if select == "random:6" or "replicas" not in recipe:
        own = manifest(select, **recipe).recipe
    else:
        own = manifest(select, **recipe | {"replicas": 1}).recipe
    record = answer(DOCUMENTS[1], own)
    (found,) = read(Answer(1, Kind.HIT, record).to_bytes(own), frame(0, Kind.END, b""), recipe=own)
    assert found.record is not None and np.array_equal(found.record.records, record.records)


def test_a_reason_written_by_hand_is_read() -> None:
    (found,) = read(frame(2, 3, "zu  wenig\nSpeicher — 内存".encode()), frame(0, 6, b""))
    assert (found.document, found.kind, found.reason) == (2, Kind.FAILED, "zu wenig Speicher — 内存")


def test_a_reason_of_any_length_is_one_that_a_client_takes() -> None:
    sent = Answer(2, Kind.FAILED, reason="𝄞" * 1_000_000).to_bytes(RECIPE)
    (found,) = read_answers([sent, frame(0, 6, b"")], DOCUMENTS[:1] * 3, RECIPE)
    assert found.reason == "𝄞" * 1024


def test_an_answer_that_was_cut_anywhere_says_so_after_what_came_whole() -> None:
    for at in range(0, len(WHOLE), 11):
        found = []
        with pytest.raises(WireError, match="cut"):
            found += list(read_answers([WHOLE[:at]], DOCUMENTS, RECIPE))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_changed_byte_is_never_believed(at: int, change: int) -> None:
    data = bytearray(WHOLE)
    data[at] ^= change
    with pytest.raises(WireError):
        read(bytes(data))


BODY = ANSWERS[0].to_bytes(RECIPE)[25:]


@pytest.mark.parametrize(
    "data",
    [
        frame(3, Kind.HIT, BODY),
        frame(2**32 - 1, Kind.HIT, BODY),
        frame(0, Kind.HIT, BODY),
        frame(1, 7, b""),
        frame(1, 255, BODY),
        frame(1, Kind.MISSING, b"\xff"),
        frame(1, Kind.HIT, b""),
        frame(1, Kind.HIT, BODY[:-1]),
        frame(1, Kind.HIT, BODY + b"\0"),
        struct.pack("<IBI", 1, 0, 1 << 31) + bytes(16),
    ],
)
def test_what_no_service_writes_is_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        read(data, frame(0, Kind.END, b""))


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_payload_of_anything_under_a_true_digest_is_a_wire_error_or_the_document(data: Any) -> None:
    body = bytearray(BODY)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    payload = bytes(body[: data.draw(st.integers(0, len(body)))]) if data.draw(st.booleans()) else bytes(body)
    try:
        found = read(frame(1, Kind.HIT, payload), frame(0, Kind.END, b""))
    except WireError:
        return
    assert found[0].record is not None
    assert np.array_equal(found[0].record.token_ids, DOCUMENTS[1][: len(found[0].record.token_ids)])
