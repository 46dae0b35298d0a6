"""`distill-train`: train a student from stores, a live teacher, or both."""

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from distill_cli.outcome import INTERRUPTED, one_line_errors, say_blas


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="logitstore")
@click.option("--student", help="An mlx-lm model folder, a .gguf file, or a hub id.")
@click.option("--dataset", help="A .jsonl or .parquet file, an mlx-lm data folder, or a hub dataset.")
@click.option("--out", help="A new folder for the adapter or model, its metrics and config.")
@click.option(
    "--store",
    multiple=True,
    help="A store to read, a path or a URL; several are asked in order. PATH=SHARE each: the teacher is a mixture of "
    "theirs.",
)
@click.option("--overlay", help="Where what is fetched from a URL is kept.  [default: the user's cache folder]")
@click.option("--overlay-gb", type=float, default=20, show_default=True, help="So much is kept there.")
@click.option(
    "--combine",
    help="Several teachers: label, at each position the one that gave the label more; or column:NAME, with --store "
    "PATH=VALUE each, by the documents' values in a column.",
)
@click.option("--teacher", help="A live teacher: alone, for online distillation; with a store, for its misses.")
@click.option("--teacher-adapter-path", help="A LoRA adapter of the teacher.")
@click.option("--split", default="train", show_default=True, help="Which split of a data folder or hub dataset.")
@click.option(
    "--filter",
    multiple=True,
    help="Only documents with e.g. 'nll<2.5', in quotes, or teacher-correct[:SHARE]: SHARE (0.5) of their labels are "
    "the teacher's likeliest token. Measures as `logitstore query` has them; several must all hold.",
)
@click.option("--sample", help="Draw documents in proportion to a measure, with replacement: disagreement, nll, ...")
@click.option("--curriculum", help="The first epoch goes from low to high values of a measure: entropy, nll, ...")
@click.option("--mix", help="COLUMN:VALUE=SHARE,VALUE=SHARE: how much of an epoch each value of a column gives.")
@click.option(
    "--cross-vocab",
    type=click.Choice(["auto", "mapped", "span", "uld", "gold"]),
    default="auto",
    show_default=True,
    help="How to learn from a store of another tokenizer: the teacher's entries by the student's names, the "
    "likelihood of spans of text, sorted probabilities, or both sides' distributions over what ends a span.",
)
@click.option(
    "--teacher-tokenizer",
    help="A model of the teacher's tokenizer, for --store and a student of another: finds chats that the two render "
    "differently.",
)
@click.option(
    "--min-coverage",
    default=0.5,
    show_default=True,
    help="Refuse to train on less of what such a teacher says.",
)
@click.option(
    "--on-miss",
    type=click.Choice(["online", "hard-only", "skip", "error"]),
    help="What to do at a position that no store answers; with --teacher, that it does not answer either, where online "
    "stops the run.  [default: online with a teacher, else error]",
)
@click.option("--write-back", is_flag=True, help="Keep the teacher's answers in the first store.")
@click.option(
    "--loss",
    multiple=True,
    default=("kl",),
    show_default=True,
    help="kl, reverse-kl, jsd, skew-kl, skew-reverse-kl, soft-ce, tvd, taid, hinge-rank or logistic-rank, as "
    "NAME[:NUMBER][=WEIGHT]; several are summed.",
)
@click.option(
    "--hidden-loss",
    type=click.Choice(["mse", "cosine", "l1"]),
    help="Bring the student's hidden states near the teacher's.",
)
@click.option(
    "--hidden-weight", default=0.1, show_default=True, help="Weight of --hidden-loss beside the other losses."
)
@click.option(
    "--attention-loss",
    type=click.Choice(["mse", "kl"]),
    help="Bring the student's attention maps near those of a live teacher.",
)
@click.option("--attention-weight", default=0.01, show_default=True, help="Weight of --attention-loss.")
@click.option(
    "--layer-map",
    default="auto",
    show_default=True,
    help="Whose layers are compared, from 0: TEACHER:STUDENT pairs as in 6:3,12:6, or skip:2 (teacher's layer 2 s for "
    "the student's s), or auto: evenly, first to first and last to last.",
)
@click.option(
    "--alpha",
    "--kd-ratio",
    type=str,
    default=0.9,
    show_default=True,
    help="Weight of distillation; cross-entropy weighs 1 - alpha. '0.9->0.3:linear' or '0.9->0.3:cosine', in quotes, "
    "changes it over the run, '0.9->0.3:wsd' over its last fifth, wsd:0.5 over its last half.",
)
@click.option("--teacher-prompt-template", help="The words around every prompt for the teacher, with {input} in it.")
@click.option("--student-prompt-template", help="The same for the student.")
@click.option("--max-teacher-length", type=int, help="A live teacher reads N tokens of a document, and no more.")
@click.option("--think-weight", type=float, help="What the loss weighs at thoughts; 0 leaves them out.")
@click.option("--think-start", default="<think>", show_default=True, help="The text before a thought.")
@click.option("--think-end", default="</think>", show_default=True, help="The text after it.")
@click.option(
    "--entropy-weight",
    default=0.0,
    show_default=True,
    help="A position weighs 1 + W times its teacher's entropy in nats.",
)
@click.option(
    "--on-policy",
    default=0.0,
    show_default=True,
    help="This share of batches is the student's own completions of their prompts, scored by --teacher.",
)
@click.option("--on-policy-temperature", default=1.0, show_default=True, help="Sampling of completions; 0: greedy.")
@click.option("--on-policy-tokens", default=128, show_default=True, help="A completion has at most N tokens.")
@click.option("--outcome-column", help="A column of the dataset that each document's loss is multiplied by.")
@click.option("--select", help="What a live teacher keeps.  [default: as the store, else threshold:16]")
@click.option(
    "--temperature",
    type=str,
    help="Softmax temperature, or a schedule as for --alpha: '4->1:linear', through the temperatures that the store "
    "serves.  [default: the store's, else 1]",
)
@click.option("--progressive", is_flag=True, help="The temperature falls to 1, from 4 unless given, and alpha to 0.")
@click.option(
    "--fine-tune-type",
    type=click.Choice(["lora", "dora", "full"]),
    default="lora",
    show_default=True,
    help="LoRA's rank, scale and dropout are the key lora_parameters of --config.",
)
@click.option("--num-layers", default=16, show_default=True, help="How many of the last layers LoRA adapts; -1: all.")
@click.option("--iters", default=1000, show_default=True, help="Steps of the optimizer.")
@click.option("--batch-size", default=4, show_default=True, help="Documents in a batch, of all processes together.")
@click.option("--grad-accumulation-steps", default=1, show_default=True, help="Batches in a step.")
@click.option("--max-seq-length", default=2048, show_default=True, help="Documents are cut to this many tokens.")
@click.option("--learning-rate", default=1e-5, show_default=True)
@click.option(
    "--optimizer",
    type=click.Choice(["adam", "adamw", "muon", "sgd", "adafactor"]),
    default="adam",
    show_default=True,
    help="Its own settings, and learning rate schedules, are keys of --config.",
)
@click.option("--max-grad-norm", type=float, help="Scale larger gradients down to this norm.")
@click.option(
    "--mask-prompt/--no-mask-prompt",
    default=True,
    show_default=True,
    help="Train completions and assistants' turns alone, or every token.",
)
@click.option("--resume-adapter-file", help="Begin with the weights of an adapter, a .safetensors file.")
@click.option("--pack", is_flag=True, help="Short documents of a batch share rows of at most --max-seq-length.")
@click.option("--grad-checkpoint", is_flag=True, help="Less memory, more time: compute the student's layers twice.")
@click.option(
    "--valid-dataset", help="Held-out documents, to measure the loss on.  [default: --valid-split of --dataset]"
)
@click.option("--valid-split", help="The held-out split, as in valid for valid.jsonl.  [default: nothing is held out]")
@click.option("--steps-per-eval", default=200, show_default=True, help="Measure the held-out loss every N steps.")
@click.option("--val-batches", default=25, show_default=True, help="On so many held-out batches; -1: all.")
@click.option("--domain-column", help="A held-out column, for whose values the held-out loss is reported apart.")
@click.option("--keep-layers", type=int, help="Cut the student to N evenly spaced layers first.")
@click.option("--seed", default=0, show_default=True, help="Seed of the order of documents and of new parameters.")
@click.option(
    "--save-every",
    type=int,
    help="A checkpoint after every N steps and at the end.  [default: only where the run is stopped]",
)
@click.option("--report-samples", default=0, show_default=True, help="Prompts answered on OUT/report.html.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out: type its command again, and this.")
@click.option(
    "--report-to", multiple=True, help="tensorboard, wandb, trackio or swanlab: each step's metrics go there too."
)
@click.option("--project-name", default="logitstore", show_default=True, help="What the run belongs to there.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML with these names as keys.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.pass_context
def main(context: click.Context, /, config_file: Path | None, **options: Any) -> None:
    """Train a student on a teacher's next-token distributions, from a store, a live teacher, or both."""
    with one_line_errors(
        "No student was saved; type the same command again, with --resume or a new --out where this one was kept."
    ):
        from distill_trainer.config_file import config_of, read_config

        values = read_config(config_file, click.echo) if config_file else {}
        for name, value in options.items():
            typed = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
            if typed or (name not in values and value not in (None, ())):
                values[name] = value
        for name in ("student", "dataset", "out"):
            if not values.get(name):
                raise click.UsageError(f"Missing option '--{name}'.")
        config = config_of(values)
        say_blas()
        from distill_trainer.parallel import processes
        from distill_trainer.train import train

        report = train(config, lambda line: None if config.quiet else click.echo(line))
        if not processes().first:
            sys.exit(INTERRUPTED if report.interrupted else 0)
        click.echo(
            f"{report.steps:,} steps, {report.trained_tokens:,} tokens at {report.tokens_per_second:,.0f} tokens/s; "
            f"{report.count.hits:,} hits, {report.count.misses:,} misses (positions)"
            + (f", {report.count.by_service:,} of them answered by the service" if report.count.by_service else "")
            + (f", {report.count.failed:,} of them not answered by the teacher" if report.count.failed else "")
        )
        if report.valid:
            click.echo(f"held-out loss {report.valid['valid_loss']:.4f}")
        click.echo(f"load it with {report.load_with}")
    if report.interrupted:
        click.echo(
            f"Stopped after {report.steps:,} of {config.iters:,} steps; what was learned so far is saved. "
            "To go on, type the same command with --resume.",
            err=True,
        )
        sys.exit(INTERRUPTED)
