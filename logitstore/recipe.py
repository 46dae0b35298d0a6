"""The recipe: the one way from a teacher's logits to the bytes that are kept, and from the bytes to targets.

A build, a miss answered live and a write-back all go through `Recipe.record`; so given the same logits they are the
same bytes. A record is one position: its sets of entries one after another, then what is kept once (`codec`).
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from logitstore import cpu_selection, hidden_states
from logitstore.codec import Codes, Form, encode_position, from_record, position_width, quantize, targets, to_record
from logitstore.errors import ConfigError
from logitstore.key import document_key
from logitstore.selection import Randomness, Selected, Selection, randomness
from logitstore.targets import SparseTargets

SUMMED = ("reverse-kl", "jsd", "skew-kl", "skew-reverse-kl", "tvd")
"""Divergences that are sums over the vocabulary of a function of p and q, but not linear in p."""
MOST_TEMPERATURES = 64


@dataclass(frozen=True, eq=False)
class DocumentRecord:
    """A document's tokens and what is kept of the teacher at each of its positions, encoded."""

    token_ids: npt.NDArray[np.int32]
    """[L]"""
    records: npt.NDArray[np.uint8]
    """[L - 1, record width]; row t is about token t + 1."""

    @property
    def key(self) -> bytes:
        """The document's key: 16 bytes."""
        return document_key(self.token_ids)


