"""`logitstore`: build a store, and look at one."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from distill_cli import moving, service
from distill_cli.outcome import LocalPath, one_line_errors, say_blas

READ = click.argument("store")  # as it was typed: it may be a URL
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
TEACHER = "An mlx-lm model folder, a .gguf file, or a hub id."


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between them: a tuple of floats."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[float, ...]:
        """Read what was typed."""
        try:
            return value if isinstance(value, tuple) else tuple(float(number) for number in value.split(","))
        except ValueError:
            flag = param.opts[0] if param else ""
            self.fail(f"{value!r} is not a list of numbers; type {flag} 1,2", param, context)


class Layers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them: a tuple of ints."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, ...]:
        """Read what was typed."""
        try:
            return value if isinstance(value, tuple) else tuple(int(number) for number in value.split(","))
        except ValueError:
            flag = param.opts[0] if param else ""
            self.fail(f"{value!r} is not a list of layers; type {flag} 6,12", param, context)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="logitstore")
def main() -> None:
    """Cache a teacher's next-token distributions in a few bytes per token."""


@main.command()
@click.option("--teacher", required=True, help=TEACHER)
@click.option("--dataset", required=True, help="A .jsonl or .parquet file, an mlx-lm data folder, or a hub dataset.")
@click.option("--out", required=True, type=LocalPath(), help="The store: begun, extended or finished.")
@click.option("--adapter-path", help="A LoRA adapter of the teacher.")
@click.option("--split", default="train", show_default=True, help="Which split of a data folder or hub dataset.")
@click.option(
    "--select",
    default="threshold:16",
    show_default=True,
    help="What is kept: threshold:k, random:N[:EXPONENT], top-k:K or top-p:P:K.",
)
@click.option(
    "--temperature",
    type=Numbers(),
    default=(1.0,),
    help="Softmax temperatures, as in 1,2: entries for each.  [default: 1]",
)
@click.option("--replicas", default=1, show_default=True, help="Independent draws, which epochs rotate through.")
@click.option("--tail-log-probs", is_flag=True, help="Keep the tail entries' own log-probs, for losses beyond KL.")
@click.option("--log-z", type=Numbers(), default=(), help="Temperatures, as in 1,2,4: top-k can be read at them too.")
@click.option("--prompt-template", help="The words around every prompt, with {input} in its place.")
@click.option(
    "--hidden-layers",
    type=Layers(),
    default=(),
    help="Layers from 0, as in 6,12: keep the teacher's hidden states too.",
)
@click.option("--max-seq-length", default=2048, show_default=True, help="Documents are cut to this many tokens.")
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

    cost = estimate(config, click.echo)
    if not cost.documents:
        return
    rate = cost.positions / cost.elapsed_s
    click.echo(f"size:  about {cost.disk_bytes:,.0f} bytes, {cost.disk_bytes / cost.positions:.1f} per token")
    click.echo(
        f"time:  about {_duration(cost.elapsed_s)} at {rate:,.0f} tokens/s (probe: {cost.probed_positions} positions)"
    )


