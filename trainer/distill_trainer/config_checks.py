"""What a `TrainConfig` must satisfy before anything is read. Each failure is one line with what to type."""

import math
from typing import TYPE_CHECKING, get_args

from distill_trainer.kinds import AttentionKind, CrossVocab, FineTuneType, HiddenKind, OnMiss
from distill_trainer.layer_map import LayerMap
from distill_trainer.mix import Mix
from distill_trainer.optimizer import make_optimizer
from distill_trainer.trackers import require_installed
from logitstore.condition import Condition
from logitstore.errors import ConfigError
from logitstore.measures import require_name
from logitstore.prompts import read_template
from logitstore.selection import Selection
from logitstore.store import is_url

if TYPE_CHECKING:
    from distill_trainer.config import TrainConfig

AT_LEAST = (
    ("iters", 0, 1000),
    ("batch_size", 1, 4),
    ("grad_accumulation_steps", 1, 1),
    ("save_every", 1, 100),
    ("steps_per_eval", 1, 200),
    ("keep_layers", 1, 10),
    ("report_samples", 0, 3),
    ("seed", 0, 0),
    ("on_policy_tokens", 1, 128),
)
"""Whole numbers, the least they may be, and one to type."""
OR_ALL = (("val_batches", 25), ("num_layers", 16))
"""Numbers of at least 1 where -1 stands for all."""
READ_AND_PREDICT = (("max_seq_length", 2048), ("max_teacher_length", 512))
"""Lengths in tokens, which hold one to read and one to predict."""


def check(config: "TrainConfig") -> None:
    """Check what can be checked without reading anything.

    Raises:
        ConfigError: naming the flag.
    """
    check_losses(config)
    check_schedules(config)
    check_choosing(config)
    check_layers(config)
    check_teachers(config)
    check_prompts(config)
    check_weights(config)
    check_on_policy(config)
    check_numbers(config)
    make_optimizer(config.optimizer, config.optimizer_config, config.learning_rate, config.lr_schedule)
    check_held_out(config)
    check_adapter(config)
    require_installed(config.report_to)
    check_kinds(config)
    check_misses(config)


def check_losses(config: "TrainConfig") -> None:
    """`--loss`."""
    _require(bool(config.loss), "loss names none; type --loss kl")
    _require(config.loss_names.count("taid") <= 1, "loss names taid twice, and a run has one t; type --loss taid once")


def check_schedules(config: "TrainConfig") -> None:
    """`--alpha`, `--temperature`, `--progressive`."""
    for moved, value in (("alpha", config.alpha), ("temperature", config.temperature)):
        _require(
            not config.progressive or "->" not in str(value),
            f"--progressive is a schedule of {moved}, and {moved} is one itself, {value}; type --{moved} with the "
            "number that it starts from, or leave --progressive out",
        )
    try:
        ends = config.alpha_schedule.start, config.alpha_schedule.end
    except ValueError:
        raise ConfigError(
            f"alpha is {config.alpha!r}, expected a number from 0 to 1, or two as in '0.9->0.3:cosine', "
            "in quotes (or linear, wsd, wsd:0.2); type --alpha 0.9"
        ) from None
    _require(all(0 <= end <= 1 for end in ends), f"alpha is {config.alpha}, expected 0 to 1; type --alpha 0.9")
    try:
        asked = config.temperature_schedule
    except ValueError:
        raise ConfigError(
            f"temperature is {config.temperature!r}, expected a number above 0, or two as in '4->1:linear', "
            "in quotes (or cosine, wsd, wsd:0.2); type --temperature 1"
        ) from None
    _require(
        asked is None or (0 < asked.start < math.inf and 0 < asked.end < math.inf),
        f"temperature is {config.temperature}, expected a number above 0; type --temperature 1",
    )
    _require(
        not config.progressive or config.distils,
        f"--progressive leads alpha from its start to 0, and alpha is {config.alpha}; type --alpha 0.9 with it",
    )


