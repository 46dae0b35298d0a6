"""A step that learns from a store beside one of plain cross-entropy, on the same batches: time, waiting, memory.

    OPENBLAS_NUM_THREADS=1 .venv/bin/python -m tools.bench_step OUT_DIR [--pairs N] [--alpha A]
    OPENBLAS_NUM_THREADS=1 .venv/bin/python -m tools.bench_step OUT_DIR --student S --dataset D --store STORE

Three runs take turns, a step each, in an order that changes: `distill-train --store STORE`, `distill-train --alpha 0`,
and mlx-lm's own loss under a loop as plain as can be, for reference. The first two are whole runs of the trainer, each
in a thread of its own: nothing of them is made for the benchmark. Their memory is that of processes of their own. All
train in full, in float32. Without --student it is a random llama of 6 layers with 8,192 tokens, and a store of another
one's answers; the documents are windows of CPython's documentation.

One BLAS thread, because two wait for each other where others use the machine: the same step then took from 0.8 to 8 s.
Ends with 1 where a target is missed. Some minutes.
"""

import argparse
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import distill_kernels  # noqa: F401  loads the BLAS before MLX

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.trainer import default_loss

from distill_trainer import train as trainer
from distill_trainer.batches import epochs
from distill_trainer.config import TrainConfig
from distill_trainer.optimizer import make_optimizer
from distill_trainer.student import load_student, make_trainable, trainable
from distill_trainer.two_prompts import read_both
from logitstore.build import BuildConfig, build
from logitstore.figure import Table
from logitstore.sequences import TokenizeReport
from tests.tiny import save_tiny_model
from tools.bench_parts import Measured, Target, Titled, child
from tools.bench_store import target_table
from tools.bench_text import texts

CACHED, PLAIN, MLX_LM = "from a store", "cross-entropy", "mlx-lm's loss"
WARM_UP = 3
"""Steps before the first that counts."""
MEMORY_STEPS = 4
WORLD: dict[str, int] = {"hidden": 192, "layers": 6, "vocab_size": 8192}
CHARACTERS, DOCUMENTS = 300, 160

T = TypeVar("T")


class Turns:
    """Lets threads take a step each, as they are called."""

    def __init__(self) -> None:
        self._go = defaultdict[str, threading.Semaphore](lambda: threading.Semaphore(0))
        self._done = threading.Semaphore(0)
        self.cpu_s = defaultdict[str, list[float]](list)
        """Of each step: of all threads, so also of what is read ahead meanwhile."""
        self._failure: BaseException | None = None

    def begin(self, name: str, run: Callable[[], object]) -> threading.Thread:
        """Begin a run up to its first step."""

        def taking_turns() -> None:
            self._go[name].acquire()
            try:
                run()
            except BaseException as error:  # it is the main thread's to tell, which waits for this one
                self._failure = error
            self._done.release()

        thread = threading.Thread(target=taking_turns, name=name, daemon=True)
        thread.start()
        return thread

    def give(self, name: str) -> None:
        """Let a run go on to the end of a step; what ended it early is raised here."""
        started = time.process_time()
        self._go[name].release()
        self._done.acquire()
        if self._failure is not None:
            raise self._failure
        self.cpu_s[name].append(time.process_time() - started)

    def done(self) -> None:
        """Called in a run's thread at the end of a step."""
        self._done.release()
        self._go[threading.current_thread().name].acquire()


class Watched:
    """What the runs of this process do, seen from within the trainer's own loop."""

    def __init__(self, turns: Turns | None = None) -> None:
        self.steps = defaultdict[str, list[dict[str, Any]]](list)
        self.waited_s = defaultdict[str, list[float]](list)
        self.collated_s = defaultdict[str, list[float]](list)
        self._prefetched, self._collate, self._append = trainer.prefetched, trainer.collate, trainer.append_metrics
        self._turns = turns

    def __enter__(self) -> "Watched":
        trainer.prefetched, trainer.collate, trainer.append_metrics = self._wait, self._make, self._step
        return self

    def __exit__(self, *_: object) -> None:
        trainer.prefetched, trainer.collate, trainer.append_metrics = self._prefetched, self._collate, self._append

    def _wait(self, items: Iterator[T], ahead: int) -> Generator[T]:
        made, waited = self._prefetched(items, ahead), self.waited_s[threading.current_thread().name]
        try:
            while True:
                started = time.perf_counter()
                item = next(made)
                waited.append(time.perf_counter() - started)
                yield item
        finally:
            made.close()

    def _make(self, *args: Any) -> Any:
        started = time.perf_counter()
        batch = self._collate(*args)
        self.collated_s[threading.current_thread().name].append(time.perf_counter() - started)
        return batch

    def _step(self, out: Path, metrics: Any) -> None:
        self.steps[threading.current_thread().name].append(dict(metrics))
        self._append(out, metrics)
        if self._turns is not None:
            self._turns.done()


