"""`logitstore`: build a store, and look at one."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from distill_cli.outcome import one_line_errors, say_blas

STORE = click.argument("store", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="logitstore")
def main() -> None:
    """Cache a teacher's next-token distributions in a few bytes per token."""


@main.command()
@click.option("--teacher", required=True, help="An mlx-lm model folder, a .gguf file, or a hub id.")
@click.option("--dataset", required=True, help="A .jsonl or .parquet file, an mlx-lm data folder, or a hub dataset.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The store: begun, extended or finished.")
@click.option("--adapter-path", help="A LoRA adapter of the teacher.")
@click.option("--split", default="train", show_default=True, help="Which split of a data folder or hub dataset.")
@click.option("--select", default="threshold:16", show_default=True, help="What is kept: threshold:k or top-k:K.")
@click.option("--temperature", default=1.0, show_default=True, help="The teacher's softmax temperature.")
@click.option("--max-length", default=2048, show_default=True, help="Documents are cut to this many tokens.")
@click.option("--batch-tokens", default=2048, show_default=True, help="Padded tokens in one teacher batch.")
@click.option("--limit", type=int, help="Only the first N documents.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random choices.")
@click.option("--shard", default="1/1", show_default=True, help="I/N: build the I-th of N disjoint parts.")
@click.option("--dry-run", is_flag=True, help="Estimate size and time from a short probe; write nothing.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def build(**options: Any) -> None:
    """Run the teacher once over a dataset and keep what it says.

    Run it again to go on after an interruption, or to add what is new in the dataset.
    """
    with one_line_errors("What is finished is kept; type the same command to go on."):
        say_blas()
        from logitstore.build import BuildConfig
        from logitstore.build import build as run

        config = BuildConfig(**options | {"out": options["out"].expanduser()})
        if config.dry_run:
            _dry_run(config)
            return
        report = run(config, lambda line: None if config.quiet else click.echo(line))
        per_token = report.disk_bytes / max(report.store_positions, 1)  # a part may hold no document
        click.echo(
            f"{config.out}: {report.store_documents:,} documents, {report.store_positions:,} positions, "
            f"{report.disk_bytes:,} bytes ({per_token:.1f} per token)"
        )
        if report.computed_positions:
            click.echo(
                f"computed {report.computed_documents:,} documents at {report.positions_per_second:,.0f} tokens/s "
                f"in {report.elapsed_s:,.0f} s"
            )


def _dry_run(config: Any) -> None:
    from logitstore.dry_run import estimate

    cost = estimate(config)
    click.echo(cost.summary)
    if not cost.documents:
        click.echo("nothing to do")
        return
    rate = cost.positions / cost.elapsed_s
    click.echo(f"to do: {cost.documents:,} documents, {cost.positions:,} positions")
    click.echo(f"size:  about {cost.disk_bytes:,.0f} bytes, {cost.disk_bytes / cost.positions:.1f} per token")
    click.echo(
        f"time:  about {_duration(cost.elapsed_s)} at {rate:,.0f} tokens/s (probe: {cost.probed_positions} positions)"
    )


def _duration(elapsed_s: float) -> str:
    minutes, seconds = divmod(round(elapsed_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


@main.command()
@STORE
@JSON
def info(store: Path, as_json: bool) -> None:
    """Print what a store holds and what made it."""
    with one_line_errors("Nothing was changed."):
        from logitstore.info import info as read
        from logitstore.info import to_text
        from logitstore.store import open_store

        facts = read(open_store(store))
        click.echo(json.dumps(facts, indent=1) if as_json else to_text(facts, store))


@main.command()
@STORE
@JSON
@click.option("--quiet", is_flag=True, help="No progress bar.")
def verify(store: Path, as_json: bool, quiet: bool) -> None:
    """Check every byte of a store; exit code 1 and the names of what is bad."""
    with one_line_errors("Nothing was changed."):
        from logitstore.verify import to_json
        from logitstore.verify import verify as check

        report = check(store, quiet=quiet or as_json)
    if as_json:
        click.echo(json.dumps(to_json(report), indent=1))
    else:
        for problem in report.problems:
            click.echo(f"{problem.file}: {problem.fault}")
        verdict = f"{len(report.problems)} problem(s)" if report.problems else "all good"
        click.echo(f"{report.files:,} files, {report.documents:,} documents, {report.positions:,} positions: {verdict}")
    sys.exit(1 if report.problems else 0)


@main.command()
@STORE
@click.option("--document", "number", default=0, show_default=True, help="Which document, from 0.")
@click.option(
    "--candidates", type=click.IntRange(min=1), default=6, show_default=True, help="How many candidates to show."
)
def inspect(store: Path, number: int, candidates: int) -> None:
    """Show a document's positions and the candidates kept for each."""
    with one_line_errors("Nothing was changed."):
        from logitstore.inspect import inspect as lines
        from logitstore.store import open_store

        click.echo_via_pager("\n".join(lines(open_store(store), number, candidates)))
