"""What a run did, kept up to date from step to step."""

from dataclasses import dataclass, field
from typing import Any

from distill_trainer.targets import Count


@dataclass
class TrainReport:
    """What a run did."""

    load_with: str = ""
    """The line of Python that loads the result."""
    steps: int = 0
    trained_tokens: int = 0
    elapsed_s: float = 0.0
    """Time in steps, targets included; loading and saving apart."""
    count: Count = field(default_factory=Count)
    final: dict[str, Any] = field(default_factory=dict)
    """The last step's metrics."""
    valid: dict[str, Any] = field(default_factory=dict)
    """The last figures on held-out documents."""
    across: dict[str, str] | None = None
    """Where the teacher has another tokenizer: `method`, and what it `teaches` of a sample of documents, in words."""
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.trained_tokens / self.elapsed_s if self.elapsed_s else 0.0