def mlx_lm_run(config: TrainConfig, turns: Turns, seconds: list[float]) -> None:
    """The batches of a run under mlx-lm's loss: whole logits, their cross-entropy, no more."""
    student = load_student(config)
    make_trainable(student, config)
    model, optimizer = student.model, make_optimizer("adam", {}, config.learning_rate, None)
    sequences = read_both(config, config.dataset, config.split, [], student.tokenizer, TokenizeReport())
    step = nn.value_and_grad(model, default_loss)
    for _, numbers in epochs([len(s.trained) for s in sequences], config.batch_size, config.seed):
        if len(seconds) == config.iters:
            return
        started = time.perf_counter()
        chosen = [sequences[number].token_ids for number in numbers]
        tokens, lengths = np.zeros((len(chosen), max(map(len, chosen))), np.int32), []
        for row, ids in zip(tokens, chosen, strict=True):
            row[: len(ids)] = ids
            lengths.append([1, len(ids) - 1])
        (loss, count), gradients = step(model, mx.array(tokens), mx.array(lengths))
        optimizer.update(model, gradients)
        mx.eval(trainable(model), optimizer.state, loss, count)
        seconds.append(time.perf_counter() - started)
        turns.done()


def timed(configs: dict[str, TrainConfig], rounds: int) -> Measured:
    """Seconds of each run's steps, and how many of them it waited for batches or made arrays of them."""
    turns, reference = Turns(), list[float]()
    names = [CACHED, PLAIN, MLX_LM]
    with Watched(turns) as watched:
        runs: dict[str, Callable[[], object]] = {name: lambda c=c: trainer.train(c) for name, c in configs.items()}
        runs[MLX_LM] = lambda: mlx_lm_run(configs[PLAIN], turns, reference)
        threads = [turns.begin(name, runs[name]) for name in names]
        for number in range(rounds):
            for name in (names, names[::-1])[number % 2]:
                turns.give(name)
        for name in names:  # out of the last step, to the end of the run
            turns.give(name)
        for thread in threads:
            thread.join()
    seconds = {name: [m["trained_tokens"] / m["tokens_per_second"] for m in watched.steps[name]] for name in configs}
    assert [m["trained_tokens"] for m in watched.steps[CACHED]] == [m["trained_tokens"] for m in watched.steps[PLAIN]]
    assert all(m["misses"] == 0 for m in watched.steps[CACHED])
    return {
        "seconds": seconds | {MLX_LM: reference},
        "cpu_s": {name: turns.cpu_s[name][:rounds] for name in names},
        "waited": {name: watched.waited_s[name][:rounds] for name in configs},
        "collated": {name: watched.collated_s[name] for name in configs},
        "tokens": [m["trained_tokens"] for m in watched.steps[PLAIN]],
    }


def config_of(arguments: argparse.Namespace, name: str, steps: int, run: str) -> TrainConfig:
    """A run of the trainer."""
    learns = {"store": (arguments.store,), "alpha": arguments.alpha} if name == CACHED else {"alpha": 0.0}
    return TrainConfig(
        student=arguments.student,
        dataset=arguments.dataset,
        out=str(Path(arguments.out) / f"{run}-{name.replace(' ', '-')}-{time.time_ns()}"),
        keep_layers=arguments.keep_layers,
        batch_size=arguments.batch_size,
        max_seq_length=arguments.max_seq_length,
        iters=steps,
        fine_tune_type="full",
        quiet=True,
        **learns,
    )


