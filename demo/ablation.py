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

    python bench/ablation.py          # as many runs at a time as cores, one thread each
"""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "demo")]

import make  # noqa: E402
from train import environment, write  # noqa: E402

import stepdpo  # noqa: E402

KINDS = {"step": "Step-DPO", "solution": "DPO on whole solutions",
         "written": "Step-DPO, chosen steps not its own"}
PAIRS, MODEL, TEST, RECIPE = (os.path.join(ROOT, "demo", name)
                              for name in ("pairs.jsonl", "model", "test.jsonl", "args"))


def run(log: str, *command: str) -> None:
    """A command in a process of one thread. Its output goes to a file, which is named if it fails."""
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        sys.exit(f"ablation: {' '.join(command)}: failed; see {log}")


def answers(model: str, problems: str, out: str) -> list[bool]:
    """Whether a model answers each problem rightly, greedily; sampled now unless it was before."""
    run(out + ".log", "data.py", "solve", "--model", model, "--problems", problems, "--instruction", "",
        "--samples", "1", "--temperature", "0", "--max-new-tokens", "256", "--out", out)
    rows = {row["prompt"]: row["correct"] for row in make.read(out)}
    return [rows[row["prompt"]] for row in make.read(problems)]


def trained(work: str, flags: list[str], kind: str, rate: str, seed: int) -> str:
    """Folder of a run: metrics.jsonl, model/, ..."""
    out = os.path.join(work, f"{kind}-{rate}-{seed}")
    if not os.path.exists(os.path.join(out, "model")):
        shutil.rmtree(out, ignore_errors=True)  # a run that was stopped
        data = os.path.join(work, "written.jsonl") if kind == "written" else PAIRS
        run(out + ".log", "stepdpo.py", "@demo/args", "--data", data, "--test-problems=", "--learning-rate",
            rate, "--seed", str(seed), "--span", "solution" if kind == "solution" else "step",
            "--output-dir", out, *flags)
    return out


def written(pairs: list[dict], problems: list[dict]) -> tuple[list[dict], int]:
    """The pairs, the chosen step in the generator's other words. Where the model's earlier steps are not
    the generator's, it cannot tell the next one, and the pair stays as it is. Returns also how many do."""
    def result(step: str) -> str:
        return step.rpartition("=")[2].split(" ")[0]

    known, rows, kept = {row["prompt"]: row for row in problems}, [], 0
    for pair in pairs:
        row = known[pair["prompt"]]
        before = [line.partition(": ")[2] for line in pair["initial_reason_steps"].splitlines()[1:-1]]
        k = len(before)
        if k < len(row["steps"]) and list(map(result, before)) == list(map(result, row["steps"][:k])):
            last = f"\nThe answer is: {row['answer']}" if k + 1 == len(row["steps"]) else ""
            pair = {**pair, "chosen": f" {row['other'][k]}{last}"}
        else:
            kept += 1
        rows.append(pair)
    return rows, kept


def agree(work: str, max_steps: str) -> None:
    """Runs of other pairs, of another model or recipe must not be taken for these: exits if there are any."""
    files = [Path(path) for path in (PAIRS, RECIPE, os.path.join(MODEL, "model.safetensors"))]
    content = b"".join([*(file.read_bytes() for file in files), max_steps.encode()])
    key, path = hashlib.sha256(content).hexdigest(), Path(work, "key")
    if path.exists() and path.read_text() != key:
        sys.exit(f"ablation: {work} holds runs of other pairs, of another model or recipe; remove it, or "
                 "choose another --work")
    path.write_text(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=os.path.join(ROOT, "runs/ablation"), help="folder of the runs")
    parser.add_argument("--out", default=os.path.join(ROOT, "bench/results/ablation.json"), help="JSON")
    parser.add_argument("--rates", nargs="+", default=["1e-5", "3e-5", "1e-4"],
                        help="learning rates to choose from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                        help="of training; the first one tunes")
    parser.add_argument("--problems", type=int, default=1000, help="development problems")
    parser.add_argument("--max-steps", default="0", help="of stepdpo.py, to try this script")
    args = parser.parse_args()
    work = os.path.abspath(args.work)
    os.makedirs(work, exist_ok=True)

    sets = make.problem_sets(make.SEED, dev=args.problems)
    dev = os.path.join(work, "dev.jsonl")
    make.write(dev, [dict(prompt=row["prompt"], answer=row["answer"]) for row in sets["dev"]])
    rows, kept = written(make.read(PAIRS), sets["problems"])
    make.write(os.path.join(work, "written.jsonl"), rows)
    agree(work, args.max_steps)
    train = partial(trained, work, ["--max-steps", args.max_steps])

    def tune(kind: str, rate: str) -> int:
        out = train(kind, rate, args.seeds[0])
        return sum(answers(os.path.join(out, "model"), dev, os.path.join(out, "dev.jsonl")))

    def test(kind: str, rate: str, seed: int) -> list[bool]:
        out = train(kind, rate, seed)
        return answers(os.path.join(out, "model"), TEST, os.path.join(out, "test.jsonl"))

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        untrained = pool.submit(answers, MODEL, TEST, os.path.join(work, "untrained.jsonl"))
        tuned = {kind: {rate: pool.submit(tune, kind, rate) for rate in args.rates} for kind in KINDS}
        tuned = {kind: {rate: job.result() for rate, job in jobs.items()} for kind, jobs in tuned.items()}
        best = {kind: max(found, key=found.get) for kind, found in tuned.items()}
        jobs = {kind: [pool.submit(test, kind, best[kind], seed) for seed in args.seeds] for kind in KINDS}
        after = {kind: [job.result() for job in found] for kind, found in jobs.items()}
        before = untrained.result()
    finally:
        pool.shutdown(cancel_futures=True)

    def row(name: str, rate: str, results: list[list[bool]]) -> str:
        shares = [f"{sum(result) / len(result):.1%}" for result in results]
        gains = [[100 * x for x in stepdpo.paired_gain(before, result)] for result in results]
        return (f"| {name} | {rate} | {', '.join(shares)} | {mean(points for points, _, _ in gains):+.1f} | "
                + ", ".join(f"{low:+.1f} to {high:+.1f}" for _, low, high in gains) + " |")

    print(f"\n{args.problems} development problems, right with each learning rate:")
    for kind, found in tuned.items():
        print(f"  {KINDS[kind]}: {', '.join(f'{rate}: {n}' for rate, n in found.items())}")
    print(f"\n{len(before)} test problems:\n\n| trained with | learning rate | accuracy by seed | mean gain "
          "| 95% interval of the gain by seed |\n|---|---|---|---|---|")
    print(f"| nothing | | {sum(before) / len(before):.1%} | | |")
    print(*(row(KINDS[kind], best[kind], after[kind]) for kind in KINDS), sep="\n")
    over = {}
    for kind in list(KINDS)[1:]:  # paired by problem, in the mean over the seeds
        shares = [[sum(each) / len(each) for each in zip(*after[which], strict=True)]
                  for which in (kind, "step")]
        over[kind] = [100 * x for x in stepdpo.paired_gain(*shares)]
        points, low, high = over[kind]
        print(f"\nStep-DPO over {KINDS[kind]}: {points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}")
    print(f"\nIn the last row {kept} of {len(rows)} chosen steps are the model's own all the same.")
    write(args.out, environment() | dict(
        best=best, problems=len(before), before=sum(before), seeds=args.seeds, step_over=over, kept=kept,
        right={kind: [sum(result) for result in results] for kind, results in after.items()},
        development=dict(problems=args.problems, right=tuned)))


if __name__ == "__main__":
    main()
