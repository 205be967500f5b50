#!/usr/bin/env python3
"""Where do answers to the demo's test problems first go wrong: at moves told in tempting words, or elsewhere?

    python demo/errors.py runs/demo                                # output folders of stepdpo.py

There are the slips that the model was taught, which step pairs can unteach; elsewhere it is what a model of
this size gets wrong anyway, arithmetic above all.
"""

import argparse
import sys

import make
import plot


def first_errors(answers: list[dict], problems: list[dict]) -> dict[str, int]:
    """How many answers are right, go first wrong at a tempting move, and elsewhere."""
    by_prompt, found = {row["prompt"]: row for row in problems}, {"right": 0, "tempting": 0, "elsewhere": 0}
    for answer in answers:
        if answer["correct"]:
            found["right"] += 1
            continue
        problem = by_prompt[answer["prompt"]]
        k = make.first_wrong(answer["solution"], problem["results"])
        found["tempting" if True in problem["tempting"][k - 1:k] else "elsewhere"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output folders of stepdpo.py")
    runs = parser.parse_args().runs
    problems = make.problem_sets(make.SEED)["test"]

    print("| answers | right | first wrong at a tempting move | elsewhere |", "|---|---|---|---|", sep="\n")
    for folder, when in [(runs[0], "before"), *((folder, "after") for folder in runs)]:
        answers = [row for row in plot.rows(folder, when) if "correct" in row]  # not the settings
        if not {row["prompt"] for row in answers} <= {row["prompt"] for row in problems}:
            sys.exit(f"errors: {folder}/{when}.jsonl: answers other problems than those of demo/test.jsonl")
        counts = first_errors(answers, problems).values()
        print(f"| {folder}, {when} | {' | '.join(map(str, counts))} |")


if __name__ == "__main__":
    main()
