#!/usr/bin/env python3
"""Tables 3 and 4 of arXiv:2406.18629 on the demo: what matters in what is trained on?

    sft        supervised on the chosen solutions: the control
    solutions  DPO on right and wrong solutions of the same problems, nothing located: the same wrong ones as
               in the pairs, each against a right one that the model samples on its own
    branches   DPO on whole solutions that part at the located step: the same pairs, `--span solution`
    step       Step-DPO: the same pairs (demo/args as it is)
    written    Step-DPO, chosen steps written by the problem generator in the model's words
    foreign    Step-DPO, chosen steps written by the problem generator in words that no model was taught

Every kind gets the same learning rates to choose from, by greedy accuracy on development problems that are
in no other file; the best one is then trained with each seed and judged on test problems. All runs have the
same number of pairs, optimizer steps and batches, and all but `sft` the recipe of demo/args, its beta too.
`sft` is demo/sft.py: a mean over tokens, AdamW as in pre-training. Runs that are there are not repeated.

    python demo/claims.py                                          # as many runs at a time as cores
    python demo/claims.py --tempting 0.3 --kinds solutions step    # problems with more places to slip at

With --tempting the pairs are made anew: the generator, which knows, names the first wrong steps; and only of
problems that the model can solve, or `solutions` would have nothing to take.
"""

import argparse
import math
import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import make
import sft
import torch
from errors import first_errors
from transformers import AutoModelForCausalLM

sys.path.insert(0, make.ROOT)
import data  # noqa: E402
from bench.common import environment, write  # noqa: E402
from pairs.grading import paired_gain  # noqa: E402
from pairs.problems import STEP_PREFIX, find_steps  # noqa: E402
from runtime.commands import run_command  # noqa: E402
from runtime.files import content_key, lock  # noqa: E402
from runtime.rows import read_rows  # noqa: E402
from runtime.templates import read_tokenizer  # noqa: E402
from runtime.weights import model_identity  # noqa: E402

TITLES = {"sft": "supervised, chosen solutions", "solutions": "DPO, right and wrong solutions",
          "branches": "DPO, solutions from the located step on", "step": "Step-DPO",
          "written": "Step-DPO, steps of the generator", "foreign": "Step-DPO, in foreign words"}
FILES = {"branches": "pairs", "step": "pairs"}  # others: of the kind's own name
MODEL, RECIPE = f"{make.HERE}/model", f"{make.HERE}/args"
SAMPLED = 4  # solutions per problem that `solutions` takes its right ones from


# --------------------------------------------------------------------------------------------- running things


def run(log: str, *command: str) -> None:
    """A command in a process of one thread. Its output goes to a file, which is named if it fails."""
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, *command], cwd=make.ROOT, stdout=file, stderr=file,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        sys.exit(f"claims: {' '.join(command)}: failed; see {log}")


def solve(model: str, problems: str, out: str, *flags: str) -> list[dict]:
    """Samples of a model, sampled now unless they were before."""
    run(f"{out}.log", "-m", "pairs", "solve", "--model", model, "--problems", problems, "--instruction", "",
        "--max-new-tokens", make.NEW_TOKENS, "--batch-tokens", "65536", "--out", out, *flags)
    return samples_of(out)


def samples_of(folder: str) -> list[dict]:
    return make.read(f"{folder}/samples.jsonl")[1:]  # after the settings


def answers(model: str, problems: str, out: str) -> list[bool]:
    """Whether a model answers each problem rightly, greedily."""
    rows = solve(model, problems, out, "--samples", "1", "--temperature", "0")
    correct = {row["prompt"]: row["correct"] for row in rows}
    return [correct[row["prompt"]] for row in make.read(problems)]


def of_recipe(flag: str) -> str:
    """A flag's value in demo/args."""
    return re.search(rf"--{flag} (\S+)", Path(RECIPE).read_text())[1]


def write_recipe(work: str) -> None:
    """demo/args without what is measured in between, which is not wanted here."""
    recipe = re.sub(r"--(eval-data|eval-every|test-problems) \S+| *#.*", "", Path(RECIPE).read_text())
    Path(f"{work}/args").write_text(recipe)


def batch_for(rows: int, pairs: int, batch: int) -> int:
    """How many rows to take at a time, to see all in as many optimizer steps as so many pairs in batches."""
    return math.ceil(rows / data.steps_per_epoch(pairs, batch))


