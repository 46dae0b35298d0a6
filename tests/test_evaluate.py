from pathlib import Path

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from distill_trainer.evaluate import TEACHER, evaluate
from logitstore.errors import ConfigError, DatasetError
from logitstore.model import LoadedModel, load_model
from logitstore.sequences import TokenSequence
from logitstore.teacher import Teacher
from tests.runs import make_world
from tests.tiny import save_tiny_model


def log_softmax(model: LoadedModel, token_ids: npt.NDArray[np.int32], width: int) -> npt.NDArray[np.float64]:
    """float64 [L - 1, width], from the whole model at once."""
    z = np.array(model.model(mx.array(token_ids[None]))[0], np.float64)[:-1, :width]
    z -= z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(str(make_world(tmp_path_factory.mktemp("world"), store=False).teacher))


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    """Two documents of which the first is longer than one chunk of logits, with prompts left out."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 384, n).astype(np.int32) for n in (530, 40)]
    return [TokenSequence(d, rng.random(len(d) - 1) < 0.5, "here", 0) for d in documents]


@pytest.mark.parametrize("width", [384, 400])
def test_figures_are_those_of_the_formulas_in_float64(
    tmp_path: Path, teacher: Teacher, sequences: list[TokenSequence], width: int
) -> None:
    student = load_model(save_tiny_model(tmp_path / "s", seed=9, vocab_size=width))
    found = evaluate({"s": student}, teacher, sequences, quiet=True)
    rows, confident = [], []
    for s in sequences:
        log_p, log_q = (log_softmax(m, s.token_ids, 384)[s.trained] for m in (teacher.loaded, student))
        p, q, labels = np.exp(log_p), np.exp(log_q), s.token_ids[1:][s.trained]
        best = [np.argsort(-x, axis=1)[:, :5] for x in (log_p, log_q)]
        rows.append([
            (p * (log_p - log_q)).sum(axis=1),
            (q * (log_q - log_p)).sum(axis=1),
            best[0][:, 0] == best[1][:, 0],
            [len(set(a) & set(b)) / 5 for a, b in zip(*(x.tolist() for x in best), strict=True)],
            1 - np.abs(p - q).sum(axis=1) / 2,
            *(-x[np.arange(len(x)), labels] for x in (log_p, log_q)),
        ])  # fmt: skip
        confident += zip(q.max(axis=1).tolist(), (q.argmax(axis=1) == labels).tolist(), strict=True)
    means = [np.concatenate(column).mean() for column in zip(*rows, strict=True)]
    kl, reverse_kl, agreement, top5, acceptance, teacher_nll, student_nll = means
    gaps = [sum(c - right for c, right in confident if b / 15 < c <= (b + 1) / 15) for b in range(15)]
    one = found["s"]
    assert one.positions == found[TEACHER].positions == len(confident)
    assert (one.kl, one.reverse_kl) == pytest.approx((kl, reverse_kl), rel=1e-5)
    assert (one.agreement, one.top5_agreement) == pytest.approx((agreement, top5), abs=1e-9)
    assert (one.acceptance, one.perplexity) == pytest.approx((acceptance, np.exp(student_nll)), rel=1e-5)
    assert one.ece == pytest.approx(np.abs(gaps).sum() / len(confident), rel=1e-5)
    assert sum(n for n, _, _ in one.bins) == len(confident) and len(one.bins) == 15
    assert found[TEACHER].perplexity == pytest.approx(np.exp(teacher_nll), rel=1e-5)
    assert (found[TEACHER].kl, found[TEACHER].agreement) == (0, 1)


def test_the_teacher_as_its_own_student_is_at_no_distance(teacher: Teacher, sequences: list[TokenSequence]) -> None:
    found = evaluate({"same": teacher.loaded}, teacher, sequences, quiet=True)
    assert found["same"] == found[TEACHER]


def test_what_cannot_be_compared_is_refused(tmp_path: Path, teacher: Teacher, sequences: list[TokenSequence]) -> None:
    with pytest.raises(DatasetError, match="no documents"):
        evaluate({}, teacher, [])
    with pytest.raises(ConfigError, match="named 'teacher'"):
        evaluate({TEACHER: teacher.loaded}, teacher, sequences)
    other = load_model(save_tiny_model(tmp_path / "other"))
    other.tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    with pytest.raises(ConfigError, match="different tokenizers"):
        evaluate({"other": other}, teacher, sequences)
