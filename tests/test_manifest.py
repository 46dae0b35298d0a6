import json
from dataclasses import replace

import pytest

from logitstore.errors import IncompatibleStoreError, StoreFormatError
from logitstore.manifest import Manifest
from logitstore.selection import Selection
from tests.stores import manifest

BASE = manifest("threshold:16")


def changed(**recipe: object) -> Manifest:
    return replace(BASE, recipe=replace(BASE.recipe, **recipe))


DIFFERENCES = [
    (replace(BASE, teacher=replace(BASE.teacher, weights_digest="b" * 32)), "teacher weights", "type --teacher"),
    (replace(BASE, teacher=replace(BASE.teacher, config_digest="b" * 32)), "teacher config", "type --teacher"),
    (replace(BASE, teacher=replace(BASE.teacher, adapter_digest="b" * 32)), "adapter", "leave --adapter-path"),
    (replace(BASE, tokenizer=replace(BASE.tokenizer, fingerprint="b" * 32)), "tokenizer", "type --teacher"),
    (changed(vocab_size=301), "LM head width", "type --teacher"),
    (changed(selection=Selection("top-k", 16)), "selection", "type --select threshold:16"),
    (changed(selection=Selection("threshold", 8)), "selection", "type --select threshold:16"),
    (changed(temperatures=(2.0,)), "temperature", "type --temperature 1.0"),
    (changed(temperatures=(1.0000001,)), "temperature", "type --temperature 1.0"),
    (changed(temperatures=(1.0, 2.0)), "temperature", "type --temperature 1.0"),
    (changed(replicas=2), "replicas", "type --replicas 1"),
    (changed(tail_log_probs=True), "tail log-probs", "leave --tail-log-probs out"),
    (changed(log_z=(1.0, 2.0)), "log Z", "leave --log-z out"),
    (changed(seed=7), "seed", "type --seed 0"),
]


@pytest.mark.parametrize(("other", "what", "type_this"), DIFFERENCES)
def test_a_difference_is_refused_with_what_was_found_expected_and_what_to_type(
    other: Manifest, what: str, type_this: str
) -> None:
    assert other.fingerprint != BASE.fingerprint
    with pytest.raises(IncompatibleStoreError) as caught:
        BASE.require_compatible(other, "docs.zarr")
    message = str(caught.value)
    assert message.startswith(f"docs.zarr was built with {what} ") and type_this in message
    assert "this run has" in message and "\n" not in message


def test_names_and_the_type_the_teacher_computed_in_do_not_count() -> None:
    teacher = replace(BASE.teacher, name="copy", dtype="bfloat16", quantization="4-bit")
    other = replace(BASE, teacher=teacher, tokenizer=replace(BASE.tokenizer, chat_template_digest="d" * 32))
    assert other.fingerprint == BASE.fingerprint
    BASE.require_compatible(other, "docs.zarr")


def test_a_temperature_of_one_is_one_however_it_is_written() -> None:
    assert changed(temperatures=(1,)).fingerprint == BASE.fingerprint


def test_a_manifest_comes_back_from_json() -> None:
    whole = changed(temperatures=(1.0, 2.5), replicas=3, tail_log_probs=True, log_z=(1.0, 4.0), seed=1 << 63)
    for made in (BASE, whole):
        assert Manifest.from_json(json.loads(json.dumps(made.to_json())), "x") == made


def test_a_newer_format_is_refused_by_name() -> None:
    with pytest.raises(StoreFormatError, match=r"x has format 2, this logitstore reads format 1; type `pip install"):
        Manifest.from_json(BASE.to_json() | {"format_version": 2, "teacher": "in another form"}, "x")
    with pytest.raises(StoreFormatError, match="not a logitstore"):
        Manifest.from_json({"format": "other"}, "x")
