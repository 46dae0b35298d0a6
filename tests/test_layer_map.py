import pytest

from distill_trainer.layer_map import LayerMap
from logitstore.errors import ConfigError, IncompatibleStoreError


def test_the_teachers_layer_is_typed_before_the_students() -> None:
    assert LayerMap.parse("6:3,12:6").on(13, 7) == ((6, 3), (12, 6))
    assert LayerMap.parse("6:3").on(30, 10, kept=(6, 12)) == ((6, 3),)


def test_skip_is_a_stride_through_the_teacher_as_far_as_it_goes() -> None:
    assert LayerMap.parse("skip:2").on(8, 4) == ((0, 0), (2, 1), (4, 2), (6, 3))
    assert LayerMap.parse("skip:3").on(7, 4) == ((0, 0), (3, 1), (6, 2))
    assert LayerMap.parse("skip:2").on(30, 10, kept=(3, 6, 12)) == ((6, 3), (12, 6))


def test_auto_joins_first_to_first_and_last_to_last() -> None:
    assert LayerMap.parse("auto").on(4, 4) == ((0, 0), (1, 1), (2, 2), (3, 3))
    # 30 layers cut to 10: round(i 29 / 9), which is what --keep-layers 10 keeps
    kept = (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)
    assert LayerMap.parse("auto").on(30, 10) == tuple((t, s) for s, t in enumerate(kept))
    assert LayerMap.parse("auto").on(12, 1) == ((11, 0),)
    assert LayerMap.parse("auto").on(2, 4) == ((0, 0), (0, 1), (1, 2), (1, 3))


def test_auto_from_a_store_gives_each_kept_layer_the_students_as_deep() -> None:
    # 6 of 0..12 is half way, 3 of 0..6
    assert LayerMap.parse("auto").on(13, 7, kept=(6, 12)) == ((6, 3), (12, 6))
    assert LayerMap.parse("auto").on(30, 10, kept=(0, 29)) == ((0, 0), (29, 9))


@pytest.mark.parametrize("text", ["", "skip", "skip:0", "6", "6:", "-1:3", "6:3,", "6:3;7:4", "linear", "٣:1"])
def test_what_is_no_map_is_refused_with_what_to_type(text: str) -> None:
    with pytest.raises(ConfigError, match=r"names no layers; type --layer-map auto, skip:2, or TEACHER:STUDENT"):
        LayerMap.parse(text)


def test_layers_that_are_not_there_are_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="names 6:3 twice"):
        LayerMap.parse("6:3,6:3")
    with pytest.raises(ConfigError, match=r"names 6:3 \(TEACHER:STUDENT\), and the teacher has layers 0 to 5;"):
        LayerMap.parse("6:3").on(6, 4)
    with pytest.raises(ConfigError, match=r"names 5:4 \(TEACHER:STUDENT\), and the student has layers 0 to 3;"):
        LayerMap.parse("5:4").on(6, 4)
    with pytest.raises(
        IncompatibleStoreError, match=r"layer 5, and the store keeps layers 6,12; .* --hidden-layers 5,12` for another"
    ):
        LayerMap.parse("5:2,12:6").on(13, 7, kept=(6, 12))
    with pytest.raises(ConfigError, match="the store keeps layers 5,11, none of which is 2 times a layer"):
        LayerMap.parse("skip:2").on(13, 7, kept=(5, 11))
