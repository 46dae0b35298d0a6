"""A build that keeps hidden states: what is read is what the teacher's layers gave, from any kind of store, or live."""

from dataclasses import replace
from pathlib import Path

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

import logitstore.plan
from distill_cli.logitstore import main
from logitstore.build import BuildConfig, build
from logitstore.contract import Store
from logitstore.errors import ConfigError, IncompatibleStoreError, UnusableLogitsError
from logitstore.hidden_states import decode, encode
from logitstore.info import info, to_text
from logitstore.live import replay
from logitstore.merge import convert, merge
from logitstore.model import load_model
from logitstore.recipe import DocumentRecord
from logitstore.store import create_store, open_store
from logitstore.store_stats import of_store
from logitstore.teacher import Teacher
from logitstore.verify import verify
from tests.runs import World, make_world
from tests.stores import contents
from tests.tiny import CORPUS

LAYERS = (3, 0)
ADDED = "hidden states of 2 layers add 72 bytes a token before compression"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("hidden"), [*CORPUS, " ".join(CORPUS[:3])], store=False)
    world.build(world.store, hidden_layers=LAYERS, batch_tokens=100)
    return world


@pytest.fixture
def teacher(world: World) -> Teacher:
    return Teacher(str(world.teacher), quiet=True)


def by_hand(world: World, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """The residual stream after LAYERS at every position of a document that predicts: [L - 1, layers, D]."""
    model = load_model(world.teacher).model
    hidden, found = model.model.embed_tokens(mx.array(token_ids[None, :-1])), {}
    for number, layer in enumerate(model.layers):
        found[number] = hidden = layer(hidden, "causal")
    return np.stack([np.array(found[number][0]) for number in LAYERS], axis=1)


def everything(store: Store) -> dict[bytes, bytes]:
    return {record.key: record.records.tobytes() for record in map(store.record, range(len(store)))}


def test_what_is_read_is_what_the_layers_gave_within_the_rounding(world: World) -> None:
    store = open_store(world.store)
    assert len(store) == 7 and verify(world.store, quiet=True).problems == []
    for number in range(len(store)):
        token_ids, targets = store.document(number)
        expected = by_hand(world, token_ids)
        assert targets.hidden is not None and targets.hidden.shape == expected.shape
        off = np.abs(targets.hidden - expected).reshape(len(targets), 2, 2, 16)  # 32 wide: two groups
        step = np.abs(expected).reshape(off.shape).max(axis=-1, keepdims=True) / 127
        assert (off <= 0.51 * step + 1e-5).all()


def test_a_beginning_is_answered_with_its_hidden_states(world: World) -> None:
    store = open_store(world.store)
    token_ids, whole = max(map(store.document, range(len(store))), key=lambda found: len(found[0]))
    found = store.get(np.append(token_ids[:50], [5, 6, 7]))
    assert found is not None and found.hidden is not None and whole.hidden is not None
    assert len(found) >= 31 and (found.hidden == whole.hidden[: len(found)]).all()


def test_a_miss_and_a_hit_are_the_same_bytes_where_the_teacher_gives_the_same(world: World, teacher: Teacher) -> None:
    store = open_store(world.store)
    recipe = store.manifest.recipe
    for number in range(len(store)):
        built = store.record(number)
        logits, hidden = zip(*teacher.outputs(built.token_ids, LAYERS), strict=True)
        (live,) = teacher.records([built.token_ids], recipe)
        alone = recipe.record(built.token_ids, np.concatenate(logits), hidden=np.concatenate(hidden))
        assert (live.records == alone).all()
        assert (live.records != built.records).mean() < 0.01  # another batch shape: the teacher's own rounding


def test_several_documents_in_one_batch_have_their_own(world: World, teacher: Teacher) -> None:
    documents = [open_store(world.store).token_ids(number) for number in (0, 6, 3)]
    recipe = open_store(world.store).manifest.recipe
    for record in teacher.records(documents, recipe):
        found = recipe.read(record.records).hidden
        assert found is not None
        np.testing.assert_allclose(found, by_hand(world, record.token_ids), atol=0.05 * np.abs(found).max())


@pytest.mark.parametrize("suffix", [".lmdb", ".zarr.zip"])
def test_a_conversion_keeps_them_and_comes_back(world: World, tmp_path: Path, suffix: str) -> None:
    convert(world.store, tmp_path / f"t{suffix}", quiet=True)
    convert(tmp_path / f"t{suffix}", tmp_path / "u.zarr", quiet=True)
    stores = [open_store(path) for path in (world.store, tmp_path / f"t{suffix}", tmp_path / "u.zarr")]
    assert everything(stores[0]) == everything(stores[1]) == everything(stores[2])
    assert verify(tmp_path / f"t{suffix}", quiet=True).problems == []


def test_parts_are_merged_and_other_hidden_states_of_one_document_are_a_conflict(world: World, tmp_path: Path) -> None:
    for part in ("1/2", "2/2"):
        world.build(tmp_path / f"{part[0]}.zarr", hidden_layers=LAYERS, batch_tokens=100, shard=part)
    merge([tmp_path / "1.zarr", tmp_path / "2.zarr"], tmp_path / "m.zarr", quiet=True)
    made = open_store(tmp_path / "m.zarr")
    assert everything(made).keys() == everything(open_store(world.store)).keys()

    recipe, record = made.manifest.recipe, made.record(0)
    records = record.records.copy()
    columns = recipe.layer_columns(1)
    states = decode(records[:, columns], 1, recipe.hidden_size)
    records[:, columns] = encode(-states)
    other = create_store(tmp_path / "o.zarr", made.manifest, made.vocabulary)
    with other.writer("build") as writer:
        writer.append([DocumentRecord(record.token_ids, records)])
        writer.commit([record.key])
    with pytest.raises(IncompatibleStoreError, match="other targets"):
        merge([tmp_path / "m.zarr", tmp_path / "o.zarr"], tmp_path / "n.zarr", quiet=True)


def test_two_builds_are_byte_identical_and_one_goes_on_where_it_was_stopped(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(world.store)
    answer, left = Teacher.submit, iter(range(2))

    def submit(*arguments: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return answer(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Teacher, "submit", submit)
        world.build(tmp_path / "s.zarr", hidden_layers=LAYERS, batch_tokens=100)
    world.build(tmp_path / "s.zarr", hidden_layers=LAYERS, batch_tokens=100)
    assert contents(tmp_path / "s.zarr") == whole


def test_a_shard_holds_fewer_positions_where_their_hidden_states_are_many(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logitstore.plan, "SHARD_HIDDEN_BYTES", 72 * 60)
    world.build(tmp_path / "s.zarr", hidden_layers=LAYERS)
    assert open_store(tmp_path / "s.zarr").shard_count >= 3 and open_store(world.store).shard_count == 1


def test_what_a_store_says_of_them(world: World) -> None:
    store = open_store(world.store)
    text = to_text(info(store), world.store)
    assert "states after layers 3, 0, 32 wide, 72 bytes a token before compression" in text
    planes = of_store(store, quiet=True).plane_bytes
    assert {"hidden-0", "hidden-1"} <= planes.keys() and 20 < planes["hidden-0"] / store.positions < 40


def test_the_cost_is_said_before_the_work(world: World, tmp_path: Path) -> None:
    said: list[str] = []
    config = BuildConfig(str(world.teacher), str(world.data), tmp_path / "s", hidden_layers=LAYERS, quiet=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Teacher, "submit", lambda *_: 1 / 0)
        build(config, said.append)
    assert ADDED in said
    words = ["build", "--teacher", str(world.teacher), "--dataset", str(world.data), "--out", str(tmp_path / "t")]
    result = CliRunner().invoke(main, [*words, "--hidden-layers", "3,0", "--dry-run", "--quiet"])
    assert result.exit_code == 0 and ADDED in result.output and not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("6", "layer 6 is asked for, and the model has layers 0 to 3; type numbers from 0 to 3"),
        ("1,1", "hidden-layers 1,1 names one twice; type each once"),
        ("-1", "names what is no layer; type numbers from 0"),
        ("1.5", "'1.5' is not a list of layers; type --hidden-layers 6,12"),
    ],
)
def test_layers_that_are_not_there_are_refused_in_one_line(
    world: World, tmp_path: Path, typed: str, message: str
) -> None:
    words = ["build", "--teacher", str(world.teacher), "--dataset", str(world.data), "--out", str(tmp_path / "s")]
    result = CliRunner().invoke(main, [*words, f"--hidden-layers={typed}", "--quiet"])
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "s").exists()