def rows_of(args: argparse.Namespace, kind: str) -> str:
    """The file that a kind is trained on."""
    return f"{args.work}/{FILES.get(kind, kind)}.jsonl"


def span_of(kind: str) -> str:
    return "solution" if kind in ("solutions", "branches") else "step"


def trained(args: argparse.Namespace, kind: str, rate: str, seed: int) -> str:
    """Folder of a run, with the trained model/ in it; named after what it is trained on, and how."""
    content = content_key(*(Path(path).read_text() for path in (rows_of(args, kind), f"{args.work}/args")))
    out = f"{args.work}/{kind}-{rate}-{seed}-{content}"
    if os.path.exists(f"{out}/model"):
        return out
    shutil.rmtree(out, ignore_errors=True)  # a run that was stopped
    if kind == "sft":
        # So many rows to a batch that an epoch has as many optimizer steps as the others' have.
        rows = len(make.read(rows_of(args, kind)))
        batch = batch_for(rows, rows, int(of_recipe("batch-size")))
        run(f"{out}.log", "demo/sft.py", "--model", MODEL, "--data", rows_of(args, kind), "--instruction", "",
            "--batch-size", str(batch), "--epochs", of_recipe("epochs"), "--learning-rate", rate,
            "--seed", str(seed), "--out", f"{out}/model")
    else:
        run(f"{out}.log", "stepdpo.py", f"@{args.work}/args", "--data", rows_of(args, kind),
            "--span", span_of(kind), "--learning-rate", rate, "--seed", str(seed), "--output-dir", out)
    return out


def answers_after(args: argparse.Namespace, kind: str, rate: str, seed: int, problems: str) -> list[bool]:
    out = trained(args, kind, rate, seed)
    return answers(f"{out}/model", problems, f"{out}/{Path(problems).stem}")


# ----------------------------------------------------------------------------------------- what is trained on


def solution_of(row: dict, which: str) -> str:
    return row["initial_reason_steps"] + row[f"full_{which}"].removeprefix(row["initial_reason_steps"])


def as_supervised(pair: dict) -> dict:
    """The chosen solution, in the format that demo/sft.py reads."""
    texts = [step.text for step in find_steps(solution_of(pair, "chosen"))]
    steps = [text.split("\nThe answer is:")[0].strip() for text in texts]
    return {"question": pair["prompt"], "answer": "\n".join([*steps, f"#### {pair['answer']}"])}


def right_solutions(args: argparse.Namespace, pairs: list[dict]) -> dict[str, list[str]]:
    """By prompt: different right solutions of the pairs' problems, in random order; some have none."""
    used, right = {pair["prompt"] for pair in pairs}, {}
    rows = [row for row in make.read(f"{args.work}/problems.jsonl") if row["prompt"] in used]
    make.write(f"{args.work}/used.jsonl", rows)
    for row in solve(MODEL, f"{args.work}/used.jsonl", f"{args.work}/sampled", "--samples", str(SAMPLED)):
        if row["prompt"] in used and row["correct"] and not row["cut"]:
            right.setdefault(row["prompt"], {})[row["solution"]] = None
    rng = random.Random(make.SEED)
    return {prompt: rng.sample(list(found), len(found)) for prompt, found in right.items()}


def as_solutions(pairs: list[dict], right: dict[str, list[str]]) -> list[dict]:
    """Each pair's wrong solution against a right one that was sampled on its own. Different ones for pairs of
    one problem, as far as there are; a problem without any gives the branch that was sampled for the pair."""
    rows = []
    for n, pair in enumerate(pairs):
        own = right.get(pair["prompt"]) or [solution_of(pair, "chosen")]
        chosen, rejected = own[n % len(own)], solution_of(pair, "rejected")
        rows.append({**pair, "initial_reason_steps": STEP_PREFIX,
                     "full_chosen": chosen.removeprefix(STEP_PREFIX).rstrip(),
                     "full_rejected": rejected.removeprefix(STEP_PREFIX).rstrip()})
    return rows


def step_number(pair: dict) -> int:
    return len(find_steps(f"{pair['initial_reason_steps']} ?"))