def check_choosing(config: "TrainConfig") -> None:
    """`--filter`, `--sample`, `--curriculum`, `--mix`."""
    for text in config.filter:
        Condition.parse(text, "--filter")
    for flag, name in (("--sample", config.sample), ("--curriculum", config.curriculum)):
        if name is not None:
            require_name(name, f"{flag} {name}")
    if config.mix is not None:
        Mix.parse(config.mix)
    _require(
        not config.teacher_measures or (bool(config.store) and not config.write_back),
        f"{', '.join(config.teacher_measures)} of a document is what a store knows before the run; "
        "type --store STORE, and not --write-back",
    )


def check_layers(config: "TrainConfig") -> None:
    """`--hidden-loss`, `--attention-loss`, `--layer-map`."""
    for name, kinds in (("hidden", HiddenKind), ("attention", AttentionKind)):
        kind, weight = getattr(config, f"{name}_loss"), getattr(config, f"{name}_weight")
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
        _require(
            kind is not None or _are_default(config, f"{name}_weight"),
            f"--{name}-weight weighs a loss that is not given; type --{name}-loss {expected}",
        )
        _require(
            kind is None or config.distils,
            f"--{name}-loss learns from a teacher, and none is read with --alpha 0; type --alpha 0.9",
        )
    by_layer = bool(config.hidden_loss or config.attention_loss)
    LayerMap.parse(config.layer_map)
    _require(
        config.layer_map == "auto" or by_layer,
        "--layer-map says whose layers are compared, and nothing compares them; type --hidden-loss mse too",
    )
    _require(
        config.attention_loss is None or (config.teacher is not None and not config.store),
        "--attention-loss reads a teacher's attention as it runs, and no store keeps that; "
        "type --teacher T without --store",
    )
    _require(
        config.attention_loss is None or not config.grad_checkpoint,
        "--attention-loss reads inside of layers that --grad-checkpoint computes twice; leave one of them out",
    )
    _require(
        not config.pack or not by_layer,
        "--hidden-loss and --attention-loss take a row for a document; leave --pack out",
    )
    _require(
        bool(config.store)
        or not by_layer
        or (config.teacher_template == config.student_template and config.max_teacher_length is None),
        "without a store, --hidden-loss and --attention-loss let the teacher read what the student reads; leave "
        "prompt templates and --max-teacher-length out, or `logitstore build --hidden-layers` a store",
    )


def check_teachers(config: "TrainConfig") -> None:
    """`--store` of several teachers, `--combine`."""
    combination = config.combination
    for given, flag, why in (
        (config.teacher is not None, "--teacher", "a live teacher is one of them"),
        (config.hidden_loss is not None, "--hidden-loss", "hidden states are those of one"),
        (not config.distils, "--alpha 0", "no teacher is read with it"),
        (
            combination.by == "mixture" and bool(config.teacher_measures),
            f"{', '.join(config.teacher_measures)} of a document",
            "it is what one teacher says",
        ),
    ):
        _require(
            not (given and combination.several),
            f"--store names several teachers, and {flag} does not fit: {why}; leave it out",
        )


def check_prompts(config: "TrainConfig") -> None:
    """`--teacher-prompt-template`, `--student-prompt-template`, `--no-mask-prompt`."""
    for flag, template in (
        ("--teacher-prompt-template", config.teacher_prompt_template),
        ("--student-prompt-template", config.student_prompt_template),
    ):
        read_template(template, flag)
    _require(
        config.teacher_prompt_template is None or config.distils or bool(config.store),
        "--teacher-prompt-template is given, and with --alpha 0 no teacher is read; leave it out, or type --alpha 0.9",
    )
    _require(
        config.mask_prompt or config.teacher_template == config.student_template,
        "the teacher and the student have other prompts, and the prompt is trained too; "
        "leave --no-mask-prompt out, or type --teacher-prompt-template and --student-prompt-template alike",
    )


