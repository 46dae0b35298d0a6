"""`distill-merge`: several LoRA adapters of one base as one."""

from pathlib import Path

import click

from distill_cli.outcome import one_line_errors


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="logitstore")
@click.argument("adapters", nargs=-1, metavar="ADAPTER[=WEIGHT]...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder for the merged adapter.")
def main(adapters: tuple[str, ...], out: Path) -> None:
    """Write the weighted sum of what several LoRA adapters of one base add to it, as one adapter.

    The sum is exact, of the updates and not of their factors, so the rank is the sum of theirs. Without weights all
    count the same and sum to 1; those that are typed are used as they are: A=0.7 B=0.3.
    """
    with one_line_errors("Nothing was written."):
        from distill_trainer.merge_adapters import merge_adapters

        merged = merge_adapters(adapters, out.expanduser())
        click.echo(
            f"{out}: {len(merged.weights)} adapters, weights {', '.join(f'{w:.4g}' for w in merged.weights)}; "
            f"{merged.layers} layers of rank {merged.rank}"
        )
        base = "BASE" if merged.base is None else f'"{merged.base}"'
        click.echo(f'load it with mlx_lm.load({base}, adapter_path="{out}")')
