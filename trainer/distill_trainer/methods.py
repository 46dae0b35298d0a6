"""Which methods beside the next-token distributions a run asks for, put together for its student and its teacher."""

from collections.abc import Callable

from distill_trainer.attention import AttentionLoss
from distill_trainer.attention_maps import require_maps
from distill_trainer.config import TrainConfig
from distill_trainer.hidden import HiddenLoss, Projectors, answered_states, live_states, width_of
from distill_trainer.layer_map import LayerMap, Pairs
from distill_trainer.method import Method
from distill_trainer.targets import TargetSource
from logitstore.errors import ConfigError, IncompatibleStoreError
from logitstore.model import LoadedModel
from logitstore.trace import layers_of


def methods_of(
    config: TrainConfig, student: LoadedModel, source: TargetSource | None, say: Callable[[str], object]
) -> list[Method]:
    """The methods of a run, in the order of their metrics; the student is in eval mode and not yet made trainable.

    Raises:
        ConfigError: a layer that is not there.
        IncompatibleStoreError: a store that does not keep the hidden states.
        ModelError: a model whose layers, or their attention, cannot be read.
    """
    if config.hidden_loss is None and config.attention_loss is None:
        return []
    assert source is not None  # the config sees to it
    own, teacher = student.model, None if source.teacher is None else source.teacher.loaded.model
    pairs = _pairs(config, len(layers_of(own)), None if teacher is None else len(layers_of(teacher)), source)
    say(f"layers TEACHER:STUDENT {_listed(pairs)}")
    methods: list[Method] = []
    if config.hidden_loss is not None:
        if config.store:
            layers, width = source.recipe.hidden_layers, source.recipe.hidden_size
            states = answered_states([layers.index(layer) for layer, _ in pairs], width)
        else:
            assert teacher is not None
            states, width = live_states(teacher, pairs), width_of(teacher)
        projectors = Projectors(pairs, width_of(own), width, config.seed)
        methods.append(HiddenLoss(config.hidden_loss, config.hidden_weight, pairs, own, states, projectors))
    if config.attention_loss is not None:
        assert teacher is not None
        require_maps(teacher, [layer for layer, _ in pairs])
        require_maps(own, [layer for _, layer in pairs])
        methods.append(AttentionLoss(config.attention_loss, config.attention_weight, pairs, own, teacher))
    return methods


def _pairs(config: TrainConfig, student_layers: int, teacher_layers: int | None, source: TargetSource) -> Pairs:
    layer_map = LayerMap.parse(config.layer_map)
    if not config.store:
        assert teacher_layers is not None
        return layer_map.on(teacher_layers, student_layers)
    kept = source.recipe.hidden_layers
    where, named = config.store[0], ",".join(map(str, kept))
    if not kept:
        raise IncompatibleStoreError(
            f"{where} keeps no hidden states, expected some for --hidden-loss; type `logitstore build --hidden-layers "
            "6,12` for another store, or leave --hidden-loss out"
        )
    if teacher_layers is None and config.layer_map == "auto":
        pairs = ",".join(f"{layer}:S" for layer in kept)
        raise ConfigError(
            f"{where} keeps the teacher's layers {named} and not how many the teacher has, by which --layer-map auto "
            f"goes; type --layer-map {pairs} (TEACHER:STUDENT), S from 0 to {student_layers - 1}"
        )
    return layer_map.on(max(kept) + 1 if teacher_layers is None else teacher_layers, student_layers, kept)


def _listed(pairs: Pairs) -> str:
    return ",".join(f"{teacher}:{student}" for teacher, student in pairs)
