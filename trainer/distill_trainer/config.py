"""What a training run takes. Flags and config keys are the field names; the resolved config lies beside the output."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from distill_trainer.combine import Combination
from distill_trainer.config_checks import check
from distill_trainer.kinds import AttentionKind, CrossVocab, FineTuneType, HiddenKind, OnMiss
from distill_trainer.losses import Term
from distill_trainer.mix import Mix
from distill_trainer.optimizer import OptimizerName
from distill_trainer.schedule import Schedule
from distill_trainer.trackers import PROJECT
from logitstore.condition import Condition
from logitstore.prompts import read_template
from logitstore.selection import Selection


@dataclass(frozen=True)
class TrainConfig:
    """A run of `distill-train`."""

    student: str
    dataset: str
    out: str
    store: tuple[str, ...] = ()
    """Stores to read, in order of lookup; the first is written to by `write_back`. As PATH=SHARE or PATH=VALUE they are
    of several teachers: see `distill_trainer.combine`."""
    overlay: str | None = None
    """The folder in which what is fetched from services is kept. None: in the user's cache folder."""
    overlay_gb: float = 20.0
    """So much is kept there, of all services together; what was used longest ago goes first."""
    combine: str | None = None
    """Who of several teachers teaches: label, or column:NAME. None: in order, or a mixture where shares are given."""
    teacher: str | None = None
    teacher_adapter_path: str | None = None
    """A LoRA adapter of the teacher; what this run makes lies in `out`."""
    split: str = "train"
    filter: tuple[str, ...] = ()
    """Conditions on a document's measures that must all hold, as `nll<2.5` or `teacher-correct:0.8`."""
    sample: str | None = None
    """A measure: an epoch draws documents in proportion to it, with replacement."""
    curriculum: str | None = None
    """A measure: the first epoch goes from its low values to its high ones."""
    mix: str | None = None
    """COLUMN:VALUE=SHARE,...: how much of an epoch each value of the dataset's column gives."""
    on_miss: OnMiss | None = None
    """What to do at a position that no store answers, and with a teacher, that it does not answer either: online stops
    the run there. None: online with a teacher, else error."""
    write_back: bool = False
    teacher_prompt_template: str | None = None
    """The words around each row's prompt, with {input} where that stands, as the teacher reads it."""
    student_prompt_template: str | None = None
    """The same as the student reads it; the completion is the row's own for both."""
    max_teacher_length: int | None = None
    """Tokens of a document that a live teacher reads; positions after them are trained on their labels alone."""
    think_weight: float | None = None
    """What the loss weighs at thoughts, between `think_start` and `think_end`; 0 leaves them out. It is 1 elsewhere."""
    think_start: str = "<think>"
    think_end: str = "</think>"
    entropy_weight: float = 0.0
    """A position weighs 1 + this · the entropy of its teacher's distribution in nats."""
    on_policy: float = 0.0
    """Share of batches that are the student's own completions of their prompts: see `distill_trainer.on_policy`."""
    on_policy_temperature: float = 1.0
    """What completions are sampled at; 0 takes the likeliest token."""
    on_policy_tokens: int = 128
    """A completion ends here at the latest."""
    outcome_column: str | None = None
    """A column of the dataset: how much each document weighs, true and false being 1 and 0."""
    cross_vocab: CrossVocab = "auto"
    """How to learn from stores of a teacher with another tokenizer: see `distill_trainer.across`."""
    teacher_tokenizer: str | None = None
    """A model of the teacher's tokenizer, which is all that is read of it: finds documents in a store whose text it
    renders differently than the student's does, as chats. `teacher` has its own."""
    min_coverage: float = 0.5
    """Share of what such a teacher says that must be carried over, positions times mass; less is refused."""
    loss: tuple[str, ...] = ("kl",)
    """Distillation losses, NAME[:NUMBER][=WEIGHT] each; their weighted sum is trained."""
    hidden_loss: HiddenKind | None = None
    """Brings the student's hidden states near the teacher's: see `distill_trainer.hidden`."""
    hidden_weight: float = 0.1
    attention_loss: AttentionKind | None = None
    """Brings the student's attention maps near a live teacher's: see `distill_trainer.attention`."""
    attention_weight: float = 0.01
    layer_map: str = "auto"
    """Which of the teacher's layers teaches which of the student's: auto, skip:N, or TEACHER:STUDENT,..."""
    alpha: float | str = 0.9
    """Weight of the distillation term; cross-entropy weighs 1 - alpha. A number, or a schedule such as
    0.9->0.3:cosine: see `distill_trainer.schedule`."""
    select: str | None = None
    """What the live teacher keeps. None: as the store does, threshold:16 without a store."""
    temperature: float | str | None = None
    """A number, or a schedule such as 4->1:linear: see `distill_trainer.temperatures`. None: the store's, 1 without a
    store."""
    progressive: bool = False
    """Stands for two schedules: the temperature falls to 1, from 4 unless given, and alpha to 0, in straight lines."""
    fine_tune_type: FineTuneType = "lora"
    num_layers: int = 16
    """How many of the last layers LoRA adapts; -1 for all."""
    lora_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rank": 8, "dropout": 0.0, "scale": 20.0})
    iters: int = 1000
    batch_size: int = 4
    max_seq_length: int = 2048
    learning_rate: float = 1e-5
    lr_schedule: Mapping[str, Any] | None = None
    """Takes the place of `learning_rate`: see `distill_trainer.optimizer`."""
    optimizer: OptimizerName = "adam"
    optimizer_config: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments by the optimizer's name, as mlx-lm has them."""
    grad_accumulation_steps: int = 1
    """Batches in a step; every trained position of theirs weighs the same."""
    max_grad_norm: float | None = None
    """The gradient of a step is scaled down to this norm where it is larger."""
    mask_prompt: bool = True
    """Train the completion, the assistant's turns, alone. False: every token, as mlx-lm does unless it is told."""
    resume_adapter_file: str | None = None
    """An adapter's weights to begin with, for new steps: the optimizer and all else is new."""
    pack: bool = False
    """Put several documents of a batch into one row of at most `max_seq_length`: see `distill_trainer.packing`."""
    grad_checkpoint: bool = False
    """Compute the student's layers a second time for the gradient rather than keep what they computed."""
    valid_dataset: str | None = None
    """Held-out documents, on which the loss is measured while training. None: `valid_split` of `dataset`, if given."""
    valid_split: str | None = None
    """The held-out split, as mlx-lm's `valid`. None: with `valid_dataset` its split "train", else nothing is held out.
    """
    steps_per_eval: int = 200
    """The held-out loss is measured after every so many steps, at the end, and where `save_every` saves."""
    val_batches: int = 25
    """Measured on so many batches of the held-out documents, always the same; -1 for all. They are held in memory."""
    domain_column: str | None = None
    """A column of the held-out dataset: the held-out loss is reported for each of its values too."""
    keep_layers: int | None = None
    """Cut the student to this many of its layers first, evenly spaced, first and last kept."""
    seed: int = 0
    save_every: int | None = None
    """A checkpoint after every so many steps, and at the end. None: only where the run is stopped."""
    report_samples: int = 0
    """How many prompts the trained student answers on the page of the run."""
    resume: bool = False
    """Go on with the run in `out` where its last checkpoint was made."""
    report_to: tuple[str, ...] = ()
    """Where each step's metrics go besides OUT/metrics.jsonl: see `distill_trainer.trackers`."""
    project_name: str = PROJECT
    """What the run belongs to there."""
    quiet: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ConfigError: naming the flag.
        """
        check(self)

    @property
    def combination(self) -> Combination:
        """`store` and `combine`, read."""
        return Combination.parse(self.store, self.combine)

    @property
    def alpha_schedule(self) -> Schedule:
        """`alpha`, read."""
        return Schedule.parse(self._moving["alpha"] if self.progressive else self.alpha)

    @property
    def temperature_schedule(self) -> Schedule | None:
        """`temperature`, read."""
        typed = self._moving["temperature"] if self.progressive else self.temperature
        return None if typed is None else Schedule.parse(typed)

    @property
    def loss_names(self) -> list[str]:
        """The names in `loss`."""
        return [Term.parse(text).name for text in self.loss]

    @property
    def depends_on_iters(self) -> bool:
        """Whether what a step learns depends on how many there will be."""
        schedules = self.alpha_schedule, self.temperature_schedule
        moving = any(schedule is not None and not schedule.constant for schedule in schedules)
        return moving or "taid" in self.loss_names

    @property
    def _moving(self) -> dict[str, str]:
        """What `progressive` stands for."""
        start = 4 if self.temperature is None else self.temperature
        return {"alpha": f"{self.alpha}->0:linear", "temperature": f"{start}->1:linear"}

    @property
    def measures(self) -> list[str]:
        """The measures of documents that the run chooses by."""
        named = [self.sample, self.curriculum]
        return [Condition.parse(text, "--filter").name for text in self.filter] + [name for name in named if name]

    @property
    def teacher_measures(self) -> list[str]:
        """Those of `measures` that the teacher's answers tell; the length alone is the document's own."""
        return [name for name in self.measures if name != "length"]

    @property
    def chooses(self) -> bool:
        """Whether an epoch is anything else than each document once, in any order."""
        return bool(self.filter or self.sample or self.curriculum or self.mix)

    @property
    def holds_out(self) -> bool:
        """Whether the loss is measured on held-out documents."""
        return self.valid_split is not None or self.valid_dataset is not None

    @property
    def teacher_template(self) -> str | None:
        """`teacher_prompt_template`; None where it adds nothing."""
        return read_template(self.teacher_prompt_template, "--teacher-prompt-template")

    @property
    def student_template(self) -> str | None:
        """`student_prompt_template`; None where it adds nothing."""
        return read_template(self.student_prompt_template, "--student-prompt-template")

    @property
    def columns(self) -> list[str]:
        """Columns of the dataset that are read beside those of its format."""
        named = None if self.mix is None else Mix.parse(self.mix).column, self.outcome_column, self.combination.column
        return list(dict.fromkeys(name for name in named if name))

    @property
    def distils(self) -> bool:
        """Whether the distillation term ever weighs anything."""
        return max(self.alpha_schedule.start, self.alpha_schedule.end) > 0

    @property
    def slower(self) -> str:
        """What to type where a loss or a weight is no finite number."""
        rate = f"type --learning-rate below {self.learning_rate:g}"
        return f"{rate if self.lr_schedule is None else 'write lower rates in lr_schedule'}, or type --max-grad-norm 1"

    @property
    def live_selection(self) -> Selection:
        """What the live teacher keeps without a store."""
        return Selection.parse(self.select or "threshold:16")

    @property
    def miss_policy(self) -> OnMiss:
        """What is done on a miss."""
        return self.on_miss or ("online" if self.teacher else "error")

    def to_json(self) -> dict[str, Any]:
        """The resolved config as JSON values."""
        schedules = self._moving | {"progressive": False} if self.progressive else {}
        return asdict(self) | {"on_miss": self.miss_policy} | schedules