def by_generator(pairs: list[dict], problems: dict[str, dict], words: str) -> tuple[list[dict], int]:
    """The pairs, each chosen step as the generator writes it: `steps`, or `foreign` words. Where the model's
    earlier steps are not right, it cannot tell the next one, and the pair stays as it is. Returns also how
    many do."""
    rows, kept = [], 0
    for pair in pairs:
        row, k = problems[pair["prompt"]], step_number(pair)
        before = make.results_of(f"{pair['initial_reason_steps']} ?")[:-1]
        if k <= len(row[words]) and before == row["results"][:k - 1]:
            end = f"\nThe answer is: {row['answer']}" if k == len(row[words]) else ""
            rows.append({**pair, "chosen": f" {row[words][k - 1]}{end}"})
        else:
            rows.append(pair)
            kept += 1
    return rows, kept


def pairs_by_generator(model: str, work: str, problems: list[dict]) -> list[dict]:
    """Step pairs whose rejected steps are named by the generator, by way of `--by human`."""
    folder, results = f"{work}/build", {row["prompt"]: row["results"] for row in problems}
    make.write(f"{work}/problems.jsonl", make.only(problems, "prompt", "answer"))
    make.build_pairs(model, f"{work}/problems.jsonl", folder, "--by", "human")
    rows = make.read(f"{folder}/located.jsonl")
    make.write(f"{folder}/located.jsonl", [
        {**row, "step": make.first_wrong(row["solution"], results[row["prompt"]])} for row in rows])
    return make.build_pairs(model, f"{work}/problems.jsonl", folder, "--by", "human")


# --------------------------------------------------------------------------------------------------- the runs


def prepare(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Write all files that are trained on and solved. Returns what a reader wants to know about them, and the
    test problems."""
    tempting = make.TEMPTING if args.tempting is None else args.tempting
    sets = make.problem_sets(make.SEED, tempting, dev=args.dev_problems)
    for name in ("dev", "test", "problems"):
        make.write(f"{args.work}/{name}.jsonl", make.only(sets[name], "prompt", "answer"))
    write_recipe(args.work)

    pairs, copies = make.read(f"{make.HERE}/pairs.jsonl"), 0
    if args.tempting is not None or "solutions" in args.kinds:
        count = len(pairs)
        if args.tempting is not None:
            pairs = pairs_by_generator(MODEL, args.work, sets["problems"])
        right = right_solutions(args, pairs)
        if args.tempting is not None:
            pairs = [pair for pair in pairs if pair["prompt"] in right][:count]
        make.write(f"{args.work}/solutions.jsonl", as_solutions(pairs, right))
        copies = sum(pair["prompt"] not in right for pair in pairs)
    make.write(f"{args.work}/pairs.jsonl", pairs)
    make.write(f"{args.work}/sft.jsonl", [as_supervised(pair) for pair in pairs])

    problems, kept = {row["prompt"]: row for row in sets["problems"]}, {}
    for kind, words in (("written", "steps"), ("foreign", "foreign")):
        rows, kept[kind] = by_generator(pairs, problems, words)
        make.write(f"{args.work}/{kind}.jsonl", rows)
    return {"tempting": tempting, "pairs": len(pairs), "branches_among_solutions": copies,
            "kept": kept}, sets["test"]


def run_all(args: argparse.Namespace) -> tuple[list[bool], dict, dict, dict]:
    """(untrained answers, kind -> rate -> right of dev, kind -> best rate, kind -> answers by seed)."""
    pool = ThreadPoolExecutor(os.cpu_count())
    dev, test = f"{args.work}/dev.jsonl", f"{args.work}/test.jsonl"
    try:
        untrained = pool.submit(answers, MODEL, test, f"{args.work}/untrained")
        jobs = {(kind, rate): pool.submit(answers_after, args, kind, rate, args.seeds[0], dev)
                for kind in args.kinds for rate in args.rates}
        tuned = {kind: {rate: sum(jobs[kind, rate].result()) for rate in args.rates} for kind in args.kinds}
        best = {kind: max(right, key=right.get) for kind, right in tuned.items()}
        jobs = {(kind, seed): pool.submit(answers_after, args, kind, best[kind], seed, test)
                for kind in args.kinds for seed in args.seeds}
        after = {kind: [jobs[kind, seed].result() for seed in args.seeds] for kind in args.kinds}
        return untrained.result(), tuned, best, after
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------- the share of the gradient


def gradient_shares(args: argparse.Namespace, kind: str, count: int = 100) -> dict[str, float]:
    """How the gradient's norm is shared out to tokens before, in and after the first wrong step.

    Of DPO's loss at the start, where policy and reference are the same, so that the gradient of a pair is
    that of logp(chosen) - logp(rejected) times a constant. The norms of the parts, over their sum, on average
    over pairs. Of a chosen solution that goes another way the step of the same number is meant.
    """
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer, totals = read_tokenizer(MODEL), torch.zeros(3)
    rows = make.read(rows_of(args, kind))[:count]
    steps = [step_number(pair) for pair in make.read(rows_of(args, "step"))[:count]]

    for row, k in zip(rows, steps, strict=True):
        parts = [0.0, 0.0, 0.0]
        for which, sign in (("chosen", 1), ("rejected", -1)):
            logps, part = token_logps(model, tokenizer, row, which, k)
            parts = [total + sign * logps[part == n].sum() for n, total in enumerate(parts)]
        norms = torch.tensor([gradient_norm(model, part) for part in parts])
        totals += norms / norms.sum()
    return dict(zip(("before", "at", "after"), (totals / len(rows)).tolist(), strict=True))


def token_logps(model, tokenizer, row: dict, which: str, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all tokens that follow the shared steps, EOS too: logps, and 0, 1 or 2 where they stand before, in
    or after step k."""
    opened, solution = data.open_turn(tokenizer, row["prompt"], "chat", ""), solution_of(row, which)
    steps = find_steps(solution)
    ends = [row["initial_reason_steps"], solution]
    if k <= len(steps):
        step = steps[k - 1]
        ends = [row["initial_reason_steps"], step.before, step.before + step.text, solution]
    ids = tokenizer([opened + end for end in ends], add_special_tokens=False).input_ids
    whole = torch.tensor([*ids[-1], tokenizer.eos_token_id])  # which `--span solution` trains too
    place = torch.zeros(len(whole), dtype=torch.long)
    for beginning in ids[1:-1]:
        place[len(beginning):] += 1

    logps = model(whole[None]).logits[0, :-1].log_softmax(-1).gather(1, whole[1:, None])[:, 0]
    first = len(ids[0])
    return logps[first - 1:], place[first:]


def gradient_norm(model, output) -> float:
    gradients = torch.autograd.grad(output, list(model.parameters()), retain_graph=True, allow_unused=True)
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients if gradient is not None))


