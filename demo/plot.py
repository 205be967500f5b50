#!/usr/bin/env python3
"""Draws runs of `stepdpo.py @demo/args`: held-out reward accuracy and margin along training (figure 2
of arXiv:2406.18629), and greedy accuracy on the held-out problems before and after, by their number of steps.

    python demo/plot.py runs/demo --out demo/result.png          # several folders: several lines
"""

import argparse
import glob
import json
import os
import sys


def rows(folder: str, name: str) -> list[dict]:
    """The rows of NAME.jsonl of a run, and of NAME.rank1.jsonl, ..., if there are. Exits if none is there."""
    paths = sorted(glob.glob(f"{glob.escape(folder)}/{name}*.jsonl"))
    if not paths:
        sys.exit(f"plot: {folder}/{name}.jsonl is not there; a whole run with --eval-data and "
                 "--test-problems makes it")
    found = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            found += [json.loads(line) for line in file]
    return found


def plot_along_training(folder: str, accuracy, margin) -> None:
    evaluations = [row for row in rows(folder, "metrics") if "eval/loss" in row]
    steps = [row["step"] for row in evaluations]
    # At step 0 policy and reference are the same, so no reward is the larger one: undefined, not 0%.
    ranked = [100 * row["eval/rewards/accuracies"] for row in evaluations[1:]]
    accuracy.plot(steps[1:], ranked, ".-")
    margin.plot(steps, [row["eval/rewards/margins"] for row in evaluations], ".-")


def plot_by_steps(folder: str, when: str, label: str, axes) -> None:
    """Share of the problems that are solved, by the number of steps: one less than of sentences."""
    solved: dict[int, list[bool]] = {}
    for row in rows(folder, when):
        if "correct" in row:  # not the settings
            steps = row["prompt"].count(".") + row["prompt"].count("?") - 1
            solved.setdefault(steps, []).append(row["correct"])

    every = [correct for of_steps in solved.values() for correct in of_steps]
    shares = [100 * sum(solved[steps]) / len(solved[steps]) for steps in sorted(solved)]
    axes.plot(sorted(solved), shares, ".-", label=f"{label}: {sum(every) / len(every):.1%} of {len(every)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output folders of stepdpo.py")
    parser.add_argument("--out", default="result.png", help="picture to write (default: result.png)")
    args = parser.parse_args()
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        sys.exit("plot: pip install matplotlib")

    figure, (accuracy, margin, greedy) = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    plot_by_steps(args.runs[0], "before", "before", greedy)
    for folder in args.runs:
        plot_along_training(folder, accuracy, margin)
        name = os.path.basename(os.path.normpath(folder)) if len(args.runs) > 1 else "after"
        plot_by_steps(folder, "after", name, greedy)
    accuracy.set(title="chosen ranked above rejected", xlabel="optimizer step", ylabel="held-out pairs, %",
                 xlim=0, ylim=(50, 100))
    margin.set(title="reward margin", xlabel="optimizer step", ylabel="nats")
    greedy.set(title="problems solved greedily", xlabel="steps of the problem", ylabel="held-out problems, %",
               ylim=(0, 100))
    for axes in (accuracy, margin, greedy):
        axes.grid(alpha=0.3)
    greedy.legend(loc="lower left", fontsize=8)
    figure.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
