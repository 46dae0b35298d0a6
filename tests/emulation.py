"""The Metal tier on a machine without Metal: a fixture that makes losses kernels, and runs kernels on the emulator."""

from collections.abc import Iterator

from distill_kernels import metal

import pytest

from tests.address_spaces import address_space_faults
from tools.metal_emulator import SCHEDULES, Emulated, compiler, emulated

needs_compiler = pytest.mark.skipif(compiler() is None, reason="executing Metal here needs g++ on Linux")


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    """Every kernel runs under every schedule; a defect raises, and so do address spaces that Metal keeps apart."""
    monkeypatch.setenv(metal.VARIABLE, "metal")
    metal.kernel_of.cache_clear()
    with emulated(schedules=SCHEDULES) as session:
        yield session
    assert not [fault for run in session.runs for fault in address_space_faults(run.launch.source)]
    metal.kernel_of.cache_clear()
