"""Do to stores what machines and people do to them: kills, damage, crowds. Ends by itself, with a table.

    python -m tools.torture_store --kills 100 --flips 2000 --seconds 120

`tools/torture_kills.py`, `tools/torture_flips.py` and `tools/torture_crowd.py` say what must hold. Exit code 1 where it
does not. Ends only processes that it has started, and leaves no file.
"""

import argparse
import time

from tools.torture_crowd import READERS, crowd
from tools.torture_flips import flips
from tools.torture_kills import kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=120, help="for each kind of store")
    parser.add_argument("--seed", type=int, default=0)
    config = parser.parse_args()
    lines, bad, begun = list[str](), list[str](), time.monotonic()
    if config.kills > 0:
        lines += kill_table(config.kills, config.seed, bad)
    if config.flips > 0:
        lines += flip_table(config.flips, config.seed, bad)
    if config.seconds > 0:
        lines += crowd_table(config.seconds)
    print("\n".join([*bad, *lines, "", f"{len(bad)} bad endings in {time.monotonic() - begun:.0f} s"]))
    raise SystemExit(bool(bad))


def kill_table(count: int, seed: int, bad: list[str]) -> list[str]:
    lines = ["", f"{'killed':<22}{'kills':>7}{'bad':>5}{'seconds of a whole run':>25}"]
    done = kills(count, seed, lambda line: print(line, flush=True))
    for scene in done:
        lines.append(f"{scene.name:<22}{scene.kills:>7}{len(scene.bad):>5}{scene.duration:>25.2f}")
        bad += [f"{scene.name}: {problem}" for problem in scene.bad]
    return lines


def flip_table(count: int, seed: int, bad: list[str]) -> list[str]:
    tallies, problems = flips(count, seed)
    bad += problems
    lines = ["", f"{'flipped or cut':<28}{'times':>6}{'noticed':>9}{'right':>7}{'bad':>5}{'most MB':>9}"]
    rows = [(k, t.flips, t.noticed, t.right, t.bad, t.most_mb) for k, t in sorted(tallies.items())]
    rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3, 4)), max(row[5] for row in rows)))
    return [*lines, *(f"{k:<28}{n:>6}{a:>9}{b:>7}{c:>5}{mb:>9}" for k, n, a, b, c, mb in rows)]


def crowd_table(seconds: float) -> list[str]:
    names = f"{'seconds':>9}{'written':>9}{'reads/s':>9}{'openings':>10}{'positions/s':>13}"
    lines = ["", f"{f'1 writer, {READERS} readers':<22}{names}"]
    for suffix in (".lmdb", ".zarr"):
        did = crowd(suffix, seconds)
        rates = f"{did.reads / did.seconds:>9,.0f}{did.openings:>10,}{did.positions / did.seconds:>13,.0f}"
        lines.append(f"{suffix:<22}{did.seconds:>9.0f}{did.written:>9,}{rates}")
    return lines


if __name__ == "__main__":
    main()
