#!/usr/bin/env python3
"""The study of this folder on one GPU, in about a quarter of an hour: pairs, three arms, before and after.

    python demo/gsm8k/one_gpu.py --model runs/gsm8k/model --data gsm8k_train.jsonl
    python demo/gsm8k/one_gpu.py --pieces runs/gsm8k/pieces      # if they came in pieces, see pieces.py

It differs from study.py in what a GPU allows. All samples are drawn in this process, without a server. Arms
are trained at the same time. And the clock decides how much is done, so that there is a result in any case:

    before  greedy answers of the model to the held-out rows: the last 500, and 200 that choose the rate
    pairs   `pairs build` on the first rows, chunk by chunk, as long as another one fits, or --aim is reached
    train   every arm with one rate at a time, then with the next; what is not done in time is left out
    after   greedy answers of the trained models, as before

--budget has the seconds of the last three. What is done is kept in --work, so that the same command goes on
after a stop, and the seconds of former calls count.

--call ends a call before it would be killed. Arms that train then are ended, and begin anew in the next call;
so they are only started if they can have all the seconds left to them, or nearly a whole call. What is not
interrupted: joining the pieces, loading a model, and a batch of samples, which may take half a minute.

Pairs are sampled in bf16, the arithmetic of training. Answers are given in fp32, because bf16 would round
away much of what training has changed. Weights, AdamW and what is exported are fp32.
"""

import argparse
import contextlib
import dataclasses
import gc
import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pieces
import study
import torch
from claims import batch_for, content_key, make, percent_gain, samples_of, share, write

from bench.common import announced_environment
from pairs import __main__ as command
from pairs.problems import read_problems
from pairs.sampling import LocalSampler, Settings
from runtime.commands import run_command
from runtime.files import write_atomically
from runtime.templates import read_tokenizer

PARTS = ("pairs", "train", "after")  # which may be cut short
BUDGET = [300, 170, 150]  # seconds of each
AGAIN = "one_gpu: no time is left in this call; the same command goes on"


# -------------------------------------------------------------------------------------------------- the clock


class TimeIsUp(Exception):
    """The budget of a part is spent."""


class Clock:
    """How many seconds each part has taken, in all calls, and what else was found out; kept in a file."""

    def __init__(self, args: argparse.Namespace):
        self.path = f"{args.work}/progress.json"
        self.call_ends = time.monotonic() + args.call
        self.budget = {"before": math.inf, **dict(zip(PARTS, args.budget, strict=True))}
        self.known: dict[str, Any] = {"seconds": dict.fromkeys(("before", *PARTS), 0.0)}
        if os.path.exists(self.path):
            self.known = json.loads(Path(self.path).read_text())

    def keep(self, **found: Any) -> None:
        self.known |= found
        write_atomically(self.path, json.dumps(self.known))

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.name, self.began = name, time.monotonic()
        try:
            yield
        finally:
            self.known["seconds"][name] += time.monotonic() - self.began
            self.keep()

    def spent(self) -> float:
        """Seconds that this part has taken, in all calls."""
        return self.known["seconds"][self.name] + time.monotonic() - self.began

    def left(self) -> float:
        """Seconds that this part may still take."""
        return self.budget[self.name] - self.spent()

    def left_in_call(self) -> float:
        return self.call_ends - time.monotonic()

    def check_call(self) -> None:
        if self.left_in_call() <= 0:
            sys.exit(AGAIN)

    def check(self) -> None:
        self.check_call()
        if self.left() < 0:
            raise TimeIsUp


class Punctual:
    """A sampler that stops when a check of the clock says so. What it has drawn by then is in the cache."""

    def __init__(self, sampler: LocalSampler, check: Callable[[], None]):
        self.sampler, self.check = sampler, check

    def sample(self, wanted: list) -> Iterator[list]:
        self.check()
        drawn = 0
        for batch in self.sampler.sample(wanted):
            drawn += len(batch)
            yield batch
            if drawn < len(wanted):
                self.check()


# ---------------------------------------------------------------------------------------------- before, after


