"""Numbers as an axis shows them, and ticks at round ones."""

import pytest

from logitstore.scale import number, round_step, round_ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (-2.5, "−2.5"),
        (1000, "1,000"),
        (20_000, "20k"),
        (5e6, "5M"),
        (2e9, "2G"),
        (1e-6, "10⁻⁶"),
        (-2e-7, "−2×10⁻⁷"),
        (1e18, "10¹⁸"),
    ],
)
def test_a_number_as_an_axis_shows_it(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 16, (0, 5, 10, 15)),
        (-16, 0, (-15, -10, -5, 0)),
        (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (3, 98, (20, 40, 60, 80)),
    ],
)
def test_ticks_lie_at_round_numbers(low: float, high: float, ticks: tuple[float, ...]) -> None:
    assert round_ticks(low, high, round_step(low, high)) == ticks
