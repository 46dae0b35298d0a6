"""Every Metal kernel of a loss, executed: against the formulas in float64, in every type, shape and schedule.

The tests of the plain MLX tier run here a second time, on the kernels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from distill_kernels import (
    JSD,
    TVD,
    BucketLoss,
    DenseLoss,
    ForwardKL,
    HingeRank,
    LogisticRank,
    ReverseKL,
    SampledLoss,
    SkewKL,
    SkewReverseKL,
    SoftCE,
    SparseKL,
)
from distill_kernels.divergence import Divergence
from distill_kernels.logits_loss import LogitsLoss
from distill_kernels.row_loss import RowLoss
from distill_kernels.tier import on_tier

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests import oracle
from tests.emulation import emulator, needs_compiler  # noqa: F401
from tests.loss_cases import exact, on_mlx, problem
from tests.oracle import Floats, Losses
from tests.test_bucket import (  # noqa: F401  collected here too, to run on the kernels
    test_a_jensen_shannon_divergence_at_200_nats_is_log_2,
    test_a_masked_row_touches_nothing,
    test_a_one_hot_teacher_is_right_or_infinite,
    test_a_softcap_makes_an_impossible_token_possible,
    test_a_tail_of_1e_minus_20_keeps_its_digits,
    test_an_impossible_token_is_harmless_until_it_carries_weight,
    test_an_infinite_divergence_that_nobody_asks_for_harms_no_gradient,
    test_every_extreme_has_the_value_and_gradient_of_the_formula,
    test_mass_that_leaks_out_of_the_kept_set_is_charged,
    test_padding_and_ids_outside_the_vocabulary_count_for_nothing,
    test_scale_softcap_and_a_padded_head_are_part_of_the_loss,
)
from tests.test_dense import (  # noqa: F401
    test_a_token_that_one_side_excludes_has_the_limits_value,
    test_distances_of_200_nats_are_right,
    test_scale_and_softcap_are_the_students_and_padding_is_nobodys,
    test_tokens_that_both_exclude_count_for_nothing,
)
from tests.test_ranking import (  # noqa: F401
    test_a_row_without_a_pair_costs_nothing,
    test_impossible_tokens_have_the_limits_value,
    test_two_impossible_tokens_are_a_tie_and_one_ranked_first_is_infinitely_wrong,
)
from tests.test_sparse_kl import (  # noqa: F401
    test_a_one_hot_teacher_is_the_cross_entropy,
    test_padding_and_ids_or_labels_outside_the_vocabulary_count_for_nothing,
    test_unsigned_ids_above_two_to_the_31_are_dropped,
)
from tests.test_taid import (  # noqa: F401
    test_at_1_it_is_the_bucket_kl_and_at_0_there_is_nothing_to_learn,
)
from tools.metal_emulator import SCHEDULES, Emulated

pytestmark = [needs_compiler, pytest.mark.usefixtures("emulator")]

VOCABULARIES = [(2, 1), (7, 7), (1000, 1000), (4099, 129), (49152, 50), (151936, 33)]
"""(vocabulary, k): 1, all of it, and numbers that no thread group is made for."""
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


class Case(NamedTuple):
    """A loss, and its oracle of (z, *rows)."""

    loss: Callable[[float], LogitsLoss]
    truth: Callable[..., Losses]


def of_divergence(divergence: Divergence) -> dict[str, Case]:
    def bucket(t: float) -> LogitsLoss:
        return BucketLoss(t, divergence=divergence)

    def dense(t: float) -> LogitsLoss:
        return DenseLoss(t, divergence=divergence)

    def sampled(t: float) -> LogitsLoss:
        return SampledLoss(t, divergence=divergence)

    return {
        f"sampled {divergence}": Case(sampled, lambda z, *rows: oracle.sampled(divergence, z, *rows)),
        f"bucket {divergence}": Case(bucket, lambda z, *rows: oracle.bucket(divergence, z, *rows)),
        f"dense {divergence}": Case(dense, lambda z, *rows: oracle.dense(divergence, z, *rows)),
    }


CASES = {
    "kl": Case(SparseKL, oracle.sparse),
    "soft-ce": Case(SoftCE, lambda z, *rows: oracle.sparse(z, *rows, less_entropy=False)),
    "hinge": Case(HingeRank, oracle.hinge),
    "hinge, margin": Case(lambda t: HingeRank(t, margin=0.01), lambda z, *rows: oracle.hinge(z, *rows, margin=0.01)),
    "logistic": Case(LogisticRank, oracle.logistic),
    **of_divergence(ForwardKL()),
    **of_divergence(ReverseKL()),
    **of_divergence(JSD(0.3)),
    **of_divergence(SkewKL()),
    **of_divergence(SkewReverseKL()),
    **of_divergence(TVD()),
}
for centred in ("ReverseKL()", "SkewReverseKL(lam=0.1)"):
    del CASES[f"sampled {centred}"]  # its gradient is not the formula's, but one of less noise: test_sampled.py


def rows_of(loss: LogitsLoss, n: int, vocab: int, k: int, t: float) -> tuple[Floats, list[NDArray[Any]]]:
    """The student's logits, and the rows that the loss takes."""
    k = min(k, 150) if isinstance(loss, (HingeRank, LogisticRank)) else k  # the oracle walks pairs
    z, ids, p, log_tail, labels = problem(n, vocab, k, t)
    named = {"ids": ids, "weights": p, "log_tail_mass": log_tail, "labels": labels}
    named["log_probs"] = exact(np.log(p / 2))
    named["teacher_logits"] = exact(np.random.default_rng(7).normal(0, 2, z.shape))
    return z, [named[name] for name in loss.names]