def split(args: argparse.Namespace) -> None:
    """The rows of study.py: the last ones are held out, those before them choose rates."""
    problems = read_problems(args.data)
    rows = make.only([problem._asdict() for problem in problems], "dataset", "prompt", "answer")
    if len(rows) <= args.dev + args.choose:
        sys.exit(f"one_gpu: {args.data} has {len(rows)} problems, and must have more than "
                 f"{args.dev + args.choose}")
    before = zip(rows[:-args.dev - args.choose], problems, strict=False)
    short = [row for row, problem in before if study.is_short(problem.reference or "")]
    make.write(f"{args.work}/train.jsonl", short[:args.problems])
    make.write(f"{args.work}/held_out.jsonl", rows[-args.dev - args.choose:])


def sampling(args: argparse.Namespace, name: str, model: str, problems: str, out: str, dtype: str,
             *flags: str) -> argparse.Namespace:
    """The arguments of `python -m pairs`, as read by itself."""
    return command.parse([name, "--model", model, "--problems", problems, "--out", out, "--dtype", dtype,
                          "--batch-tokens", str(args.batch_tokens), *in_words(args), *flags])


def in_words(args: argparse.Namespace) -> list[str]:
    return [] if args.instruction is None else ["--instruction", args.instruction]


def sampler_of(flags: argparse.Namespace) -> LocalSampler:
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(flags, name) for name in names})
    return LocalSampler(settings, read_tokenizer(flags.model))


def answers(args: argparse.Namespace, clock: Clock, model: str, out: str) -> tuple[list[bool], list[bool]]:
    """Whether a model solves the rows that choose rates, and those of the result. Greedily."""
    flags = sampling(args, "solve", model, f"{args.work}/held_out.jsonl", out, "float32", "--samples", "1",
                     "--temperature", "0", "--max-new-tokens", str(args.answer_tokens))
    command.run(flags, Punctual(sampler_of(flags), clock.check))
    free_memory()
    correct = {row["prompt"]: row["correct"] for row in samples_of(out)}
    right = [correct[row["prompt"]] for row in make.read(f"{args.work}/held_out.jsonl")]
    return right[:args.choose], right[args.choose:]


def free_memory() -> None:
    """Of the GPU, for the processes that train."""
    gc.collect()
    torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------ pairs


def make_pairs(args: argparse.Namespace, clock: Clock) -> None:
    """`pairs build` on more and more rows. How many more is what fits, by the time of the last chunk.

    A chunk that is late makes no pairs, because its rows go through the stages together; those of the chunks
    before it are in the file. So a chunk is half of what fits, and what may be lost is smaller each time.
    """
    rows = make.read(f"{args.work}/train.jsonl")
    flags = sampling(args, "build", args.model, f"{args.work}/problems.jsonl", f"{args.work}/build",
                     args.dtype, *study.BUILD, *args.build)
    sampler = sampler_of(flags)  # one for all chunks, with its model
    done, chunk = clock.known.get("problems", 0), clock.known.get("chunk", args.chunk)
    clock.known.setdefault("chunk_began", clock.spent())  # on this part's clock: a chunk may take two calls
    while chunk:
        end = min(done + chunk, len(rows))
        make.write(f"{args.work}/problems.jsonl", rows[:end])
        try:
            # The first chunk may be late, as there is nothing else to train on.
            command.run(flags, Punctual(sampler, clock.check if done else clock.check_call))
        except TimeIsUp:
            break
        seconds = clock.spent() - clock.known["chunk_began"]
        pairs = len(make.read(f"{args.work}/build/pairs.jsonl"))
        print(f"== {pairs} pairs of {end} problems; the last {end - done} took {seconds:.0f} s", flush=True)

        fits = int(0.45 * clock.left() / (seconds / (end - done)))
        wanted = math.ceil(max(args.aim - pairs, 0) * end / max(pairs, 1))
        done, chunk = end, min(fits, wanted, len(rows) - end)
        if chunk < args.chunk / 4:  # its waves would take as long as those of a large one
            chunk = 0
        clock.keep(problems=done, chunk=chunk, chunk_began=clock.spent())
    clock.keep(pairs=len(make.read(f"{args.work}/build/pairs.jsonl")), chunk=0)


# ------------------------------------------------------------------------------------------------------ train


