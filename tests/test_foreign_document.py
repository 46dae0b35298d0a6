"""Also holds the teacher that the tests of the single formats write caches of."""

import numpy as np
import numpy.typing as npt
import pytest

from logitstore.errors import DatasetError
from logitstore.foreign.alignment import aligned
from logitstore.foreign.document import ForeignDocument, foreign_document, log_sum_exp

INF = np.inf
Teacher = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]


def teacher(length: int, vocab: int, seed: int = 0, *, spread: float = 3.0) -> Teacher:
    """Tokens [L] drawn from a teacher, its log-probs [L, vocab]: row t is about token t + 1, the last about none."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((length, vocab)) * spread
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    drawn = [rng.choice(vocab, p=np.exp(row)) for row in log_probs[:-1]]
    return np.array([int(rng.integers(vocab)), *drawn]), log_probs


def top(log_probs: npt.NDArray[np.float64], k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The k largest, by falling log-prob: ids and log-probs."""
    ids = np.argsort(-log_probs, axis=1)[:, :k]
    return ids, np.take_along_axis(log_probs, ids, axis=1)


def document(tokens: list[int], ids: list[list[int]], log_probs: list[list[float]]) -> ForeignDocument:
    return foreign_document(np.array(tokens), np.array(ids), np.array(log_probs, np.float64), "a row 3")


def test_entries_are_sorted_and_padding_is_last_with_id_0() -> None:
    found = document([1, 2], [[7, 262_143, 99]], [[np.log(0.25), np.log(0.5), -INF]])
    assert found.ids.tolist() == [[262_143, 7, 0]]
    np.testing.assert_array_equal(found.log_probs, [[np.log(0.5), np.log(0.25), -INF]])
    assert [str(a.dtype) for a in (found.token_ids, found.ids, found.log_probs)] == ["int32", "uint32", "float64"]


def test_the_tail_is_what_the_entries_leave_without_cancelling() -> None:
    rest = 1e-13
    found = document(
        [1, 2, 3, 4, 5], [[1, 2], [1, 2], [1, 2], [1, 2]], [[np.log1p(-rest), -INF], [-INF, -INF], [0, -INF], [-1, -2]]
    )
    expected = [np.log(rest), 0, -INF, np.log(1 - np.exp(-1) - np.exp(-2))]
    np.testing.assert_allclose(found.log_tail_mass, expected, rtol=1e-4)


def test_the_label_is_found_among_the_entries_or_unknown() -> None:
    found = document([5, 6, 7, 0], [[6, 5], [5, 6], [3, 0]], [[-1, -2], [-1, -2], [-1, -INF]])
    np.testing.assert_array_equal(found.label_log_prob, [-1, np.nan, np.nan])


def test_log_sum_exp_survives_extremes() -> None:
    with np.errstate(all="raise"):
        found = log_sum_exp(np.array([[1e4, 1e4], [-1e4, -1e4 - 1]]))
    np.testing.assert_allclose(found, [1e4 + np.log(2), -1e4 + np.log1p(np.exp(-1))])
    assert log_sum_exp(np.array([[-INF, -INF]]))[0] == -INF


@pytest.mark.parametrize(
    ("tokens", "ids", "log_probs", "says"),
    [
        ([1, 2, 3], [[1]], [[-1.0]], "found 3 tokens"),
        ([1, 2], [[1, 2]], [[-1.0, np.nan]], "found log-prob nan at position 0"),
        ([1, 2], [[1, 2]], [[-1.0, 0.5]], "found log-prob 0.5"),
        ([1, -2], [[1, 2]], [[-1.0, -1.5]], "found token -2"),
        ([1, 2**31], [[1, 2]], [[-1.0, -1.5]], "found token 2147483648"),
        ([1, 2], [[-1, 2]], [[-1.0, -1.5]], "found id -1"),
        ([1, 2], [[4, 4]], [[-1.0, -1.5]], "found id 4 twice at position 0"),
        ([1, 2], [[4, 5]], [[-0.1, -0.1]], "sum to 1.81"),
    ],
)
def test_what_is_no_document_is_refused_in_one_line(
    tokens: list[int], ids: list[list[int]], log_probs: list[list[float]], says: str
) -> None:
    with pytest.raises(DatasetError, match=says) as raised:
        document(tokens, ids, log_probs)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("a row 3: ")


def shifted(by: int, length: int = 400) -> ForeignDocument:
    tokens, log_probs = teacher(length, 50)
    ids, values = top(log_probs, 8)
    return foreign_document(np.roll(tokens, by), ids[:-1], values[:-1], "a row 3")


def test_targets_of_these_tokens_pass() -> None:
    documents = [shifted(0), shifted(0)]
    assert list(aligned(iter(documents), "type this")) == documents


@pytest.mark.parametrize(("by", "token"), [(1, 2), (-1, 0)])
def test_targets_one_position_off_are_refused(by: int, token: int) -> None:
    with pytest.raises(DatasetError, match=rf"token t \+ {token} [0-9.]+%, expected most on token t \+ 1; type this"):
        list(aligned(iter([shifted(by)]), "type this"))


def test_targets_of_other_tokens_are_refused() -> None:
    with pytest.raises(DatasetError, match="they belong to other tokens; type this"):
        list(aligned(iter([shifted(100)]), "type this"))


def test_few_positions_are_not_judged() -> None:
    documents = [shifted(1, length=50)]
    assert list(aligned(iter(documents), "type this")) == documents
