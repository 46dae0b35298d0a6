"""What TAID loses where the tail is one cell: value and gradient from k kept tokens beside the whole distributions'.

    .venv/bin/python tools/bench_taid.py

Zipf-like logits at V = 50,000: the teacher's log-probability falls with the log of its rank, with noise, and the
student's logits are the teacher's with more. Then a teacher and a student of random weights, as the tests have them, at
V = 384. Printed are the gradients' mean angle and the share of the loss that is seen, over all positions. Seconds.
"""

import tempfile
from pathlib import Path

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from logitstore.model import load_model
from tests.tiny import CORPUS, save_tiny_model

Floats = NDArray[np.float64]
KEPT = (8, 50, 200)
POSITIONS = 64


def log_softmax(z: Floats) -> Floats:
    top = z.max(axis=-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(axis=-1, keepdims=True))


def interpolated(log_q: Floats, log_p: Floats, t: float) -> tuple[Floats, Floats]:
    """(the target, its KL to the student) over cells that sum to 1."""
    log_target = log_softmax((1 - t) * log_q + t * log_p)
    target = np.exp(log_target)
    return target, (target * (log_target - log_q)).sum(axis=-1)


def compared(z: Floats, teacher: Floats, k: int, t: float) -> tuple[float, float]:
    """(angle in degrees between the gradients, sparse value / dense value): means over the positions."""
    log_q, log_p = log_softmax(z), log_softmax(teacher)
    target, value = interpolated(log_q, log_p, t)
    dense = np.exp(log_q) - target

    order = np.argsort(-log_p, axis=-1)
    kept, rest = order[:, :k], order[:, k:]
    cells = [
        np.concatenate(
            [
                np.take_along_axis(log, kept, -1),
                np.logaddexp.reduce(np.take_along_axis(log, rest, -1), axis=-1)[:, None],
            ],
            axis=-1,
        )
        for log in (log_q, log_p)
    ]
    cell_target, cell_value = interpolated(*cells, t)
    sparse = np.exp(log_q) * (1 - cell_target[:, -1:] / np.exp(cells[0][:, -1:]))
    np.put_along_axis(sparse, kept, np.exp(cells[0][:, :-1]) - cell_target[:, :-1], -1)

    cosine = (dense * sparse).sum(-1) / np.linalg.norm(dense, axis=-1) / np.linalg.norm(sparse, axis=-1)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean()), float(cell_value.mean() / value.mean())


def zipf(rng: np.random.Generator, vocab: int = 50_000) -> tuple[Floats, Floats]:
    """(student's, teacher's) logits."""
    ranks = np.argsort(np.argsort(rng.random((POSITIONS, vocab)), axis=-1), axis=-1) + 1
    teacher = -1.5 * np.log(ranks) + rng.normal(0, 1, (POSITIONS, vocab))
    return teacher + rng.normal(0, 1, (POSITIONS, vocab)), teacher


def tiny_models() -> tuple[Floats, Floats]:
    """(student's, teacher's) logits of one text."""
    with tempfile.TemporaryDirectory() as folder:
        models = [load_model(save_tiny_model(Path(folder) / str(seed), seed=seed)) for seed in (2, 1)]
        tokens = mx.array([models[0].tokenizer.encode(" ".join(CORPUS))])
        student, teacher = (np.array(m.model(tokens)[0].astype(mx.float32)).astype(np.float64) for m in models)
        return student, teacher


def main() -> None:
    """Print the table."""
    print(f"{'logits':28s} {'t':>4s} {'k':>5s} {'angle':>7s} {'of the loss':>12s}")
    problems = {"Zipf, V = 50,000": zipf(np.random.default_rng(0)), "tiny models, V = 384": tiny_models()}
    for name, (z, teacher) in problems.items():
        for t in (0.4, 1.0):
            for k in KEPT:
                angle, share = compared(z, teacher, k, t)
                print(f"{name:28s} {t:4.1f} {k:5d} {angle:6.1f}° {share:11.1%}")


if __name__ == "__main__":
    main()