def training(args: argparse.Namespace, arm: str, rate: str, out: str) -> list[str]:
    """The command that trains an arm. All take as many optimizer steps."""
    rows = f"{args.work}/{study.ROWS.get(arm, 'pairs')}.jsonl"
    common = ["--model", args.model, "--data", rows, "--learning-rate", rate, "--epochs", str(args.epochs),
              "--seed", "0", *in_words(args)]
    if arm == "sft":
        count = len(make.read(rows))
        batch = batch_for(count, count, args.batch_size)
        dtype = "bf16" if args.dtype == "bfloat16" else "fp32"
        return ["demo/sft.py", *common, "--batch-size", str(batch), "--dtype", dtype,
                "--export-dtype", "fp32", "--out", f"{out}/model"]
    # The arms share a GPU, but each would plan its memory as if it were alone, and gather its layers once
    # because that fits. Activation checkpointing, the default on a GPU, does the rest to make them fit.
    return ["stepdpo.py", *common, "--batch-size", str(args.batch_size), "--dtype", args.dtype,
            "--no-gather-once", *study.ARMS[arm], "--output-dir", out]


def train(args: argparse.Namespace, clock: Clock) -> dict[tuple[str, str], str]:
    """By arm and rate the folder of what could be trained in time."""
    study.write_rows(args)
    made = content_key(Path(f"{args.work}/pairs.jsonl").read_text(), str(args.epochs), str(args.batch_size))
    folders = {}
    for rate in args.rates:
        outs = {arm: f"{args.work}/{arm}-{rate}-{made}" for arm in args.arms}
        folders |= {(arm, rate): out for arm, out in outs.items()}
        missing = [arm for arm, out in outs.items() if not os.path.exists(f"{out}/model")]
        if not missing or clock.left() <= 0:
            continue
        if clock.left_in_call() < min(clock.left(), 0.9 * args.call):
            sys.exit(AGAIN)

        running = {}
        for arm in missing:
            shutil.rmtree(outs[arm], ignore_errors=True)  # of a run that was stopped
            running[outs[arm]] = start(training(args, arm, rate, outs[arm]), f"{outs[arm]}.log")
        wait_for_all(running, clock)
    return {key: out for key, out in folders.items() if os.path.exists(f"{out}/model")}


def start(arguments: list[str], log: str) -> subprocess.Popen:
    print("+ python", *arguments, flush=True)
    with open(log, "w") as file:
        return subprocess.Popen([sys.executable, *arguments], cwd=make.ROOT, stdout=file, stderr=file)


def wait_for_all(running: dict[str, subprocess.Popen], clock: Clock) -> None:
    """Until they have ended, or time is up. One that fails is shown, and left out. Ends with the call."""
    try:
        for out, process in running.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                if process.wait(max(min(clock.left(), clock.left_in_call()), 0)):
                    print(f"== {out} failed:", Path(f"{out}.log").read_text()[-2000:], sep="\n", flush=True)
    finally:
        for out, process in running.items():
            if process.poll() is None:
                print(f"== {out}: no time left, ended", flush=True)
                process.kill()
                process.wait()
    clock.check_call()


# ------------------------------------------------------------------------------------------------- the result


def result(args: argparse.Namespace, clock: Clock, before: tuple, after: dict) -> dict[str, Any]:
    """What goes to --out, beside the environment, and the table."""
    found = {}
    for arm in args.arms:
        rates = {rate: right for (kind, rate), right in after.items() if kind == arm}
        if rates:
            best = max(rates, key=lambda rate: sum(rates[rate][0]))
            found[arm] = best, [rates[best][1]]
    untrained = before[1]
    study.print_table(clock.known["pairs"], untrained, found)

    tokens = sum(row["tokens"] for row in samples_of(f"{args.work}/build"))
    arms = {}
    for arm, (rate, (right,)) in found.items():
        chosen_by = {rate: sum(of_rate[0]) for (kind, rate), of_rate in after.items() if kind == arm}
        arms[arm] = {"rate": rate, "right_of_choose_by_rate": chosen_by, "accuracy": share(right),
                     "gain": percent_gain(untrained, right)}
    return {"pairs": clock.known["pairs"], "problems": clock.known["problems"],
            "tokens_sampled": tokens, "tokens_per_second": tokens / clock.known["seconds"]["pairs"],
            "seconds": clock.known["seconds"], "budget": args.budget, "before": share(untrained),
            "arms": arms, "left_out": [f"{arm} at {rate}" for arm in args.arms for rate in args.rates
                                       if (arm, rate) not in after]}