def own_world(arguments: argparse.Namespace) -> None:
    """Make the student, the dataset and the store that no argument names."""
    folder = Path(arguments.out) / "step-world"
    arguments.student, arguments.dataset = str(folder / "student"), str(folder / "train.jsonl")
    arguments.store = str(folder / "store.zarr")
    if not Path(arguments.dataset).exists():
        for seed, name in enumerate(("student", "teacher")):
            save_tiny_model(folder / name, seed=seed, **WORLD)
        text = "".join(texts())[: CHARACTERS * DOCUMENTS]
        windows = [text[at : at + CHARACTERS] for at in range(0, len(text), CHARACTERS)]
        Path(arguments.dataset).write_text("".join(json.dumps({"text": window}) + "\n" for window in windows))
    teacher, length = str(folder / "teacher"), arguments.max_seq_length
    build(BuildConfig(teacher, arguments.dataset, Path(arguments.store), max_seq_length=length, quiet=True))


def found(measured: Measured, memory: dict[str, Measured]) -> tuple[Titled, list[Target]]:
    """A table of medians, and what had to be reached."""
    seconds = {name: np.array(each[WARM_UP:]) for name, each in measured["seconds"].items()}
    steps = {name: float(np.median(each)) for name, each in seconds.items()}
    cpu = {name: np.array(each[WARM_UP:]) for name, each in measured["cpu_s"].items()}
    data = {name: np.array(measured["waited"][name][WARM_UP:]) for name in (CACHED, PLAIN)}
    arrays = {name: np.array(measured["collated"][name][WARM_UP:]) for name in (CACHED, PLAIN)}
    ratios = {name: float(np.median(seconds[name] / seconds[PLAIN])) for name in seconds}
    rows = [
        (
            name,
            f"{1e3 * steps[name]:,.1f}",
            f"{ratios[name]:.3f}",
            f"{np.median(cpu[name] / cpu[PLAIN]):.3f}",
            f"{100 * data[name].sum() / seconds[name].sum():.2f}" if name in data else "",
            f"{100 * arrays[name].sum() / seconds[name].sum():.2f}" if name in data else "",
            f"{memory[name]['peak_gb']:.3f}" if name in memory else "",
            f"{memory[name]['resident_gb']:.3f}" if name in memory else "",
        )
        for name in seconds
    ]
    header = ("", "ms a step", "of cross-entropy", "CPU time", "% waiting", "% arrays", "peak GB", "resident GB")
    remark = (
        f"Medians over {len(seconds[PLAIN])} steps of {np.mean(measured['tokens']):,.0f} trained positions on average; "
        "ratios are medians of pairs, of time on the clock and of processor time. Arrays: batches made of what was "
        "read, in the step. Peak: what MLX held, of a process of its own; resident: all of that process."
    )
    cached = memory[CACHED]["peak_gb"] / memory[PLAIN]["peak_gb"]
    targets = [
        Target.at_most("step time, cached of cross-entropy's", 1.05, ratios[CACHED], ".3f"),
        Target.at_most("% of a cached step that waits for data", 1.0, _percent(data[CACHED], seconds[CACHED]), ".2f"),
        Target.at_most("peak memory, cached of cross-entropy's", 1.1, cached, ".3f"),
    ]
    return Titled("A step", remark, Table(header, rows)), targets


def _percent(part: Any, whole: Any) -> float:
    return float(100 * part.sum() / whole.sum())


def resident_gb() -> float:
    """The most memory that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--student")
    parser.add_argument("--dataset")
    parser.add_argument("--store")
    parser.add_argument("--keep-layers", type=int)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-seq-length", type=int, default=128)
    parser.add_argument("--alone", choices=[CACHED, PLAIN], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    given = [arguments.student, arguments.dataset, arguments.store]
    if any(given) and not all(given):
        parser.error("--student, --dataset and --store go together")
    if not all(given):
        own_world(arguments)
    if arguments.alone:
        trainer.train(config_of(arguments, arguments.alone, MEMORY_STEPS, "alone"))
        print(json.dumps({"peak_gb": mx.get_peak_memory() / 1e9, "resident_gb": resident_gb()}))
        return
    rounds = WARM_UP + arguments.pairs
    measured = timed({name: config_of(arguments, name, rounds, "timed") for name in (CACHED, PLAIN)}, rounds)
    again = ["-m", "tools.bench_step", *sys.argv[1:]]
    memory = {name: child([*again, "--alone", name]) for name in (CACHED, PLAIN)}
    table, targets = found(measured, memory)
    print(f"{table.text()}\n{target_table(targets).text()}")
    (arguments.out / "bench_step.json").write_text(json.dumps({"memory": memory, **measured}, indent=1) + "\n")
    sys.exit(not all(target.met for target in targets))


if __name__ == "__main__":
    main()
