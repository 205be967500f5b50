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

import numpy as np
import torch.distributed as dist

from runtime.files import add_lines, read_bytes, write_atomically
from runtime.messages import InputError, print0
from runtime.rows import read_rows

from .grading import paired_gain, wilson_interval
from .judge import Judge
from .problems import STEP_PREFIX, Problem, Step, find_steps, read_problems
from .sampling import Sample, Samples, Settings

RATES = np.geomspace(0.03, 0.95, 10)[:, None]  # pass rates as long as all steps are right, each as likely


@dataclass(eq=False)
class Wrong:
    """A wrong solution on its way to a pair. V(j) is the pass rate of samples that go on after j steps."""

    problem: Problem
    solution: str
    steps: list[Step]            # empty if they are not numbered 1..n
    status: str = ""             # why it goes no further, as "stage: reason"; "" as long as it does
    step: int | None = None      # the first wrong one, 1..n; 0 if none is; None if that is not known
    passed: list[int] = field(init=False)  # of the samples drawn after 0..n-1 steps to find the step
    drawn: list[int] = field(init=False)
    certainty: float | None = None         # that the step is the first wrong one
    rate_before: float = 0.0     # V before the step, by all samples
    candidates: list[list[Step]] = field(default_factory=list)  # steps of solutions that pass: see `rectify`
    pairs: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.passed, self.drawn = [0] * len(self.steps), [0] * len(self.steps)

    def after(self, j: int) -> tuple[Problem, str]:
        """The prefix of samples that go on after the first j steps."""
        return self.problem, self.steps[j].before


def open_rows(rows: list[Wrong]) -> list[Wrong]:
    return [row for row in rows if not row.status]


def pass_rate(samples: list[Sample]) -> float:
    return sum(sample.passes for sample in samples) / len(samples)


# ------------------------------------------------------------------------------------------------------ solve


def solve(problems: list[Problem], samples: Samples, count: int,
          prefix: str = STEP_PREFIX) -> list[tuple[Problem, Sample]]:
    """`count` graded solutions of each problem. With one, at temperature 0, it is the evaluation."""
    drawn = samples.draw([(problem, prefix) for problem in problems], count, label="solve")
    solutions = []
    for problem, found in zip(problems, drawn, strict=True):
        solutions += [(problem, sample) for sample in found]
    report_accuracy([sample for _, sample in solutions], len(problems), samples.settings)
    return solutions


def report_accuracy(samples: list[Sample], problems: int, settings: Settings) -> None:
    n = len(samples)
    right = sum(sample.correct for sample in samples)
    no_answer = sum(sample.predicted is None for sample in samples)
    cut = sum(sample.cut for sample in samples)
    not_numbered = sum(find_steps(sample.solution) is None for sample in samples)

    low, high = wilson_interval(right, n)
    certainty = f", 95% interval {low:.1%} to {high:.1%}"
    if n > problems:  # several samples of a problem are not independent
        certainty = f" samples of {problems} problems"
    print0(f"accuracy {right / n:.1%} ({right} of {n}{certainty}); {no_answer} without an answer, "
           f"{cut} cut at {settings.max_new_tokens} tokens, {not_numbered} not in numbered steps")


def report_gain(before: str, after: str, config: Namespace) -> None:
    """Greedy accuracy of two models on --test-problems of the trainer, and the difference. Collective."""
    problems, right = read_problems(config.test_problems), []
    for when, model in (("before", before), ("after", after)):
        print0(f"{when:11s} {model} answers {config.test_problems}:")
        settings = Settings(model, config.template, config.instruction, config.template_args, temperature=0,
                            dtype=config.dtype, max_new_tokens=config.max_length)
        samples = Samples(f"{config.output_dir}/{when}.jsonl", settings)
        right.append([sample.correct for _, sample in solve(problems, samples, count=1)])

    shares = [sum(of_model) / len(problems) for of_model in right]
    gain, low, high = paired_gain(*right)
    print0(f"accuracy    before {shares[0]:.1%}, after {shares[1]:.1%} on {len(problems)} held-out problems: "
           f"{100 * gain:+.1f} points, 95% interval {100 * low:+.1f} to {100 * high:+.1f}")


# ----------------------------------------------------------------------------------------------------- locate


def wrong_solutions(solutions: list[tuple[Problem, Sample]], args: Namespace) -> list[Wrong]:
    """The wrong ones. A `status` says which of them cannot be searched, and why."""
    rows, seen, of_problem = [], set(), Counter()
    for problem, sample in solutions:
        # Graded even if it was cut: an answer that stood there before the cut counts.
        if sample.correct:
            continue
        row = Wrong(problem, sample.solution, find_steps(sample.solution) or [])
        if (problem, sample.solution) in seen:
            row.status = "usable: the same as another"
        elif sample.cut:
            row.status = "usable: cut at --max-new-tokens"
        elif not row.steps:
            row.status = "usable: not numbered Step 1: to Step n:"
        elif of_problem[problem] == args.per_problem:
            row.status = "usable: more than --per-problem"
        else:
            of_problem[problem] += 1
        seen.add((problem, sample.solution))
        rows.append(row)
    return rows


