"""How the checks of a config are written: a condition, and the one line where it does not hold."""

from typing import TYPE_CHECKING

from logitstore.errors import ConfigError

if TYPE_CHECKING:
    from distill_trainer.config import TrainConfig


def are_default(config: "TrainConfig", *names: str) -> bool:
    """Whether fields of a config were left as they are."""
    fields = type(config).__dataclass_fields__
    return all(getattr(config, name) == fields[name].default for name in names)


def flag_of(name: str) -> str:
    """What is typed for a field."""
    return f"--{name.replace('_', '-')}"


def require(condition: bool, message: str) -> None:
    """Check a condition.

    Raises:
        ConfigError: it does not hold; with this message.
    """
    if not condition:
        raise ConfigError(message)