def strided(z: Floats, dtype: mx.Dtype) -> mx.array:
    """The same logits as a slice of something larger: rows that do not follow each other."""
    wider = np.concatenate([z, np.full((len(z), 3), 99.0)], axis=1)
    return mx.array(wider.astype(np.float32)).astype(dtype)[:, :-3]


def all_of(loss: RowLoss, logits: mx.array, rows: list[NDArray[Any]], cts: Floats) -> list[Floats]:
    """kd, ce and the gradient."""
    cotangents = [mx.array(c.astype(np.float32)) for c in cts]
    losses, (dz,) = mx.vjp(lambda z: list(loss(z, *on_mlx(rows))), [logits], cotangents)
    return [np.array(a.astype(mx.float32)).astype(np.float64) for a in (*losses, dz)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "k"), VOCABULARIES)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_as_near_to_the_truth_as_plain_mlx(name: str, vocab: int, k: int, dtype: mx.Dtype) -> None:
    t, n = (2.0, 9) if vocab in (2, 1000) else (1.0, 2)
    loss, case = CASES[name].loss(t), CASES[name]
    z, rows = rows_of(loss, n, vocab, k, t)
    logits = strided(z, dtype)
    truth = case.truth(np.array(logits.astype(mx.float32)).astype(np.float64), *rows, t)
    cts = exact(np.random.default_rng(1).normal(size=(2, n)))
    wanted = [truth.kd, truth.ce, truth.gradient(*cts)]
    ours, plain = (all_of(on_tier(loss, tier), logits, rows, cts) for tier in ("metal", "ops"))
    rounding = {mx.float32: 1e-6, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[dtype]
    for i, (found, by_ops, right) in enumerate(zip(ours, plain, wanted, strict=True)):
        relative = 1e-6 if i < 2 else rounding
        tolerance = relative * np.abs(right).max() + 1e-6 * t * t
        assert np.abs(found - right).max() <= np.abs(by_ops - right).max() + tolerance


def test_every_run_had_the_same_result_under_every_schedule(emulator: Emulated) -> None:  # noqa: F811
    for name in ("kl", "bucket JSD(beta=0.3)", "hinge", "dense SkewKL(lam=0.1)"):
        loss = CASES[name].loss(2.0)
        z, rows = rows_of(loss, 9, 4099, 50, 2.0)
        all_of(on_tier(loss), strided(z, mx.float32), rows, np.ones((2, 9)))
    runs = emulator.runs
    assert len(runs) == 8 * len(SCHEDULES)
    for at in range(0, len(runs), len(SCHEDULES)):
        first, *others = (run.outputs for run in runs[at : at + len(SCHEDULES)])
        assert all(mx.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("tier", ["ops", "metal"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", CASES)
def test_a_logit_that_is_no_number_is_told_by_the_loss_and_the_gradient(name: str, bad: float, tier: Any) -> None:
    loss = CASES[name].loss(1.0)
    z, rows = rows_of(loss, 2, 100, 5, 1.0)
    kept = rows[0][0] if loss.names[0] == "ids" else np.arange(0)
    z[0, next(v for v in range(100) if v not in kept)] = bad
    cts = np.array([[1.0, 1], [1, 1]])
    kd, ce, dz = all_of(on_tier(loss, tier), mx.array(z.astype(np.float32)), rows, cts)
    assert not np.isfinite(ce[0]) and np.isfinite(kd[1]) and np.isfinite(dz[1]).all()
    assert name == "logistic" or bad == np.inf or np.isnan(kd[0])  # the pairs of a ranking do not see the others
    assert not np.isfinite(dz[0]).all()
