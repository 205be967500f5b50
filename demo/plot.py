#!/usr/bin/env python3
"""Draws runs of `stepdpo.py @demo/args`: held-out reward accuracy and margin along training (figure 2
of arXiv:2406.18629), and greedy accuracy on the held-out problems before and after, each with its own 95%
interval (that of the difference, which stepdpo.py prints, is narrower: the problems are the same).

    python demo/plot.py runs/demo --out demo/result.png          # several folders: several lines
"""
import argparse
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from data import wilson  # noqa: E402


def rows(folder: str, name: str) -> list[dict]:
    """The rows of a JSONL file of a run, in order. Exits with what is missing."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        sys.exit(f"plot: {path} is not there; a whole run with --eval-data and --test-problems makes it")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


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
    for run in args.runs:
        evaluations = [row for row in rows(run, "metrics.jsonl") if "eval/loss" in row]
        steps, label = [row["step"] for row in evaluations], os.path.basename(os.path.normpath(run))
        # At step 0 policy and reference are the same, so no reward is the larger one: undefined, not 0%.
        ranked = [100 * row["eval/rewards/accuracies"] for row in evaluations]
        accuracy.plot(steps[1:], ranked[1:], ".-", label=label)
        margin.plot(steps, [row["eval/rewards/margins"] for row in evaluations], ".-", label=label)
        solved = [[row["correct"] for row in rows(run, f"{when}.jsonl")] for when in ("before", "after")]
        share = [100 * sum(right) / len(right) for right in solved]
        bounds = [[100 * bound for bound in wilson(sum(right), len(right))] for right in solved]
        spread = [[s - low for s, (low, _) in zip(share, bounds, strict=True)],
                  [high - s for s, (_, high) in zip(share, bounds, strict=True)]]
        greedy.errorbar(["before", "after"], share, spread, fmt="o-", capsize=4, label=label)
    accuracy.set(title="chosen ranked above rejected", xlabel="optimizer step", ylabel="held-out pairs, %",
                 xlim=0, ylim=(50, 100))
    margin.set(title="reward margin", xlabel="optimizer step", ylabel="nats")
    greedy.set(title="problems solved greedily", ylabel=f"of {len(solved[0])} held-out problems, %",
               xlim=(-0.5, 1.5))
    for axes in (accuracy, margin, greedy):
        axes.grid(alpha=0.3)
    if len(args.runs) > 1:
        greedy.legend(loc="lower right", fontsize=8)
    figure.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
