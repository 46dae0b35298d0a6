"""What a `TrainConfig` must satisfy before anything is read. Each failure is one line with what to type."""

import math
from typing import TYPE_CHECKING, get_args

from distill_trainer.checking import are_default, flag_of, require
from distill_trainer.kinds import CrossVocab, FineTuneType, OnMiss
from distill_trainer.mix import Mix
from distill_trainer.optimizer import make_optimizer
from distill_trainer.teacher_checks import check_layers, check_misses, check_on_policy, check_prompts, check_teachers
from distill_trainer.trackers import require_installed
from logitstore.condition import Condition
from logitstore.errors import ConfigError
from logitstore.measures import require_name
from logitstore.selection import Selection

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
    ("on_policy_tokens", 1, 128),
)
"""Whole numbers, the least they may be, and one to type."""
OR_ALL = (("val_batches", 25), ("num_layers", 16))
"""Numbers of at least 1 where -1 stands for all."""
READ_AND_PREDICT = (("max_seq_length", 2048), ("max_teacher_length", 512))
"""Lengths in tokens, which hold one to read and one to predict."""
MOST = (1 << 31) - 1
"""No whole number but the seed is larger."""

LORA_KEYS = ("rank", "scale", "dropout", "keys")


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
    require(bool(config.loss), "loss names none; type --loss kl")
    require(config.loss_names.count("taid") <= 1, "loss names taid twice, and a run has one t; type --loss taid once")
    named = [text.partition("=")[0] for text in config.loss]
    for name in named:
        require(named.count(name) == 1, f"loss names {name} twice; type it once, with a weight, as in --loss {name}=2")