def check_weights(config: "TrainConfig") -> None:
    """`--think-weight`, `--entropy-weight`."""
    _require(
        config.think_weight is None or 0 <= config.think_weight < math.inf,
        f"think_weight is {config.think_weight}, expected a number of at least 0; type --think-weight 2",
    )
    _require(
        config.think_weight is not None or _are_default(config, "think_start", "think_end"),
        "--think-start and --think-end say where thoughts are, and nothing weighs them; type --think-weight 2 too",
    )
    for flag, mark in (("--think-start", config.think_start), ("--think-end", config.think_end)):
        _require(bool(mark), f"{flag} is empty; type {flag} with the text that the dataset has there")
    _require(
        0 <= config.entropy_weight < math.inf,
        f"entropy_weight is {config.entropy_weight}, expected a number of at least 0; type --entropy-weight 1",
    )
    _require(
        not config.entropy_weight or config.distils,
        "--entropy-weight weighs by the teacher's entropy, and no teacher is read with --alpha 0; "
        "type --alpha 0.9, or leave --entropy-weight out",
    )


def check_on_policy(config: "TrainConfig") -> None:
    """`--on-policy` and what goes with it."""
    _require(0 <= config.on_policy <= 1, f"on_policy is {config.on_policy}, expected 0 to 1; type --on-policy 0.5")
    _require(
        not config.on_policy or (config.teacher is not None and config.distils),
        "--on-policy lets a live teacher score what the student says, and there is none; type --teacher T with it, "
        "and an --alpha above 0",
    )
    _require(
        not config.on_policy or (config.mask_prompt and config.think_weight is None),
        "--on-policy keeps each prompt and trains what follows it; leave --no-mask-prompt and --think-weight out, "
        "or type --on-policy 0",
    )
    _require(
        0 <= config.on_policy_temperature < math.inf,
        f"on_policy_temperature is {config.on_policy_temperature}, expected a number of at least 0; "
        "type --on-policy-temperature 1",
    )
    _require(
        bool(config.on_policy) or _are_default(config, "on_policy_temperature", "on_policy_tokens"),
        "--on-policy-temperature and --on-policy-tokens say how the student completes prompts, and it completes "
        "none; type --on-policy 0.5 with them",
    )


def check_numbers(config: "TrainConfig") -> None:
    """Counts, lengths and rates, each by itself."""
    for name, least, usual in AT_LEAST:
        value = getattr(config, name)
        _require(
            value is None or value >= least,
            f"{name} is {value}, expected at least {least}; type {_flag(name)} {usual}",
        )
    for name, usual in OR_ALL:
        value = getattr(config, name)
        _require(
            value == -1 or value >= 1,
            f"{name} is {value}, expected at least 1, or -1 for all; type {_flag(name)} {usual}",
        )
    for name, usual in READ_AND_PREDICT:
        value = getattr(config, name)
        _require(
            value is None or value >= 2,
            f"{name} is {value}, expected at least 2: one token to read and one to predict; type {_flag(name)} {usual}",
        )
    _require(
        0 < config.learning_rate < math.inf,
        f"learning_rate is {config.learning_rate:g}, expected a number above 0; type --learning-rate 1e-5",
    )
    _require(
        config.max_grad_norm is None or 0 < config.max_grad_norm < math.inf,
        f"max_grad_norm is {config.max_grad_norm}, expected a number above 0; type --max-grad-norm 1",
    )
    _require(
        0 <= config.min_coverage <= 1,
        f"min_coverage is {config.min_coverage}, expected 0 to 1; type --min-coverage 0.5",
    )
    if config.select is not None:
        Selection.parse(config.select)


def check_held_out(config: "TrainConfig") -> None:
    """`--valid-split`, `--domain-column`."""
    _require(
        config.valid_split != config.split or config.valid_dataset not in (None, config.dataset),
        f"--valid-split {config.valid_split} is what is trained on; type --valid-split valid, or --valid-dataset D",
    )
    _require(
        config.domain_column is None or config.holds_out,
        "--domain-column tells held-out documents apart, and none are held out; type --valid-split valid with it",
    )