def locate(rows: list[Wrong], samples: Samples, judge: Judge | None, args: Namespace) -> None:
    """Fill in the first wrong step of each row, or the status that says why there is none."""
    if args.by in ("rollouts", "both"):
        locate_by_rollouts(rows, samples, args)
    if args.by in ("judge", "both"):
        locate_by_judge(open_rows(rows), judge, "agreed" if args.by == "both" else "located")


def locate_by_rollouts(rows: list[Wrong], samples: Samples, args: Namespace) -> None:
    """The first wrong step, as the one after which the model seldom gets the answer right: a noisy binary
    search. Each wave samples, for each row, where that promises to halve what is still possible."""
    # Problems that the model never solves are given up early, after few samples.
    roll_out(rows, [0] * len(rows), args.screen, samples)
    for row in rows:
        if row.passed[0] == 0:
            row.status = f"located: none of the first {args.screen} samples of the problem passes"

    searching = open_rows(rows)
    while searching:
        middles = []
        for row in searching:
            chances = chances_of_steps(row.passed, row.drawn, args.max_recovery)
            row.certainty = float(chances.max())
            if row.certainty >= args.certainty:
                row.step = int(chances.argmax()) + 1
            elif sum(row.drawn) >= args.max_rollouts:
                row.status = "located: no step is certain after --max-rollouts samples"
            else:
                # Whether V is low after j steps tells most if it is as likely as not.
                is_low = chances.cumsum()[:-1]
                middles.append(int(abs(is_low - 0.5).argmin()) + 1)
        searching = [row for row in open_rows(searching) if row.step is None]
        roll_out(searching, middles, args.rollouts, samples)


def roll_out(rows: list[Wrong], js: list[int], count: int, samples: Samples) -> None:
    """Draw `count` more samples of each row that go on after its first j steps."""
    known = [row.drawn[j] for row, j in zip(rows, js, strict=True)]
    prefixes = [row.after(j) for row, j in zip(rows, js, strict=True)]
    for row, j, found in zip(rows, js, samples.draw(prefixes, count, known, "locate"), strict=True):
        row.drawn[j] += count
        row.passed[j] += sum(sample.passes for sample in found)


def chances_of_steps(passed: list[int], drawn: list[int], max_recovery: float) -> np.ndarray:
    """The probability of each step 1..n of a wrong solution to be the first wrong one.  # (n,)

    Of `drawn[j]` samples that go on after j steps `passed[j]` are right: at some rate as long as these steps
    are right, and after a wrong one at a part of it, as models recover from errors, but at most max_recovery.
    All orders of magnitude of rate and part, and all steps, are as likely beforehand: Bayes' rule on a grid.
    One rate for all right steps is a simplification, as a hard step ahead lowers it: on the demo the
    probabilities are too high by 3 points.
    """
    parts = max_recovery * np.geomspace(0.1, 1, 3)
    right = np.array(passed)[:, None, None]  # (n, 1, 1)
    wrong = np.array(drawn)[:, None, None] - right
    good = np.broadcast_to(RATES, (len(RATES), len(parts)))
    bad = parts * RATES
    log_good = right * np.log(good) + wrong * np.log1p(-good)  # (n, rates, parts)
    log_bad = right * np.log(bad) + wrong * np.log1p(-bad)

    # If step k is the first wrong one, then 0..k-1 steps are good to go on from, and k..n-1 are bad.
    likelihoods = log_good.cumsum(0)
    likelihoods[:-1] += log_bad[::-1].cumsum(0)[::-1][1:]
    chances = np.exp(likelihoods - likelihoods.max()).sum((1, 2))
    return chances / chances.sum()


def locate_by_judge(rows: list[Wrong], judge: Judge, stage: str) -> None:
    """The first wrong step by a judge's verdict. Where rollouts have named one, both must name the same:
    labels on which they agree train better than those of either (arXiv:2501.07301)."""
    solutions = [(row.problem, [step.text for step in row.steps]) for row in rows]
    for row, verdict in zip(rows, judge.first_errors(solutions), strict=True):
        if verdict is None:
            row.status = f"{stage}: verdict not as asked for"
        elif row.step not in (None, verdict):
            row.status = f"{stage}: the judge names another step, or none"
        else:
            row.step = verdict
            if verdict == 0:
                row.status = f"{stage}: no wrong step"


