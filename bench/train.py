#!/usr/bin/env python3
"""Whole optimizer steps, ours against TRL's DPOTrainer: pairs per second, peak memory, and the same numbers.

    python bench/corrupted_pairs.py gsm8k_train.jsonl pairs.jsonl
    python bench/train.py --model SmolLM2-135M-Instruct --data pairs.jsonl                       # CPU, fp32
    python bench/train.py --shape qwen2-7b --model ANY_CHAT_MODEL --data pairs.jsonl --batch-size 64   # GPU
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
- Reference: "with reference" spreads the one reference pass over --epochs epochs. On CUDA both compile in it.
- Memory: CUDA: the most ever allocated; CPU: the process's peak resident size (VmHWM, because the ru_maxrss
  of a child includes its parent's). Loading and the reference pass are part of the run, exporting is not.
- MFU: 6 (N processed + V D trained) FLOPs per step over the GPU's dense peak. N: the parameters but embedding
  and head; processed: all tokens of the policy's forward, padding included; trained: the tokens that need the
  head. Not counted: recomputation, attention scores, TRL's second model. "useful" counts each prefix once and
  no padding: it compares methods, not kernels.
"""
import argparse
import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
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
from statistics import mean, median, quantiles

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

_QWEN2 = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "vocab_size", "tie_word_embeddings")
SHAPES = {name: dict(zip(_QWEN2, values, strict=True)) for name, values in {
    "qwen2-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2-72b": (8192, 29568, 80, 64, 8, 152064, False)}.items()}
PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "liger-kernel", "cut-cross-entropy",
            "quack-kernels", "nvidia-cutlass-dsl")
PEAK = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362}  # dense bf16 TFLOP/s (SXM)

OOM = "out of memory"
KINDS = {  # of work, by the names of CPU operators and CUDA kernels; the first that matches counts
    "communication": "nccl|gloo|c10d",
    "matrix products": r"\b(add|b)?mm_?\b|gemm|nvjet|cutlass|xmma",
    "attention": "attention|flex",
    "row kernels of the head": "_fold_kernel|_dtile_kernel",
    "copies": r"copy|\bcat\b|chunk_cat|fill_|zero_|Memcpy|Memset|CatArray|FillFunctor",
}

# ---------------------------------------------------------------------------------- shared with other scripts


def environment() -> dict:
    """What a number means nothing without: device, versions, date, command."""
    import torch
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = f"CPU ({os.cpu_count()} cores)"
    with open("/proc/cpuinfo") as file:
        if found := re.search(r"model name\s*: (.*)", file.read()):
            device = f"{found[1]} ({os.cpu_count()} cores)"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    place = device.lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"  # in names of files
    return {"device": device, "place": place, "cuda": torch.cuda.is_available(), "versions": versions,
            "date": datetime.datetime.now().isoformat(timespec="minutes"),
            "command": shlex.join(["python", *sys.argv]), "load_before": os.getloadavg()[0]}