def check_adapter(config: "TrainConfig") -> None:
    """`--resume-adapter-file`, `lora_parameters`."""
    _require(
        config.resume_adapter_file is None or config.fine_tune_type != "full",
        "--resume-adapter-file is given, and --fine-tune-type full has no adapter; type --student with the model "
        "that mlx_lm.fuse makes of it",
    )
    rank, scale, dropout = (config.lora_parameters.get(name) for name in ("rank", "scale", "dropout"))
    _require(
        isinstance(rank, int)
        and rank >= 1
        and isinstance(scale, int | float)
        and isinstance(dropout, int | float)
        and 0 <= dropout < 1,
        f"lora_parameters is {dict(config.lora_parameters)}, expected rank, scale and dropout, "
        "as in {rank: 8, scale: 20.0, dropout: 0.0}",
    )


def check_kinds(config: "TrainConfig") -> None:
    """Fields that take one of several words."""
    for name, kinds in (("fine_tune_type", FineTuneType), ("on_miss", OnMiss), ("cross_vocab", CrossVocab)):
        value, known = getattr(config, name), get_args(kinds)
        _require(value is None or value in known, f"{name} is {value}; type {_flag(name)} {'|'.join(known)}")


def check_misses(config: "TrainConfig") -> None:
    """What is distilled from: `--store`, `--teacher`, `--on-miss`, `--write-back`."""
    _require(
        config.on_miss != "online" or config.teacher is not None,
        "--on-miss online needs a teacher to ask; type --teacher T, or --on-miss hard-only, skip or error",
    )
    _require(
        config.teacher_adapter_path is None or config.teacher is not None,
        "--teacher-adapter-path is given, and no teacher; type --teacher T with it",
    )
    _require(
        config.distils or config.cross_vocab == "auto",
        "--cross-vocab says how to learn from a teacher, and with --alpha 0 none is read; leave it out, or type "
        "--alpha 0.9",
    )
    _require(
        config.teacher_tokenizer is None or (config.teacher is None and bool(config.store) and config.distils),
        "--teacher-tokenizer finds documents in a store, and --teacher has its own; type it with --store, without "
        "--teacher",
    )
    _require(
        config.max_teacher_length is None or (config.teacher is not None and config.distils),
        "--max-teacher-length bounds what a live teacher is asked, and none is; type --teacher T with it",
    )
    _require(
        not config.distils or bool(config.store) or config.teacher is not None,
        "nothing to distil from; type --store STORE, --teacher T, or --alpha 0 for cross-entropy alone",
    )
    _require(
        config.teacher is None or not config.store or config.miss_policy != "error",
        "--teacher is never asked with --on-miss error; leave it out, or type --on-miss online",
    )
    _require(
        not config.distils or bool(config.store) or config.miss_policy != "error",
        "without --store every position is a miss, and --on-miss error never asks the teacher; "
        "type --on-miss online, or --alpha 0 for cross-entropy alone",
    )
    _require(
        not config.write_back or (bool(config.store) and config.teacher is not None and config.distils),
        "--write-back keeps a teacher's answers in a store; "
        "type --store STORE, --teacher T and an --alpha above 0 with it",
    )
    _require(
        not (config.write_back and config.store and is_url(config.store[0])),
        "--write-back keeps answers in the first store, and that is a URL; type --store with a path of your own first",
    )
    _require(
        0 < config.overlay_gb < math.inf,
        f"overlay_gb is {config.overlay_gb}, expected a number above 0; type --overlay-gb 20",
    )
    _require(
        config.overlay is None or any(is_url(path) for path in config.store),
        "--overlay keeps what is fetched from services, and no --store is a URL; type --store https://HOST:8470/NAME",
    )


def _are_default(config: "TrainConfig", *names: str) -> bool:
    fields = type(config).__dataclass_fields__
    return all(getattr(config, name) == fields[name].default for name in names)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
