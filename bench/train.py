#!/usr/bin/env python3
"""Whole optimizer steps, ours against TRL's DPOTrainer: pairs per second, peak memory, and the same numbers.

    python bench/corrupted_pairs.py gsm8k_train.jsonl pairs.jsonl
    python bench/train.py --model SmolLM2-135M-Instruct --data pairs.jsonl                       # CPU, fp32
    python bench/train.py --shape qwen2-7b --model ANY_CHAT_MODEL --data pairs.jsonl --batch-size 64   # GPU
    python bench/train.py ... --only '^ours' --other OLD_CHECKOUT    # ours, before and after a change
    python bench/train.py ... --cpu --only '^ours$|CPU'              # does the GPU compute what the CPU does?
    python bench/train.py ... --profile                     # instead: where the time of one step of ours goes

`pip install trl liger-kernel` for the comparison (written for TRL 1.16); what is missing is named. Both get
one device, one process, the same model, pairs, order, global batch, learning rates and precision (fp32, or
bf16 compute over fp32 master weights):

    ours                 stepdpo.py with its defaults (activation checkpointing on CUDA only); also without
                         sharing the prefix, and with the other choice of checkpointing; --ours adds others
    trl                  DPOTrainer's defaults: a second model gives the reference, in every step
    trl, precomputed     reference log-probabilities computed once, before training, as ours are; also without
                         gradient checkpointing by micro-batches of --trl-micro-batch, and with Liger's layer
                         kernels (TRL 1.16 has no Liger loss for DPO: its own chunked head took its place)

- Tokens: TRL would append EOS to each step. It is handed our token ids instead (by overriding one method),
  so no EOS has to be stripped. "differs": the largest difference to ours over all steps, of the loss and
  of the gradient norm (as a share of the largest norm).
- Time: forward, backward, clipping, update. Ours also counts packing; TRL's clock leaves out its collating
  and logging. Each run is a process of its own, and the settings alternate. A run's rate is that of its
  median step after --warmup; the table has the median over rounds, a ratio is the median of those within each
  round. Stopped, the same command goes on from the runs in OUT.part; each run's date is in the JSON.
- Memory: CUDA: the most ever allocated; CPU: the process's peak resident size. Loading and the reference pass
  are part of the run, exporting is not.
- MFU: 6 (N processed + V D trained) FLOPs per step over the GPU's dense peak. N: the parameters but embedding
  and head; processed: all tokens of the policy's forward, padding included; trained: the tokens that need the
  head. Not counted: recomputation, attention scores, TRL's second model.
"""

import argparse
import datetime
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from statistics import mean, median
from typing import Any

import torch
from common import (
    CUDA,
    HERE,
    PEAK_TFLOPS,
    ROOT,
    SHAPES,
    announced_environment,
    peak_bytes,
    seconds,
    sizes,
    write,
)

OOM, OTHER, ON_CPU = "out of memory", "ours, other checkout", "ours, on the CPU in fp32"
KINDS = {  # of work, by the names of CPU operators and CUDA kernels; the first that matches counts
    "communication": "nccl|gloo|c10d",
    "attention": "attention|flash",  # its kernels have cutlass in their names too
    "matrix products": r"\b(add|b)?mm_?\b|gemm|nvjet|cutlass|xmma",
    "row kernels of the head": "_fold_kernel|_dtile_kernel",
    "copies": r"copy|\bcat\b|chunk_cat|index_select|index_add|fill_|zero_|Memcpy|Memset|CatArray|FillFunctor",
}


# ----------------------------------------------------------------------------- the runs, each its own process


