"""From problems to pairs: the three stages of section 3.2 of the paper.

    solve     problems -> solutions, graded
    locate    wrong solutions -> the first wrong step of each, or the reason why it is not known
    rectify   located errors -> pairs

Each stage asks for what it needs of all solutions at once (a wave), because large batches are fast. The
samples of a wave come from the cache where they are known, so no stage has to remember how far it came.

A *step* here is a numbered step of a solution. The *pass rate after j steps* is the share of samples that go
on after the first j steps of a solution and reach the right answer: a wrong step makes it fall.
"""

import json
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

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


class Stage(Enum):
    """What a wrong solution has to get through, in this order, to become a pair."""

    USABLE = "usable"        # it can be searched
    LOCATED = "located"      # its first wrong step is known
    AGREED = "agreed"        # by rollouts and the judge alike: with --by both only
    RECTIFIED = "rectified"  # there is a right step to take its place


@dataclass(eq=False)
class Wrong:
    """A wrong solution on its way to a pair."""

    problem: Problem
    solution: str
    steps: list[Step]            # empty if they are not numbered 1..n
    failed: Stage | None = None  # the stage that it does not get through; None as long as it goes on
    reason: str = ""             # why not
    step: int | None = None      # the first wrong one, 1..n; 0 if none is; None if that is not known
    passed: list[int] = field(init=False)  # of the samples drawn after 0..n-1 steps, those that pass
    drawn: list[int] = field(init=False)   # how many these are
    certainty: float | None = None         # that the step is the first wrong one
    rate_before: float = 0.0     # the pass rate before the wrong step, by all samples drawn there
    candidates: list[list[Step]] = field(default_factory=list)  # steps of solutions that pass: see `rectify`
    pairs: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.passed, self.drawn = [0] * len(self.steps), [0] * len(self.steps)

    def give_up(self, stage: Stage, reason: str) -> None:
        self.failed, self.reason = stage, reason

    @property
    def status(self) -> str:
        """How far it came, in words for people: "located: no wrong step"; "" if it goes on."""
        return f"{self.failed.value}: {self.reason}" if self.failed else ""

    def after(self, j: int) -> tuple[Problem, str]:
        """The prefix of samples that go on after the first j steps."""
        return self.problem, self.steps[j].before

    def wrong_step(self) -> Step:
        return self.steps[self.step - 1]

    def before_wrong_step(self) -> tuple[Problem, str]:
        """The prefix of samples that go on after the right steps."""
        return self.after(self.step - 1)


def going_on(wrongs: Sequence[Wrong]) -> list[Wrong]:
    """Those that have not been given up."""
    return [wrong for wrong in wrongs if wrong.failed is None]


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
    of = f"{right} of {n}, 95% interval {low:.1%} to {high:.1%}"
    if n > problems:  # several samples of a problem are not independent
        of = f"{right} of {n} samples of {problems} problems"
    print0(f"accuracy {right / n:.1%} ({of}); {no_answer} without an answer, "
           f"{cut} cut at {settings.max_new_tokens} tokens, {not_numbered} not in numbered steps")


def report_gain(before: str, after: str, config: Namespace) -> None:
    """Print the greedy accuracy of two models on --test-problems of the trainer, and the gain. Collective."""
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
    """The wrong ones of the solutions. Those that cannot be searched are given up, and say why."""
    wrongs, seen, of_problem = [], set(), Counter()
    for problem, sample in solutions:
        # Graded even if it was cut: an answer that stood there before the cut counts.
        if sample.correct:
            continue
        wrong = Wrong(problem, sample.solution, find_steps(sample.solution) or [])
        if (problem, sample.solution) in seen:
            wrong.give_up(Stage.USABLE, "the same as another")
        elif sample.cut:
            wrong.give_up(Stage.USABLE, "cut at --max-new-tokens")
        elif sample.predicted is None:
            # It may be right, and say so in words that grading does not know.
            wrong.give_up(Stage.USABLE, "no answer is found in it")
        elif not wrong.steps:
            wrong.give_up(Stage.USABLE, "not numbered Step 1: to Step n:")
        elif of_problem[problem] == args.per_problem:
            wrong.give_up(Stage.USABLE, "more than --per-problem")
        else:
            of_problem[problem] += 1
        seen.add((problem, sample.solution))
        wrongs.append(wrong)
    return wrongs


