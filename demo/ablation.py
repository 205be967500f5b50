#!/usr/bin/env python3
"""Tables 3 and 4 of arXiv:2406.18629 on the demo: what is trained on, with everything else the same.

    step      Step-DPO: one step, chosen from the model's own continuations        (demo/args as it is)
    solution  DPO on whole solutions, the same pairs: `--span solution`
    written   Step-DPO, chosen steps by the problem generator: right, but in words that the model was never
              taught (`other` of demo/make.py): out of distribution

Every kind gets the same learning rates to choose from, by greedy accuracy on development problems that are
in no other file; the best one is then trained with each seed and judged on demo/test.jsonl. All runs have
the same pairs, optimizer steps, batches and beta (demo/args: chosen for Step-DPO, on the development
problems). Runs that are already there are not repeated.

    python demo/ablation.py          # as many runs at a time as cores, one thread each
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import make

sys.path.insert(0, make.ROOT)
from bench.common import environment, write  # noqa: E402
from pairs.grading import paired_gain  # noqa: E402

KINDS = {"step": "Step-DPO", "solution": "DPO on whole solutions",
         "written": "Step-DPO, chosen steps not its own"}
PAIRS, TEST = f"{make.HERE}/pairs.jsonl", f"{make.HERE}/test.jsonl"
MODEL, RECIPE = f"{make.HERE}/model", f"{make.HERE}/args"


def run(log: str, *command: str) -> None:
    """A command in a process of one thread. Its output goes to a file, which is named if it fails."""
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, *command], cwd=make.ROOT, stdout=file, stderr=file,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        sys.exit(f"ablation: {' '.join(command)}: failed; see {log}")


def answers(model: str, problems: str, out: str) -> list[bool]:
    """Whether a model answers each problem rightly, greedily; sampled now unless it was before."""
    run(f"{out}.log", "-m", "pairs", "solve", "--model", model, "--problems", problems, "--instruction", "",
        "--samples", "1", "--temperature", "0", "--max-new-tokens", "256", "--out", out)
    correct = {row["prompt"]: row["correct"] for row in make.read(f"{out}/samples.jsonl")[1:]}
    return [correct[row["prompt"]] for row in make.read(problems)]


def trained(args: argparse.Namespace, kind: str, rate: str, seed: int) -> str:
    """Folder of a run: metrics.jsonl, model/, ..."""
    out = f"{args.work}/{kind}-{rate}-{seed}"
    if not os.path.exists(f"{out}/model"):
        shutil.rmtree(out, ignore_errors=True)  # a run that was stopped
        pairs = f"{args.work}/written.jsonl" if kind == "written" else PAIRS
        run(f"{out}.log", "stepdpo.py", "@demo/args", "--data", pairs, "--test-problems=", "--learning-rate",
            rate, "--seed", str(seed), "--span", "solution" if kind == "solution" else "step",
            "--output-dir", out, "--max-steps", args.max_steps)
    return out


def answers_after(args: argparse.Namespace, kind: str, rate: str, seed: int, problems: str) -> list[bool]:
    out = trained(args, kind, rate, seed)
    return answers(f"{out}/model", problems, f"{out}/{Path(problems).stem}")


def result_of(step: str) -> str:
    """The number that a step comes to."""
    return step.rpartition("=")[2].split(" ")[0]


def written(pairs: list[dict], problems: list[dict]) -> tuple[list[dict], int]:
    """The pairs, the chosen step in the generator's other words. Where the model's earlier steps are not
    the generator's, it cannot tell the next one, and the pair stays as it is. Returns also how many do."""
    known, rows, kept = {row["prompt"]: row for row in problems}, [], 0
    for pair in pairs:
        row = known[pair["prompt"]]
        before = [line.partition(": ")[2] for line in pair["initial_reason_steps"].splitlines()[1:-1]]
        k = len(before)
        if k < len(row["steps"]) and list(map(result_of, before)) == list(map(result_of, row["steps"][:k])):
            is_last = k + 1 == len(row["steps"])
            end = f"\nThe answer is: {row['answer']}" if is_last else ""
            rows.append({**pair, "chosen": f" {row['other'][k]}{end}"})
        else:
            rows.append(pair)
            kept += 1
    return rows, kept


def content_of_runs(args: argparse.Namespace) -> str:
    """A name for what all runs depend on, so that runs of other pairs, models or recipes stand elsewhere."""
    digest = hashlib.sha256(args.max_steps.encode())
    for file in (PAIRS, RECIPE, f"{MODEL}/model.safetensors"):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:12]