def _duration(elapsed_s: float) -> str:
    minutes, seconds = divmod(round(elapsed_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


@main.command()
@READ
@JSON
def info(store: str, as_json: bool) -> None:
    """Print what a store holds and what made it."""
    with one_line_errors("Nothing was changed."):
        from logitstore.info import info as read
        from logitstore.info import to_text
        from logitstore.store import open_store

        facts = read(open_store(store))
        click.echo(json.dumps(facts, indent=1) if as_json else to_text(facts, store))


@main.command()
@READ
@JSON
@click.option("--repair", "mend", is_flag=True, help="Quarantine what is damaged; with a teacher, compute it again.")
@click.option("--live", type=click.IntRange(min=1), help="Ask the teacher again for N documents chosen at random.")
@click.option("--teacher", help=f"For --live and --repair, the one that built the store. {TEACHER}")
@click.option("--adapter-path", help="A LoRA adapter of the teacher.")
@click.option("--dataset", help="For --repair: what the store was built from; most damage loses tokens too.")
@click.option("--split", default="train", show_default=True, help="Which split of it.")
@click.option("--max-seq-length", default=2048, show_default=True, help="At which its documents were cut.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which documents --live chooses."
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def verify(
    store: str,
    as_json: bool,
    mend: bool,
    live: int | None,
    teacher: str | None,
    adapter_path: str | None,
    dataset: str | None,
    split: str,
    max_seq_length: int,
    seed: int,
    quiet: bool,
) -> None:
    """Check every byte of a store; exit code 1 and the names of what is bad.

    With --repair, what is bad afterwards. With --live, exit code 1 too where less than 99 % of the entries are equal,
    or of the positions have hidden states within 5 % of the teacher's.
    """
    quiet = quiet or as_json
    facts: dict[str, Any] = {}
    with one_line_errors("Nothing that is good was changed; type the same command to go on."):
        if live and not teacher:
            raise click.UsageError("--live asks the teacher again; type --teacher T.")
        if teacher and not (live or mend):
            raise click.UsageError("--teacher has nothing to do; type --live N, or --repair.")
        if adapter_path and not teacher:
            raise click.UsageError("--adapter-path is the teacher's; type --teacher T with it.")
        if dataset and not (mend and teacher):
            raise click.UsageError("--dataset has nothing to do; type --repair --teacher T with it.")
        from logitstore.verify import to_json
        from logitstore.verify import verify as check

        asked: Any = _teacher(store, teacher, adapter_path, quiet) if teacher else None
        if mend and "://" in store:
            raise click.UsageError(
                f"{store} is a URL and is no folder, and only folders can be repaired; type its path, where it is."
            )
        if mend:
            from logitstore.repair import repair

            done = repair(Path(store), asked, dataset=dataset, split=split, max_seq_length=max_seq_length, quiet=quiet)
            facts["repair"] = done.to_json()
            if not as_json:
                click.echo(done.to_text(), nl=False)
        report = check(store, quiet=quiet)
        facts = to_json(report) | facts
        replay = None
        if live and not report.problems:
            from logitstore.live import replay as ask
            from logitstore.store import open_store

            replay = ask(open_store(store), asked, live, seed, quiet=quiet)
            facts["live"] = replay.to_json()
        if as_json:
            click.echo(json.dumps(facts, indent=1))
        else:
            for problem in report.problems:
                click.echo(f"{problem.file}: {problem.fault}")
            verdict = f"{len(report.problems)} problem(s)" if report.problems else "all good"
            counts = f"{report.files:,} files, {report.documents:,} documents, {report.positions:,} positions"
            click.echo(f"{counts}: {verdict}")
            if replay is not None:
                click.echo(replay.to_text())
    sys.exit(1 if report.problems or (replay is not None and not replay.ok) else 0)


def _teacher(store: str, source: str, adapter_path: str | None, quiet: bool) -> Any:
    from logitstore.store import open_store

    open_store(store)  # a path that is none is told before a teacher is loaded
    say_blas()
    from logitstore.teacher import Teacher

    return Teacher(source, adapter_path, quiet=quiet)


@main.command()
@READ
@click.option("--document", "number", default=0, show_default=True, help="Which document, from 0.")
@click.option(
    "--candidates", type=click.IntRange(min=1), default=6, show_default=True, help="How many candidates to show."
)
def inspect(store: str, number: int, candidates: int) -> None:
    """Show a document's positions and the candidates kept for each."""
    with one_line_errors("Nothing was changed."):
        from logitstore.inspect import inspect as lines
        from logitstore.store import open_store

        click.echo_via_pager("\n".join(lines(open_store(store), number, candidates)))


@main.command()
@READ
@JSON
@click.option("--html", type=LocalPath(), help="Write one page with plots to this file.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def stats(store: str, as_json: bool, html: Path | None, quiet: bool) -> None:
    """Show what a store's targets look like: size, fidelity and histograms."""
    with one_line_errors("Nothing was changed; type the same command again."):
        from logitstore.stats_report import to_json, to_text
        from logitstore.store import open_store
        from logitstore.store_stats import of_store, require_page, save_html

        if html:
            require_page(html.expanduser())  # before all of the store is read
        found = of_store(open_store(store), quiet=quiet or as_json)
        if html:
            save_html(found, html.expanduser())
        click.echo(json.dumps(to_json(found), indent=1) if as_json else to_text(found))


@main.command()
@READ
@click.option(
    "--sort", help="By length, nll, entropy, correct, disagreement or tail_mass.  [default: the store's own order]"
)
@click.option("--descending", is_flag=True, help="The largest first.")
@click.option("--where", multiple=True, help="Only documents with e.g. 'nll>3', in quotes; several must all hold.")
@click.option("--limit", type=int, help="How many to show.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, an object a line.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def query(store: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """List documents by what the teacher made of them.

    Means over a document's positions: nll (-log of the label's probability) and entropy, in nats; correct, the share
    of labels that are the teacher's likeliest token; disagreement, the share of the others; tail_mass, the
    probability outside the head.
    """
    with one_line_errors("Nothing was changed."):
        from logitstore.query import HEADER
        from logitstore.query import query as ask
        from logitstore.store import open_store

        found = ask(open_store(store), quiet=quiet or as_json, **options)
        if not as_json:
            click.echo(HEADER)
        for each in found:
            click.echo(json.dumps(each.to_json()) if as_json else each.to_text())


@main.command(name="vocab-map")
@READ
@JSON
@click.option("--student", required=True, help="A model folder, a .gguf file or a hub id; only its tokenizer is read.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def vocab_map(store: str, as_json: bool, student: str, quiet: bool) -> None:
    """Show how much of what a store keeps a student with another tokenizer can use.

    The map from the teacher's tokens to the student's is kept in the store, if that is a folder that can be written.
    """
    with one_line_errors("Nothing was changed."):
        from logitstore.coverage import coverage
        from logitstore.store import open_store
        from logitstore.tokenizer import load_tokenizer
        from logitstore.vocabulary import vocabulary_of

        opened = open_store(store)
        found = coverage(opened, vocabulary_of(load_tokenizer(student, "--student")), quiet=quiet or as_json)
        click.echo(json.dumps(found.to_json(), indent=1) if as_json else found.to_text(store))


for command in (*moving.COMMANDS, *service.COMMANDS):
    main.add_command(command)