def locate(wrongs: list[Wrong], samples: Samples, judge: Judge | None, args: Namespace) -> None:
    """Fill in the first wrong step of each, or give it up."""
    if args.by in ("rollouts", "both"):
        locate_by_rollouts(wrongs, samples, args)
    if args.by in ("judge", "both"):
        locate_by_judge(going_on(wrongs), judge, Stage.AGREED if args.by == "both" else Stage.LOCATED)


def locate_by_rollouts(wrongs: list[Wrong], samples: Samples, args: Namespace) -> None:
    """The first wrong step, as the one after which the model seldom gets the answer right.

    A noisy binary search: each wave samples every solution after as many steps as promise to halve what is
    still possible.
    """
    # Problems that the model never solves are given up early, after few samples.
    roll_out(wrongs, [0] * len(wrongs), args.screen, samples)
    for wrong in wrongs:
        if wrong.passed[0] == 0:
            wrong.give_up(Stage.LOCATED, f"none of the first {args.screen} samples of the problem passes")

    searched = going_on(wrongs)
    while searched:
        middles = []
        for wrong in searched:
            chances = chances_of_steps(wrong.passed, wrong.drawn, args.max_recovery)
            wrong.certainty = float(chances.max())
            if wrong.certainty >= args.certainty:
                wrong.step = int(chances.argmax()) + 1
            elif sum(wrong.drawn) >= args.max_rollouts:
                wrong.give_up(Stage.LOCATED, "no step is certain after --max-rollouts samples")
            else:
                # Samples after j steps tell most if an error among these is as likely as none.
                error_is_among_first = chances.cumsum()[:-1]  # 1..n-1 steps
                middles.append(int(abs(error_is_among_first - 0.5).argmin()) + 1)
        searched = [wrong for wrong in going_on(searched) if wrong.step is None]
        roll_out(searched, middles, args.rollouts, samples)


def roll_out(wrongs: list[Wrong], kept: list[int], count: int, samples: Samples) -> None:
    """Draw `count` more samples of each solution that go on after the first `kept` of its steps."""
    known = [wrong.drawn[j] for wrong, j in zip(wrongs, kept, strict=True)]
    prefixes = [wrong.after(j) for wrong, j in zip(wrongs, kept, strict=True)]
    drawn = samples.draw(prefixes, count, known, "locate")
    for wrong, j, found in zip(wrongs, kept, drawn, strict=True):
        wrong.drawn[j] += count
        wrong.passed[j] += sum(sample.passes for sample in found)