def run_ours(spec: dict) -> dict:
    """stepdpo.py with these flags; it tells time, loss and gradient norm in metrics.jsonl."""
    import stepdpo
    record, micro_batches = {"tokens": 0, "trained": 0}, stepdpo.micro_batches

    def counting(*args):
        for indices, batch in micro_batches(*args):
            if torch.is_grad_enabled():  # not in the reference pass
                record["tokens"] += batch.input_ids.numel()
                record["trained"] += len(batch.targets)
            yield indices, batch

    stepdpo.micro_batches = counting
    # Not a part of any step. An older checkout has it in another place.
    home = stepdpo.weights if hasattr(stepdpo, "weights") else stepdpo.storage
    home.export = lambda *_: None
    out = os.path.join(spec["folder"], "out")
    stepdpo.train(stepdpo.parse(["--model", spec["model"], "--data", spec["data"], "--output-dir", out,
                                 *spec["common"], *spec["flags"]]))
    with open(f"{out}/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    return {**record, "seconds": [spec["batch"] / line["pairs_per_second"] for line in lines],
            "loss": [line["loss"] for line in lines], "grad_norm": [line["grad_norm"] for line in lines]}


def run_profile(spec: dict) -> dict:
    """The last step: seconds of work by KINDS, FLOPs of the matrix products, and the rate of a bare one."""
    from runtime import outputs
    log = outputs.log
    profiler = torch.profiler.profile(record_shapes=True, with_flops=True)

    def log_and_profile(config, line):
        log(config, line)
        if line["step"] == spec["steps"] - 2:
            profiler.start()
        elif line["step"] == spec["steps"] - 1:
            profiler.stop()

    outputs.log = log_and_profile
    record, kinds, flops = run_ours(spec), dict.fromkeys([*KINDS, "the rest"], 0.0), 0
    longest = []  # (seconds, calls, name)
    for event in profiler.key_averages():
        if event.is_user_annotation:  # a span of other events
            continue
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "the rest")
        if kind == "matrix products":
            flops += event.flops
        if CUDA == (event.device_type == torch.autograd.DeviceType.CUDA):
            microseconds = event.self_device_time_total if CUDA else event.self_cpu_time_total
            kinds[kind] += microseconds / 1e6
            longest.append((microseconds / 1e6, event.count, event.key))

    n, dtype = (8192, torch.bfloat16) if CUDA else (2048, torch.float32)
    a, b = torch.randn(2, n, n, dtype=dtype, device="cuda" if CUDA else "cpu")
    bare = median(seconds(lambda: torch.mm(a, b)) for _ in range(8))
    return {"seconds": record["seconds"][-1], "unprofiled_seconds": record["seconds"][-2],
            "kinds": kinds, "longest": sorted(longest, reverse=True)[:20],
            "flops": flops, "bare_flops_per_second": 2 * n**3 / bare}