def pack(path: str, packed: str) -> None:
    Path(packed).write_bytes(gzip.compress(Path(path).read_bytes(), mtime=0))


def study_on_one_gpu(args: argparse.Namespace, clock: Clock) -> None:
    environment = announced_environment()  # the version of transformers matters: see README.md
    split(args)
    with clock.part("before"):
        before = answers(args, clock, args.model, f"{args.work}/before")
    of_one_model = clock.known.setdefault("of_one_model", clock.known["seconds"]["before"])

    if "pairs" not in clock.known:
        with clock.part("pairs"):
            make_pairs(args, clock)
        free_memory()
    if not clock.known["pairs"]:
        sys.exit("one_gpu: there are no pairs; give more time to them in --budget, or more problems")

    with clock.part("train"):
        folders = train(args, clock)

    after = {}
    with clock.part("after"):
        for key, folder in folders.items():
            if clock.left_in_call() < min(of_one_model, args.call / 2):
                sys.exit(AGAIN)
            with contextlib.suppress(TimeIsUp):
                after[key] = answers(args, clock, f"{folder}/model", f"{folder}/answers")

    found = result(args, clock, before, after)
    pack(f"{args.work}/pairs.jsonl", f"{args.out.removesuffix('.json')}-pairs.jsonl.gz")
    write(args.out, environment | found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pieces", help="folder of pieces, which are joined in --work first")
    add("--model", help="folder of the model to start from [WORK/model]")
    add("--data", help="problems, as GSM8K's 7,473 of training [WORK/gsm8k_train.jsonl]")
    add("--work", default="runs/one_gpu", help="folder of what lies in between [%(default)s]")
    add("--out", default="bench/results/real.json", help="JSON; the pairs are put beside it [%(default)s]")
    add("--budget", type=float, nargs=3, default=BUDGET, metavar=("PAIRS", "TRAIN", "AFTER"),
        help=f"seconds, in all calls together {BUDGET}")
    add("--call", type=float, default=math.inf, help="seconds of this call at most [no limit]")
    add("--problems", type=int, default=2000, help="rows that pairs are made of at most [2000]")
    add("--aim", type=int, default=1000, help="pairs at most, up to those of the last chunk [1000]")
    add("--chunk", type=int, default=100, help="rows of the first chunk; later ones are what fits [100]")
    add("--dev", type=int, default=study.DEV, help="last rows, for the result [500]")
    add("--choose", type=int, default=study.CHOOSE, help="rows before those, which choose the rate [200]")
    add("--arms", nargs="+", choices=list(study.ARMS), default=["sft", "step", "nll1"],
        help="what is trained [sft step nll1]")
    add("--rates", nargs="+", default=["3e-6", "1e-5"], help="learning rates to choose from [3e-6 1e-5]")
    add("--epochs", type=int, default=study.EPOCHS, help="passes over the pairs [4]")
    add("--batch-size", type=int, default=study.BATCH, help="pairs to an optimizer step [32]")
    cuda = torch.cuda.is_available()
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if cuda else "float32",
        help="of training and of the samples that pairs are made of [bfloat16 on CUDA, else float32]")
    add("--batch-tokens", type=int, default=786432 if cuda else 16384,
        help="samples x (prompt + new tokens) per batch [786432 on CUDA, else 16384]")
    add("--answer-tokens", type=int, default=512, help="of an answer at most, before and after [512]")
    add("--instruction", help="text after the problem, '' for none [the template's own]")
    add("--build", nargs=argparse.REMAINDER, default=[], help="last: other flags of `pairs build`")
    args = parser.parse_args()
    args.model = args.model or f"{args.work}/model"
    args.data = args.data or f"{args.work}/gsm8k_train.jsonl"
    for name in ("model", "data", "work", "out"):
        setattr(args, name, os.path.abspath(getattr(args, name)))
    os.makedirs(args.work, exist_ok=True)
    os.makedirs(os.path.dirname(args.out), exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the clock is kept
    clock = Clock(args)
    if args.pieces:
        pieces.join(args.pieces, args.work)
    study_on_one_gpu(args, clock)


if __name__ == "__main__":
    run_command("demo/gsm8k/one_gpu.py", main)