def announced_environment() -> dict:
    """`environment`, printed before anything is timed, with a warning if other work would disturb."""
    found = environment()
    print(f"{found['device']}, {found['date']}, load {found['load_before']:.1f} before the start, "
          + ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    if found["load_before"] > 0.5 and not found["cuda"]:
        print("WARNING: other work runs on this machine; do not quote these times")
    return found


def write(path: str, result: dict) -> None:
    from data import write_whole
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_whole(path, json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {path}")


def sizes(config) -> tuple[int, int]:
    """(parameters but embedding and head, V D) of a model of this configuration; nothing is allocated."""
    import torch
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    return sum(p.numel() for p in model.parameters() if p not in ends), ends.pop().numel()


def seconds(run) -> float:
    import torch
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def peak_bytes() -> int:
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s*(\d+) kB", file.read())[1]) * 1024


# ----------------------------------------------------------------------------- the runs, each its own process


def seconds_of(function, record: dict, key: str):
    """The function, adding the seconds that each call takes to record[key]."""
    import torch

    @functools.wraps(function)
    def timed(*args, **kwargs):
        began = time.perf_counter()
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        record[key] = record.get(key, 0) + time.perf_counter() - began
        return result
    return timed


def run_ours(spec: dict) -> dict:
    """stepdpo.py with these flags; it tells time, loss and gradient norm in metrics.jsonl."""
    import stepdpo
    record, step_logps = {"tokens": 0, "trained": 0}, stepdpo.step_logps

    def counting(token_logps, batch):
        if token_logps.requires_grad:  # not in the reference pass
            record["tokens"] += batch.input_ids.numel()
            record["trained"] += len(batch.targets)
        return step_logps(token_logps, batch)

    stepdpo.step_logps = counting
    stepdpo.reference_logps = seconds_of(stepdpo.reference_logps, record, "reference_seconds")
    stepdpo.export = lambda *_: None  # not a part of any step
    out = os.path.join(spec["folder"], "out")
    stepdpo.train(stepdpo.parse(["--model", spec["model"], "--data", spec["data"], "--output-dir", out,
                                 *spec["common"], *spec["flags"]]))
    with open(os.path.join(out, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    return record | {"seconds": [spec["batch"] / line["pairs_per_second"] for line in lines],
                     **{key: [line[key] for line in lines] for key in ("loss", "grad_norm")}}


def run_profile(spec: dict) -> dict:
    """The last step: seconds of work by KINDS, FLOPs of the matrix products, and the rate of a bare one."""
    import torch

    import stepdpo
    cuda, log = torch.cuda.is_available(), stepdpo.log
    profiler = torch.profiler.profile(record_shapes=True, with_flops=True)

    def log_and_profile(out, line):
        log(out, line)
        if line["step"] == spec["steps"] - 2:
            profiler.start()
        elif line["step"] == spec["steps"] - 1:
            profiler.stop()

    stepdpo.log = log_and_profile
    record, kinds, flops = run_ours(spec), dict.fromkeys([*KINDS, "the rest"], 0.0), 0
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "the rest")
        flops += event.flops if kind == "matrix products" else 0
        if cuda == (event.device_type == torch.autograd.DeviceType.CUDA):
            took = event.self_device_time_total if cuda else event.self_cpu_time_total  # microseconds
            kinds[kind] += took / 1e6
    n, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = torch.randn(2, n, n, dtype=dtype, device="cuda" if cuda else "cpu")
    bare = median(seconds(lambda: torch.mm(a, b)) for _ in range(8))
    return {"seconds": record["seconds"][-1], "unprofiled_seconds": record["seconds"][-2],
            "kinds": kinds, "flops": flops, "bare_flops_per_second": 2 * n**3 / bare}


def run_trl(spec: dict) -> dict:
    """DPOTrainer with these options on the same token ids in the same order, at the same learning rates."""
    import torch
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    import data
    import stepdpo
    config = stepdpo.parse(["--model", spec["model"], "--data", spec["data"], "--output-dir", spec["folder"],
                            *spec["common"]])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    pairs, _ = data.encode(data.read_rows(spec["data"]), tokenizer, config.template, config.instruction,
                           config.span, config.max_length)
    plan = data.schedule(len(pairs), config.batch_size, config.epochs, config.seed)
    rows = [dict(prompt_ids=pairs[i].prefix, chosen_ids=pairs[i].chosen, rejected_ids=pairs[i].rejected)
            for indices in plan for i in indices]
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
                step, len(plan), config) / config.learning_rate)
            return self.lr_scheduler

    Trainer._precompute_ref_logps = seconds_of(DPOTrainer._precompute_ref_logps, record, "reference_seconds")

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            record["seconds"].append(time.perf_counter() - self.began)

    micro = spec["options"].pop("micro_batch")
    trainer = Trainer(spec["model"], args=DPOConfig(
        output_dir=spec["folder"], beta=config.beta, learning_rate=config.learning_rate, num_train_epochs=1,
        per_device_train_batch_size=micro, gradient_accumulation_steps=config.batch_size // micro,
        train_sampling_strategy="sequential", max_length=config.max_length,
        max_grad_norm=config.max_grad_norm, bf16=config.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(), logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, **spec["options"]),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return record | {key: [line[key] for line in logs] for key in ("loss", "grad_norm")}


def run_random(spec: dict) -> dict:
    """A folder with random bf16 weights of that shape, and the tokenizer of another model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[spec["shape"]], rope_theta=1e6, max_position_embeddings=32768)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(spec["folder"], max_shard_size="4GB")
    AutoTokenizer.from_pretrained(spec["model"]).save_pretrained(spec["folder"])
    return {}


def worker(path: str) -> None:
    with open(path) as file:
        spec = json.load(file)
    run = {"ours": run_ours, "profile": run_profile, "trl": run_trl, "random": run_random}[spec["kind"]]
    result = run(spec)
    with open(path + ".result", "w") as file:
        json.dump(result | {"peak_bytes": peak_bytes()}, file)


def start(spec: dict) -> dict:
    """Run a worker to its end. {"failed": why} if it did not get there; out of memory is a result too."""
    path = os.path.join(spec["folder"], "spec.json")
    with open(path, "w") as file:
        json.dump(spec, file)
    env = {**os.environ, "STEPDPO_CACHE": spec["folder"]}  # an empty one: the reference pass is timed
    env.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one device; with several TRL refuses to start
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


def finished_before(path: str, key: dict) -> dict[tuple[int, str], dict]:
    """(round, name) -> run, of this very command and code if it was stopped; else the file starts anew."""
    for name in ("bench/train.py", "data.py", "kernels.py", "stepdpo.py"):
        with open(os.path.join(os.path.dirname(HERE), name), "rb") as file:
            key[name] = hashlib.sha256(file.read()).hexdigest()
    first, kept = json.dumps(key) + "\n", []
    if os.path.exists(path):
        with open(path) as file:
            before, *lines = [line for line in file if line.endswith("\n")] or [""]
        if before == first:
            kept = [line for line in lines if json.loads(line)[2].get("failed", OOM) == OOM]
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w") as file:
        file.writelines([first, *kept])
    return {(n, name): run for n, name, run in map(json.loads, kept)}


# -------------------------------------------------------------------------------------------------- the table


def settings(args: argparse.Namespace, cuda: bool) -> list[dict]:
    """[name -> its part of a spec, name -> why it cannot run here]."""
    other = {"ours, no checkpointing": "--no-activation-checkpointing"} if cuda else \
            {"ours, checkpointing": "--activation-checkpointing"}
    ours = {"ours": "", "ours, prefix not shared": "--no-share-prefix", **other,
            **{f"ours, {f}": f for f in args.ours}}
    specs = {name: dict(kind="ours", flags=shlex.split(flags)) for name, flags in ours.items()}
    usual = math.gcd(8, args.batch_size)  # TRL's default, or what the same global batch can be cut into
    trl = {"trl": dict(micro_batch=usual),
           "trl, precomputed": dict(micro_batch=usual, precompute_ref_log_probs=True)}
    for micro in {math.gcd(n, args.batch_size): 0 for n in args.trl_micro_batch}:
        options = dict(micro_batch=micro, precompute_ref_log_probs=True, gradient_checkpointing=False)
        trl[f"trl, precomputed, no checkpointing, by {micro}"] = options
        trl[f"trl, precomputed, no checkpointing, liger, by {micro}"] = {**options, "use_liger_kernel": True}
    missing = {}
    for name, options in trl.items():
        if not importlib.util.find_spec("trl"):
            missing[name] = "not installed: pip install trl"
        elif "liger" in name and not cuda:
            missing[name] = "needs CUDA"
        elif "liger" in name and not importlib.util.find_spec("liger_kernel"):
            missing[name] = "not installed: pip install liger-kernel"
        else:
            specs[name] = dict(kind="trl", options=options)
    wanted = {name for name in specs | missing if re.search(args.only, name)}
    return [{name: x[name] for name in x if name in wanted} for x in (specs, missing)]


def rates(rounds: list[dict], args: argparse.Namespace) -> list[float]:
    """Pairs per second of each run, by the median of its steps that count."""
    return [args.batch_size / median(run["seconds"][args.warmup:]) for run in rounds]


def summarize(runs: dict[str, list], args: argparse.Namespace, flops: dict, peak: float | None) -> dict:
    """Medians over the rounds of each setting that ran; ratios to TRL's defaults, within rounds."""
    per_pair = args.batch_size * (args.warmup + args.steps)
    table, ours = {}, runs.get("ours", [None])[0]
    for name, rounds in runs.items():
        apart = [max(abs(a - b) for a, b in zip(ours[key], rounds[0][key], strict=True)) if ours else None
                 for key in ("loss", "grad_norm")]
        each, tokens = rates(rounds, args), rounds[0]["tokens"] / per_pair
        rate = median(each)
        reference = [run["reference_seconds"] / per_pair for run in rounds if "reference_seconds" in run]
        ratios = [a / b for a, b in zip(each, rates(runs.get("trl", []), args), strict=False)]
        work = flops["body"] * tokens + flops["head"] * rounds[0]["trained"] / per_pair
        table[name] = {
            "pairs_per_second": rate, "lowest": min(each), "highest": max(each),
            "times_trl": median(ratios) if ratios else None,
            "with_reference": 1 / (1 / rate + median(reference) / args.epochs) if reference else rate,
            "peak_gb": max(run["peak_bytes"] for run in rounds) / 1e9, "tokens_per_pair": tokens,
            "mfu": rate * work / peak if peak else None,
            "useful_mfu": rate * flops["useful"] / peak if peak else None,
            "loss_differs": apart[0], "norm_differs": apart[1] / max(ours["grad_norm"]) if ours else None}
    return table


def print_table(table: dict, absent: dict[str, str], peak: float | None) -> None:
    wide = max(map(len, [*table, *absent]))
    print(f"\n{'':{wide}}  pairs/s  (range)        x trl  with reference  peak GB  tokens/pair    MFU  "
          "useful  differs: loss, norm")
    for name, row in table.items():
        ratio = f"{row['times_trl']:.2f}" if row["times_trl"] else "-"
        shares = [f"{row[k]:.1%}" if peak else "-" for k in ("mfu", "useful_mfu")]
        apart = [f"{row[k]:.0e}" if row[k] is not None else "-" for k in ("loss_differs", "norm_differs")]
        spread = f"({row['lowest']:.3g} - {row['highest']:.3g})"
        print(f"{name:{wide}}  {row['pairs_per_second']:7.3g}  {spread:13s} {ratio:>6s}  "
              f"{row['with_reference']:14.3g}  {row['peak_gb']:7.2f}  {row['tokens_per_pair']:11.0f}  "
              f"{shares[0]:>5s}  {shares[1]:>6s}  {apart[0]:>13s} {apart[1]:>5s}")
    for name, why in absent.items():
        print(f"{name:{wide}}  {why}")


def print_profile(run: dict) -> None:
    busy, products = sum(run["kinds"].values()), run["kinds"]["matrix products"]
    for kind, took in sorted(run["kinds"].items(), key=lambda item: -item[1]):
        print(f"{kind:24s} {took:8.3f} s {took / busy:6.1%}")
    print(f"{busy:.2f} s of work in a step of {run['seconds']:.2f} s (the step before, without the profiler: "
          f"{run['unprofiled_seconds']:.2f} s). The matrix products run at "
          f"{run['flops'] / products / 1e12:.3g} TFLOP/s, one large one alone at "
          f"{run['bare_flops_per_second'] / 1e12:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder; with --shape only its tokenizer")
    parser.add_argument("--shape", choices=list(SHAPES)[:3], help="random weights of that shape")
    parser.add_argument("--data", required=True, help="step pairs, .jsonl")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per optimizer step [16]")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps that count, per run [3]")
    parser.add_argument("--warmup", type=int, help="steps before them [1; on CUDA 3, which compile]")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each setting, alternating [3]")
    parser.add_argument("--epochs", type=int, default=8, help="to spread the reference pass over [8]")
    parser.add_argument("--learning-rate", type=float, default=5e-6, help="so high that losses move [5e-6]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="[bfloat16 on CUDA, else float32]")
    parser.add_argument("--ours", action="append", default=[], metavar="FLAGS",
                        help='also ours with these flags; write --ours="--compile"')
    parser.add_argument("--trl-micro-batch", type=int, nargs="+", default=[8],
                        help="pairs per micro-batch of TRL's best settings, each is tried [8, TRL's default]")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the settings whose name matches")
    parser.add_argument("--profile", action="store_true",
                        help="no comparison: the last of --warmup + --steps steps of ours by kinds of work")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU; known: " + ", ".join(PEAK))
    parser.add_argument("--out", help="JSON [bench/results/train-MODEL-DEVICE.json]")
    args = parser.parse_args()

    from transformers import AutoConfig, AutoTokenizer, Qwen2Config

    import data
    found = announced_environment()
    cuda = found["cuda"]
    args.warmup = args.warmup if args.warmup is not None else 3 if cuda else 1
    dtype = args.dtype or ("bfloat16" if cuda else "float32")
    need = args.batch_size * (args.warmup + args.steps)
    rows = data.read_rows(args.data)
    pairs, _ = data.encode(rows, AutoTokenizer.from_pretrained(args.model), "chat", None, "step", 1024)
    if args.profile and args.warmup + args.steps < 2:
        parser.error("--profile needs --warmup + --steps of at least 2")
    if len(pairs) < need:
        parser.error(f"{args.data}: {len(pairs)} pairs; --batch-size x (--warmup + --steps) are {need}")
    fit, pairs = {pair.where for pair in pairs[:need]}, pairs[:need]
    config = Qwen2Config(**SHAPES[args.shape]) if args.shape else AutoConfig.from_pretrained(args.model)
    body, head = sizes(config)
    lengths = {}
    for key in ("prefix", "chosen", "rejected"):
        n = [len(getattr(pair, key)) for pair in pairs]
        lengths[key] = dict(mean=mean(n), median=median(n), min=min(n), max=max(n),
                            p95=quantiles(n, n=20, method="inclusive")[-1])
    trained = lengths["chosen"]["mean"] + lengths["rejected"]["mean"]
    useful = lengths["prefix"]["mean"] + trained
    flops = {"body": 6 * body, "head": 6 * head, "useful": 6 * (body * useful + head * trained)}
    known = [tflops for gpu, tflops in PEAK.items() if gpu in found["device"]]
    peak = 1e12 * (args.peak_tflops or known[0]) if args.peak_tflops or known else None
    name = args.shape or os.path.basename(os.path.normpath(args.model))
    print(f"model       {name}{' with random weights' if args.shape else ''}, {dtype}: "
          f"{body / 1e6:,.1f}M parameters in the layers, {head / 1e6:,.1f}M in the head\n"
          f"steps       {args.batch_size} pairs each, {args.warmup} + {args.steps} of them in each of "
          f"{args.rounds} rounds")
    for key, n in lengths.items():
        print(f"{key:11s} {n['mean']:.0f} tokens in the mean, from {n['min']} to {n['max']}, median "
              f"{n['median']:.0f}, 95% up to {n['p95']:.0f}")

    what = "profile" if args.profile else "train"
    out = args.out or os.path.join(HERE, "results", f"{what}-{name}-{found['place']}.json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker and the folder go too
    specs, missing = settings(args, cuda)
    runs, failed = {name: [] for name in specs}, {}
    key = {**vars(args), **found["versions"], "device": found["device"], "pairs": data.fingerprint(pairs)}
    kept = {} if args.profile else finished_before(f"{out}.part", key)
    if kept:
        print(f"continuing  with {len(kept)} runs of the same command, the first of "
              f"{min(run['date'] for run in kept.values())}, in {out}.part")
    with tempfile.TemporaryDirectory() as folder:
        model, chosen = os.path.abspath(args.model), os.path.join(folder, "pairs.jsonl")
        with open(chosen, "w") as file:
            file.writelines(json.dumps(row) + "\n" for where, row in rows if where in fit)
        if args.shape:
            model = os.path.join(folder, "model")
            os.mkdir(model)
            made = start(dict(kind="random", folder=model, shape=args.shape, model=args.model))
            if "failed" in made:
                sys.exit(f"train: cannot make the random model: {made['failed']}")
        common = ["--batch-size", str(args.batch_size), "--epochs", "1", "--dtype", dtype,
                  "--learning-rate", str(args.learning_rate)]
        if args.profile:
            run = start(dict(kind="profile", folder=folder, model=model, data=chosen, common=common,
                             batch=args.batch_size, steps=args.warmup + args.steps, flags=[]))
            if "failed" in run:
                sys.exit(f"train: {run['failed']}")
            print_profile(run)
            return write(out, {**found, "arguments": vars(args), "dtype": dtype, "lengths": lengths, **run})
        for n in range(args.rounds):
            for name in list(specs)[::-1 if n % 2 else 1]:  # back and forth: drift hits all alike
                if name in failed:
                    continue
                if not (run := kept.get((n, name))):
                    with tempfile.TemporaryDirectory(dir=folder) as place:
                        run = start(dict(specs[name], folder=place, model=model, data=chosen, common=common,
                                         batch=args.batch_size))
                    run["date"] = datetime.datetime.now().isoformat(timespec="minutes")
                    with open(f"{out}.part", "a") as file:
                        file.write(json.dumps([n, name, run]) + "\n")
                if "failed" in run:
                    failed[name] = run["failed"]
                    continue
                runs[name].append(run)
                print(f"round {n + 1}     {name}: {rates([run], args)[0]:.3g} pairs/s", flush=True)
    runs = {name: rounds for name, rounds in runs.items() if rounds and name not in failed}

    table = summarize(runs, args, flops, peak)
    print_table(table, missing | failed, peak)
    print(f"{useful:.0f} tokens per pair are useful: each prefix once, no padding.")
    ours, trl = (max((name for name in table if name.startswith(who)), default=None,
                     key=lambda name: table[name]["pairs_per_second"]) for who in ("ours", "trl"))
    if ours and trl:
        times = median(a / b for a, b in zip(rates(runs[ours], args), rates(runs[trl], args), strict=True))
        print(f"The fastest of ours ({ours}) over the fastest of TRL ({trl}): {times:.2f}")
    if broken := [name for name, why in failed.items() if name.startswith("ours") and why != OOM]:
        sys.exit(f"train: {', '.join(broken)} failed; the other runs are kept in {out}.part")
    write(out, {
        **found, "arguments": vars(args), "dtype": dtype, "peak_flops": peak, "lengths": lengths,
        "useful_tokens_per_pair": useful, "flops_per_token": flops, "table": table,
        "missing": missing, "failed": failed, "runs": runs})
    os.remove(f"{out}.part")


if __name__ == "__main__":
    worker(sys.argv[2]) if sys.argv[1:2] == ["worker"] else main()
