"""Commands of `logitstore` that move stores: from kind to kind, together, in from other tools and out to others."""

from pathlib import Path
from typing import Any

import click

from distill_cli.outcome import LocalPath, one_line_errors

GO_ON = "What is finished is kept; type the same command to go on."
OUT = click.argument("out", type=LocalPath())
QUIET = click.option("--quiet", is_flag=True, help="No progress bar.")
JOBS = click.option("--jobs", type=click.IntRange(min=1), default=4, show_default=True, help="Files at once.")


@click.command()
@click.argument("store")
@OUT
@QUIET
def convert(store: str, out: Path, quiet: bool) -> None:
    """Write a store as another kind: OUT ends in .zarr (a folder), .zip (one file to ship) or .lmdb (hot, local)."""
    with one_line_errors(GO_ON):
        from logitstore.merge import convert as run

        report = run(store, out.expanduser(), quiet=quiet)
        click.echo(_holds(out, report))


@click.command()
@click.argument("stores", nargs=-1, required=True)
@OUT
@QUIET
def merge(stores: tuple[str, ...], out: Path, quiet: bool) -> None:
    """Write the documents of several stores of one teacher into OUT, each document once."""
    with one_line_errors(GO_ON):
        from logitstore.merge import merge as run

        report = run(stores, out.expanduser(), quiet=quiet)
        click.echo(f"{_holds(out, report)}; {report.given:,} documents were given")


@click.command()
@click.argument("place", metavar="[STORE|DIR]", type=LocalPath(), required=False)
@click.option("--overlay", is_flag=True, help="Of what was fetched from services: DIR, else the user's cache folder.")
@click.option("--overlay-gb", type=float, help="So much of that may stay.  [default: 20]")
@click.option("--dry-run", is_flag=True, help="List what would go; remove nothing.")
def gc(place: Path | None, overlay: bool, overlay_gb: float | None, dry_run: bool) -> None:
    """Remove what killed commands have left in a store and beside it; what a running one holds stays.

    With --overlay, remove of the stores that were fetched from services what was used longest ago.
    """
    with one_line_errors("What was removed is gone; type the same command to go on."):
        if overlay:
            _gc_overlay(place, 20 if overlay_gb is None else overlay_gb, dry_run=dry_run)
            return
        if overlay_gb is not None:
            raise click.UsageError("--overlay-gb is how much of the overlay may stay; type --overlay with it.")
        if place is None:
            raise click.UsageError("a store is missing; type its path, or --overlay for what was fetched.")
        from logitstore.gc import gc as run

        report = run(place.expanduser(), dry_run=dry_run)
        for leftover in report.removed:
            click.echo(f"{leftover.path}: {leftover.size_bytes:,} bytes, {leftover.why}")
        for leftover in report.kept:
            click.echo(f"{leftover.path}: kept, {leftover.why}")
        click.echo(f"{report.freed_bytes:,} bytes {'to free' if dry_run else 'freed'}")


def _gc_overlay(place: Path | None, overlay_gb: float, *, dry_run: bool) -> None:
    from logitstore.overlay import default_overlay, gc_overlay

    overlay = default_overlay() if place is None else place.expanduser()
    if not 0 <= overlay_gb < float("inf"):
        raise click.UsageError(f"--overlay-gb is {overlay_gb:g}, expected a number of at least 0.")
    if place is not None and not overlay.is_dir():
        raise click.UsageError(f"there is no folder {overlay}; type the DIR that --overlay had, or none.")
    report = gc_overlay(overlay, round(overlay_gb * 1e9), dry_run=dry_run)
    verb = "to free" if dry_run else "freed"
    for url in sorted({each.url for each in (*report.gone, *report.stays)}):
        gone, stays = (sum(e.size_bytes for e in part if e.url == url) for part in (report.gone, report.stays))
        click.echo(f"{url}: {gone:,} bytes {verb}, {stays:,} stay")
    if report.left_bytes:
        click.echo(f"{report.left_bytes:,} bytes that killed commands have left")
    whole = report.left_bytes + sum(each.size_bytes for each in report.gone)
    click.echo(f"{overlay}: {whole:,} bytes {verb}, {sum(each.size_bytes for each in report.stays):,} stay")


