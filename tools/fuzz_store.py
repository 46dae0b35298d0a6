"""Look for stores that do harm to who reads them: coverage-guided, through Atheris (`pip install atheris`).

    python -m tools.fuzz_store --minutes 10

A run edits a small store as `tests/hostile.py` says, mends every checksum over it, and reads all of it; whatever comes
out that is no `LogitstoreError`, takes 10 s or 2 GB more than at the start, ends the fuzzing and is kept beside the
corpus as `crash-...`. With `--minimise` the corpus is made small again instead: what covers nothing new is left out.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "tests" / "corpus"
MOST_S, MOST_BYTES = 10, 2 << 30
MOST_INPUT_BYTES = 64
SEEDS = 300
RUNS = 2500
"""Of one process: Atheris takes 0.3 MB for each and keeps them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minimise", action="store_true")
    config = parser.parse_args()
    config.corpus.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_len={MOST_INPUT_BYTES}",
        "-len_control=0",
        f"-timeout={2 * MOST_S}",
        "-rss_limit_mb=0",
        f"-seed={config.seed + 1}",
    ]
    if config.minimise:
        minimise(config.corpus)
    else:
        sow(config.corpus, config.seed)
        until = time.monotonic() + 60 * config.minutes
        while (left := until - time.monotonic()) > 1:
            limits = [f"-max_total_time={round(left)}", f"-runs={RUNS}"]
            run([*options, *limits, f"-artifact_prefix={config.corpus}/", str(config.corpus)])


def sow(corpus: Path, seed: int) -> None:
    """Inputs to begin with."""
    rng = random.Random(seed)
    for number in range(SEEDS - len(list(corpus.iterdir()))):
        program = [rng.randrange(256) for _ in range(rng.randrange(4, 20))]
        program[3:3] = [rng.randrange(4)]
        (corpus / f"seed-{seed}-{number}").write_bytes(bytes(program))


def run(options: list[str]) -> None:
    """Atheris ends its process, so it has one of its own."""
    result = subprocess.run([sys.executable, "-m", "tools.fuzz_store", "--here", *options], cwd=ROOT, check=False)
    if result.returncode:
        raise SystemExit(f"something was found: see above; exit code {result.returncode}")


def minimise(corpus: Path) -> None:
    """Keep the inputs that lead to steps from line to line that no smaller one leads to, and what did harm."""
    from tests import hostile

    folder, package = Path(tempfile.mkdtemp()), str(ROOT / "logitstore")
    seen, total = set[tuple[str, int, int]](), 0
    steps, last = set[tuple[str, int, int]](), dict[int, int]()

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            steps.add((frame.f_code.co_filename, last.get(id(frame), 0), frame.f_lineno))
            last[id(frame)] = frame.f_lineno
        return trace

    for path in sorted(corpus.iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        steps.clear(), last.clear()
        sys.settrace(trace)
        try:
            hostile.try_to_harm(path.read_bytes(), folder)
        finally:
            sys.settrace(None)
        if path.name.startswith("crash-") or not steps <= seen:
            seen |= steps
            total += path.stat().st_size
            path.rename(corpus / path.name.removeprefix("crash-")[:16])
        else:
            path.unlink()
    print(f"{len(list(corpus.iterdir())):,} inputs, {total:,} bytes")


def fuzz(options: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["logitstore"]):
        from tests import hostile
    for select in hostile.RECIPES:
        hostile.golden(select), hostile.golden_lmdb(select)

    # Where the memory has a file system, there.
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)

    def alarm(*_: object) -> None:
        raise TimeoutError(f"more than {MOST_S} s")

    signal.signal(signal.SIGALRM, alarm)

    def one(data: bytes) -> None:
        signal.alarm(MOST_S)
        try:
            hostile.try_to_harm(data, Path(folder))
        finally:
            signal.alarm(0)

    one(b"")
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, -1))
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        fuzz(sys.argv[2:])
    else:
        main()