def chances_of_steps(passed: list[int], drawn: list[int], max_recovery: float) -> np.ndarray:
    """(n,) probabilities of the steps 1..n of a wrong solution: that the step is the first wrong one.

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


def locate_by_judge(wrongs: list[Wrong], judge: Judge, stage: Stage) -> None:
    """The first wrong step by a judge's verdict.

    Where rollouts have named one, both must name the same: labels on which they agree train better than those
    of either (arXiv:2501.07301).
    """
    solutions = [(wrong.problem, [step.text for step in wrong.steps]) for wrong in wrongs]
    for wrong, verdict in zip(wrongs, judge.first_errors(solutions), strict=True):
        if verdict is None:
            wrong.give_up(stage, "verdict not as asked for")
        elif wrong.step not in (None, verdict):
            wrong.give_up(stage, "the judge names another step, or none")
        else:
            wrong.step = verdict
            if verdict == 0:
                wrong.give_up(stage, "no wrong step")


def take_filled_in(path: str, wrongs: list[Wrong]) -> list[Wrong]:
    """Take the steps that people put into the file. Returns the solutions that have no line there yet.

    Lines are known by problem and solution, so they may be moved, and none is ever changed or removed.
    Raises InputError if a step is none of its solution's.
    """
    filled_in = read_filled_in(path)
    new = []
    for wrong in wrongs:
        place = wrong.problem.prompt, wrong.solution
        if place not in filled_in:
            new.append(wrong)
        where, wrong.step = filled_in.get(place, (path, None))
        n = len(wrong.steps)
        if wrong.step is None:
            wrong.give_up(Stage.LOCATED, "not filled in yet")
        elif wrong.step > n:
            raise InputError(f"{where}: step must be 0 (none is wrong) to {n}, or null, not {wrong.step}")
        elif wrong.step == 0:
            wrong.give_up(Stage.LOCATED, "no wrong step")
    return new


def read_filled_in(path: str) -> dict[tuple[str, str], tuple[str, int | None]]:
    """The steps that people have filled in, by problem and solution, each with the place of its line."""
    filled_in: dict[tuple[str, str], tuple[str, int | None]] = {}
    has_rows = os.path.exists(path) and read_bytes(path).strip()
    for where, row in read_rows(path) if has_rows else []:
        for name in ("step", "prompt", "solution"):
            if name not in row:
                raise InputError(f"{where}: has no {name!r}; repair or remove that line")
        step, place = row["step"], (row["prompt"], row["solution"])
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
    """Located errors -> pairs, in the format of data.py. Those of which none is made are given up.

    The first step of a sample that goes on after the right steps and passes may become `chosen`. That the
    answer is right does not make the step right: it must also be as good to go on from as the steps before
    it, or please the judge.
    """
    give_up_repeated_steps(located)
    located = going_on(located)
    find_candidates(located, samples, args)

    for n in range(args.tries):  # everyone's n-th candidate is checked in one wave
        wave = [wrong for wrong in located
                if n < len(wrong.candidates) and len(wrong.pairs) < args.pairs_per_step]
        for wrong, is_right in zip(wave, check(wave, n, samples, judge, args), strict=True):
            if is_right:
                wrong.pairs.append(make_pair(wrong, wrong.candidates[n]))

    return first_pairs_of_each_problem(located, args.per_problem)


def give_up_repeated_steps(located: list[Wrong]) -> None:
    """Two solutions may share the wrong step and all before it: one of them is enough."""
    seen = set()
    for wrong in located:
        rejected = wrong.before_wrong_step(), simplified(wrong.wrong_step().text)
        if rejected in seen:
            wrong.give_up(Stage.RECTIFIED, "the step is already rejected in another pair")
        seen.add(rejected)


def find_candidates(located: list[Wrong], samples: Samples, args: Namespace) -> None:
    """Sample what may take the place of each wrong step, or give it up."""
    # Those that `locate` drew there are among these, from the cache.
    prefixes = [wrong.before_wrong_step() for wrong in located]
    drawn = samples.draw(prefixes, args.rectify_samples, label="rectify")
    for wrong, found in zip(located, drawn, strict=True):
        wrong.rate_before = pass_rate(found)
        wrong.candidates = candidates_for(wrong, found, args.max_length_ratio)
        if wrong.rate_before == 0:
            wrong.give_up(Stage.RECTIFIED, "no continuation passes")
        elif not wrong.candidates:
            wrong.give_up(Stage.RECTIFIED, "no other step of similar length")


def candidates_for(wrong: Wrong, drawn: list[Sample], max_ratio: float) -> list[list[Step]]:
    """For each different next step, the steps of one solution that passes; the most frequent step first."""
    k, (_, prefix) = wrong.step, wrong.before_wrong_step()
    by_text: dict[str, list[list[Step]]] = {}
    for sample in drawn:
        steps = find_steps(sample.solution) if sample.passes else None
        # The step must begin where the right steps end: a sample may number its steps anew.
        if steps and len(steps) >= k and steps[k - 1].before == prefix:
            by_text.setdefault(simplified(steps[k - 1].text), []).append(steps)

    rejected = simplified(wrong.wrong_step().text)
    kept = []
    for text, solutions in by_text.items():
        if text != rejected and 1 / max_ratio <= len(text) / len(rejected) <= max_ratio:
            kept.append(solutions)
    most_frequent_first = sorted(kept, key=len, reverse=True)
    return [solutions[0] for solutions in most_frequent_first]


def check(wave: list[Wrong], n: int, samples: Samples, judge: Judge | None, args: Namespace) -> list[bool]:
    """Whether the n-th candidate of each is right, by --check."""
    if args.check == "judge":
        beginnings = []
        for wrong in wave:
            up_to_candidate = wrong.candidates[n][:wrong.step]
            beginnings.append((wrong.problem, [step.text for step in up_to_candidate]))
        return [verdict == 0 for verdict in judge.first_errors(beginnings)]

    # A candidate that is the last step is right, because the answer is; the others are gone on from.
    inner = [wrong for wrong in wave if len(wrong.candidates[n]) > wrong.step]
    prefixes = [(wrong.problem, wrong.candidates[n][wrong.step].before) for wrong in inner]
    drawn = samples.draw(prefixes, args.check_rollouts, label="check")
    worse = set()
    for wrong, found in zip(inner, drawn, strict=True):
        if pass_rate(found) < wrong.rate_before:
            worse.add(wrong)
    return [wrong not in worse for wrong in wave]


def make_pair(wrong: Wrong, steps: list[Step]) -> dict:
    """The row of a pair: `steps`, of a solution that passes, are those of the wrong one up to its error."""
    chosen, last = steps[wrong.step - 1], steps[-1]
    passing = last.before + last.text
    prefix = chosen.before
    return {"dataset": wrong.problem.dataset, "prompt": wrong.problem.prompt, "initial_reason_steps": prefix,
            "chosen": chosen.text, "rejected": wrong.wrong_step().text,
            "full_chosen": passing[len(prefix):], "full_rejected": wrong.solution[len(prefix):].rstrip(),
            "answer": wrong.problem.answer}


def first_pairs_of_each_problem(located: list[Wrong], most: int) -> list[dict]:
    """The pairs, at most so many of a problem. Solutions that none is left of are given up."""
    pairs, of_problem = [], Counter()
    for wrong in located:
        kept = wrong.pairs[:most - of_problem[wrong.problem]]
        if not wrong.pairs and not wrong.failed:
            wrong.give_up(Stage.RECTIFIED, "no chosen step passes --check")
        elif wrong.pairs and not kept:
            wrong.give_up(Stage.RECTIFIED, "more than --per-problem")
        pairs += kept
        of_problem[wrong.problem] += len(kept)
    return pairs


def simplified(step: str) -> str:
    return " ".join(step.lower().split())


# --------------------------------------------------------------------------------------------- all the stages


def build(solutions: list[tuple[Problem, Sample]], samples: Samples, judge: Judge | None,
          args: Namespace) -> None:
    """Solutions -> pairs.jsonl in the folder --out, and a count of what fell away where. Collective."""
    wrongs = wrong_solutions(solutions, args)
    usable = going_on(wrongs)
    if args.by == "human":
        sheet = f"{args.out}/located.jsonl"
        new = take_filled_in(sheet, usable)
        wait_for_all()  # before rank 0 adds to what the others read
        write_rows(sheet, [as_row(wrong, args.by) for wrong in new], mode="a")
        print0(f"{sheet}: where step is null, put the number of the first wrong step there (0 if none is); "
               "then run the same command again")
        if not going_on(usable):
            report_counts(len(solutions), wrongs, args)
            return
    else:
        locate(usable, samples, judge, args)
        write_rows(f"{args.out}/located_by_{args.by}.jsonl", [as_row(wrong, args.by) for wrong in wrongs])

    pairs = rectify(going_on(usable), samples, judge, args)
    write_rows(f"{args.out}/pairs.jsonl", pairs)
    report_counts(len(solutions), wrongs, args)
    of_problems = len({pair["prompt"] for pair in pairs})
    print0(f"{len(pairs)} pairs of {of_problems} problems -> {args.out}/pairs.jsonl")


def as_row(wrong: Wrong, by: str) -> dict:
    """What located*.jsonl says of a wrong solution."""
    return {"step": wrong.step, "status": wrong.status or "located", "by": by, **wrong.problem._asdict(),
            "solution": wrong.solution, "certainty": wrong.certainty, "passed": wrong.passed,
            "drawn": wrong.drawn}


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def write_rows(path: str, rows: list[dict], mode: str = "w") -> None:
    """On rank 0: write a JSONL file, completely or not at all ("w"), or add lines at its end ("a")."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if mode == "w":
        write_atomically(path, text)
    elif rows:
        if os.path.exists(path) and not read_bytes(path).endswith(b"\n"):
            text = "\n" + text  # an editor has left the last line without its end
        add_lines(path, text)


def report_counts(solutions: int, wrongs: list[Wrong], args: Namespace) -> None:
    """Print how many are left after each stage, and why the others are not."""
    left = len(wrongs)
    lines = [f"{'solutions':12}{solutions:7,}", f"{'wrong':12}{left:7,}"]
    for stage in Stage:
        if stage is Stage.AGREED and args.by != "both":
            continue
        reasons = Counter(wrong.reason for wrong in wrongs if wrong.failed is stage)
        left -= reasons.total()
        lines.append(f"{stage.value:12}{left:7,}")
        for reason, count in sorted(reasons.items()):
            lines.append(f"{'':12}{-count:7,}  {reason}")
    print0(*lines)