def run_all(args: argparse.Namespace) -> tuple[list[bool], dict, dict, dict]:
    """(untrained answers, kind -> rate -> right of dev, kind -> best rate, kind -> answers by seed)."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        untrained = pool.submit(answers, MODEL, TEST, f"{args.work}/untrained")
        dev = f"{args.work}/dev.jsonl"
        jobs = {(kind, rate): pool.submit(answers_after, args, kind, rate, args.seeds[0], dev)
                for kind in KINDS for rate in args.rates}
        tuned = {kind: {rate: sum(jobs[kind, rate].result()) for rate in args.rates} for kind in KINDS}
        best = {kind: max(right, key=right.get) for kind, right in tuned.items()}
        jobs = {(kind, seed): pool.submit(answers_after, args, kind, best[kind], seed, TEST)
                for kind in KINDS for seed in args.seeds}
        after = {kind: [jobs[kind, seed].result() for seed in args.seeds] for kind in KINDS}
        return untrained.result(), tuned, best, after
    finally:
        pool.shutdown(cancel_futures=True)


def percent_gain(before: list, after: list) -> list[float]:
    return [100 * x for x in paired_gain(before, after)]


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


def table(before: list[bool], best: dict, after: dict) -> list[str]:
    lines = ["| trained with | learning rate | accuracy by seed | mean gain | 95% interval of the gain |",
             "|---|---|---|---|---|", f"| nothing | | {share(before):.1%} | | |"]
    for kind, by_seed in after.items():
        gains = [percent_gain(before, right) for right in by_seed]
        accuracies = ", ".join(f"{share(right):.1%}" for right in by_seed)
        mean = sum(points for points, _, _ in gains) / len(gains)
        intervals = ", ".join(f"{low:+.1f} to {high:+.1f}" for _, low, high in gains)
        lines.append(f"| {KINDS[kind]} | {best[kind]} | {accuracies} | {mean:+.1f} | {intervals} |")
    return lines


def step_over(after: dict) -> dict[str, list[float]]:
    """Step-DPO over each other kind: points and interval, paired by problem, on average over the seeds."""
    shares = {kind: [share(of_problem) for of_problem in zip(*by_seed, strict=True)]
              for kind, by_seed in after.items()}
    return {kind: percent_gain(shares[kind], shares["step"]) for kind in KINDS if kind != "step"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", default=f"{make.ROOT}/runs/ablation", type=os.path.abspath, help="folder of the runs")
    add("--out", default=f"{make.ROOT}/bench/results/ablation.json", help="JSON")
    add("--rates", nargs="+", default=["1e-5", "3e-5", "1e-4"], help="learning rates to choose from")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training; the first one tunes")
    add("--problems", type=int, default=1000, help="development problems")
    add("--max-steps", default="0", help="of stepdpo.py, to try this script")
    args = parser.parse_args()

    found = environment()
    args.work = f"{args.work}/{content_of_runs(args)}"
    os.makedirs(args.work, exist_ok=True)
    sets = make.problem_sets(make.SEED, dev=args.problems)
    make.write(f"{args.work}/dev.jsonl", make.only(sets["dev"], "prompt", "answer"))
    rows, kept = written(make.read(PAIRS), sets["problems"])
    make.write(f"{args.work}/written.jsonl", rows)
    before, tuned, best, after = run_all(args)

    print(f"\n{args.problems} development problems, right with each learning rate:")
    for kind, found in tuned.items():
        print(f"  {KINDS[kind]}: {', '.join(f'{rate}: {n}' for rate, n in found.items())}")
    print(f"\n{len(before)} test problems:\n", *table(before, best, after), sep="\n")
    over = step_over(after)
    for kind, (points, low, high) in over.items():
        print(f"\nStep-DPO over {KINDS[kind]}: {points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}")
    print(f"\nIn the last row {kept} of {len(rows)} chosen steps are the model's own all the same.")
    right = {kind: [sum(each) for each in by_seed] for kind, by_seed in after.items()}
    write(args.out, {**found, "best": best, "problems": len(before), "before": sum(before),
                     "seeds": args.seeds, "step_over": over, "kept": kept, "right": right,
                     "development": {"problems": args.problems, "right": tuned}})


if __name__ == "__main__":
    main()