@click.command(name="import")
@click.argument("source", type=LocalPath())
@click.option("--format", required=True, help="distillkit, axolotl, dwq or mlx-kld.")
@click.option("--out", required=True, type=LocalPath(), help="The store: begun or finished.")
@click.option("--teacher", required=True, help="The name of the teacher; the cache holds no more of it.")
@click.option("--tokenizer", required=True, help="That of the cache's token ids: a folder, a .gguf file or a hub id.")
@click.option("--vocab-size", type=click.IntRange(min=1), help="Width of the teacher's LM head, if not in the cache.")
@click.option("--assume-normalised", is_flag=True, help="Take kept probabilities for all, where a cache tells no more.")
@click.option("--compression-config", type=LocalPath(), help="distillkit: the settings of the capture.")
@click.option("--legacy-values", help="distillkit: what its first codec holds, log-probs or logits.")
@click.option("--alignment", help="axolotl: legacy (up to 0.18) or current.")
@click.option("--logprobs-field", help="axolotl: the column of log-probs.")
@click.option("--temperature", type=float, help="axolotl: that of the stored distribution.")
@click.option(
    "--renormalised/--not-renormalised", default=None, help="axolotl: whether entries were scaled to sum to 1."
)
@click.option("--split", help="dwq: which folder, train or valid.")
@click.option("--tokens", type=LocalPath(), help="Token ids as JSON Lines, where the cache has none.")
@click.option(
    "--no-check-alignment",
    "check_alignment",
    is_flag=True,
    default=True,
    flag_value=False,
    help="Import even what looks shifted.",
)
@QUIET
def import_(**options: Any) -> None:
    """Import another tool's cache as a top-k store; what that cannot know is marked in the store."""
    with one_line_errors(GO_ON):
        from logitstore.import_cache import ImportConfig, import_cache

        config = ImportConfig(
            **options | {"out": options["out"].expanduser(), "source": options["source"].expanduser()}
        )
        report = import_cache(config, lambda line: None if config.quiet else click.echo(line))
        click.echo(_holds(config.out, report))
        if report.repeated:
            click.echo(f"{report.repeated:,} documents repeat an earlier one's tokens; the first of each is kept")
        if report.unanswered:
            click.echo(f"{report.unanswered:,} positions have no targets in the cache")
        click.echo(f"unknown, and marked so: {', '.join(report.unknown)}")


@click.command()
@click.argument("store")
@OUT
@click.option("--temperature", type=float, help="Which set of entries.  [default: the store's first]")
@click.option("--replica", type=click.IntRange(min=0), default=0, show_default=True, help="Which of several draws.")
@QUIET
def export(store: str, out: Path, temperature: float | None, replica: int, quiet: bool) -> None:
    """Write a store as a Parquet file, a row for each document."""
    with one_line_errors("Nothing was written; type the same command again."):
        from logitstore.export import export as run
        from logitstore.store import open_store

        report = run(open_store(store), out.expanduser(), temperature=temperature, replica=replica, quiet=quiet)
        click.echo(_holds(out, report))


@click.command()
@click.argument("store")
@click.argument("url")
@JOBS
@QUIET
def push(store: str, url: str, jobs: int, quiet: bool) -> None:
    """Bring to URL what it lacks of a store: a folder, a service (http://HOST:8470/NAME), s3://, gs://, az:// or hf://.

    Every byte is held against the store's digests before it is sent. LOGITSTORE_TOKEN holds the token for a service.
    """
    _move(store, url, jobs, quiet=quiet)


@click.command()
@click.argument("url")
@click.argument("folder", metavar="DIR")
@JOBS
@QUIET
def pull(url: str, folder: str, jobs: int, quiet: bool) -> None:
    """Bring to DIR what it lacks of the store at URL: a service's, a web server's, s3://, gs://, az://, hf://, a path.

    What was cut goes on where it stopped when the same command is typed again.
    """
    _move(url, folder, jobs, quiet=quiet)


def _move(source: str, destination: str, jobs: int, *, quiet: bool) -> None:
    with one_line_errors(GO_ON):
        from logitstore.places import push as run

        click.echo(run(source, destination, jobs, quiet=quiet).to_text(destination))


def _holds(out: Path, report: Any) -> str:
    return f"{out}: {report.documents:,} documents, {report.positions:,} positions, {report.disk_bytes:,} bytes"


COMMANDS = (convert, merge, gc, import_, export, push, pull)
