"""The three stages of section 3.2 of the paper, as plain functions over rows.

    solve     problems -> solutions, graded
    locate    wrong solutions -> the first wrong step of each, or the reason why it is not known
    rectify   located errors -> pairs

Each stage asks for what it needs of all rows at once (a wave), because large batches are fast. The samples of
a wave come from the cache where they are known, so no stage has to remember how far it came.
"""

import json
import os
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field

import torch.distributed as dist

from data import InputError, print0, read_rows, write_atomically

from .grading import paired_gain, wilson_interval
from .judge import Judge
from .problems import (
    STEP_PREFIX,
    Problem,
    Steps,
    find_steps,
    prefix_before,
    read_problems,
    step_text,
    step_texts,
)
from .sampling import Sample, Samples, Sampling, rank_and_ranks


@dataclass
class Wrong:
    """A wrong solution, and what is known of its first wrong step."""

    problem: Problem
    solution: str
    steps: Steps                 # empty if they are not numbered 1..n
    step: int | None = None      # the first wrong one, 1..n; 0 if none is; None if that is not known
    status: str = ""             # why it goes no further, as "stage: reason"; "" as long as it does
    pass_rates: list[float] = field(default_factory=list)  # V at the start, before the step, after it
    low: int = 0                 # in the search: the first `low` steps count as right,
    high: int = 0                # the first `high` do not

    def after(self, j: int) -> tuple[Problem, str]:
        """What a sample that goes on after the first j steps goes on from."""
        return self.problem, prefix_before(self.solution, self.steps, j + 1)


def open_rows(rows: list[Wrong]) -> list[Wrong]:
    return [row for row in rows if not row.status]


def pass_rate(samples: list[Sample]) -> float:
    return sum(sample.passes for sample in samples) / len(samples)


# ------------------------------------------------------------------------------------------------------ solve


def solve(problems: list[Problem], samples: Samples, count: int,
          prefix: str = STEP_PREFIX) -> list[tuple[Problem, Sample]]:
    """`count` graded solutions of each problem. With one, at temperature 0, it is the evaluation."""
    drawn = samples.draw([(problem, prefix) for problem in problems], count, desc="solve")
    solutions = []
    for problem, found in zip(problems, drawn, strict=True):
        solutions += [(problem, sample) for sample in found]
    report_accuracy([sample for _, sample in solutions], len(problems), samples.sampling)
    return solutions


def report_accuracy(samples: list[Sample], problems: int, sampling: Sampling) -> None:
    n = len(samples)
    right = sum(sample.correct for sample in samples)
    no_answer = sum(sample.predicted is None for sample in samples)
    cut = sum(sample.cut for sample in samples)
    not_numbered = sum(find_steps(sample.solution) is None for sample in samples)

    low, high = wilson_interval(right, n)
    one_each = n == problems  # several samples of a problem are not independent
    certainty = f", 95% interval {low:.1%} to {high:.1%}" if one_each else f" samples of {problems} problems"
    print0(f"accuracy {right / n:.1%} ({right} of {n}{certainty}); {no_answer} without an answer, "
           f"{cut} cut at {sampling.max_new_tokens} tokens, {not_numbered} not in numbered steps")


def report_gain(before: str, after: str, config: Namespace) -> None:
    """Greedy accuracy of two models on --test-problems of the trainer, and the difference. Collective."""
    problems, right = read_problems(config.test_problems), {}
    for when, model in (("before", before), ("after", after)):
        print0(f"{when:11s} {model} answers {config.test_problems}:")
        sampling = Sampling(model, config.template, config.instruction, temperature=0, dtype=config.dtype,
                            max_new_tokens=config.max_length)
        samples = Samples(f"{config.output_dir}/{when}.jsonl", sampling)
        right[when] = [sample.correct for _, sample in solve(problems, samples, count=1)]

    shares = {when: sum(each) / len(problems) for when, each in right.items()}
    points, low, high = (100 * share for share in paired_gain(right["before"], right["after"]))
    print0(f"accuracy    before {shares['before']:.1%}, after {shares['after']:.1%} on {len(problems)} "
           f"held-out problems: {points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}")