def check_schedules(config: "TrainConfig") -> None:
    """`--alpha`, `--temperature`, `--progressive`."""
    for moved, value in (("alpha", config.alpha), ("temperature", config.temperature)):
        require(
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
    require(all(0 <= end <= 1 for end in ends), f"alpha is {config.alpha}, expected 0 to 1; type --alpha 0.9")
    try:
        asked = config.temperature_schedule
    except ValueError:
        raise ConfigError(
            f"temperature is {config.temperature!r}, expected a number above 0, or two as in '4->1:linear', "
            "in quotes (or cosine, wsd, wsd:0.2); type --temperature 1"
        ) from None
    require(
        asked is None or (0 < asked.start < math.inf and 0 < asked.end < math.inf),
        f"temperature is {config.temperature}, expected a number above 0; type --temperature 1",
    )
    require(
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
    require(
        not config.teacher_measures or (bool(config.store) and not config.write_back),
        f"{', '.join(config.teacher_measures)} of a document is what a store knows before the run; "
        "type --store STORE, and not --write-back",
    )


def check_weights(config: "TrainConfig") -> None:
    """`--think-weight`, `--entropy-weight`."""
    require(
        config.think_weight is None or 0 <= config.think_weight < math.inf,
        f"think_weight is {config.think_weight}, expected a number of at least 0; type --think-weight 2",
    )
    require(
        config.think_weight is not None or are_default(config, "think_start", "think_end"),
        "--think-start and --think-end say where thoughts are, and nothing weighs them; type --think-weight 2 too",
    )
    for flag, mark in (("--think-start", config.think_start), ("--think-end", config.think_end)):
        require(bool(mark), f"{flag} is empty; type {flag} with the text that the dataset has there")
    require(
        0 <= config.entropy_weight < math.inf,
        f"entropy_weight is {config.entropy_weight}, expected a number of at least 0; type --entropy-weight 1",
    )
    require(
        not config.entropy_weight or config.distils,
        "--entropy-weight weighs by the teacher's entropy, and no teacher is read with --alpha 0; "
        "type --alpha 0.9, or leave --entropy-weight out",
    )


def check_numbers(config: "TrainConfig") -> None:
    """Counts, lengths and rates, each by itself."""
    for name, least, usual in AT_LEAST:
        value = getattr(config, name)
        require(
            value is None or value >= least,
            f"{name} is {value}, expected at least {least}; type {flag_of(name)} {usual}",
        )
    for name, usual in OR_ALL:
        value = getattr(config, name)
        require(
            value == -1 or value >= 1,
            f"{name} is {value}, expected at least 1, or -1 for all; type {flag_of(name)} {usual}",
        )
    for name, usual in READ_AND_PREDICT:
        value = getattr(config, name)
        require(
            value is None or value >= 2,
            f"{name} is {value}, expected at least 2: one token to read and one to predict; "
            f"type {flag_of(name)} {usual}",
        )
    for name, *_, usual in (*AT_LEAST, *OR_ALL, *READ_AND_PREDICT):
        value = getattr(config, name)
        require(
            value is None or value <= MOST,
            f"{name} is {value}, expected at most {MOST}; type {flag_of(name)} {usual}",
        )
    require(0 <= config.seed < 1 << 64, f"seed is {config.seed}, expected 0 to 2^64 - 1; type --seed 0")
    require(
        0 < config.learning_rate < math.inf,
        f"learning_rate is {config.learning_rate:g}, expected a number above 0; type --learning-rate 1e-5",
    )
    require(
        config.max_grad_norm is None or 0 < config.max_grad_norm < math.inf,
        f"max_grad_norm is {config.max_grad_norm}, expected a number above 0; type --max-grad-norm 1",
    )
    require(
        0 <= config.min_coverage <= 1,
        f"min_coverage is {config.min_coverage}, expected 0 to 1; type --min-coverage 0.5",
    )
    if config.select is not None:
        Selection.parse(config.select)


def check_held_out(config: "TrainConfig") -> None:
    """`--valid-split`, `--domain-column`."""
    require(
        config.valid_split != config.split or config.valid_dataset not in (None, config.dataset),
        f"--valid-split {config.valid_split} is what is trained on; type --valid-split valid, or --valid-dataset D",
    )
    require(
        config.domain_column is None or config.holds_out,
        "--domain-column tells held-out documents apart, and none are held out; type --valid-split valid with it",
    )


def check_adapter(config: "TrainConfig") -> None:
    """`--resume-adapter-file`, `lora_parameters`."""
    require(
        config.resume_adapter_file is None or config.fine_tune_type != "full",
        "--resume-adapter-file is given, and --fine-tune-type full has no adapter; type --student with the model "
        "that mlx_lm.fuse makes of it",
    )
    require(
        config.fine_tune_type != "full" or config.num_layers == -1 or are_default(config, "num_layers"),
        f"num_layers is {config.num_layers}, which is of adapters, and --fine-tune-type full trains every layer; leave "
        "it out, or type --num-layers -1",
    )
    rank, scale, dropout = (config.lora_parameters.get(name) for name in ("rank", "scale", "dropout"))
    require(
        isinstance(rank, int)
        and not isinstance(rank, bool)
        and 1 <= rank <= MOST
        and isinstance(scale, int | float)
        and not isinstance(scale, bool)
        and math.isfinite(scale)
        and isinstance(dropout, int | float)
        and 0 <= dropout < 1,
        f"lora_parameters is {dict(config.lora_parameters)}, expected rank, scale and dropout, "
        "as in {rank: 8, scale: 20.0, dropout: 0.0}",
    )
    for key in config.lora_parameters:
        require(
            key in LORA_KEYS,
            f"lora_parameters has the key {key!r}, which mlx-lm does not look at; write {', '.join(LORA_KEYS)} alone",
        )


def check_kinds(config: "TrainConfig") -> None:
    """Fields that take one of several words."""
    for name, kinds in (("fine_tune_type", FineTuneType), ("on_miss", OnMiss), ("cross_vocab", CrossVocab)):
        value, known = getattr(config, name), get_args(kinds)
        require(value is None or value in known, f"{name} is {value}; type {flag_of(name)} {'|'.join(known)}")
