#!/usr/bin/env python3
"""How often is the located step the first wrong one? The demo's problem generator knows, so rules are scored.

    torchrun --nproc_per_node 2 demo/localization.py

Wrong solutions of the demo's model to problems that are in no other file, each searched by

    this repository's rule, at several --certainty and with the default --max-recovery, and the one that it
        had before: binary search for the first step after which at most half of the problem's pass rate is
        left, confirmed by fresh samples
    "a prefix is good if any of 8 continuations is right" (Math-Shepherd, arXiv:2312.08935), step by step, and
        with binary search (OmegaPRM, arXiv:2406.06592)
    a judge, that is the generator, and names another step in 10% or 20% of the cases: alone, and where it
        agrees with rollouts (`--by both`)

and of each: how many are located, how many of these exactly, how many one step off; and what was sampled per
located error, in lengths of an average solution.
"""

import argparse
import os
import random
import tempfile
from collections import Counter
from types import SimpleNamespace

import make
import torch.distributed as dist
from claims import MODEL

from bench.common import environment, write
from pairs.__main__ import parse
from pairs.problems import read_problems
from pairs.sampling import Samples, Settings
from pairs.stages import Wrong, going_on, locate_by_rollouts, pass_rate, solve, wrong_solutions
from runtime.commands import joining
from runtime.messages import print0

COLUMNS = "| rule | located | exact | exact, of all | one step off | early, late | lengths per located |"


class Counted:
    """Samples, and what one rule asks for, as if no other had asked before."""

    def __init__(self, samples: Samples):
        self.samples, self.seen = samples, {}

    def draw(self, prefixes: list, count: int, first: list[int] | None = None, label: str = "") -> list:
        drawn = self.samples.draw(prefixes, count, first, label)
        for prefix, start, found in zip(prefixes, first or [0] * len(prefixes), drawn, strict=True):
            for n, sample in enumerate(found, start):
                self.seen[prefix, n] = sample.tokens
        return drawn

    def tokens(self) -> int:
        return sum(self.seen.values())


# -------------------------------------------------------------------------------------------------- the rules
# A rule fills in row.step, or leaves it None.


def former(rows: list[Wrong], samples: Counted) -> None:
    """At most half of V(0) is left after the first wrong step, by 4 samples a rate; and by 8 fresh ones more
    than half of it before the step, and after it at most a third of what is before."""
    start = dict(zip(rows, rates(rows, [0] * len(rows), 4, 0, samples), strict=True))
    found = [row for row in rows if start[row] > 0]
    low, high = binary_search(found, 4, samples, lambda row, rate: rate > start[row] / 2)

    before = dict(zip(found, rates(found, [low[row] for row in found], 8, 4, samples), strict=True))
    found = [row for row in found if before[row] > start[row] / 2]
    inner = [row for row in found if high[row] < len(row.steps)]
    after = dict(zip(inner, rates(inner, [high[row] for row in inner], 8, 4, samples), strict=True))
    for row in found:
        row.step = None if after.get(row, 0) > before[row] / 3 else high[row]