# ----------------------------------------------------------------------------------------------------- locate


def wrong_solutions(solutions: list[tuple[Problem, Sample]], args: Namespace) -> list[Wrong]:
    """The wrong ones. A `status` says which of them cannot be searched, and why."""
    rows, seen, of_problem = [], set(), Counter()
    for problem, sample in solutions:
        # Graded even if it was cut: an answer that stood there before the cut counts.
        if sample.correct:
            continue
        row = Wrong(problem, sample.solution, find_steps(sample.solution) or [])
        key = problem.key(sample.solution)
        if key in seen:
            row.status = "usable: the same as another"
        elif sample.cut:
            row.status = "usable: cut at --max-new-tokens"
        elif not row.steps:
            row.status = "usable: not numbered Step 1: to Step n:"
        elif of_problem[problem] == args.per_problem:
            row.status = "usable: more than --per-problem"
        else:
            of_problem[problem] += 1
        seen.add(key)
        rows.append(row)
    return rows


def locate(wrong: list[Wrong], samples: Samples, judge: Judge | None, args: Namespace) -> None:
    """Fill in the first wrong step of each row, or the status that says why there is none."""
    if args.by == "judge":
        locate_by_judge(open_rows(wrong), judge)
    elif args.by in ("rollouts", "both"):
        locate_by_rollouts(open_rows(wrong), samples, args)
    if args.by == "both":
        keep_where_judge_agrees(open_rows(wrong), judge)


