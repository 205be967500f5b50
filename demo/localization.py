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
# A rule fills in wrong.step, or leaves it None.


def former(wrongs: list[Wrong], samples: Counted) -> None:
    """At most half of V(0) is left after the first wrong step, by 4 samples a rate; and by 8 fresh ones more
    than half of it before the step, and after it at most a third of what is before."""
    start = dict(zip(wrongs, rates(wrongs, [0] * len(wrongs), 4, 0, samples), strict=True))
    found = [wrong for wrong in wrongs if start[wrong] > 0]
    low, high = binary_search(found, 4, samples, lambda wrong, rate: rate > start[wrong] / 2)

    before = dict(zip(found, rates(found, [low[wrong] for wrong in found], 8, 4, samples), strict=True))
    found = [wrong for wrong in found if before[wrong] > start[wrong] / 2]
    inner = [wrong for wrong in found if high[wrong] < len(wrong.steps)]
    after = dict(zip(inner, rates(inner, [high[wrong] for wrong in inner], 8, 4, samples), strict=True))
    for wrong in found:
        wrong.step = None if after.get(wrong, 0) > before[wrong] / 3 else high[wrong]


def binary_search(wrongs: list[Wrong], count: int, samples: Counted, is_good) -> tuple[dict, dict]:
    """By solution: a number of steps to go on from that is good, and the next one, that is not."""
    low, high = dict.fromkeys(wrongs, 0), {wrong: len(wrong.steps) for wrong in wrongs}
    while searching := [wrong for wrong in wrongs if high[wrong] - low[wrong] > 1]:
        middles = [(low[wrong] + high[wrong]) // 2 for wrong in searching]
        for wrong, middle, rate in zip(searching, middles, rates(searching, middles, count, 0, samples),
                                     strict=True):
            (low if is_good(wrong, rate) else high)[wrong] = middle
    return low, high


def rates(wrongs: list[Wrong], js: list[int], count: int, first: int, samples: Counted) -> list[float]:
    prefixes = [wrong.after(j) for wrong, j in zip(wrongs, js, strict=True)]
    return [pass_rate(found) for found in samples.draw(prefixes, count, [first] * len(wrongs), "locate")]


def by_steps(wrongs: list[Wrong], samples: Counted) -> None:
    searching, j = wrongs, 0
    while searching:
        j += 1
        inner = [wrong for wrong in searching if j < len(wrong.steps)]
        good = dict(zip(inner, rates(inner, [j] * len(inner), 8, 0, samples), strict=True))
        for wrong in searching:
            if not good.get(wrong):
                wrong.step = j
        searching = [wrong for wrong in inner if good[wrong]]


def halving(wrongs: list[Wrong], samples: Counted) -> None:
    _, high = binary_search(wrongs, 8, samples, lambda wrong, rate: rate > 0)
    for wrong in wrongs:
        wrong.step = high[wrong]


def judged(wrongs: list[Wrong], truth: list[int], noise: float) -> list[int]:
    rng, verdicts = random.Random(f"judge {noise}"), []
    for wrong, k in zip(wrongs, truth, strict=True):
        others = [j for j in range(1, len(wrong.steps) + 1) if j != k]
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


def compare(wrongs: list[Wrong], truth: list[int], samples: Samples, args: argparse.Namespace,
            length: float) -> dict:
    """Lines of the table by the rule's name. Solutions are `length` tokens long on average."""
    lines: dict[str, dict] = {}

    def searched(name: str, rule) -> list[int | None]:
        fresh = [Wrong(wrong.problem, wrong.solution, wrong.steps) for wrong in wrongs]
        counted = Counted(samples)
        rule(fresh, counted)
        steps = [wrong.step for wrong in fresh]
        lines[name] = score(name, steps, truth, counted.tokens() / length)
        return steps

    def ours(**changes: float):
        flags = SimpleNamespace(**{**vars(args), **changes})
        return lambda wrongs, samples: locate_by_rollouts(wrongs, samples, flags)

    found = {certainty: searched(f"this one, --certainty {certainty}", ours(certainty=certainty))
             for certainty in sorted({0.7, 0.8, 0.95, args.certainty})}
    searched("this one, --max-recovery 0.5", ours(max_recovery=0.5))
    default, spent = found[args.certainty], lines[f"this one, --certainty {args.certainty}"]
    searched("the former: half of V(0), confirmed", former)
    searched("any of 8, step by step", by_steps)
    searched("any of 8, binary search", halving)

    for noise in (0.1, 0.2):
        verdicts = judged(wrongs, truth, noise)
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

    wrongs = going_on(wrong_solutions(solutions, args))
    truth = [make.first_wrong(wrong.solution, results[wrong.problem.prompt]) for wrong in wrongs]
    print0(f"\n{len(wrongs)} of {len(problems)} solutions are wrong; "
           f"one has {length:.0f} tokens on average\n")
    print0(COLUMNS, "|---|---|---|---|---|---|---|")
    lines = compare(wrongs, truth, samples, args, length)
    if samples.cache.rank == 0:
        write(flags.out, {**report, "wrong": len(wrongs), "tokens_per_solution": length, "rules": lines})


if __name__ == "__main__":
    main()
