"""Commands that are killed at random moments and typed again, in a process of their own without MLX."""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.children import scratch

ROOT = Path(__file__).parent.parent

DRIVER = """
import os, random, shutil, sys, time
from pathlib import Path
import lmdb, zarr
from logitstore import plan
from tests.children import finish, forked, killed
from tests.stores import contents

plan.SHARD_POSITIONS = 100
folder = Path(sys.argv[1])
random.seed(7)

def run_killed(prepare, act, done, times=20):
    '''As often as that: prepare, act, be killed (now and then again), act to the end, and be as if nothing had been.'''
    whole = folder / "whole"
    prepare(whole)
    begin = time.perf_counter()
    finish(forked(lambda: act(whole)))
    duration = time.perf_counter() - begin
    expected, kills = done(whole), 0
    while kills < times:
        trial = folder / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        prepare(trial)
        for _ in range(random.choice((1, 1, 2))):
            child = forked(lambda: act(trial))
            time.sleep(random.random() * duration)
            kills += killed(child)
        finish(forked(lambda: act(trial)))
        assert done(trial) == expected, (kills, sorted(set(done(trial)) ^ set(expected)))
    print(kills)
"""


def drive(code: str) -> None:
    """Run it; it ends with `run_killed`."""
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        command = [sys.executable, "-W", "error", "-c", DRIVER + code, folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= 20