# ---------------------------------------------------------------------------------------------- the reporting


def share(right: list) -> float:
    return sum(right) / len(right)


def over_seeds(by_seed: list[list[bool]]) -> list[float]:
    """Of each problem, the share of the seeds after which it is solved."""
    return [share(of_problem) for of_problem in zip(*by_seed, strict=True)]


def percent_gain(before: list, after: list) -> list[float]:
    """(points, low, high): the gain paired by problem, with its 95% interval."""
    return [round(100 * x, 1) for x in paired_gain(before, after)]


def trained_tokens(args: argparse.Namespace, kind: str) -> int:
    """Tokens per pair that carry a loss."""
    tokenizer, path = read_tokenizer(MODEL), rows_of(args, kind)
    if kind == "sft":
        examples = [sft.encode(tokenizer, row, path, "") for row in make.read(path)]
        return round(sum(len(example.ids) - example.question for example in examples) / len(examples))
    pairs = data.encode(read_rows(path), tokenizer, "chat", "", span_of(kind))
    return round(sum(len(pair.chosen) + len(pair.rejected) for pair in pairs) / len(pairs))


def by_length(lengths: list[int], right: list) -> dict[int, float]:
    """Accuracy on the problems of each number of steps."""
    return {n: share([r for length, r in zip(lengths, right, strict=True) if length == n])
            for n in sorted(set(lengths))}


