"""What a `TrainConfig` must satisfy about who teaches: stores, a live teacher, and what is learned from it alone."""

import math
from typing import TYPE_CHECKING, get_args

from distill_trainer.checking import are_default, require
from distill_trainer.kinds import AttentionKind, HiddenKind
from distill_trainer.layer_map import LayerMap
from logitstore.prompts import read_template
from logitstore.store import is_url

if TYPE_CHECKING:
    from distill_trainer.config import TrainConfig


def check_layers(config: "TrainConfig") -> None:
    """`--hidden-loss`, `--attention-loss`, `--layer-map`."""
    for name, kinds in (("hidden", HiddenKind), ("attention", AttentionKind)):
        kind, weight = getattr(config, f"{name}_loss"), getattr(config, f"{name}_weight")
        expected = "|".join(get_args(kinds))
        require(
            kind is None or kind in get_args(kinds),
            f"{name}_loss is {kind!r}, expected one of {expected}; type --{name}-loss {expected}",
        )
        require(
            0 < weight < math.inf,
            f"{name}_weight is {weight}, expected a number above 0; type --{name}-weight 0.1, "
            f"or leave --{name}-loss out",
        )
        require(
            kind is not None or are_default(config, f"{name}_weight"),
            f"--{name}-weight weighs a loss that is not given; type --{name}-loss {expected}",
        )
        require(
            kind is None or config.distils,
            f"--{name}-loss learns from a teacher, and none is read with --alpha 0; type --alpha 0.9",
        )
    by_layer = bool(config.hidden_loss or config.attention_loss)
    LayerMap.parse(config.layer_map)
    require(
        config.layer_map == "auto" or by_layer,
        "--layer-map says whose layers are compared, and nothing compares them; type --hidden-loss mse too",
    )
    require(
        config.attention_loss is None or (config.teacher is not None and not config.store),
        "--attention-loss reads a teacher's attention as it runs, and no store keeps that; "
        "type --teacher T without --store",
    )
    require(
        config.attention_loss is None or not config.grad_checkpoint,
        "--attention-loss reads inside of layers that --grad-checkpoint computes twice; leave one of them out",
    )
    require(
        not config.pack or not by_layer,
        "--hidden-loss and --attention-loss take a row for a document; leave --pack out",
    )
    require(
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
        require(
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
    require(
        config.teacher_prompt_template is None or config.distils or bool(config.store),
        "--teacher-prompt-template is given, and with --alpha 0 no teacher is read; leave it out, or type --alpha 0.9",
    )
    require(
        config.mask_prompt or config.teacher_template == config.student_template,
        "the teacher and the student have other prompts, and the prompt is trained too; "
        "leave --no-mask-prompt out, or type --teacher-prompt-template and --student-prompt-template alike",
    )


def check_on_policy(config: "TrainConfig") -> None:
    """`--on-policy` and what goes with it."""
    require(0 <= config.on_policy <= 1, f"on_policy is {config.on_policy}, expected 0 to 1; type --on-policy 0.5")
    require(
        not config.on_policy or (config.teacher is not None and config.distils),
        "--on-policy lets a live teacher score what the student says, and there is none; type --teacher T with it, "
        "and an --alpha above 0",
    )
    require(
        not config.on_policy or (config.mask_prompt and config.think_weight is None),
        "--on-policy keeps each prompt and trains what follows it; leave --no-mask-prompt and --think-weight out, "
        "or type --on-policy 0",
    )
    require(
        0 <= config.on_policy_temperature < math.inf,
        f"on_policy_temperature is {config.on_policy_temperature}, expected a number of at least 0; "
        "type --on-policy-temperature 1",
    )
    require(
        bool(config.on_policy) or are_default(config, "on_policy_temperature", "on_policy_tokens"),
        "--on-policy-temperature and --on-policy-tokens say how the student completes prompts, and it completes "
        "none; type --on-policy 0.5 with them",
    )


def check_misses(config: "TrainConfig") -> None:
    """What is distilled from: `--store`, `--teacher`, `--on-miss`, `--write-back`."""
    require(
        config.on_miss != "online" or config.teacher is not None,
        "--on-miss online needs a teacher to ask; type --teacher T, or --on-miss hard-only, skip or error",
    )
    require(
        config.teacher_adapter_path is None or config.teacher is not None,
        "--teacher-adapter-path is given, and no teacher; type --teacher T with it",
    )
    require(
        config.distils or config.cross_vocab == "auto",
        "--cross-vocab says how to learn from a teacher, and with --alpha 0 none is read; leave it out, or type "
        "--alpha 0.9",
    )
    require(
        config.teacher_tokenizer is None or (config.teacher is None and bool(config.store) and config.distils),
        "--teacher-tokenizer finds documents in a store, and --teacher has its own; type it with --store, without "
        "--teacher",
    )
    require(
        config.max_teacher_length is None or (config.teacher is not None and config.distils),
        "--max-teacher-length bounds what a live teacher is asked, and none is; type --teacher T with it",
    )
    require(
        not config.distils or bool(config.store) or config.teacher is not None,
        "nothing to distil from; type --store STORE, --teacher T, or --alpha 0 for cross-entropy alone",
    )
    require(
        config.teacher is None or not config.store or config.miss_policy != "error",
        "--teacher is never asked with --on-miss error; leave it out, or type --on-miss online",
    )
    require(
        not config.distils or bool(config.store) or config.miss_policy != "error",
        "without --store every position is a miss, and --on-miss error never asks the teacher; "
        "type --on-miss online, or --alpha 0 for cross-entropy alone",
    )
    require(
        not config.write_back or (bool(config.store) and config.teacher is not None and config.distils),
        "--write-back keeps a teacher's answers in a store; "
        "type --store STORE, --teacher T and an --alpha above 0 with it",
    )
    require(
        not (config.write_back and config.store and is_url(config.store[0])),
        "--write-back keeps answers in the first store, and that is a URL; type --store with a path of your own first",
    )
    require(
        0 < config.overlay_gb < math.inf,
        f"overlay_gb is {config.overlay_gb}, expected a number above 0; type --overlay-gb 20",
    )
    require(
        are_default(config, "overlay", "overlay_gb") or any(is_url(path) for path in config.store),
        "--overlay and --overlay-gb keep what is fetched from services, and no --store is a URL; "
        "type --store https://HOST:8470/NAME",
    )
