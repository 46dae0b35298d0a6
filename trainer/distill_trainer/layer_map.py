"""Which of the teacher's layers each of the student's layers learns from, as it is typed. Layers are numbered from 0.

    --layer-map 6:3,12:6    TEACHER:STUDENT: the teacher's layer 6 for the student's layer 3, 12 for 6
    --layer-map skip:2      the student's layer s learns from the teacher's layer 2 s, while there is one
    --layer-map auto        the student's layer s of S learns from the teacher's layer round(s (L - 1) / (S - 1)) of L

`auto` joins first to first and last to last, and gives a student that `--keep-layers` cut the layers that it was cut
of. From a store it goes the other way: each layer t that the store keeps teaches the student's layer
round(t (S - 1) / (L - 1)); a store does not say what L is, so that this takes a live teacher too.

Reference: PMetal's linear and skip mappings; its linear one, floor(s L / S), leaves the teacher's last layer out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from logitstore.errors import ConfigError, IncompatibleStoreError

Pairs = tuple[tuple[int, int], ...]
"""(teacher's layer, student's layer)"""

_FORMS = "type --layer-map auto, skip:2, or TEACHER:STUDENT pairs such as 6:3,12:6"
_PAIRS = re.compile(r"\d+:\d+(,\d+:\d+)*", re.ASCII)


@dataclass(frozen=True)
class LayerMap:
    """One `--layer-map`: pairs, or a stride, or neither for `auto`."""

    pairs: Pairs = ()
    stride: int | None = None

    @classmethod
    def parse(cls, text: str) -> "LayerMap":
        """Read auto, skip:N or TEACHER:STUDENT,...

        Raises:
            ConfigError: saying what to type.
        """
        if text == "auto":
            return cls()
        if re.fullmatch(r"skip:[1-9]\d*", text, re.ASCII):
            return cls(stride=int(text.removeprefix("skip:")))
        if not _PAIRS.fullmatch(text):
            raise ConfigError(f"layer_map is {text!r}, which names no layers; {_FORMS}")
        numbers = [pair.split(":") for pair in text.split(",")]
        pairs = tuple((int(teacher), int(student)) for teacher, student in numbers)
        for pair in pairs:
            if pairs.count(pair) > 1:
                raise ConfigError(f"layer_map names {pair[0]}:{pair[1]} twice; type each pair once")
        return cls(pairs)

    def on(self, teacher_layers: int, student_layers: int, kept: Sequence[int] | None = None) -> Pairs:
        """The pairs for models of so many layers.

        Args:
            kept: the teacher's layers that a store keeps; None for a live teacher, which has all.

        Raises:
            ConfigError: a layer that a model does not have; no pair at all.
            IncompatibleStoreError: a layer of the teacher's that the store does not keep.
        """
        there = range(teacher_layers) if kept is None else kept
        if self.pairs:
            for number, (whose, layers) in enumerate((("teacher", teacher_layers), ("student", student_layers))):
                for pair in self.pairs:
                    if pair[number] >= layers and (number or kept is None):
                        raise ConfigError(
                            f"layer_map names {pair[0]}:{pair[1]} (TEACHER:STUDENT), and the {whose} has layers 0 to "
                            f"{layers - 1}; type a number of at most {layers - 1} there"
                        )
            if missing := sorted({teacher for teacher, _ in self.pairs} - set(there)):
                raise IncompatibleStoreError(
                    f"layer_map names the teacher's layer {missing[0]}, and the store keeps layers {_listed(there)}; "
                    "type these, or `logitstore build --hidden-layers "
                    f"{_listed(sorted({teacher for teacher, _ in self.pairs}))}` for another store"
                )
            return self.pairs
        if self.stride is not None:
            pairs = tuple((s * self.stride, s) for s in range(student_layers) if s * self.stride in there)
            if not pairs:
                raise ConfigError(
                    f"layer_map is skip:{self.stride}, and the store keeps layers {_listed(there)}, none of which is "
                    f"{self.stride} times a layer of the student's; {_FORMS}"
                )
            return pairs
        if kept is not None:
            return tuple((t, _spread(t, teacher_layers, student_layers)) for t in kept)
        return tuple((_spread(s, student_layers, teacher_layers), s) for s in range(student_layers))


def _spread(layer: int, layers: int, others: int) -> int:
    """The layer of `others` that lies as deep as this one of `layers`; the last where there is but one."""
    return others - 1 if layers == 1 else round(layer * (others - 1) / (layers - 1))


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
