"""Train a student: documents and targets in, an mlx-lm model or adapter out. Reads from top to bottom.

Everything that must fit is put together and checked here before the first step; `distill_trainer.steps` has the loop.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import distill_kernels

import mlx.core as mx

from distill_trainer.checkpoint import Checkpoints, cut_metrics
from distill_trainer.choosing import choose
from distill_trainer.config import TrainConfig
from distill_trainer.cross_vocab import crossing_of
from distill_trainer.held_out import read_held_out
from distill_trainer.interrupts import uninterrupted
from distill_trainer.method import Method, learner, save_own
from distill_trainer.methods import methods_of
from distill_trainer.objective import Objective
from distill_trainer.on_policy import on_policy
from distill_trainer.opening_lines import between_bars, said_of_templates, say_coverage, say_padding
from distill_trainer.optimizer import make_optimizer
from distill_trainer.output import CONFIG, SUMMARY, output_folder, require_new, require_room, require_run, writing
from distill_trainer.packing import require_apart
from distill_trainer.pages import save_run_page
from distill_trainer.parallel import processes
from distill_trainer.report import TrainReport
from distill_trainer.steps import Parts, run_steps
from distill_trainer.student import load_student, make_trainable, save_student, trainable
from distill_trainer.target_source import open_stores, target_source
from distill_trainer.trackers import tracked
from distill_trainer.two_prompts import read_both
from distill_trainer.weights import weighted
from logitstore.errors import MissingTargetsError, ProcessLostError, StoreError, TeacherLostError, UnusableLogitsError
from logitstore.model import LoadedModel
from logitstore.sequences import TokenizeReport, require_ids_below, require_places

ENDS = (MissingTargetsError, StoreError, TeacherLostError, UnusableLogitsError, ProcessLostError)
"""What ends a run early with what it has learned."""


def train(config: TrainConfig, say: Callable[[str], object] = lambda _: None) -> TrainReport:
    """Train a student and save it to `config.out`.

    After the first step, Ctrl-C, a store that fails, a teacher that is lost or says no numbers, or a miss ends the run
    early, and what was learned and a checkpoint are saved; before it, nothing is left behind. With `config.resume` a
    run goes on from its last checkpoint as if it had never stopped. Among several processes, the first alone speaks and
    writes.

    Args:
        say: takes one line of text at a time for the user.

    Raises:
        LogitstoreError: see `logitstore.errors`.
    """
    among = processes()
    among.require_shares(config)
    if config.resume or among.first:
        (require_run if config.resume else require_new)(Path(config.out))
    if not among.first:
        config, say = replace(config, quiet=True, report_to=()), lambda _: None
    say = between_bars(say)
    teachers = open_stores(config, say)
    student = load_student(config)
    report = TokenizeReport()
    sequences = read_both(config, config.dataset, config.split, config.columns, student.tokenizer, report)
    say(report.describe())
    sequences = weighted(sequences, config, student.tokenizer, say)
    config.combination.say(teachers, sequences, say)
    vocab_size = student.model(mx.array([[0]])).shape[-1]
    crossing = crossing_of(config, teachers, student, vocab_size, sequences, say)
    sequences, draw = choose(config, teachers, sequences, say)
    held_out = read_held_out(config, student.tokenizer, sequences, say)
    require_ids_below(vocab_size, [*sequences, *held_out], f"student {student.name}")
    longest = max(len(sequence.trained) for sequence in [*sequences, *held_out])
    require_places(student.places, longest, f"student {student.name}")
    if crossing is not None:
        teachers = crossing.teachers
        sequences, held_out = crossing.over(sequences, say), crossing.over_held_out(held_out, say)

    folder = output_folder(Path(config.out), new=not config.resume) if among.first else nullcontext(Path(config.out))
    with folder as out, ExitStack() as asked:
        crosses = crossing is not None
        source = None
        if config.distils:
            source = asked.enter_context(target_source(config, teachers, student.tokenizer, say, crosses=crosses))
            other_template = ""
            if not crosses:
                require_ids_below(source.recipe.vocab_size, [*sequences, *held_out], "the teacher")
                other_template = said_of_templates(teachers.stores, student.tokenizer)
            say_coverage(source, sequences, held_out, config, say, other_template)
        methods = methods_of(config, student, source, say)
        make_trainable(student, config, write_base=among.first)
        own = on_policy(config, student, sequences, source, say)
        if config.pack:
            require_apart(student.model, student.name)
            say_padding(config, sequences, draw, among, say)
        parameters = trainable(learner(student.model, methods)).values()
        result_bytes = sum(parameter.nbytes for parameter in parameters)
        # three checkpoints for a moment, each with an optimizer's two moments; two are there when a run goes on
        checkpoints_bytes = (3 if config.resume else 9) * result_bytes if config.save_every else 0
        if among.first:
            require_room(out, result_bytes + checkpoints_bytes)
        optimizer = make_optimizer(config.optimizer, config.optimizer_config, config.learning_rate, config.lr_schedule)
        run, failure = TrainReport(), None
        run.across = None if crossing is None else {"method": crossing.method, "teaches": crossing.teaches}
        objective = Objective(config, None if source is None else source.recipe, crossing=crossing)
        stores = teachers.stores
        checkpoints = Checkpoints(config, student, optimizer, objective, stores, sequences, held_out, methods)
        if config.resume:
            checkpoints.restore(run)
            say(f"going on after step {run.steps:,}")
        if among.first:
            with writing(out):
                (out / CONFIG).write_text(json.dumps(replace(config, resume=False).to_json(), indent=1) + "\n")
                (out / SUMMARY).unlink(missing_ok=True)  # it tells of an end, and this run goes on
            cut_metrics(out, run.steps)
        if among.size > 1:
            say(f"{among.size} processes share each batch of {config.batch_size:,} documents")
        say(f"training {sum(parameter.size for parameter in parameters):,} parameters for {config.iters:,} steps")
        head = distill_kernels.split_head(student.model)
        if head.reason:
            say(f"every step holds whole logits, because the LM head cannot be taken apart: {head.reason}")
        try:
            parts = Parts(
                config, head, optimizer, objective, sequences, draw, tuple(held_out), source, own, methods, among
            )
            tracking = tracked(config.report_to, config.project_name, out, config.to_json(), run.steps, say)
            with among.together(), tracking as track:
                run_steps(parts, checkpoints, run, track)
        except (KeyboardInterrupt, *ENDS) as error:
            if not run.steps:
                raise
            run.interrupted, failure = True, error
        with uninterrupted(last=True):
            if among.first:
                save_run(config, student, methods, checkpoints, run)
        try:
            asked.close()
        except StoreError as error:  # the teacher's last answers cannot be kept; what was learned of them is saved
            failure = error
        if among.first:
            shown, samples = held_out or sequences, 0 if run.interrupted else config.report_samples
            save_run_page(config, student, shown, say, samples)
        if not isinstance(failure, ProcessLostError):  # a ring that has lost one never answers again
            among.wait()
    if isinstance(failure, ProcessLostError) and not among.first:
        raise failure
    if isinstance(failure, ENDS):
        resumes = isinstance(failure, TeacherLostError | UnusableLogitsError | MissingTargetsError)
        go_on = "; --resume goes on from there" if resumes else ""
        raise type(failure)(f"{failure}; what was learned in {run.steps:,} steps is saved in {out}{go_on}") from failure
    return run


def save_run(
    config: TrainConfig,
    student: LoadedModel,
    methods: Sequence[Method],
    checkpoints: Checkpoints,
    run: TrainReport,
) -> None:
    """Write the student, what methods trained of their own, the summary, and the last or an interrupted checkpoint.

    Raises:
        ConfigError: full disk, no permission.
        ModelError: weights that are no numbers; nothing is written.
    """
    out = Path(config.out)
    checkpoints.require_numbers(run)
    run.load_with = save_student(student, config)
    summary = asdict(run) | {"tokens_per_second": run.tokens_per_second}
    with writing(out):
        save_own(methods, out)
        (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    if run.steps and (run.interrupted or config.save_every):
        checkpoints.save(run)