def locate_by_rollouts(rows: list[Wrong], samples: Samples, args: Namespace) -> None:
    """The first wrong step, as the one after which the model seldom gets the answer right.

    V(j) is the pass rate of samples that go on after the first j steps; V(n) = 0, as the n steps end in a
    wrong answer. "Wrong" is not V = 0, because models recover from errors, but at most half of V(0). Binary
    search keeps V(low) > V(0)/2 >= V(high) until high = low + 1. Every V is a guess from few samples, so
    fresh ones confirm the drop over that one step.
    """
    # Problems that the model never solves are given up early, after few samples.
    for count in (args.screen, args.rollouts):
        still_open = open_rows(rows)
        rates = pass_rates(still_open, [0] * len(still_open), samples, count)
        for row, rate in zip(still_open, rates, strict=True):
            row.pass_rates, row.high = [rate], len(row.steps)
            if rate == 0:
                row.status = f"located: none of the first {count} samples of the problem passes"
    for row in open_rows(rows):
        if row.pass_rates[0] < args.min_pass_rate:
            row.status = "located: the problem's pass rate is below --min-pass-rate"

    # Halve all that is still open with one wave of samples; after log2(steps) waves nothing is.
    searching = [row for row in open_rows(rows) if row.high - row.low > 1]
    while searching:
        middles = [(row.low + row.high) // 2 for row in searching]
        rates = pass_rates(searching, middles, samples, args.rollouts)
        for row, middle, rate in zip(searching, middles, rates, strict=True):
            if rate > args.good_ratio * row.pass_rates[0]:
                row.low = middle
            else:
                row.high = middle
        searching = [row for row in searching if row.high - row.low > 1]

    confirm(open_rows(rows), samples, args)


def pass_rates(rows: list[Wrong], after: list[int], samples: Samples, count: int,
               first: int = 0) -> list[float]:
    """V(j) of each row, for its j in `after`."""
    prefixes = [row.after(j) for row, j in zip(rows, after, strict=True)]
    return [pass_rate(drawn) for drawn in samples.draw(prefixes, count, first, desc="locate")]


def confirm(rows: list[Wrong], samples: Samples, args: Namespace) -> None:
    """Keep a step only if fresh samples show the drop too: good before it, seldom right after it."""
    # The search went where the pass rates happened to be low, so those rates are biased; fresh ones are not.
    fresh = {"samples": samples, "count": args.confirmations, "first": args.rollouts}
    before = pass_rates(rows, [row.low for row in rows], **fresh)
    for row, rate in zip(rows, before, strict=True):
        row.pass_rates += [rate, 0.0]  # nothing is right after the last step of a wrong solution
        if rate <= args.good_ratio * row.pass_rates[0]:
            row.status = "confirmed: pass rate already low before the step"

    # Only steps that are not the last can be gone on from.
    inner = [row for row in open_rows(rows) if row.high < len(row.steps)]
    after = pass_rates(inner, [row.high for row in inner], **fresh)
    for row, rate in zip(inner, after, strict=True):
        row.pass_rates[2] = rate
        if rate > args.bad_ratio * row.pass_rates[1]:
            row.status = "confirmed: pass rate still high after the step"

    for row in open_rows(rows):
        row.step = row.high


def locate_by_judge(rows: list[Wrong], judge: Judge) -> None:
    """The first wrong step by a judge's verdict."""
    for row, verdict in zip(rows, verdicts_on(rows, judge), strict=True):
        row.step = verdict
        if verdict is None:
            row.status = "located: verdict not as asked for"
        elif verdict == 0:
            row.status = "located: no wrong step"


def keep_where_judge_agrees(rows: list[Wrong], judge: Judge) -> None:
    """Labels on which rollouts and a judge agree train better than either's alone (arXiv:2501.07301)."""
    for row, verdict in zip(rows, verdicts_on(rows, judge), strict=True):
        if verdict is None:
            row.status = "agreed: verdict not as asked for"
        elif verdict != row.step:
            row.status = "agreed: the judge names another step, or none"


def verdicts_on(rows: list[Wrong], judge: Judge) -> list[int | None]:
    return judge.first_errors([(row.problem, step_texts(row.solution, row.steps)) for row in rows])


def write_located(path: str, rows: list[Wrong], by: str) -> None:
    lines = []
    for row in rows:
        fields = {"step": row.step, "status": row.status or "located", "by": by, **row.problem._asdict(),
                  "solution": row.solution, "pass_rates": row.pass_rates}
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    if rank_and_ranks()[0] == 0:
        write_atomically(path, "".join(lines))


def read_filled_in(path: str, rows: list[Wrong]) -> None:
    """Take the steps that people put into the file that `write_located` wrote for these rows.

    Raises InputError if it is for other solutions, or if a step is none of its solution's.
    """
    lines = read_rows(path) if rows else []
    if len(lines) != len(rows):
        raise InputError(f"{path}: has {len(lines)} rows for {len(rows)} wrong solutions, so it was made for "
                         "others; choose another --out")
    for (where, line), row in zip(lines, rows, strict=True):
        if (line.get("prompt"), line.get("solution")) != (row.problem.prompt, row.solution):
            raise InputError(f"{where}: is not the wrong solution that stands there now; lines must not be "
                             "moved, and other problems need another --out")
        step, n = line.get("step"), len(row.steps)
        if step is not None and (type(step) is not int or not 0 <= step <= n):
            raise InputError(f"{where}: step must be 0 (none is wrong) to {n}, or null, not {step!r}")
        row.step = step
        if step is None:
            row.status = "located: not filled in yet"
        elif step == 0:
            row.status = "located: no wrong step"


# ---------------------------------------------------------------------------------------------------- rectify


@dataclass
class Repair:
    """A located error, and what may take its place."""

    row: Wrong
    pass_rate: float                      # of samples that go on from the right steps before it
    candidates: list[tuple[str, Steps]]   # solutions that pass, by their next step, the most frequent first
    pairs: list[dict] = field(default_factory=list)


def rectify(located: list[Wrong], samples: Samples, judge: Judge | None, args: Namespace) -> list[dict]:
    """Located errors -> pairs, in the format of data.py. The rows' status says why some have none.

    The first step of a sample that goes on after the right steps and passes may become `chosen`. That the
    answer is right does not make the step right: it must also be as good to go on from as the steps before
    it, or please the judge. Wave n checks everyone's n-th candidate.
    """
    # What `locate` drew there to find and confirm the step counts; mostly that is enough.
    known = args.rollouts + args.confirmations if args.by in ("rollouts", "both") else 0
    count = max(args.rectify_samples, known)
    drawn = samples.draw([row.after(row.step - 1) for row in located], count, desc="rectify")

    repairs = []
    for row, found in zip(located, drawn, strict=True):
        repair = Repair(row, pass_rate(found), candidates_for(row, found, args))
        if repair.pass_rate == 0:
            row.status = "rectified: no continuation passes"
        elif not repair.candidates:
            row.status = "rectified: no other step of similar length"
        repairs.append(repair)

    for n in range(args.tries):
        wave = [repair for repair in repairs
                if n < len(repair.candidates) and len(repair.pairs) < args.pairs_per_step]
        for repair, is_right in zip(wave, check(wave, n, samples, judge, args), strict=True):
            if is_right:
                repair.pairs.append(make_pair(repair.row, *repair.candidates[n]))

    pairs = []
    for repair in repairs:
        pairs += repair.pairs
        if not repair.pairs and not repair.row.status:
            repair.row.status = "rectified: no chosen step passes --check"
    return pairs


def candidates_for(row: Wrong, drawn: list[Sample], args: Namespace) -> list[tuple[str, Steps]]:
    """One solution that passes for each different next step, the most frequent step first."""
    k, (_, prefix) = row.step, row.after(row.step - 1)
    by_step: dict[str, list[tuple[str, Steps]]] = {}
    for sample in drawn:
        steps = find_steps(sample.solution) if sample.passes else None
        # The step must begin where the right steps end: a sample may number its steps anew.
        if steps and len(steps) >= k and steps[k - 1][1] == len(prefix):
            step = simplified(step_text(sample.solution, steps, k))
            by_step.setdefault(step, []).append((sample.solution, steps))

    wrong, ratio = simplified(step_text(row.solution, row.steps, k)), args.max_length_ratio
    kept = []
    for step, solutions in by_step.items():
        if step != wrong and 1 / ratio <= len(step) / len(wrong) <= ratio:
            kept.append(solutions)
    return [solutions[0] for solutions in sorted(kept, key=len, reverse=True)]


def check(wave: list[Repair], n: int, samples: Samples, judge: Judge | None, args: Namespace) -> list[bool]:
    """Whether the n-th candidate of each is right, by --check."""
    if args.check == "judge":
        beginnings = []
        for repair in wave:
            text, steps = repair.candidates[n]
            beginnings.append((repair.row.problem, step_texts(text, steps)[:repair.row.step]))
        return [verdict == 0 for verdict in judge.first_errors(beginnings)]

    # A candidate that is the last step is right, because the answer is; the others are gone on from.
    inner, prefixes = [], []
    for repair in wave:
        text, steps = repair.candidates[n]
        if len(steps) > repair.row.step:
            inner.append(repair)
            prefixes.append((repair.row.problem, prefix_before(text, steps, repair.row.step + 1)))
    worse = []
    for repair, drawn in zip(inner, samples.draw(prefixes, args.rollouts, desc="check"), strict=True):
        if pass_rate(drawn) < repair.pass_rate:
            worse.append(repair)
    return [repair not in worse for repair in wave]


def make_pair(row: Wrong, text: str, steps: Steps) -> dict:
    """`text` is a solution that passes, with the same steps as the row's up to the wrong one."""
    _, prefix = row.after(row.step - 1)
    return {"dataset": row.problem.dataset, "prompt": row.problem.prompt, "initial_reason_steps": prefix,
            "chosen": step_text(text, steps, row.step),
            "rejected": step_text(row.solution, row.steps, row.step),
            "full_chosen": text[len(prefix):].rstrip(),
            "full_rejected": row.solution[len(prefix):].rstrip(), "answer": row.problem.answer}


def simplified(step: str) -> str:
    return " ".join(step.lower().split())


def select(pairs: list[dict], args: Namespace) -> tuple[list[dict], Counter]:
    """Pairs that do not repeat each other, and how many fell away, by the reason."""
    kept, reasons, of_step, of_problem = [], Counter(), Counter(), Counter()
    for pair in pairs:
        step = pair["prompt"], pair["initial_reason_steps"], simplified(pair["rejected"])
        if of_step[step] >= args.pairs_per_step:
            reasons["pairs: the step is already rejected in another pair"] += 1
        elif of_problem[pair["prompt"]] == args.per_problem:
            reasons["pairs: more than --per-problem"] += 1
        else:
            kept.append(pair)
            of_step[step] += 1
            of_problem[pair["prompt"]] += 1
    return kept, reasons


# --------------------------------------------------------------------------------------------- all the stages


def build(problems: list[Problem], samples: Samples, judge: Judge | None, args: Namespace) -> None:
    """Problems -> pairs.jsonl in the folder --out, and a count of what fell away where. Collective."""
    located_file, pairs_file = f"{args.out}/located.jsonl", f"{args.out}/pairs.jsonl"
    solutions = solve(problems, samples, args.samples, STEP_PREFIX if args.step_prefix else "")
    wrong = wrong_solutions(solutions, args)

    if args.by == "human":
        if not was_there(located_file):
            write_located(located_file, open_rows(wrong), args.by)
            print0(f"{located_file}: where step is null, put the number of the first wrong step there (0 if "
                   "none is); then run the same command again")
            return
        read_filled_in(located_file, open_rows(wrong))
    else:
        refuse_to_overwrite_people(located_file)
        locate(wrong, samples, judge, args)
        write_located(located_file, wrong, args.by)

    # Two solutions may share the wrong step and all before it: one pair of them is enough.
    pairs, repeated = select(rectify(open_rows(wrong), samples, judge, args), args)
    if rank_and_ranks()[0] == 0:
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
        write_atomically(pairs_file, "".join(lines))
    report_counts(len(solutions), wrong, repeated, args.by)
    print0(f"{len(pairs)} pairs of {len({pair['prompt'] for pair in pairs})} problems -> {pairs_file}")


def was_there(path: str) -> bool:
    """Whether a file was there before any rank of this run could have written it. Collective."""
    found = os.path.exists(path)
    if dist.is_initialized():
        dist.barrier()
    return found


def refuse_to_overwrite_people(path: str) -> None:
    rows = read_rows(path) if os.path.exists(path) and os.path.getsize(path) else []
    if any(row.get("by") == "human" and row.get("step") is not None for _, row in rows):
        raise InputError(f"{path}: holds steps that people filled in, which would be overwritten; go on with "
                         "--by human, or choose another --out")


def report_counts(solutions: int, wrong: list[Wrong], repeated: Counter, by: str) -> None:
    """Print how many are left after each stage, and why the others are not (from "stage: reason")."""
    stages = ["usable", "located", "rectified", "pairs"]
    if by in ("rollouts", "both"):
        stages.insert(2, "confirmed")
    if by == "both":
        stages.insert(3, "agreed")

    reasons = Counter(row.status for row in wrong if row.status) + repeated
    left = len(wrong)
    lines = [f"{'solutions':12}{solutions:7,}", f"{'wrong':12}{left:7,}"]
    for stage in stages:
        fell_away = sorted((reason, n) for reason, n in reasons.items() if reason.startswith(f"{stage}: "))
        left -= sum(n for _, n in fell_away)
        lines.append(f"{stage:12}{left:7,}")
        lines += [f"{'':12}{-n:7,}  {reason.removeprefix(f'{stage}: ')}" for reason, n in fell_away]
    print0(*lines)
