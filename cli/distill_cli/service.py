"""Commands of `logitstore` for a team: `serve`, and the tokens that open it."""

import os
import sys
import time
from pathlib import Path
from threading import RLock
from typing import Any

import click

from distill_cli.outcome import LocalPath, one_line_errors, say_blas
from logitstore.errors import ConfigError

FILE = LocalPath()
TOKENS = click.option("--tokens", required=True, type=FILE, help="The file of tokens that `serve --tokens` takes.")


@click.command()
@click.argument("places", nargs=-1, required=True, type=FILE, metavar="DIR|STORE...")
@click.option("--teacher", help="Answers what a store lacks: an mlx-lm model folder, a .gguf file, or a hub id.")
@click.option("--adapter-path", help="A LoRA adapter of the teacher.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8470, show_default=True, help="0: any free one.")
@click.option("--tokens", type=FILE, help="Only who has a token of this file is served; see `logitstore token`.")
@click.option("--tls-cert", type=FILE, help="A certificate, PEM, for https.")
@click.option("--tls-key", type=FILE, help="Its key, PEM.")
@click.option("--read-only", is_flag=True, help="No uploads, and nothing is taught or mended.")
@click.option("--insecure", is_flag=True, help="Listen to other machines without tokens.")
@click.option("--queue-tokens", type=int, default=1 << 18, show_default=True, help="So many may wait for the teacher.")
@click.option("--quiet", is_flag=True, help="No line for each request.")
def serve(**options: Any) -> None:
    """Serve stores to a team: DIR is a folder of stores, each served as /NAME.

    Others train with `--store http://HOST:8470/NAME`; what a store lacks, --teacher computes once for all.
    """
    with one_line_errors("What was taught is kept; type the same command to go on."):
        try:
            from logitstore.service.serve import ServeConfig
            from logitstore.service.serve import serve as run
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is not installed; type `pip install 'logitstore[serve]'`") from error
        if options["teacher"]:
            from tqdm import tqdm

            say_blas()
            # Bars of one process: a lock for several is one that Python on macOS calls leaked after `os._exit`.
            tqdm.set_lock(RLock())
        places = tuple(place.expanduser() for place in options["places"])
        config = ServeConfig(**options | {"places": places})
        run(config, click.echo, lambda line: None if config.quiet else click.echo(line))
        if config.teacher is not None:
            # All is on disk, and MLX aborts one process in ten that ends after another thread than its first used it.
            sys.stdout.flush()
            os._exit(0)


@click.group()
def token() -> None:
    """Make, list and revoke the tokens that open a service."""


@token.command()
@TOKENS
@click.option("--name", required=True, help="Who holds it, for `token list`.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=("read",),
    show_default=True,
    help="read, write or teach; may be repeated.",
)
@click.option(
    "--store",
    "stores",
    multiple=True,
    help="Only this store, by the name it is served as; may be repeated.  [default: all]",
)
def new(tokens: Path, name: str, scopes: tuple[str, ...], stores: tuple[str, ...]) -> None:
    """Print a new token. It is shown this once: only its hash is kept."""
    with one_line_errors("No token was made."):
        from logitstore.service.tokens import new_token

        click.echo(new_token(tokens.expanduser(), name, scopes, stores))


@token.command(name="list")
@TOKENS
def list_(tokens: Path) -> None:
    """List tokens: what each is called, and what it allows."""
    with one_line_errors("Nothing was changed."):
        from logitstore.service.tokens import TokenFile

        for grant in TokenFile(tokens.expanduser()).grants().values():
            day = time.strftime("%Y-%m-%d", time.gmtime(grant.created))
            stores = ", ".join(grant.stores) or "all stores"
            click.echo(f"{grant.id}  {day}  {','.join(grant.scopes):<16}  {stores:<20}  {grant.name}")


@token.command()
@TOKENS
@click.argument("number", metavar="ID")
def revoke(tokens: Path, number: str) -> None:
    """Revoke a token, by the ID that `list` shows; a running service refuses it from then on."""
    with one_line_errors("Nothing was changed."):
        from logitstore.service.tokens import revoke_token

        grant = revoke_token(tokens.expanduser(), number)
        click.echo(f"revoked {grant.id} ({grant.name})")


COMMANDS = (serve, token)
