"""How often does each rule fire on healthy programs?

    python benchmarks/detection/calibrate.py --seeds 3

Runs the checkup on every healthy program of the benchmark, the repaired twins of its
faults among them, and writes a column into ``docs/rules.md``: the share of runs in
which a rule was an alarm, an error or a warning, or else a note.
"""

import argparse
import re
from collections import Counter
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


def counted(seeds):
    """Counts the runs with an alarm and with a note, by rule; and all of them."""
    alarms, notes, num_runs, num_alarmed = Counter(), Counter(), 0, 0
    for program in programs():
        for seed in range(seeds):
            findings, seconds = findings_of(program, seed)
            loud = {one.rule for one in findings if one.severity != "info"}
            alarms.update(loud)
            notes.update({one.rule for one in findings} - loud)
            num_runs, num_alarmed = num_runs + 1, num_alarmed + bool(loud)
            print(
                f"{num_runs:4} {', '.join(sorted(loud)) or 'silent'} ({seconds:.0f} s)",
                flush=True,
            )
    return alarms, notes, num_runs, num_alarmed


def with_column(page, alarms, notes, num_runs):
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
            cell = _cell(RULE.findall(line.split("|")[1]), alarms, notes, num_runs)
        if is_in:
            parts = line.rstrip().rstrip("|").split("|")
            kept = parts[: -1 if has_column else None]
            lines[number] = "|".join([*kept, f" {cell} |" if cell else " |"])
    return "\n".join(lines) + "\n"


def _cell(rules, alarms, notes, num_runs):
    words = [
        f"{word} {100 * count / num_runs:.2g}%"
        for word, counts in (("alarm", alarms), ("note", notes))
        if (count := sum(counts[rule] for rule in rules))
    ]
    return ", ".join(words)


def main():
    """Counts, and writes the column."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    seeds = parser.parse_args().seeds
    alarms, notes, num_runs, num_alarmed = counted(seeds)
    PAGE.write_text(with_column(PAGE.read_text(), alarms, notes, num_runs))
    low, high = wilson(num_alarmed / num_runs, num_runs)
    print(f"{num_alarmed} of {num_runs} runs with an alarm, {low:.1%} to {high:.1%}")
    for rule, count in alarms.most_common():
        print(f"  {rule:44} {count}")


if __name__ == "__main__":
    main()
