"""How often does each rule fire on healthy programs?

    python benchmarks/detection/calibrate.py --seeds 3

Runs the checkup on every healthy program of the benchmark, the repaired twins of its
faults among them, and writes a column into ``docs/rules.md``: the share of runs in
which a rule was an alarm, an error or a warning, or else a note.
"""

import argparse
import re
from pathlib import Path

from run import FAULTS, findings_of, wilson
from tasks import HEALTHY

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
TITLE = "on healthy programs"
RULE = re.compile(r"`([a-z-]+/[a-z-]+)`")


def programs():
    """The healthy programs, each once."""
    found = list(HEALTHY.values())
    for fault in FAULTS:
        if fault.healthy not in found:
            found.append(fault.healthy)
    return found


def looked_at(seeds):
    """Returns for each run the rules that were alarms, and those that were notes."""
    runs = []
    for program in programs():
        for seed in range(seeds):
            findings, seconds = findings_of(program, seed)
            loud = {one.rule for one in findings if one.severity != "info"}
            runs.append((loud, {one.rule for one in findings} - loud))
            words = ", ".join(sorted(loud)) or "silent"
            print(f"{len(runs):4} {words} ({seconds:.0f} s)", flush=True)
    return runs


def with_column(page, runs):
    """Writes the last column of the first table, or fills it anew."""
    lines, is_in = page.splitlines(), False
    for number, line in enumerate(lines):
        if line.startswith("| rule | ground"):
            is_in, has_column = True, TITLE in line
            cell = TITLE
        elif not line.startswith("|"):
            is_in = False
        elif line.startswith("|---"):
            cell = "---"
        else:
            cell = _cell({*RULE.findall(line.split("|")[1])}, runs)
        if is_in:
            parts = line.rstrip().rstrip("|").split("|")
            kept = parts[: -1 if has_column else None]
            padded = cell if cell == "---" else f" {cell} ".replace("  ", " ")
            lines[number] = "|".join([*kept, padded, ""])
    return "\n".join(lines) + "\n"


def _cell(rules, runs):
    """In which share of the runs one of the rules was an alarm, or else a note."""
    alarms = [bool(rules & loud) for loud, _ in runs]
    notes = [bool(rules & quiet) and not rules & loud for loud, quiet in runs]
    return ", ".join(
        f"{word} {100 * sum(one) / len(runs):.0f}%"
        for word, one in (("alarm", alarms), ("note", notes))
        if any(one)
    )


def main():
    """Counts, and writes the column."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    seeds = parser.parse_args().seeds
    runs = looked_at(seeds)
    PAGE.write_text(with_column(PAGE.read_text(), runs))
    num_alarmed = sum(bool(loud) for loud, _ in runs)
    low, high = wilson(num_alarmed / len(runs), len(runs))
    print(f"{num_alarmed} of {len(runs)} runs with an alarm, {low:.1%} to {high:.1%}")


if __name__ == "__main__":
    main()
