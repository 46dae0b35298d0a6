"""What a training run takes. Flags and config keys are the field names; the resolved config lies beside the output."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from distill_trainer.combine import Combination
from distill_trainer.layer_map import LayerMap
from distill_trainer.losses import Term
from distill_trainer.mix import Mix
from distill_trainer.optimizer import OptimizerName, make_optimizer
from distill_trainer.schedule import Schedule
from distill_trainer.trackers import PROJECT, require_installed
from logitstore.condition import Condition
from logitstore.errors import ConfigError
from logitstore.measures import require_name
from logitstore.prompts import read_template
from logitstore.selection import Selection

OnMiss = Literal["online", "hard-only", "skip", "error"]
FineTuneType = Literal["lora", "dora", "full"]
HiddenKind = Literal["mse", "cosine", "l1"]
AttentionKind = Literal["mse", "kl"]


@dataclass(frozen=True)
class TrainConfig:
    """A run of `distill-train`."""

    student: str
    dataset: str
    out: str
    store: tuple[str, ...] = ()
    """Stores to read, in order of lookup; the first is written to by `write_back`. As PATH=SHARE or PATH=VALUE they are
    of several teachers: see `distill_trainer.combine`."""
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
        _require(bool(self.loss), "loss names none; type --loss kl")
        names = [Term.parse(text).name for text in self.loss]
        _require(names.count("taid") <= 1, "loss names taid twice, and a run has one t; type --loss taid once")
        for moved, value in (("alpha", self.alpha), ("temperature", self.temperature)):
            _require(
                not self.progressive or "->" not in str(value),
                f"--progressive is a schedule of {moved}, and {moved} is one itself, {value}; type --{moved} with the "
                "number that it starts from, or leave --progressive out",
            )
        try:
            ends = self.alpha_schedule.start, self.alpha_schedule.end
        except ValueError:
            raise ConfigError(
                f"alpha is {self.alpha!r}, expected a number from 0 to 1, or two as in '0.9->0.3:cosine', "
                "in quotes (or linear, wsd, wsd:0.2); type --alpha 0.9"
            ) from None
        _require(all(0 <= end <= 1 for end in ends), f"alpha is {self.alpha}, expected 0 to 1; type --alpha 0.9")
        for text in self.filter:
            Condition.parse(text, "--filter")
        for flag, name in (("--sample", self.sample), ("--curriculum", self.curriculum)):
            if name is not None:
                require_name(name, f"{flag} {name}")
        require_installed(self.report_to)
        if self.mix is not None:
            Mix.parse(self.mix)
        self._check_methods()
        _require(
            set(self.measures) <= {"length"} or (bool(self.store) and not self.write_back),
            f"{', '.join(self.measures)} of a document is what a store knows before the run; "
            "type --store STORE, and not --write-back",
        )
        self._require_one_teacher()
        self._require_temperature()
        for flag, template in (
            ("--teacher-prompt-template", self.teacher_prompt_template),
            ("--student-prompt-template", self.student_prompt_template),
        ):
            read_template(template, flag)
        _require(
            self.teacher_prompt_template is None or self.distils or bool(self.store),
            "--teacher-prompt-template is given, and with --alpha 0 no teacher is read; leave it out, or type "
            "--alpha 0.9",
        )
        _require(
            self.mask_prompt or self.teacher_template == self.student_template,
            "the teacher and the student have other prompts, and the prompt is trained too; "
            "leave --no-mask-prompt out, or type --teacher-prompt-template and --student-prompt-template alike",
        )
        _require(
            self.max_teacher_length is None or self.max_teacher_length >= 2,
            f"max_teacher_length is {self.max_teacher_length}, expected at least 2: one token to read and one to "
            "predict; type --max-teacher-length 512",
        )
        _require(
            self.max_teacher_length is None or (self.teacher is not None and self.distils),
            "--max-teacher-length bounds what a live teacher is asked, and none is; type --teacher T with it",
        )
        _require(
            self.think_weight is None or 0 <= self.think_weight < math.inf,
            f"think_weight is {self.think_weight}, expected a number of at least 0; type --think-weight 2",
        )
        _require(
            self.think_weight is not None or (self.think_start, self.think_end) == ("<think>", "</think>"),
            "--think-start and --think-end say where thoughts are, and nothing weighs them; type --think-weight 2 too",
        )
        for flag, mark in (("--think-start", self.think_start), ("--think-end", self.think_end)):
            _require(bool(mark), f"{flag} is empty; type {flag} with the text that the dataset has there")
        _require(
            0 <= self.entropy_weight < math.inf,
            f"entropy_weight is {self.entropy_weight}, expected a number of at least 0; type --entropy-weight 1",
        )
        _require(
            not self.entropy_weight or self.distils,
            "--entropy-weight weighs by the teacher's entropy, and no teacher is read with --alpha 0; "
            "type --alpha 0.9, or leave --entropy-weight out",
        )
        self._require_on_policy()
        _require(self.iters >= 0, f"iters is {self.iters}, expected at least 0; type --iters 1000")
        _require(self.batch_size >= 1, f"batch_size is {self.batch_size}, expected at least 1; type --batch-size 4")
        _require(
            self.max_seq_length >= 2,
            f"max_seq_length is {self.max_seq_length}, expected at least 2: one token to read and one to predict; "
            "type --max-seq-length 2048",
        )
        _require(
            0 < self.learning_rate < math.inf,
            f"learning_rate is {self.learning_rate:g}, expected a number above 0; type --learning-rate 1e-5",
        )
        make_optimizer(self.optimizer, self.optimizer_config, self.learning_rate, self.lr_schedule)
        _require(
            self.grad_accumulation_steps >= 1,
            f"grad_accumulation_steps is {self.grad_accumulation_steps}, expected at least 1; "
            "type --grad-accumulation-steps 1",
        )
        _require(
            self.max_grad_norm is None or 0 < self.max_grad_norm < math.inf,
            f"max_grad_norm is {self.max_grad_norm}, expected a number above 0; type --max-grad-norm 1",
        )
        _require(
            self.save_every is None or self.save_every >= 1,
            f"save_every is {self.save_every}, expected at least 1; type --save-every 100",
        )
        _require(
            self.steps_per_eval >= 1,
            f"steps_per_eval is {self.steps_per_eval}, expected at least 1; type --steps-per-eval 200",
        )
        _require(
            self.val_batches == -1 or self.val_batches >= 1,
            f"val_batches is {self.val_batches}, expected at least 1, or -1 for all; type --val-batches 25",
        )
        _require(
            self.valid_split != self.split or self.valid_dataset not in (None, self.dataset),
            f"--valid-split {self.valid_split} is what is trained on; type --valid-split valid, or --valid-dataset D",
        )
        _require(
            self.domain_column is None or self.holds_out,
            "--domain-column tells held-out documents apart, and none are held out; type --valid-split valid with it",
        )
        _require(
            self.num_layers == -1 or self.num_layers >= 1,
            f"num_layers is {self.num_layers}, expected at least 1, or -1 for all; type --num-layers 16",
        )
        _require(
            self.keep_layers is None or self.keep_layers >= 1,
            f"keep_layers is {self.keep_layers}, expected at least 1; type --keep-layers 10",
        )
        _require(
            self.report_samples >= 0,
            f"report_samples is {self.report_samples}, expected at least 0; type --report-samples 3",
        )
        _require(self.seed >= 0, f"seed is {self.seed}, expected at least 0; type --seed 0")
        if self.select is not None:
            Selection.parse(self.select)
        _require(
            self.resume_adapter_file is None or self.fine_tune_type != "full",
            "--resume-adapter-file is given, and --fine-tune-type full has no adapter; type --student with the model "
            "that mlx_lm.fuse makes of it",
        )
        rank, scale, dropout = (self.lora_parameters.get(name) for name in ("rank", "scale", "dropout"))
        _require(
            isinstance(rank, int)
            and rank >= 1
            and isinstance(scale, int | float)
            and isinstance(dropout, int | float)
            and 0 <= dropout < 1,
            f"lora_parameters is {dict(self.lora_parameters)}, expected rank, scale and dropout, "
            "as in {rank: 8, scale: 20.0, dropout: 0.0}",
        )
        _require(
            self.fine_tune_type in get_args(FineTuneType),
            f"fine_tune_type is {self.fine_tune_type}; type --fine-tune-type {'|'.join(get_args(FineTuneType))}",
        )
        _require(
            self.on_miss is None or self.on_miss in get_args(OnMiss),
            f"on_miss is {self.on_miss}; type --on-miss {'|'.join(get_args(OnMiss))}",
        )
        _require(
            self.on_miss != "online" or self.teacher is not None,
            "--on-miss online needs a teacher to ask; type --teacher T, or --on-miss hard-only, skip or error",
        )
        _require(
            self.teacher_adapter_path is None or self.teacher is not None,
            "--teacher-adapter-path is given, and no teacher; type --teacher T with it",
        )
        _require(
            not self.distils or bool(self.store) or self.teacher is not None,
            "nothing to distil from; type --store STORE, --teacher T, or --alpha 0 for cross-entropy alone",
        )
        _require(
            self.teacher is None or not self.store or self.miss_policy != "error",
            "--teacher is never asked with --on-miss error; leave it out, or type --on-miss online",
        )
        _require(
            not self.distils or bool(self.store) or self.miss_policy != "error",
            "without --store every position is a miss, and --on-miss error never asks the teacher; "
            "type --on-miss online, or --alpha 0 for cross-entropy alone",
        )
        _require(
            not self.write_back or (bool(self.store) and self.teacher is not None and self.distils),
            "--write-back keeps a teacher's answers in a store; "
            "type --store STORE, --teacher T and an --alpha above 0 with it",
        )

    def _require_one_teacher(self) -> None:
        combination = self.combination
        if not combination.several:
            return
        for given, flag, why in (
            (self.teacher is not None, "--teacher", "a live teacher is one of them"),
            (self.hidden_loss is not None, "--hidden-loss", "hidden states are those of one"),
            (not self.distils, "--alpha 0", "no teacher is read with it"),
            (
                combination.by == "mixture" and not set(self.measures) <= {"length"},
                f"{', '.join(self.measures)} of a document",
                "it is what one teacher says",
            ),
        ):
            _require(not given, f"--store names several teachers, and {flag} does not fit: {why}; leave it out")

    def _require_temperature(self) -> None:
        try:
            asked = self.temperature_schedule
        except ValueError:
            raise ConfigError(
                f"temperature is {self.temperature!r}, expected a number above 0, or two as in '4->1:linear', "
                "in quotes (or cosine, wsd, wsd:0.2); type --temperature 1"
            ) from None
        _require(
            asked is None or (0 < asked.start < math.inf and 0 < asked.end < math.inf),
            f"temperature is {self.temperature}, expected a number above 0; type --temperature 1",
        )
        _require(
            not self.progressive or self.distils,
            f"--progressive leads alpha from its start to 0, and alpha is {self.alpha}; type --alpha 0.9 with it",
        )

    def _require_on_policy(self) -> None:
        _require(0 <= self.on_policy <= 1, f"on_policy is {self.on_policy}, expected 0 to 1; type --on-policy 0.5")
        _require(
            not self.on_policy or (self.teacher is not None and self.distils),
            "--on-policy lets a live teacher score what the student says, and there is none; type --teacher T with it, "
            "and an --alpha above 0",
        )
        _require(
            not self.on_policy or (self.mask_prompt and self.think_weight is None),
            "--on-policy keeps each prompt and trains what follows it; leave --no-mask-prompt and --think-weight out, "
            "or type --on-policy 0",
        )
        _require(
            0 <= self.on_policy_temperature < math.inf,
            f"on_policy_temperature is {self.on_policy_temperature}, expected a number of at least 0; "
            "type --on-policy-temperature 1",
        )
        _require(
            self.on_policy_tokens >= 1,
            f"on_policy_tokens is {self.on_policy_tokens}, expected at least 1; type --on-policy-tokens 128",
        )
        _require(
            bool(self.on_policy) or (self.on_policy_temperature, self.on_policy_tokens) == (1.0, 128),
            "--on-policy-temperature and --on-policy-tokens say how the student completes prompts, and it completes "
            "none; type --on-policy 0.5 with them",
        )

    def _check_methods(self) -> None:
        for name, kinds in (("hidden", HiddenKind), ("attention", AttentionKind)):
            kind, weight = getattr(self, f"{name}_loss"), getattr(self, f"{name}_weight")
            expected = "|".join(get_args(kinds))
            _require(
                kind is None or kind in get_args(kinds),
                f"{name}_loss is {kind!r}, expected one of {expected}; type --{name}-loss {expected}",
            )
            _require(
                0 < weight < math.inf,
                f"{name}_weight is {weight}, expected a number above 0; type --{name}-weight 0.1, "
                f"or leave --{name}-loss out",
            )
            usual = type(self).__dataclass_fields__[f"{name}_weight"].default
            _require(
                kind is not None or weight == usual,
                f"--{name}-weight weighs a loss that is not given; type --{name}-loss {expected}",
            )
            _require(
                kind is None or self.distils,
                f"--{name}-loss learns from a teacher, and none is read with --alpha 0; type --alpha 0.9",
            )
        LayerMap.parse(self.layer_map)
        _require(
            self.layer_map == "auto" or bool(self.hidden_loss or self.attention_loss),
            "--layer-map says whose layers are compared, and nothing compares them; type --hidden-loss mse too",
        )
        _require(
            self.attention_loss is None or (self.teacher is not None and not self.store),
            "--attention-loss reads a teacher's attention as it runs, and no store keeps that; "
            "type --teacher T without --store",
        )
        _require(
            self.attention_loss is None or not self.grad_checkpoint,
            "--attention-loss reads inside of layers that --grad-checkpoint computes twice; leave one of them out",
        )
        _require(
            not self.pack or not (self.hidden_loss or self.attention_loss),
            "--hidden-loss and --attention-loss take a row for a document; leave --pack out",
        )
        _require(
            bool(self.store)
            or not (self.hidden_loss or self.attention_loss)
            or (self.teacher_template == self.student_template and self.max_teacher_length is None),
            "without a store, --hidden-loss and --attention-loss let the teacher read what the student reads; leave "
            "prompt templates and --max-teacher-length out, or `logitstore build --hidden-layers` a store",
        )

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
    def spans_run(self) -> bool:
        """Whether what a step learns depends on how many there will be."""
        schedules = self.alpha_schedule, self.temperature_schedule
        moving = any(schedule is not None and not schedule.constant for schedule in schedules)
        return moving or any(Term.parse(text).name == "taid" for text in self.loss)

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
        """What to type against losses that are no numbers."""
        rate = f"type --learning-rate below {self.learning_rate:g}"
        return f"{rate if self.lr_schedule is None else 'write lower rates in lr_schedule'}, or type --max-grad-norm 1"

    @property
    def miss_policy(self) -> OnMiss:
        """What is done on a miss."""
        return self.on_miss or ("online" if self.teacher else "error")

    def to_json(self) -> dict[str, Any]:
        """The resolved config as JSON values."""
        schedules = self._moving | {"progressive": False} if self.progressive else {}
        return asdict(self) | {"on_miss": self.miss_policy} | schedules


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
