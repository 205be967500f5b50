#!/usr/bin/env python3
"""Draws runs of `stepdpo.py @demo/args`: held-out reward accuracy and margin along training (figure 2
of arXiv:2406.18629), and greedy accuracy on the held-out problems before and after, each with its own 95%
interval (that of the difference, which stepdpo.py prints, is narrower: the problems are the same).

    python demo/plot.py runs/demo --out demo/result.png          # several folders: several lines
"""

import argparse
import glob
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from pairs.grading import wilson_interval  # noqa: E402


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


def plot_before_and_after(folder: str, axes) -> int:
    """Returns the number of problems."""
    shares, below, above = [], [], []
    for when in ("before", "after"):
        correct = [row["correct"] for row in rows(folder, when) if "correct" in row]  # not the settings
        share, n = sum(correct) / len(correct), len(correct)
        low, high = wilson_interval(sum(correct), n)
        shares.append(100 * share)
        below.append(100 * (share - low))
        above.append(100 * (high - share))
    name = os.path.basename(os.path.normpath(folder))
    axes.errorbar(["before", "after"], shares, [below, above], fmt="o-", capsize=4, label=name)
    return n


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
    for folder in args.runs:
        plot_along_training(folder, accuracy, margin)
        n = plot_before_and_after(folder, greedy)
    accuracy.set(title="chosen ranked above rejected", xlabel="optimizer step", ylabel="held-out pairs, %",
                 xlim=0, ylim=(50, 100))
    margin.set(title="reward margin", xlabel="optimizer step", ylabel="nats")
    greedy.set(title="problems solved greedily", ylabel=f"of {n} held-out problems, %", xlim=(-0.5, 1.5))
    for axes in (accuracy, margin, greedy):
        axes.grid(alpha=0.3)
    if len(args.runs) > 1:
        greedy.legend(loc="lower right", fontsize=8)
    figure.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
