"""Hidden states come back within half a step of their group, whatever else is in it; what is no number is refused."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from logitstore.errors import ConfigError, StoreFormatError
from logitstore.hidden_states import decode, encode, from_streams, layer_width, to_streams
from logitstore.manifest import Manifest
from logitstore.recipe import Recipe
from logitstore.selection import Selection
from tests.stores import manifest

Floats = npt.NDArray[np.float32]


def back(hidden: Floats) -> Floats:
    return decode(encode(hidden), *hidden.shape[1:])


def require_within_the_bound(hidden: Floats) -> None:
    found = back(hidden)
    assert found.dtype == np.float32 and found.shape == hidden.shape
    for at in range(0, hidden.shape[2], 16):
        group, near = (x[..., at : at + 16].astype(np.float64) for x in (hidden, found))
        step = np.abs(group).max(axis=-1, keepdims=True) / 127 * (1 + 2.0**-7)
        assert (np.abs(near - group) <= step / 2 * (1 + 1e-6) + 2.0**-100).all()


@settings(max_examples=200, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=3, max_dims=3, max_side=40),
        elements=st.floats(-(2.0**126), 2.0**126, width=32) | st.sampled_from([0.0, 1.0, -1e4, 2.0**-99, 1e-40]),
    )
)
def test_every_value_is_within_half_a_step_of_its_group(hidden: Floats) -> None:
    require_within_the_bound(hidden)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 576])
def test_an_outlier_costs_its_own_group_and_no_other(size: int) -> None:
    rng = np.random.default_rng(size)
    hidden = rng.normal(0, 1, (50, 3, size)).astype(np.float32)
    hidden[..., 0] *= 20_000
    require_within_the_bound(hidden)
    off = np.linalg.norm((back(hidden) - hidden)[..., 16:], axis=-1)
    assert (off <= 0.01 * np.linalg.norm(hidden[..., 16:], axis=-1)).all()


def test_a_group_is_at_most_1_6_percent_off() -> None:
    scale = 1 + 2.0**-7  # its bfloat16 is rounded up most just above a power of two
    worst = np.full((1, 1, 16), 0.5 * scale, np.float32)  # each half a step off
    worst[..., 0] = 126.5 * scale
    off = np.linalg.norm(back(worst) - worst) / np.linalg.norm(worst)
    assert 0.0155 < off < 0.016


def test_bytes_spelled_out() -> None:
    hidden = np.zeros((1, 1, 18), np.float32)
    hidden[0, 0, :3], hidden[0, 0, 17] = [127, -63.4, 0.4], -254
    # Scales 1 (3F80) and 2 (4000): low bytes 80 00, high ones 3F 40; then 127, -63, 0, ... and 0, -127.
    assert encode(hidden).tobytes().hex() == "8000" + "3f40" + "7fc100" + 13 * "00" + "0081"
    assert back(hidden)[0, 0, [0, 1, 2, 17]].tolist() == [127, -63, 0, -254]


def test_zeros_and_what_is_next_to_nothing_are_zeros() -> None:
    assert not back(np.zeros((2, 1, 20), np.float32)).any()
    assert not back(np.full((2, 1, 20), 1e-38, np.float32)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**127])
def test_what_is_no_number_is_refused(bad: float) -> None:
    hidden = np.ones((3, 2, 40), np.float32)
    hidden[1, 1, 33] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode(hidden)


@pytest.mark.parametrize(("at", "byte"), [(5, 0x80), (3, 0x80), (3, 0x7F)])  # -128; a negative scale; a scale of 2^127
def test_bytes_that_no_encoder_writes_are_refused(at: int, byte: int) -> None:
    data = encode(np.ones((4, 1, 20), np.float32))
    data[2, at] = byte
    with pytest.raises(ValueError, match="no encoder writes"):
        decode(data, 1, 20)
    with pytest.raises(ValueError, match="no encoder writes"):
        from_streams(np.concatenate(to_streams(data, 20)), 4, 20)


def test_streams_come_back_and_a_chunk_that_ends_too_early_is_refused() -> None:
    data = encode(np.random.default_rng(0).normal(0, 1, (5, 1, 33)).astype(np.float32))
    raw = np.concatenate(to_streams(data, 33))
    assert (from_streams(np.append(raw, np.zeros(9, np.uint8)), 5, 33) == data).all()
    with pytest.raises(ValueError, match="ends too early"):
        from_streams(raw[:-1], 5, 33)


REFUSED = [
    ((0, 0), 8, "names one twice"),
    ((-1,), 8, "names what is no layer; type numbers from 0"),
    ((1 << 16,), 8, "names what is no layer"),
    (tuple(range(65)), 8, "at most 64; type fewer"),
    ((0,), 0, "expected 1 to 65536"),
    ((0,), 65_537, "expected 1 to 65536"),
    ((), 8, "expected 0"),
]


@pytest.mark.parametrize(("layers", "size", "message"), REFUSED)
def test_layers_that_cannot_be_are_refused(layers: tuple[int, ...], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(Selection.parse("top-k:4"), (1.0,), 0, 300, hidden_layers=layers, hidden_size=size)


def test_a_recipe_that_keeps_them_is_given_them() -> None:
    recipe = manifest(hidden_layers=(2, 0), hidden_size=20).recipe
    assert recipe.hidden_width == 2 * layer_width(20) == 2 * (20 + 4)
    assert recipe.record_width == manifest().recipe.record_width + 48
    with pytest.raises(ValueError, match=r"hidden states None, expected \(2, 2, 20\)"):
        recipe.record(np.array([1, 2, 3], np.int32), np.zeros((2, 300), np.float32))


def test_a_manifest_without_them_is_what_it_was_and_one_with_them_is_another_store() -> None:
    plain, kept = manifest(), manifest(hidden_layers=(2, 0), hidden_size=20)
    assert "hidden" not in str(plain.to_json()) and plain.fingerprint != kept.fingerprint
    assert kept.fingerprint not in {
        manifest(hidden_layers=layers, hidden_size=size).fingerprint for layers, size in (((0, 2), 20), ((2, 0), 21))
    }
    assert Manifest.from_json(kept.to_json(), "s") == kept and Manifest.from_json(plain.to_json(), "s") == plain


def test_what_a_later_reader_would_know_is_refused_by_name() -> None:
    said = manifest().to_json()
    said["recipe"]["attention"] = [1]
    with pytest.raises(StoreFormatError, match=r"'attention', which this .* `pip install --upgrade logitstore`"):
        Manifest.from_json(said, "s")


@pytest.mark.parametrize("layers", [[1.0], [True], "12", 3])
def test_layers_of_another_type_are_refused(layers: object) -> None:
    said = manifest(hidden_layers=(1,), hidden_size=20).to_json()
    said["recipe"]["hidden_layers"] = layers
    with pytest.raises(TypeError):
        Manifest.from_json(said, "s")
