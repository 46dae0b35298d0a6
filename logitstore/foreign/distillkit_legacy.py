"""DistillKit's first codec: ids in 64-bit words, a few exact values, and a polynomial in 1/t for the others.

Three columns, one row each per position: `packed_indices`, 64 // b ids of b = ceil(log2 vocab_size) bits to a word,
the first in its lowest bits; `exact_values`, the largest `exact_k`; `coeffs`, of the curve through the other values at
t = 1, 2, ...: powers 0 to `polynomial_degree` of 1/t (of t where `invert_polynomial` is false), then sqrt(t) if asked.
The values are log-probs or, where the capture compressed whole logits, logits less their mean; nothing says which.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from logitstore.foreign.distillkit_codec import MAX_ENTRIES, MAX_VOCAB, make, require
from logitstore.foreign.numbers import unpack_words

_MAX_DEGREE = 64


@dataclass(frozen=True)
class LegacyCodec:
    """The settings of DistillKit's `legacy_logit_compression`, under their own names."""

    k: int
    exact_k: int
    polynomial_degree: int
    vocab_size: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: str = "float32"

    @classmethod
    def parse(cls, settings: Mapping[str, Any], where: str) -> Self:
        """Check the settings that a file gives.

        Raises:
            DatasetError: a setting is missing, unknown or out of range.
        """
        codec = make(cls, settings, where)
        require(2 <= codec.vocab_size <= MAX_VOCAB, f"vocab_size is {codec.vocab_size}", "2 to 2^31", where)
        require(1 <= codec.k <= MAX_ENTRIES, f"k is {codec.k}", f"1 to {MAX_ENTRIES}", where)
        require(0 <= codec.exact_k <= codec.k, f"exact_k is {codec.exact_k}", f"0 to {codec.k}", where)
        degree = codec.polynomial_degree
        require(0 <= degree <= _MAX_DEGREE, f"polynomial_degree is {degree}", f"0 to {_MAX_DEGREE}", where)
        return codec

    @property
    def id_bits(self) -> int:
        """Bits of one id: ceil(log2 vocab_size), with the logarithm in float32 as DistillKit takes it."""
        return int(np.ceil(np.log2(np.float32(self.vocab_size))))

    @property
    def word_count(self) -> int:
        """Words of one position's ids."""
        return -(-self.k // (64 // self.id_bits))

    @property
    def term_count(self) -> int:
        """Coefficients of one position."""
        return self.polynomial_degree + 1 + self.with_sqrt_term if self.exact_k < self.k else 0

    def decode_ids(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Ids [P, k] from `packed_indices`, uint64 [P, word_count]."""
        return unpack_words(words, self.id_bits, self.k).astype(np.int64)

    def decode_values(
        self, exact: npt.NDArray[np.float64], coefficients: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Values float64 [P, k] from `exact_values` [P, exact_k] and `coeffs` [P, term_count]."""
        if not self.term_count:
            return exact
        t = np.arange(1, self.k - self.exact_k + 1, dtype=np.float64)
        powers = np.arange(self.polynomial_degree + 1)
        basis = t ** (-powers if self.invert_polynomial else powers)[:, None]
        if self.with_sqrt_term:
            basis = np.concatenate([basis, np.sqrt(t)[None]])
        with np.errstate(invalid="ignore", over="ignore"):
            curve = coefficients @ basis
        if self.exact_k:
            curve = np.minimum(curve, exact[:, -1:])  # sorted before it was fitted
        return np.concatenate([exact, curve], axis=1)