def measure(args: argparse.Namespace) -> dict:
    """All that is reported."""
    report, test = prepare(args)
    before, tuned, best, after = run_all(args)
    mean = {kind: over_seeds(by_seed) for kind, by_seed in after.items()}

    errors = {"nothing": first_errors(samples_of(f"{args.work}/untrained"), test)}
    for kind in args.kinds:
        of_seeds = [first_errors(samples_of(f"{trained(args, kind, best[kind], seed)}/test"), test)
                    for seed in args.seeds]
        errors[kind] = {place: share([found[place] for found in of_seeds]) for place in of_seeds[0]}

    lengths, accuracy = [len(row["results"]) for row in test], {"nothing": before, **mean}
    return {**report, "problems": len(before), "before": sum(before), "seeds": args.seeds, "best": best,
            "right": {kind: [sum(right) for right in by_seed] for kind, by_seed in after.items()},
            "gain": {kind: percent_gain(before, right) for kind, right in mean.items()},
            "step_over": {kind: percent_gain(right, mean["step"]) for kind, right in mean.items()
                          if "step" in mean and kind != "step"},
            "tokens_per_pair": {kind: trained_tokens(args, kind) for kind in args.kinds},
            "gradient": {kind: gradient_shares(args, kind) for kind in args.kinds
                         if span_of(kind) == "solution"},
            "first_errors": errors,
            "accuracy_by_steps": {kind: by_length(lengths, right) for kind, right in accuracy.items()},
            "development": {"problems": args.dev_problems, "right": tuned}}


def show(report: dict) -> None:
    problems, development = report["problems"], report["development"]
    print(f"\n{development['problems']} development problems, right with each learning rate:")
    for kind, found in development["right"].items():
        print(f"  {TITLES[kind]}: {', '.join(f'{rate}: {n}' for rate, n in found.items())}")

    print(f"\n{report['pairs']} pairs, {problems} test problems:\n")
    print("| trained with | tokens with a loss, per pair | learning rate | accuracy by seed | gain | 95% "
          "interval |", "|---|---|---|---|---|---|",
          f"| nothing | | | {report['before'] / problems:.1%} | | |", sep="\n")
    for kind, (points, low, high) in report["gain"].items():
        accuracies = ", ".join(f"{right / problems:.1%}" for right in report["right"][kind])
        print(f"| {TITLES[kind]} | {report['tokens_per_pair'][kind]} | {report['best'][kind]} | {accuracies} "
              f"| {points:+.1f} | {low:+.1f} to {high:+.1f} |")
    for kind, (points, low, high) in report["step_over"].items():
        print(f"Step-DPO over {TITLES[kind]}: {points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}")
    print(f"\nOf the generator's chosen steps {report['kept']} are the model's own all the same, and "
          f"{report['branches_among_solutions']} of the right solutions branches.")

    print("\nThe gradient's norm, shared out to tokens before, in and after the first wrong step:")
    for kind, shares in report["gradient"].items():
        print(f"  {TITLES[kind]}: {', '.join(f'{value:.0%}' for value in shares.values())}")
    print("\nAnswers right, first wrong at a tempting move, elsewhere; right where no move tempts:")
    for kind, found in report["first_errors"].items():
        print(f"  {TITLES.get(kind, kind)}: {', '.join(f'{count:.1f}' for count in found.values())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", default=f"{make.ROOT}/runs/claims", type=os.path.abspath, help="folder of the runs")
    add("--out", help="JSON [bench/results/claims.json, or claims-TEMPTING.json]")
    add("--kinds", nargs="+", choices=list(TITLES), default=list(TITLES), help="rows of the table [all]")
    add("--rates", nargs="+", default=["1.5e-5", "3e-5", "6e-5"], help="learning rates to choose from")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of training; the first one tunes")
    add("--dev-problems", type=int, default=300, metavar="N", help="problems to choose rates by [300]")
    add("--tempting", type=float,
        help="chance that a move is told in tempting words, if its kind has some, as half of them do "
             f"[{make.TEMPTING}, with the demo's pairs]")
    args = parser.parse_args()
    for name in ("kinds", "rates", "seeds"):  # twice the same would train into one folder at once
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))

    report = environment()
    args.work = f"{args.work}/{content_key(str(args.tempting), model_identity(MODEL))}"
    locked = lock(f"{args.work}/.lock")  # noqa: F841  held until this ends
    report |= measure(args)
    show(report)
    suffix = "" if args.tempting is None else f"-{args.tempting:g}"
    write(args.out or f"{make.ROOT}/bench/results/claims{suffix}.json", report)


if __name__ == "__main__":
    run_command("demo/claims.py", main)