def binary_search(rows: list[Wrong], count: int, samples: Counted, is_good) -> tuple[dict, dict]:
    """By row: a number of steps to go on from that is good, and the next one, that is not."""
    low, high = dict.fromkeys(rows, 0), {row: len(row.steps) for row in rows}
    while searching := [row for row in rows if high[row] - low[row] > 1]:
        middles = [(low[row] + high[row]) // 2 for row in searching]
        for row, middle, rate in zip(searching, middles, rates(searching, middles, count, 0, samples),
                                     strict=True):
            (low if is_good(row, rate) else high)[row] = middle
    return low, high


def rates(rows: list[Wrong], js: list[int], count: int, first: int, samples: Counted) -> list[float]:
    prefixes = [row.after(j) for row, j in zip(rows, js, strict=True)]
    return [pass_rate(found) for found in samples.draw(prefixes, count, [first] * len(rows), "locate")]


def by_steps(rows: list[Wrong], samples: Counted) -> None:
    searching, j = rows, 0
    while searching:
        j += 1
        inner = [row for row in searching if j < len(row.steps)]
        good = dict(zip(inner, rates(inner, [j] * len(inner), 8, 0, samples), strict=True))
        for row in searching:
            if not good.get(row):
                row.step = j
        searching = [row for row in inner if good[row]]


def halving(rows: list[Wrong], samples: Counted) -> None:
    _, high = binary_search(rows, 8, samples, lambda row, rate: rate > 0)
    for row in rows:
        row.step = high[row]


def judged(rows: list[Wrong], truth: list[int], noise: float) -> list[int]:
    rng, verdicts = random.Random(f"judge {noise}"), []
    for row, k in zip(rows, truth, strict=True):
        others = [j for j in range(1, len(row.steps) + 1) if j != k]
        verdicts.append(rng.choice(others) if others and rng.random() < noise else k)
    return verdicts


# ------------------------------------------------------------------------------------------------ the scoring


def score(name: str, steps: list[int | None], truth: list[int], lengths: float) -> dict:
    """One line of the table. `lengths` were sampled in all, in solutions."""
    apart = Counter(step - k for step, k in zip(steps, truth, strict=True) if step is not None)
    located, exact = max(1, sum(apart.values())), apart[0]
    early = sum(n for difference, n in apart.items() if difference < 0)
    spent = lengths / located
    print0(f"| {name} | {sum(apart.values())} | {exact / located:.1%} | {exact / len(truth):.1%} | "
           f"{(apart[1] + apart[-1]) / located:.1%} | {early}, {located - exact - early} | {spent:.1f} |")
    return {"located": located, "exact": exact, "off_by": dict(sorted(apart.items())), "lengths": spent}


def compare(rows: list[Wrong], truth: list[int], samples: Samples, args: argparse.Namespace,
            length: float) -> dict:
    """Lines of the table by the rule's name. Solutions are `length` tokens long on average."""
    lines: dict[str, dict] = {}

    def searched(name: str, rule) -> list[int | None]:
        fresh, counted = [Wrong(row.problem, row.solution, row.steps) for row in rows], Counted(samples)
        rule(fresh, counted)
        steps = [row.step for row in fresh]
        lines[name] = score(name, steps, truth, counted.tokens() / length)
        return steps

    def ours(**changes: float):
        flags = SimpleNamespace(**{**vars(args), **changes})
        return lambda rows, samples: locate_by_rollouts(rows, samples, flags)

    found = {certainty: searched(f"this one, --certainty {certainty}", ours(certainty=certainty))
             for certainty in sorted({0.7, 0.8, 0.95, args.certainty})}
    searched("this one, --max-recovery 0.5", ours(max_recovery=0.5))
    default, spent = found[args.certainty], lines[f"this one, --certainty {args.certainty}"]
    searched("the former: half of V(0), confirmed", former)
    searched("any of 8, step by step", by_steps)
    searched("any of 8, binary search", halving)

    for noise in (0.1, 0.2):
        verdicts = judged(rows, truth, noise)
        name = f"a judge wrong in {noise:.0%}"
        lines[name] = score(name, verdicts, truth, 0)
        agreed = [step if step == verdict else None for step, verdict in zip(default, verdicts, strict=True)]
        name = f"both: this one and a judge wrong in {noise:.0%}"
        lines[name] = score(name, agreed, truth, spent["lengths"] * spent["located"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--problems", type=int, default=800, help="to solve once; the wrong solutions are searched [800]")
    add("--out", default=f"{make.ROOT}/bench/results/localization.json", help="JSON")
    add("--work", default=f"{make.ROOT}/runs/localization", help="folder of the samples, kept")
    flags = parser.parse_args()
    report = environment()
    if "RANK" in os.environ:  # set by torchrun
        with joining():
            dist.init_process_group("gloo")

    fresh = make.problem_sets(make.SEED, fresh=flags.problems)["fresh"]
    results = {row["prompt"]: row["results"] for row in fresh}
    with tempfile.TemporaryDirectory() as folder:  # each rank reads a copy of its own
        make.write(f"{folder}/problems.jsonl", make.only(fresh, "prompt", "answer"))
        args = parse(["build", f"@{make.HERE}/build_args", "--problems", f"{folder}/problems.jsonl",
                      "--model", MODEL, "--out", flags.work, "--samples", "1"])
        problems = read_problems(args.problems)
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    samples = Samples(f"{flags.work}/samples.jsonl", settings)
    solutions = solve(problems, samples, args.samples)
    length = sum(sample.tokens for _, sample in solutions) / len(solutions)

    rows = going_on(wrong_solutions(solutions, args))
    truth = [make.first_wrong(row.solution, results[row.problem.prompt]) for row in rows]
    print0(f"\n{len(rows)} of {len(problems)} solutions are wrong; one has {length:.0f} tokens on average\n")
    print0(COLUMNS, "|---|---|---|---|---|---|---|")
    lines = compare(rows, truth, samples, args, length)
    if samples.cache.rank == 0:
        write(flags.out, {**report, "wrong": len(rows), "tokens_per_solution": length, "rules": lines})


if __name__ == "__main__":
    main()
