import math

import pytest

from distill_trainer.schedule import Schedule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", [0.5] * 11),
        ("0.9->0.4", [0.9 - 0.05 * i for i in range(11)]),
        ("0.9->0.4:linear", [0.9 - 0.05 * i for i in range(11)]),
        ("0.2->0.8:cosine", [0.8 - 0.3 * (1 + math.cos(math.pi * i / 10)) for i in range(11)]),
        ("0.9->0.5:wsd", [0.9] * 9 + [0.7, 0.5]),
        ("0.9->0.4:wsd:0.5", [0.9] * 6 + [0.8, 0.7, 0.6, 0.5, 0.4]),
    ],
)
def test_each_shape_is_its_formula_from_the_first_step_to_the_last(text: str, expected: list[float]) -> None:
    schedule = Schedule.parse(text)
    assert [schedule.at(step, 11) for step in range(1, 12)] == pytest.approx(expected, abs=1e-12)


def test_a_run_of_one_step_begins_and_a_number_is_itself() -> None:
    assert Schedule.parse("0.9->0.3:cosine").at(1, 1) == 0.9
    assert Schedule.parse(0.1).at(3, 9) == 0.1


@pytest.mark.parametrize(
    "text", ["", "x", "1->", "->1", "1->0:step", "1->0:linear:2", "1->0:wsd:0", "1->0:wsd:x", "1:2"]
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Schedule.parse(text)
