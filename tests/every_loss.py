"""Each loss that can be asked for, with its formula in float64, and its slope through a whole student both ways.

`test_every_loss` asks this of tiny models, `tools/every_loss.py` of the demo's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import distill_kernels
from distill_kernels import JSD, TVD, ForwardKL, ReverseKL, SkewKL, SkewReverseKL

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Batch
from distill_trainer.losses import Loss
from logitstore.model import LoadedModel
from tests import llama_oracle, oracle

TOLERANCE = 1e-4
"""How far a slope may be off relatively."""
STEP = 1e-6
"""Of the differences, along a direction of norm about 1.4 in all weights."""


@dataclass(frozen=True)
class Case:
    """A loss, what serves it, and its float64 formula of (logits, ids, weights, log tail or log-probs, labels)."""

    name: str
    store: str
    formula: Callable[..., oracle.Losses]

    def __str__(self) -> str:
        return f"{self.name} {self.store}"

    def oracle(self, z: oracle.Floats, batch: Batch) -> oracle.Losses:
        rows = {name: np.array(getattr(batch, name), np.float64) for name in ("weights", "log_tail_mass", "log_probs")}
        ids, labels = (np.array(getattr(batch, name), np.int64) for name in ("ids", "labels"))
        given: dict[str, Any] = {"ids": ids, "labels": labels, "t": 1.0}
        if self.store == "top-k:50":
            given |= {"p": rows["weights"]}
            if self.name not in ("hinge-rank", "logistic-rank"):
                given |= {"log_tail": rows["log_tail_mass"]}
        elif self.name in ("kl", "soft-ce"):
            given |= {"weights": rows["weights"]}
        else:
            given |= {"w": rows["weights"], "log_p": rows["log_probs"]}
        return self.formula(z=z, **given)


KINDS = {
    "reverse-kl": ReverseKL(), "jsd": JSD(), "skew-kl": SkewKL(), "skew-reverse-kl": SkewReverseKL(), "tvd": TVD(),
}  # fmt: skip
CASES = [
    Case("kl", "threshold:16", oracle.sparse),
    Case("soft-ce", "threshold:16", partial(oracle.sparse, less_entropy=False)),
    Case("kl", "top-k:50", partial(oracle.bucket, ForwardKL())),
    Case("taid", "top-k:50", partial(oracle.taid, at=0.4)),
    Case("hinge-rank", "top-k:50", oracle.hinge),
    Case("logistic-rank", "top-k:50", oracle.logistic),
    *(Case(name, "top-k:50", partial(oracle.bucket, kind)) for name, kind in KINDS.items()),
    *(
        Case(name, "threshold:16", partial(oracle.sampled, kind, less_q=name in ("reverse-kl", "skew-reverse-kl")))
        for name, kind in KINDS.items()
    ),
]
"""From a sample, two have the gradient of f - q, which is that of f in the mean and less noisy: `sampled_loss_ce`."""
LEARNT = [
    (case, live)
    for case in CASES
    for live in (False, True)
    if not (live and case.store == "threshold:16" and case.name in KINDS)  # a live teacher keeps no tail log-probs
]


def slopes(case: Case, student: LoadedModel, losses: Loss, batch: Batch) -> tuple[float, float]:
    """(found, expected): the loss's slope along its gradient and as much noise, in all weights at once.

    Found by the float32 gradient that trains; expected by differences, model and formula in float64 NumPy.

    Args:
        student: a llama, all of its weights trainable.
        losses: `case`'s.
    """
    head = distill_kernels.split_head(student.model)
    _, gradient = nn.value_and_grad(student.model, lambda batch: batch_loss(head, losses, batch)[0])(batch)
    gradients = _arrays(gradient)
    rng = np.random.default_rng(0)
    noise = {name: rng.standard_normal(g.shape, np.float32) for name, g in gradients.items()}
    lengths = _norm(gradients), _norm(noise)
    direction = {name: g / lengths[0] + noise[name] / lengths[1] for name, g in gradients.items()}
    found = sum(_product(g, direction[name]) for name, g in gradients.items())

    weights, tokens = _arrays(student.model.parameters()), np.array(batch.tokens, np.int64)

    def logits(step: float) -> oracle.Floats:
        def weight(name: str) -> oracle.Floats:
            return weights[name].astype(np.float64) + step * direction[name]

        z = llama_oracle.logits(weight, student.config, tokens)
        return z.reshape(-1, z.shape[-1])[np.array(batch.rows)]

    before, after = logits(-STEP), logits(STEP)
    if case.name == "taid":  # its target is a constant, which differences of values would move
        d_kd = case.oracle(logits(0.0), batch).d_kd
        return found, float((d_kd * (after - before) / (2 * STEP)).sum(axis=1).mean())
    values = [case.oracle(z, batch).kd.mean() for z in (after, before)]
    return found, float((values[0] - values[1]) / (2 * STEP))


def _arrays(tree: Any) -> dict[str, Any]:
    return {name: np.array(leaf) for name, leaf in tree_flatten(tree)}


def _product(a: Any, b: Any) -> float:
    return float(np.einsum("i,i", a.ravel(), b.ravel(), dtype=np.float64))


def _norm(arrays: dict[str, Any]) -> float:
    return math.sqrt(sum(_product(a, a) for a in arrays.values()))