def test_a_store_is_extended_with_the_layers_that_it_has_and_no_others(world: World) -> None:
    with pytest.raises(IncompatibleStoreError, match=r"hidden layers 3,0 .*has none.*; type --hidden-layers 3,0"):
        world.build(world.store)
    with pytest.raises(IncompatibleStoreError, match="hidden layers"):
        world.build(world.store, hidden_layers=(0, 3))


def test_a_teacher_whose_hidden_states_are_no_numbers_is_refused(world: World, teacher: Teacher) -> None:
    recipe = open_store(world.store).manifest.recipe
    hidden = np.full((2, 2, 32), np.nan, np.float32)
    with pytest.raises(UnusableLogitsError, match="hidden states are NaN or infinite"):
        teacher._checked(lambda: recipe.record(np.arange(3, dtype=np.int32), np.zeros((2, 384)), hidden=hidden))
    with pytest.raises(ConfigError, match="layers 0 to 3"):
        teacher.hidden_size((4,))


def test_verify_live_holds_them_against_the_teacher(world: World, teacher: Teacher, tmp_path: Path) -> None:
    store = open_store(world.store)
    found = replay(store, teacher, 7, seed=1, quiet=True)
    assert found.ok and found.hidden_near == found.positions == store.positions
    assert found.to_json()["hidden_near"] == found.positions
    assert "positions within 5% of the live teacher's" in found.to_text()

    record = store.record(0)
    records = record.records.copy()
    records[:, store.manifest.recipe.hidden_columns] = np.roll(
        records[:, store.manifest.recipe.hidden_columns], 1, axis=0
    )
    shifted = create_store(tmp_path / "s.lmdb", store.manifest, store.vocabulary)
    with shifted.writer("build") as writer:
        writer.append([DocumentRecord(record.token_ids, records)])
    off = replay(shifted, teacher, 1, seed=1, quiet=True)
    assert not off.ok and off.hidden_near == 0 and off.equal_entries >= 0.99 * off.entries
    assert replace(off, hidden_near=None).ok and "hidden_near" not in replace(off, hidden_near=None).to_json()