def take_filled_in(path: str, rows: list[Wrong]) -> list[Wrong]:
    """Take the steps that people put into the file. Returns the rows that have no line there yet.

    Lines are known by problem and solution, so they may be moved, and none is ever changed or removed.
    Raises InputError if a step is none of its solution's.
    """
    filled_in = read_filled_in(path)
    new = []
    for row in rows:
        place = row.problem.prompt, row.solution
        if place not in filled_in:
            new.append(row)
        where, row.step = filled_in.get(place, (path, None))
        n = len(row.steps)
        if row.step is None:
            row.status = "located: not filled in yet"
        elif row.step > n:
            raise InputError(f"{where}: step must be 0 (none is wrong) to {n}, or null, not {row.step}")
        elif row.step == 0:
            row.status = "located: no wrong step"
    return new


def read_filled_in(path: str) -> dict[tuple[str, str], tuple[str, int | None]]:
    """By problem and solution: the line, and the step that is written there."""
    filled_in: dict[tuple[str, str], tuple[str, int | None]] = {}
    has_rows = os.path.exists(path) and read_bytes(path).strip()
    for where, line in read_rows(path) if has_rows else []:
        for name in ("step", "prompt", "solution"):
            if name not in line:
                raise InputError(f"{where}: has no {name!r}; repair or remove that line")
        step, place = line["step"], (line["prompt"], line["solution"])
        if not all(isinstance(text, str) for text in place):
            raise InputError(f"{where}: 'prompt' and 'solution' must be text; repair or remove that line")
        if step is not None and (type(step) is not int or step < 0):
            raise InputError(f"{where}: step must be 0 (none is wrong) to the number of its steps, or "
                             f"null, not {step!r}")
        first, known = filled_in.setdefault(place, (where, step))
        if step != known:
            raise InputError(f"{where}: step is {step}, and for the same solution {known} in {first}; "
                             "remove one of these lines")
    return filled_in


# ---------------------------------------------------------------------------------------------------- rectify


def rectify(located: list[Wrong], samples: Samples, judge: Judge | None, args: Namespace) -> list[dict]:
    """Located errors -> pairs, in the format of data.py. The rows' status says why some have none.

    The first step of a sample that goes on after the right steps and passes may become `chosen`. That the
    answer is right does not make the step right: it must also be as good to go on from as the steps before
    it, or please the judge. Wave n checks everyone's n-th candidate.
    """
    # Two solutions may share the wrong step and all before it: one of them is enough.
    seen = set()
    for row in located:
        wrong_step = row.after(row.step - 1), simplified(row.steps[row.step - 1].text)
        if wrong_step in seen:
            row.status = "rectified: the step is already rejected in another pair"
        seen.add(wrong_step)
    located = open_rows(located)

    # Those that `locate` drew there are among these, from the cache.
    prefixes = [row.after(row.step - 1) for row in located]
    drawn = samples.draw(prefixes, args.rectify_samples, label="rectify")
    for row, found in zip(located, drawn, strict=True):
        row.rate_before, row.candidates = pass_rate(found), candidates_for(row, found, args)
        if row.rate_before == 0:
            row.status = "rectified: no continuation passes"
        elif not row.candidates:
            row.status = "rectified: no other step of similar length"

    for n in range(args.tries):
        wave = [row for row in located if n < len(row.candidates) and len(row.pairs) < args.pairs_per_step]
        for row, is_right in zip(wave, check(wave, n, samples, judge, args), strict=True):
            if is_right:
                row.pairs.append(make_pair(row, row.candidates[n]))

    pairs, of_problem = [], Counter()
    for row in located:
        room = args.per_problem - of_problem[row.problem]
        if not row.pairs and not row.status:
            row.status = "rectified: no chosen step passes --check"
        elif row.pairs and room == 0:
            row.status = "rectified: more than --per-problem"
        pairs += row.pairs[:room]
        of_problem[row.problem] += len(row.pairs[:room])
    return pairs


def candidates_for(row: Wrong, drawn: list[Sample], args: Namespace) -> list[list[Step]]:
    """The steps of one solution that passes for each different next step, the most frequent step first."""
    k, (_, prefix) = row.step, row.after(row.step - 1)
    by_text: dict[str, list[list[Step]]] = {}
    for sample in drawn:
        steps = find_steps(sample.solution) if sample.passes else None
        # The step must begin where the right steps end: a sample may number its steps anew.
        if steps and len(steps) >= k and steps[k - 1].before == prefix:
            by_text.setdefault(simplified(steps[k - 1].text), []).append(steps)

    wrong, ratio = simplified(row.steps[k - 1].text), args.max_length_ratio
    kept = []
    for text, solutions in by_text.items():
        if text != wrong and 1 / ratio <= len(text) / len(wrong) <= ratio:
            kept.append(solutions)
    return [solutions[0] for solutions in sorted(kept, key=len, reverse=True)]