def run_trl(spec: dict) -> dict:
    """DPOTrainer with these options on the same token ids in the same order, at the same learning rates."""
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    import data
    import stepdpo
    config = stepdpo.parse(["--model", spec["model"], "--data", spec["data"], "--output-dir", spec["folder"],
                            *spec["common"]])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    pairs = read_pairs(tokenizer, spec["data"])
    steps = config.epochs * data.steps_per_epoch(len(pairs), config.batch_size)
    order = [pairs[i] for step in range(steps)
             for i in data.indices_of_step(step, len(pairs), config.batch_size, config.seed)]
    rows = [{"prompt_ids": pair.prefix, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
            for pair in order]
    record = {"tokens": 0, "trained": 0, "seconds": []}

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # token ids already: TRL would tokenize text and append EOS to each step

        def compute_loss(self, model, inputs, *args, **kwargs):
            record["tokens"] += inputs["input_ids"].numel()
            record["trained"] += int(inputs["completion_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: stepdpo.learning_rate(
                step, steps, config) / config.learning_rate)
            return self.lr_scheduler

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if CUDA:
                torch.cuda.synchronize()
            record["seconds"].append(time.perf_counter() - self.began)

    micro = spec["options"].pop("micro_batch")
    arguments = DPOConfig(
        output_dir=spec["folder"], beta=config.beta, learning_rate=config.learning_rate, num_train_epochs=1,
        per_device_train_batch_size=micro, gradient_accumulation_steps=config.batch_size // micro,
        train_sampling_strategy="sequential", max_length=config.max_length,
        max_grad_norm=config.max_grad_norm, bf16=config.dtype == "bfloat16", use_cpu=not CUDA,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **spec["options"])
    trainer = Trainer(spec["model"], args=arguments, train_dataset=Dataset.from_list(rows),
                      processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return {**record, "loss": [line["loss"] for line in logs],
            "grad_norm": [line["grad_norm"] for line in logs]}


def run_random(spec: dict) -> dict:
    """A folder with random bf16 weights of that shape, and the tokenizer of another model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[spec["shape"]], rope_theta=1e6, max_position_embeddings=32768)
    with torch.device("cuda" if CUDA else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(spec["folder"], max_shard_size="4GB")
    AutoTokenizer.from_pretrained(spec["model"]).save_pretrained(spec["folder"])
    return {}


def read_pairs(tokenizer, path: str) -> list:
    """The pairs of a file, with the trainer's defaults."""
    import stepdpo
    from runtime import rows
    config = stepdpo.parse(["--model", "-", "--data", path, "--output-dir", "-"])
    return rows.read_pairs(tokenizer, config)[0]


def worker(path: str) -> None:
    with open(path) as file:
        spec = json.load(file)
    if "checkout" in spec:  # and not what common has imported of this one
        for name in [name for name in sys.modules if name.partition(".")[0] == "runtime"]:
            del sys.modules[name]
    sys.path.insert(0, spec.get("checkout", ROOT))
    runs = {"ours": run_ours, "profile": run_profile, "trl": run_trl, "random": run_random}
    result = {**runs[spec["kind"]](spec), "peak_bytes": peak_bytes()}
    with open(path + ".result", "w") as file:
        json.dump(result, file)


def start(spec: dict) -> dict:
    """Run a worker to its end. {"failed": why} if it did not get there; out of memory is a result too."""
    path = os.path.join(spec["folder"], "spec.json")
    with open(path, "w") as file:
        json.dump(spec, file)
    env = {**os.environ, "STEPDPO_CACHE": spec["folder"]}  # an empty one: the reference pass is computed
    env.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one device; with several TRL refuses to start
    env |= spec.get("env", {})
    done = subprocess.run([sys.executable, os.path.abspath(__file__), "worker", path], env=env,
                          capture_output=True, text=True)
    if done.returncode == 0:
        with open(path + ".result") as file:
            return json.load(file)
    if "OutOfMemoryError" in done.stderr:
        return {"failed": OOM}
    if done.returncode == -signal.SIGKILL:
        return {"failed": "killed, most likely because memory ran out"}
    print(done.stderr[-4000:], file=sys.stderr)
    return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}


# ------------------------------------------------------------------------- many runs, in turns, through stops


def settings(args: argparse.Namespace) -> tuple[dict, dict]:
    """name -> its part of a spec, and name -> why it cannot run here."""
    other = "--no-activation-checkpointing" if CUDA else "--activation-checkpointing"
    flags = {"ours": "", "ours, prefix not shared": "--no-share-prefix", f"ours, {other[2:]}": other}
    flags |= {f"ours, {words}": words for words in args.ours}
    specs: dict[str, dict] = {}
    missing = {}
    for name, words in flags.items():
        specs[name] = {"kind": "ours", "flags": shlex.split(words)}
    if args.other:
        specs[OTHER] = {"kind": "ours", "flags": [], "checkout": os.path.abspath(args.other)}

    if args.cpu:
        specs[ON_CPU] = {"kind": "ours", "flags": ["--dtype", "float32"], "env": {"CUDA_VISIBLE_DEVICES": ""}}

    usual = math.gcd(8, args.batch_size)  # TRL's default, or what the same global batch can be cut into
    precomputed = {"precompute_ref_log_probs": True}
    trl = {"trl": {"micro_batch": usual}, "trl, precomputed": {"micro_batch": usual, **precomputed}}
    for wanted in args.trl_micro_batch:
        micro = math.gcd(wanted, args.batch_size)
        options = {"micro_batch": micro, "gradient_checkpointing": False, **precomputed}
        trl[f"trl, precomputed, no checkpointing, by {micro}"] = options
        trl[f"trl, precomputed, no checkpointing, liger, by {micro}"] = {**options, "use_liger_kernel": True}

    for name, options in trl.items():
        if not importlib.util.find_spec("trl"):
            missing[name] = "not installed: pip install trl"
        elif "liger" in name and not (CUDA and importlib.util.find_spec("liger_kernel")):
            missing[name] = "needs CUDA, and pip install liger-kernel"
        else:
            specs[name] = {"kind": "trl", "options": options}

    for found in (specs, missing):
        for name in [name for name in found if not re.search(args.only, name)]:
            del found[name]
    return specs, missing


def finished_before(path: str, key: dict) -> dict[tuple[int, str], dict]:
    """(round, name) -> run, of this very command and code if it was stopped; else the file starts anew."""
    code = [f"{HERE}/train.py", f"{HERE}/common.py"]
    for checkout in filter(None, (ROOT, key["other"])):
        for place in ("*.py", "runtime/*.py"):
            code += sorted(glob.glob(f"{glob.escape(checkout)}/{place}"))
    for name in code:
        with open(name, "rb") as file:
            key[name] = hashlib.sha256(file.read()).hexdigest()
    first, kept = json.dumps(key) + "\n", []
    if os.path.exists(path):
        with open(path) as file:
            lines = [line for line in file if line.endswith("\n")]
        if lines[:1] == [first]:
            kept = [line for line in lines[1:] if json.loads(line)[2].get("failed", OOM) == OOM]
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w") as file:
        file.writelines([first, *kept])
    return {(n, name): run for n, name, run in map(json.loads, kept)}


def run_all(specs: dict, kept: dict, common: dict, part: str, args: argparse.Namespace) -> tuple[dict, dict]:
    """name -> its run of each round, and name -> why it failed. Each finished run is added to `part`."""
    runs, failed = {name: [] for name in specs}, {}
    for n in range(args.rounds):
        for name in list(specs)[::-1 if n % 2 else 1]:  # back and forth: drift hits all alike
            if name in failed:
                continue
            run = kept.get((n, name))
            if run is None:
                with tempfile.TemporaryDirectory() as folder:
                    run = start({**common, **specs[name], "folder": folder})
                run["date"] = datetime.datetime.now().isoformat(timespec="minutes")
                with open(part, "a") as file:
                    file.write(json.dumps([n, name, run]) + "\n")
            if "failed" in run:
                failed[name] = run["failed"]
                continue
            runs[name].append(run)
            print(f"round {n + 1}     {name}: {rate(run, args):.3g} pairs/s", flush=True)
    return {name: rounds for name, rounds in runs.items() if name not in failed}, failed


# -------------------------------------------------------------------------------------------------- the table


def rate(run: dict, args: argparse.Namespace) -> float:
    """Pairs per second, by the median of the steps that count."""
    return args.batch_size / median(run["seconds"][args.warmup:])


def ratio(runs: list[dict], others: list[dict], args: argparse.Namespace) -> float | None:
    """Of two settings' rates: the median of those within each round."""
    if not others:
        return None
    return median(rate(run, args) / rate(other, args) for run, other in zip(runs, others, strict=True))


def summarize(runs: dict[str, list], args: argparse.Namespace, body: int, head: int,
              peak: float | None) -> dict[str, dict[str, Any]]:
    table, pairs = {}, args.batch_size * (args.warmup + args.steps)
    ours = runs.get("ours", [None])[0]
    for name, rounds in runs.items():
        rates, first = [rate(run, args) for run in rounds], rounds[0]
        work = 6 * (body * first["tokens"] + head * first["trained"]) / pairs
        row = {"pairs_per_second": median(rates), "lowest": min(rates), "highest": max(rates),
               "times_trl": ratio(rounds, runs.get("trl", []), args),
               "peak_gb": max(run["peak_bytes"] for run in rounds) / 1e9,
               "tokens_per_pair": first["tokens"] / pairs,
               "mfu": median(rates) * work / peak if peak else None}
        if ours:
            scale = max(ours["grad_norm"])
            row["loss_differs"] = largest_difference(ours["loss"], first["loss"])
            row["norm_differs"] = largest_difference(ours["grad_norm"], first["grad_norm"]) / scale
        table[name] = row
    return table


def largest_difference(some: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


def print_table(table: dict, absent: dict[str, str]) -> None:
    wide = max(len(name) for name in [*table, *absent])

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    print(f"\n{'':{wide}}  pairs/s  (range)        x trl  peak GB  tokens/pair    MFU  differs: loss, norm")
    for name, row in table.items():
        spread = f"({row['lowest']:.3g} - {row['highest']:.3g})"
        times, mfu = shown(row["times_trl"], ".2f"), shown(row["mfu"], ".1%")
        loss, norm = shown(row.get("loss_differs"), ".0e"), shown(row.get("norm_differs"), ".0e")
        print(f"{name:{wide}}  {row['pairs_per_second']:7.3g}  {spread:13s} {times:>6s}  "
              f"{row['peak_gb']:7.2f}  {row['tokens_per_pair']:11.0f}  {mfu:>5s}  {loss:>13s} {norm:>5s}")
    for name, why in absent.items():
        print(f"{name:{wide}}  {why}")


def print_profile(run: dict) -> None:
    busy, products = sum(run["kinds"].values()), run["kinds"]["matrix products"]
    for kind, took in sorted(run["kinds"].items(), key=lambda item: -item[1]):
        print(f"{kind:24s} {took:8.3f} s {took / busy:6.1%}")
    for took, calls, name in run["longest"]:
        print(f"    {took:8.3f} s in {calls:6d} x {name[:90]}")
    print(f"{busy:.2f} s of work in a step of {run['seconds']:.2f} s (the step before, without the profiler: "
          f"{run['unprofiled_seconds']:.2f} s). The matrix products run at "
          f"{run['flops'] / products / 1e12:.3g} TFLOP/s, one large one alone at "
          f"{run['bare_flops_per_second'] / 1e12:.3g}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="model folder; with --shape only its tokenizer")
    add("--shape", choices=SHAPES, help="random weights of that shape")
    add("--data", required=True, help="step pairs, .jsonl")
    add("--batch-size", type=int, default=16, help="pairs per optimizer step [16]")
    add("--steps", type=int, default=3, help="optimizer steps that count, per run [3]")
    add("--warmup", type=int, default=1, help="steps before them [1]")
    add("--rounds", type=int, default=3, help="runs of each setting, alternating [3]")
    add("--learning-rate", type=float, default=5e-6, help="so high that losses move [5e-6]")
    add("--dtype", choices=("float32", "bfloat16"), help="[bfloat16 on CUDA, else float32]")
    add("--ours", action="append", default=[], metavar="FLAGS", help="also ours so: --ours=--compile")
    add("--other", metavar="DIR", help="also ours with its defaults, from another checkout")
    add("--cpu", action="store_true", help="also ours on this machine's CPU, in fp32")
    add("--trl-micro-batch", type=int, nargs="+", default=[8],
        help="pairs per micro-batch of TRL's best settings, each is tried [8, TRL's default]")
    add("--only", default="", metavar="REGEX", help="only the settings whose name matches")
    add("--profile", action="store_true", help="no comparison: the last step of ours by kinds of work")
    add("--peak-tflops", type=float, help="of the GPU; known: " + ", ".join(PEAK_TFLOPS))
    add("--out", help="JSON [bench/results/train-MODEL-DEVICE.json]")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if CUDA else "float32")
    if args.profile and args.warmup + args.steps < 2:
        parser.error("--profile needs --warmup + --steps of at least 2")
    return args


def prepare(args: argparse.Namespace, folder: str) -> tuple[dict, list]:
    """(what all runs have in common, the pairs they train on, which are written into the folder)."""
    from transformers import AutoTokenizer

    from runtime.rows import read_rows
    need = args.batch_size * (args.warmup + args.steps)
    pairs = read_pairs(AutoTokenizer.from_pretrained(args.model), args.data)
    if len(pairs) < need:
        sys.exit(f"train: {args.data}: {len(pairs)} pairs; --batch-size x (--warmup + --steps) are {need}")
    pairs = pairs[:need]
    wanted = {pair.where for pair in pairs}
    rows = [row for where, row in read_rows(args.data) if where in wanted]
    with open(f"{folder}/pairs.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

    model = os.path.abspath(args.model)
    if args.shape:
        model = f"{folder}/model"
        os.mkdir(model)
        made = start({"kind": "random", "folder": model, "shape": args.shape, "model": args.model})
        if "failed" in made:
            sys.exit(f"train: cannot make the random model: {made['failed']}")
    return {"model": model, "data": f"{folder}/pairs.jsonl", "batch": args.batch_size,
            "common": ["--batch-size", str(args.batch_size), "--epochs", "1", "--dtype", args.dtype,
                       "--learning-rate", str(args.learning_rate)]}, pairs


def describe(args: argparse.Namespace, name: str, body: int, head: int, pairs: list) -> None:
    print(f"model       {name}{' with random weights' if args.shape else ''}, {args.dtype}: "
          f"{body / 1e6:,.1f}M parameters in the layers, {head / 1e6:,.1f}M in the head\n"
          f"steps       {args.batch_size} pairs each, {args.warmup} + {args.steps} of them in each run")
    for key in ("prefix", "chosen", "rejected"):
        lengths = [len(getattr(pair, key)) for pair in pairs]
        print(f"{key:11s} {mean(lengths):.0f} tokens on average, from {min(lengths)} to {max(lengths)}")


def print_fastest(table: dict, runs: dict, args: argparse.Namespace) -> None:
    fastest = {}
    for who in ("ours", "trl"):
        of_them = [name for name in table if name.startswith(who)]
        fastest[who] = max(of_them, key=lambda name: table[name]["pairs_per_second"], default=None)
    if all(fastest.values()):
        times = ratio(runs[fastest["ours"]], runs[fastest["trl"]], args)
        print(f"The fastest of ours ({fastest['ours']}) over the fastest of TRL ({fastest['trl']}): "
              f"{times:.2f}")
    if OTHER in table and "ours" in table:
        print(f"ours over ours of the other checkout: {ratio(runs['ours'], runs[OTHER], args):.3f}")


def main() -> None:
    args = parse()
    from transformers import AutoConfig, Qwen2Config

    from runtime.rows import fingerprint
    found = announced_environment()
    name = args.shape or os.path.basename(os.path.normpath(args.model))
    what = "profile" if args.profile else "train"
    out = args.out or f"{HERE}/results/{what}-{name}-{found['place']}.json"
    config = Qwen2Config(**SHAPES[args.shape]) if args.shape else AutoConfig.from_pretrained(args.model)
    body, head = sizes(config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker and the folder go too

    with tempfile.TemporaryDirectory() as folder:
        common, pairs = prepare(args, folder)
        describe(args, name, body, head, pairs)
        if args.profile:
            run = start({**common, "kind": "profile", "folder": folder, "flags": [],
                         "steps": args.warmup + args.steps})
            if "failed" in run:
                sys.exit(f"train: {run['failed']}")
            print_profile(run)
            write(out, {**found, "arguments": vars(args), **run})
            return

        specs, missing = settings(args)
        kept = finished_before(f"{out}.part", {**vars(args), **found["versions"], "device": found["device"],
                                               "pairs": fingerprint(pairs)})
        if kept:
            print(f"continuing  with {len(kept)} runs of the same command, in {out}.part")
        runs, failed = run_all(specs, kept, common, f"{out}.part", args)

    known = [tflops for gpu, tflops in PEAK_TFLOPS.items() if gpu in found["device"]]
    peak = 1e12 * (args.peak_tflops or known[0]) if args.peak_tflops or known else None
    table = summarize(runs, args, body, head, peak)
    print_table(table, missing | failed)
    print_fastest(table, runs, args)
    broken = [name for name, why in failed.items() if name.startswith("ours") and why != OOM]
    if broken:
        sys.exit(f"train: {', '.join(broken)} failed; the other runs are kept in {out}.part")
    write(out, {**found, "arguments": vars(args), "peak_flops": peak, "table": table, "missing": missing,
                "failed": failed, "runs": runs})
    os.remove(f"{out}.part")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2])
    else:
        main()