class Selector(Protocol):
    """`cpu_selection`, or `device_selection` for logits on a GPU."""

    def select(
        self, logits: Any, labels: npt.NDArray[np.int64], selection: Selection, temperature: float, random: Randomness
    ) -> Selected: ...
    def log_z(self, logits: Any, temperatures: tuple[float, ...]) -> npt.NDArray[np.float64]: ...


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of some positions, at full precision."""

    sets: list[tuple[Selected, npt.NDArray[np.float64]]]
    """Each set of entries, with the random numbers that round it."""
    log_z: npt.NDArray[np.float64]
    hidden: npt.NDArray[np.float32] | None = None
    """[N, layers, D]"""


@dataclass(frozen=True)
class Recipe:
    """What is kept of a position and how: part of a store's fingerprint."""

    selection: Selection
    temperatures: tuple[float, ...]
    """One set of entries for each, and for each replica."""
    seed: int
    vocab_size: int
    """Width of the teacher's LM head."""
    replicas: int = 1
    """Independent draws, which epochs rotate through."""
    tail_log_probs: bool = False
    """threshold: the tail's entries keep their own log-probs too."""
    log_z: tuple[float, ...] = ()
    """Temperatures of 1 or more at which log sum p^(1 / T) is kept."""
    hidden_layers: tuple[int, ...] = ()
    """Layers, numbered from 0, whose output is kept: the residual stream after them."""
    hidden_size: int = 0
    """Width of that output; 0 where none is kept."""

    def __post_init__(self) -> None:
        for name, temperatures in (("temperature", self.temperatures), ("log-z", self.log_z)):
            for temperature in temperatures:
                if not 0 < temperature < float("inf"):
                    raise ConfigError(f"{name} {temperature:g} is not a number above 0; type --{name} 1")
            if len(temperatures) > MOST_TEMPERATURES:
                raise ConfigError(
                    f"{name} names {len(temperatures)} temperatures, expected at most {MOST_TEMPERATURES}; type fewer"
                )
            if len(set(temperatures)) < len(temperatures):
                raise ConfigError(f"{name} {_listed(temperatures)} names one twice; type each once")
        if min(self.log_z, default=1) < 1:
            raise ConfigError(f"log-z {min(self.log_z):g} is below 1, where log Z has no code; type --log-z 1")
        if not 1 <= self.vocab_size <= 1 << 31:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}, expected 1 to 2^31: the width of the teacher's LM head"
            )
        if not self.temperatures:
            raise ConfigError("there is no temperature; type --temperature 1")
        if not 1 <= self.replicas <= 64:
            raise ConfigError(f"replicas is {self.replicas}, expected 1 to 64; type --replicas 2")
        if self.replicas > 1 and not self.selection.unbiased:
            raise ConfigError(f"selection {self.selection} draws nothing, so replicas are equal; leave --replicas out")
        if self.tail_log_probs and self.selection.kind != "threshold":
            raise ConfigError(f"selection {self.selection} has no tail entries; leave --tail-log-probs out")
        self.selection.require_vocab(self.vocab_size)
        self._check_hidden()

    def _check_hidden(self) -> None:
        layers = self.hidden_layers
        listed = ",".join(map(str, layers))
        if len(layers) > hidden_states.MOST_LAYERS:
            raise ConfigError(
                f"hidden-layers names {len(layers)} layers, expected at most {hidden_states.MOST_LAYERS}; type fewer"
            )
        if len(set(layers)) < len(layers):
            raise ConfigError(f"hidden-layers {listed} names one twice; type each once")
        if not all(0 <= layer < hidden_states.MOST_LAYER_NUMBER for layer in layers):
            raise ConfigError(f"hidden-layers {listed} names what is no layer; type numbers from 0, as in 6,12")
        if not (1 <= self.hidden_size <= hidden_states.MOST_SIZE if layers else self.hidden_size == 0):
            raise ConfigError(
                f"hidden_size is {self.hidden_size}, expected "
                + (f"1 to {hidden_states.MOST_SIZE}: the width of the teacher's layers" if layers else "0 of no layers")
            )

    @property
    def form(self) -> Form:
        """How a set of entries lies in bytes."""
        return Form(self.selection, self.vocab_size, self.tail_log_probs)

    @property
    def sets(self) -> int:
        """Sets of entries of a position: for each temperature, for each replica."""
        return len(self.temperatures) * self.replicas

    @property
    def record_width(self) -> int:
        """Bytes of one position before compression."""
        return self.sets * self.form.entries_width + position_width(len(self.log_z)) + self.hidden_width

    @property
    def hidden_width(self) -> int:
        """Bytes of a position's hidden states before compression, at the end of its record; 0 where there are none."""
        return len(self.hidden_layers) * hidden_states.layer_width(self.hidden_size)

    def columns(self, number: int) -> slice:
        """Where set `number` lies in a record; after the last one, what is kept once beside the entries."""
        width = self.form.entries_width
        end = (number + 1) * width if number < self.sets else self.record_width - self.hidden_width
        return slice(number * width, end)

    def layer_columns(self, number: int) -> slice:
        """Where the hidden states of the layer that is named in place `number` lie in a record."""
        width = hidden_states.layer_width(self.hidden_size)
        start = self.record_width - self.hidden_width + number * width
        return slice(start, start + width)

    @property
    def hidden_columns(self) -> slice:
        """Where all of them lie."""
        return slice(self.record_width - self.hidden_width, self.record_width)

    @property
    def hidden_cost(self) -> str:
        """What keeping hidden states adds, in words."""
        layers = len(self.hidden_layers)
        return (
            f"hidden states of {layers} layer{'s' * (layers > 1)} add {self.hidden_width:,} bytes a token "
            "before compression"
        )

    def set_number(self, temperature: float | None = None, replica: int = 0) -> int:
        """Which set serves a temperature (default: the first) in an epoch's replica, counted modulo how many there are.

        Raises:
            ConfigError: there is none of this temperature.
        """
        wanted = self.temperatures[0] if temperature is None else temperature
        if wanted in self.temperatures:
            return self.temperatures.index(wanted) * self.replicas + replica % self.replicas
        if self._retempers(wanted):
            return self.temperatures.index(1.0) * self.replicas
        raise ConfigError(
            f"the store serves temperature {_listed(self.served_temperatures)}, this run asks for {wanted:g}; "
            f"leave --temperature out, or type `logitstore build --temperature {wanted:g}` for another store"
        )

    @property
    def served_temperatures(self) -> tuple[float, ...]:
        """At which temperatures targets can be read."""
        return self.temperatures + tuple(t for t in self.log_z if t not in self.temperatures and self._retempers(t))

    @property
    def serves(self) -> dict[str, Any]:
        """Which losses this is right for, and at which temperatures: part of what a manifest tells people."""
        if self.selection.unbiased:
            losses = ["kl", "soft-ce", *(SUMMED if self.tail_log_probs else ())]
            return {"estimate": "unbiased", "losses": losses, "temperatures": list(self.temperatures)}
        return {
            "estimate": "lower bound, over the kept entries and one cell for the rest",
            "losses": ["kl", *SUMMED],
            "temperatures": list(self.served_temperatures),
        }

    def record(
        self,
        token_ids: npt.NDArray[np.int32],
        logits: Any,
        first: int = 0,
        *,
        hidden: npt.NDArray[np.float32] | None = None,
        selector: Selector = cpu_selection,
    ) -> npt.NDArray[np.uint8]:
        """Keep what the recipe says of a document of L tokens at positions first .. first + n - 1.

        Args:
            logits: float32 [n, V], those of these positions; what the selector takes.
            hidden: [n, layers, D], of the same forward pass; where the recipe keeps them.

        Returns:
            uint8 [n, record width].

        Raises:
            ValueError: logits that are no distribution, or hidden states that are no numbers.
        """
        return self.encode(replace(self.select(token_ids, logits, first, selector=selector), hidden=hidden))

    def select(
        self, token_ids: npt.NDArray[np.int32], logits: Any, first: int = 0, *, selector: Selector = cpu_selection
    ) -> Kept:
        """The first half of `record`: what needs the logits."""
        stop = first + len(logits)
        key, positions = document_key(token_ids), np.arange(first, stop)
        labels = token_ids[first + 1 : stop + 1].astype(np.int64)
        sets = []
        for index, temperature in enumerate(self.temperatures):
            for replica in range(self.replicas):
                random = randomness(
                    key,
                    positions,
                    self.selection,
                    self.vocab_size,
                    seed=self.seed,
                    temperature_index=index,
                    replica=replica,
                )
                selected = selector.select(logits, labels, self.selection, temperature, random)
                sets.append((selected, random.rounding))
        log_z = selector.log_z(logits, self.log_z) if self.log_z else np.empty((len(logits), 0))
        return Kept(sets, log_z)

    def encode(self, kept: Kept) -> npt.NDArray[np.uint8]:
        """The second half of `record`: what does not."""
        columns = [to_record(quantize(selected, rounding, self.form), self.form) for selected, rounding in kept.sets]
        columns.append(encode_position(kept.sets[0][0], kept.log_z))
        if self.hidden_layers:
            expected = len(columns[0]), len(self.hidden_layers), self.hidden_size
            if kept.hidden is None or kept.hidden.shape != expected:
                found = None if kept.hidden is None else kept.hidden.shape
                raise ValueError(f"it gives hidden states {found}, expected {expected}")
            columns.append(hidden_states.encode(kept.hidden))
        return np.concatenate(columns, axis=1)

    def read(self, records: npt.NDArray[np.uint8], temperature: float | None = None, replica: int = 0) -> SparseTargets:
        """Decode a document's records uint8 [P, record width] at a temperature, by default the first.

        Raises:
            ConfigError: there is nothing of this temperature.
            ValueError: bytes that no encoder writes.
        """
        entries = records[:, self.columns(self.set_number(temperature, replica))]
        position, hidden = records[:, self.columns(self.sets)], records[:, self.hidden_columns]
        return self.read_codes(from_record(entries, self.form), position, hidden, temperature)

    def read_codes(
        self,
        codes: Codes,
        position: npt.NDArray[np.uint8],
        hidden: npt.NDArray[np.uint8],
        temperature: float | None = None,
    ) -> SparseTargets:
        """The same from the codes of the set that serves the temperature, and what is kept beside them [P, width].

        Args:
            hidden: [P, hidden_width].
        """
        found = targets(codes, position, self.form)
        if self.hidden_layers:
            found = replace(found, hidden=hidden_states.decode(hidden, len(self.hidden_layers), self.hidden_size))
        if temperature is None or temperature in self.temperatures:
            return found
        assert found.log_z is not None
        return found.retempered(temperature, found.log_z[:, self.log_z.index(temperature)])

    def _retempers(self, temperature: float) -> bool:
        return not self.selection.unbiased and 1.0 in self.temperatures and temperature in self.log_z


def _listed(temperatures: tuple[float, ...]) -> str:
    return ",".join(f"{t:g}" for t in temperatures)
