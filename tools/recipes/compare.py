"""What a recipe prints last: figures of `distill-eval --json` side by side, and by one of them whether the last student
is better than each of the others."""

import json
import sys
from pathlib import Path

COLUMNS = {"kl": "KL", "agreement": "agreement", "acceptance": "acceptance", "perplexity": "perplexity"}
LESS_IS_BETTER = {"kl", "perplexity"}


def main(figure: str, folder: Path, *names: str) -> None:
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    values = {
        name: {column: one["figures"][column]["value"] for column in COLUMNS if column in one["figures"]}
        for name, one in read.items()
    }
    print(f"held out: {read[names[-1]]['positions']:,} positions, against {read[names[-1]]['against']}\n")
    print(f"{'':<16}" + "".join(f"{title:>12}" for title in COLUMNS.values()))
    for name, found in values.items():
        print(f"{name:<16}" + "".join(f"{shown(column, found.get(column)):>12}" for column in COLUMNS))
    print()
    *others, last = names
    mine = values[last][figure]
    for other in others:
        theirs = values[other][figure]
        worse = mine > theirs if figure in LESS_IS_BETTER else mine < theirs
        word = "as good as" if mine == theirs else "WORSE than" if worse else "better than"
        print(f"{last} is {word} {other} in {COLUMNS[figure]}: {shown(figure, mine)} against {shown(figure, theirs)}")


def shown(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if column in ("agreement", "acceptance") else f"{value:,.3f}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
