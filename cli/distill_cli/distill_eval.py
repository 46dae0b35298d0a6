"""`distill-eval`: hold a student against its teacher."""

from pathlib import Path
from typing import Any

import click

from distill_cli.outcome import one_line_errors, say_blas


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="logitstore")
@click.option("--student", help="An mlx-lm model folder, a .gguf file, or a hub id.")
@click.option("--adapter-path", help="A LoRA adapter of the student.")
@click.option("--dataset", help="A .jsonl or .parquet file, an mlx-lm data folder, or a hub dataset.")
@click.option("--split", help="Which split of a data folder or hub dataset.  [default: test]")
@click.option("--teacher", help="The live teacher: everything is measured, exactly.")
@click.option("--teacher-adapter-path", help="A LoRA adapter of the teacher.")
@click.option("--store", help="Or a store: what it serves is measured, and named as what it is.")
@click.option("--max-seq-length", default=2048, show_default=True, help="Documents are cut to this many tokens.")
@click.option("--samples", default=0, show_default=True, help="Answer so many prompts, side by side.")
@click.option("--run", type=click.Path(path_type=Path), help="The --out of a run, whose curves --html shows too.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with plots.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all numbers.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def main(run: Path | None, html: Path | None, json_file: Path | None, **options: Any) -> None:
    """Measure how near a student is to its teacher on documents that it was not trained on.

    With --run the student is that run's, unless one is typed, and reads the documents as it did there: with its prompt
    template, and its prompts too where these were trained. With --run and --html alone, the page of that run is made
    again.
    """
    with one_line_errors("Nothing was written."):
        from distill_trainer.pages import evaluation_page, run_page, save_page

        asked = any(value for name, value in options.items() if name not in ("max_seq_length", "quiet")) or json_file
        if run is not None and html is None:
            raise click.UsageError("--run is shown on a page: type --html PAGE with it.")
        if run is not None and html is not None and not asked:
            save_page(run_page(run.expanduser()), html)
            click.echo(f"the run in {run} is shown in {html}")
            return
        from distill_trainer.distill_eval import EvalConfig, distill_eval, save_json, student_of_run

        if run is not None and not options["student"] and not options["adapter_path"]:
            options["student"], options["adapter_path"] = student_of_run(run.expanduser())
        for name in ("student", "dataset"):
            if not options[name]:
                raise click.UsageError(f"Missing option '--{name}'.")
        say_blas()
        config = EvalConfig(**options, run=None if run is None else run.expanduser())
        held = distill_eval(config, lambda line: None if config.quiet else click.echo(line))
        click.echo(held.to_text())
        if json_file is not None:
            save_json(held, json_file.expanduser())
        if html is not None:
            save_page(evaluation_page(held) if run is None else run_page(run.expanduser(), held), html)
