#!/usr/bin/env python3
"""Where do answers to the demo's test problems first go wrong: at moves told in tempting words, or elsewhere?

    python demo/errors.py runs/demo                                # output folders of stepdpo.py

There are the slips that the model was taught, which step pairs can unteach; elsewhere it is what a model of
this size gets wrong anyway, arithmetic above all. What becomes of that is seen best on the problems in which
no move tempts: the last column.
"""

import argparse
import sys

import make
import plot


def first_errors(answers: list[dict], problems: list[dict]) -> dict[str, int]:
    """How many answers are right, go first wrong at a tempting move, and elsewhere; and ("plain") are right
    where no move tempts."""
    by_prompt = {row["prompt"]: row for row in problems}
    found = {"right": 0, "tempting": 0, "elsewhere": 0, "plain": 0}
    for answer in answers:
        tempting = by_prompt[answer["prompt"]]["tempting"]
        if answer["correct"]:
            found["right"] += 1
            found["plain"] += not any(tempting)
            continue
        k = make.first_wrong(answer["solution"], by_prompt[answer["prompt"]]["results"])
        found["tempting" if any(tempting[k - 1:k]) else "elsewhere"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output folders of stepdpo.py")
    runs = parser.parse_args().runs
    problems = make.problem_sets(make.SEED)["test"]

    plain = sum(not any(row["tempting"]) for row in problems)
    print("| answers | right | first wrong at a tempting move | elsewhere | right where no move tempts "
          f"(of {plain}) |", "|---|---|---|---|---|", sep="\n")
    for folder, when in [(runs[0], "before"), *((folder, "after") for folder in runs)]:
        answers = [row for row in plot.rows(folder, when) if "correct" in row]  # not the settings
        if {row["prompt"] for row in answers} != {row["prompt"] for row in problems}:
            sys.exit(f"errors: {folder}/{when}.jsonl: must answer the problems of demo/test.jsonl, and all")
        counts = first_errors(answers, problems).values()
        print(f"| {folder}, {when} | {' | '.join(map(str, counts))} |")


if __name__ == "__main__":
    main()