def check(wave: list[Wrong], n: int, samples: Samples, judge: Judge | None, args: Namespace) -> list[bool]:
    """Whether the n-th candidate of each row is right, by --check."""
    if args.check == "judge":
        beginnings = []
        for row in wave:
            beginnings.append((row.problem, [step.text for step in row.candidates[n][:row.step]]))
        return [verdict == 0 for verdict in judge.first_errors(beginnings)]

    # A candidate that is the last step is right, because the answer is; the others are gone on from.
    inner = [row for row in wave if len(row.candidates[n]) > row.step]
    prefixes = [(row.problem, row.candidates[n][row.step].before) for row in inner]
    drawn = samples.draw(prefixes, args.check_rollouts, label="check")
    worse = {row for row, found in zip(inner, drawn, strict=True) if pass_rate(found) < row.rate_before}
    return [row not in worse for row in wave]


def make_pair(row: Wrong, steps: list[Step]) -> dict:
    """`steps` are those of a solution that passes, up to the wrong one the same as the row's."""
    prefix, last = steps[row.step - 1].before, steps[-1]
    passing = last.before + last.text
    return {"dataset": row.problem.dataset, "prompt": row.problem.prompt, "initial_reason_steps": prefix,
            "chosen": steps[row.step - 1].text, "rejected": row.steps[row.step - 1].text,
            "full_chosen": passing[len(prefix):], "full_rejected": row.solution[len(prefix):].rstrip(),
            "answer": row.problem.answer}


def simplified(step: str) -> str:
    return " ".join(step.lower().split())


# --------------------------------------------------------------------------------------------- all the stages


def build(solutions: list[tuple[Problem, Sample]], samples: Samples, judge: Judge | None,
          args: Namespace) -> None:
    """Solutions -> pairs.jsonl in the folder --out, and a count of what fell away where. Collective."""
    wrong = wrong_solutions(solutions, args)
    usable = open_rows(wrong)
    if args.by == "human":
        sheet = f"{args.out}/located.jsonl"
        new = take_filled_in(sheet, usable)
        wait_for_all()  # before rank 0 adds to what the others read
        write_rows(sheet, [as_line(row, args) for row in new], mode="a")
        print0(f"{sheet}: where step is null, put the number of the first wrong step there (0 if none is); "
               "then run the same command again")
        if not open_rows(usable):
            return report_counts(len(solutions), wrong, args)
    else:
        locate(usable, samples, judge, args)
        write_rows(f"{args.out}/located_by_{args.by}.jsonl", [as_line(row, args) for row in wrong])

    pairs = rectify(open_rows(usable), samples, judge, args)
    write_rows(f"{args.out}/pairs.jsonl", pairs)
    report_counts(len(solutions), wrong, args)
    of_problems = len({pair["prompt"] for pair in pairs})
    print0(f"{len(pairs)} pairs of {of_problems} problems -> {args.out}/pairs.jsonl")


def as_line(row: Wrong, args: Namespace) -> dict:
    return {"step": row.step, "status": row.status or "located", "by": args.by, **row.problem._asdict(),
            "solution": row.solution, "certainty": row.certainty, "passed": row.passed, "drawn": row.drawn}


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def write_rows(path: str, rows: list[dict], mode: str = "w") -> None:
    """On rank 0: a JSONL file, complete or not at all, or lines at its end."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if mode == "w":
        write_atomically(path, text)
    elif rows:
        if os.path.exists(path) and not read_bytes(path).endswith(b"\n"):
            text = "\n" + text  # an editor has left the last line without its end
        add_lines(path, text)


def report_counts(solutions: int, wrong: list[Wrong], args: Namespace) -> None:
    """Print how many are left after each stage, and why the others are not (from "stage: reason")."""
    stages = ["usable", "located"]
    if args.by == "both":
        stages.append("agreed")

    reasons = Counter(row.status for row in wrong if row.status)
    left = len(wrong)
    lines = [f"{'solutions':12}{solutions:7,}", f"{'wrong':12}{left:7,}"]
    for stage in [*stages, "rectified"]:
        fell_away = sorted((reason, n) for reason, n in reasons.items() if reason.startswith(f"{stage}: "))
        left -= sum(n for _, n in fell_away)
        lines.append(f"{stage:12}{left:7,}")
        lines += [f"{'':12}{-n:7,}  {reason.removeprefix(f'{stage}: ')}" for reason, n in fell_away]
    print0(*lines)
