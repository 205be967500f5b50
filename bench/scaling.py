#!/usr/bin/env python3
"""How cost grows: with tokens and vocabulary, with the length of the prefix, with processes, with the model.

    python bench/scaling.py --model MODEL [--data pairs.jsonl] [--plot scaling.png]
    python bench/scaling.py --shape qwen2-1.5b --model ANY_CHAT_MODEL          # random weights, a tokenizer
    python bench/scaling.py --model TINY_MODEL --quick --out /tmp/scaling.json                  # seconds

1. Time and memory of `linear_logps`, forward and backward, against T and V. Memory is what is allocated
   beyond inputs and the two gradients: at most what its docstring says, and the same for any V.
2. Forward and backward of pairs of random tokens, with and without sharing the prefix, against its length P
   and that of the steps S. The formula 2(P+S)/(P+2S) counts tokens in the layers; the head's work is the same
   for both, and attention grows faster than the tokens: what is measured may lie on either side of it.
3. stepdpo.py under torchrun with 1, 2, 4 processes, one thread each on a CPU: pairs per second of the same
   global batch; they take turns, medians over --rounds. With more processes than cores or GPUs there is
   nothing to gain, and such a line says so.
4. Arithmetic, no measurement: the head's share of the FLOPs of a step at 7B and 72B, and the hours of the
   paper's runs on 8 GPUs, from the "useful" utilisation of ours with its defaults that bench/train.py
   measured on a GPU, if its JSON lies beside --out.
"""
import argparse
import glob
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from statistics import mean, median

import torch
from loss import peak_bytes
from train import (  # (and the root to import from)
    HERE,
    PEAK,
    SHAPES,
    announced_environment,
    seconds,
    sizes,
    start,
    write,
)
from transformers import AutoTokenizer, Qwen2Config

import data
import kernels
import stepdpo

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def head(shapes: list[tuple[int, int, int]], repeats: int) -> list[dict]:
    rows, dtype = [], torch.bfloat16 if CUDA else torch.float32
    for T, D, V in shapes:
        torch.manual_seed(0)
        with DEVICE:
            hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
            weight = (torch.randn(V, D, dtype=dtype) * D**-0.5).requires_grad_()
            targets = torch.randint(V, (T,))

        def run(hidden=hidden, weight=weight, targets=targets):
            torch.autograd.grad(kernels.linear_logps(hidden, weight, targets).sum(), (hidden, weight))

        run()  # compiles, warms up
        block = min(V, kernels.BLOCK if CUDA else kernels.BLOCK_CPU)
        # its docstring's; with fp32 on a CPU no operand is copied and dhidden is the gradient itself
        formula = T * block * 6 + 2 * T * D * 4 if CUDA else T * block * 4
        rows.append(dict(T=T, D=D, V=V, seconds=median(seconds(run) for _ in range(repeats)),
                         bytes=peak_bytes(run) - (T + V) * D * dtype.itemsize, formula_bytes=formula,
                         logits_bytes=T * V * 4))
    return rows


def sharing(model: str, lengths: list[tuple[int, int]], count: int, repeats: int) -> list[dict]:
    budget = max(4096 if CUDA else 1024, 2 * max(map(sum, lengths)))
    configs = {share: stepdpo.Config(model=model, data="-", output_dir="-", share_prefix=share,
                                     dtype="bfloat16" if CUDA else "float32", tokens_per_micro_batch=budget,
                                     activation_checkpointing=CUDA)  # as by default
               for share in (True, False)}
    policy, rng, rows = stepdpo.build(model, configs[True], DEVICE), random.Random(0), []
    for P, S in lengths:
        def ids(n):
            return rng.choices(range(policy.config.vocab_size), k=n)  # noqa: B023
        pairs = [data.Pair(ids(P), ids(S), ids(S), "") for _ in range(count)]

        def run(share, pairs=pairs):
            policy.share_prefix = share
            for _, batch in stepdpo.micro_batches(pairs, range(count), configs[share], DEVICE):
                stepdpo.step_logps(policy(batch), batch).sum().backward()
            policy.zero_grad()

        times = [[seconds(lambda share=share: run(share)) for share in (True, False)]  # noqa: B023
                 for _ in range(repeats + 1)][1:]
        rows.append(dict(P=P, S=S, pairs=count, shared=median(t[0] for t in times),
                         plain=median(t[1] for t in times), gain=median(t[1] / t[0] for t in times),
                         formula=2 * (P + S) / (P + 2 * S)))
    return rows


def processes(model: str, source: str, numbers: list[int], batch: int, steps: int, rounds: int) -> list[dict]:
    """Same pairs, same global batch; the first step warms up. Losses must not depend on the number."""
    rows = [dict(processes=n, rates=[], loss=[]) for n in numbers]
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "STEPDPO_CACHE": folder, "OMP_NUM_THREADS": "1"}
        for turn in range(rounds):
            for row in rows[::-1 if turn % 2 else 1]:
                out = os.path.join(folder, f"{row['processes']}-{turn}")
                done = subprocess.run(
                    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                     str(row["processes"]), stepdpo.__file__, "--model", model, "--data", source,
                     "--output-dir", out, "--batch-size", str(batch), "--max-steps", str(steps + 1),
                     "--learning-rate", "1e-5"], env=env, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"scaling: {row['processes']} processes failed:\n{done.stderr[-4000:]}")
                with open(os.path.join(out, "metrics.jsonl")) as file:
                    lines = [json.loads(line) for line in file]
                row["rates"].append(median(line["pairs_per_second"] for line in lines[1:]))
                row["loss"] = [line["loss"] for line in lines]
                shutil.rmtree(out)
    for row in rows:
        row["pairs_per_second"] = median(row["rates"])
        row["speed_up"] = median(a / b for a, b in zip(row["rates"], rows[0]["rates"], strict=True))
    return rows


def synthetic(path: str, count: int) -> str:
    """Pairs of the form of GSM8K's, for where no file of pairs is at hand."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            a, b, c = (rng.randint(2, 99) for _ in range(3))
            file.write(json.dumps({
                "prompt": f"A shop has {a} boxes of {b} pens each. It sells {c} pens. How many are left?",
                "initial_reason_steps": f"Let's think step by step.\nStep 1: There are {a} * {b} = {a * b} "
                                        "pens.\nStep 2:",
                "chosen": f" {a * b} - {c} = {a * b - c} pens are left.",
                "rejected": f" {a * b} + {c} = {a * b + c} pens are left."}) + "\n")
    return path


def projection(P: float, S: float, results: str) -> dict:
    """FLOPs per pair at 7B and 72B, and hours of the paper's runs: 10,795 pairs, 8 or 4 epochs, 8 GPUs."""
    measured = []
    for path in sorted(glob.glob(os.path.join(results, "train-qwen2-7b-*.json"))):
        with open(path) as file:
            found = json.load(file)
        if share := found["table"].get("ours", {}).get("useful_mfu"):
            measured.append((share, found["device"], found["peak_flops"]))
    mfu, device, peak = max(measured, default=(0.4, "H200", PEAK["H200"] * 1e12))
    result = dict(P=P, S=S, mfu=mfu, measured=bool(measured), device=device, peak_flops=peak, models={})
    for name, epochs in (("qwen2-7b", 8), ("qwen2-72b", 4)):
        body, vd = sizes(Qwen2Config(**SHAPES[name]))
        layers, ours, plain = 2 * body * (P + 2 * S), 2 * vd * 2 * S, 2 * vd * 2 * (P + S)  # one forward
        passes = 10795 * (3 * epochs + 1)  # the reference is one more forward
        result["models"][name] = dict(
            epochs=epochs, forward_flops_per_pair=layers + ours,
            head_share=4 * ours / (4 * ours + 4 * layers),  # both made twice forward, once backward
            head_share_all_positions=3 * plain / (3 * plain + 4 * 2 * body * 2 * (P + S)),
            hours=passes * (layers + ours) / (8 * peak * mfu) / 3600)
    return result


def report(result: dict) -> None:
    print("\nlinear_logps, forward and backward\n"
          "      T      D       V         ms   extra MB  at most MB  logits MB")
    for r in result["head"]:
        print(f"{r['T']:7d}{r['D']:7d}{r['V']:8d}{r['seconds'] * 1e3:11.2f}{r['bytes'] / 1e6:11.2f}"
              f"{r['formula_bytes'] / 1e6:12.2f}{r['logits_bytes'] / 1e6:11.2f}")
    print("\nsharing the prefix, forward and backward\n"
          "      P      S  shared ms   plain ms    gain  2(P+S)/(P+2S)")
    for r in result["sharing"]:
        print(f"{r['P']:7d}{r['S']:7d}{r['shared'] * 1e3:11.1f}{r['plain'] * 1e3:11.1f}{r['gain']:8.2f}"
              f"{r['formula']:15.2f}")
    print("\nprocesses (one thread each on a CPU)  pairs/s  speed-up")
    for r in result["processes"]:
        apart = max(abs(a - b) for a, b in zip(r["loss"], result["processes"][0]["loss"], strict=True))
        note = f", on {result['units']} cores" if r["processes"] > result["units"] else ""
        print(f"{r['processes']:9d}{r['pairs_per_second']:36.3g}{r['speed_up']:10.2f}"
              f"   losses within {apart:.0e}{note}")
    p = result["projection"]
    print(f"\nby arithmetic, prefix {p['P']:.0f} and step {p['S']:.0f} tokens ({result['lengths_are']}):")
    for name, m in p["models"].items():
        print(f"{name:10s} head {m['head_share']:.1%} of a step's FLOPs; {m['head_share_all_positions']:.1%} "
              "if it took all positions of both sequences\n           PROJECTION of the paper's run "
              f"(10,795 pairs, {m['epochs']} epochs, 8 x {p['device']}): {m['hours']:.2g} hours")
    origin = "measured by bench/train.py at 7B on one GPU" if p["measured"] else \
        "NOT MEASURED YET, an ASSUMPTION (bench/train.py --shape qwen2-7b on a GPU measures it)"
    print(f"utilisation {p['mfu']:.0%}: {origin}; communication, and the offloading that 72B needs on 8 "
          "GPUs, are not in it.")


def plot(result: dict, path: str) -> None:
    if not importlib.util.find_spec("matplotlib"):
        return print(f"no {path}: pip install matplotlib")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4))
    V = result["head"][0]["V"]
    rows = [r for r in result["head"] if r["V"] == V]
    for key, style, label in (("bytes", "o-", "linear_logps"), ("logits_bytes", "--", "logits, one copy")):
        left.loglog([r["T"] for r in rows], [r[key] / 1e6 for r in rows], style, label=label)
    left.set(xlabel="T", ylabel="extra MB", title=f"memory, V = {V:,}")
    for S in sorted({r["S"] for r in result["sharing"]}):
        rows = [r for r in result["sharing"] if r["S"] == S]
        line, = middle.plot([r["P"] for r in rows], [r["gain"] for r in rows], "o-", label=f"S = {S}")
        middle.plot([r["P"] for r in rows], [r["formula"] for r in rows], "--", color=line.get_color())
    middle.set(xlabel="P", title="gain of sharing the prefix (dashed: formula)")
    rows = result["processes"]
    right.plot([r["processes"] for r in rows], [r["pairs_per_second"] for r in rows], "o-", label="pairs/s")
    right.set(xlabel="processes", ylim=0, title=f"{result['units']} {'GPUs' if CUDA else 'cores'}")
    for axis in (left, middle, right):
        axis.legend()
    figure.suptitle(f"{result['device']}, {result['date']}")
    figure.tight_layout()
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, for parts 2 and 3; with --shape only "
                                                       "its tokenizer")
    parser.add_argument("--shape", choices=list(SHAPES)[:3], help="random weights of that shape")
    parser.add_argument("--data", help="step pairs for part 3, whose lengths part 4 takes [made-up ones]")
    parser.add_argument("--batch-size", type=int, help="pairs per optimizer step of part 3 [8; on CUDA 64]")
    parser.add_argument("--repeats", type=int, help="of parts 1 and 2; the median counts [3; on CUDA 9]")
    parser.add_argument("--rounds", type=int, default=3, help="of part 3 [3]")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--plot", metavar="FILE", help="also a PNG, with matplotlib")
    parser.add_argument("--out", help="JSON [bench/results/scaling-DEVICE.json]")
    args = parser.parse_args()
    args.batch_size, args.repeats = args.batch_size or (64 if CUDA else 8), args.repeats or (9 if CUDA else 3)
    if args.quick:
        args.batch_size, args.repeats, args.rounds = 4, 2, 1
        lengths, numbers, count = [(64, 16)], [1, 2], 2
        shapes = [(16, 32, 3000), (32, 32, 3000), (16, 32, 6000)]
    else:
        D, few, many = (3584, 1024, 152064) if CUDA else (576, 64, 49152)
        shapes = [(T, D, many) for T in (few, 2 * few, 4 * few, 8 * few)]
        shapes += [(2 * few, D, V) for V in (many // 4, many // 2, many * 2)]
        lengths = [(P, S) for S in (32, 128) for P in (64, 256, 512)]
        numbers, count = [1, 2, 4], 32 if CUDA else 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and folders go too
    units = torch.cuda.device_count() if CUDA else os.cpu_count()
    if CUDA:
        numbers = [n for n in numbers if n <= units]  # NCCL refuses two processes on one GPU
    result = announced_environment() | {"arguments": vars(args), "units": units}
    with tempfile.TemporaryDirectory() as folder:
        source = args.data or synthetic(os.path.join(folder, "pairs.jsonl"), 3 * args.batch_size)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        rows = data.read_rows(source)
        pairs, _ = data.encode(rows, tokenizer, "chat", None, "step", 1024)
        P, S = mean(len(x.prefix) for x in pairs), mean(len(x.chosen + x.rejected) / 2 for x in pairs)
        result["lengths_are"] = f"the means of {os.path.basename(args.data)}" if args.data else "ASSUMED"
        P, S = (P, S) if args.data else (256, 64)
        if args.shape and (made := start(dict(kind="random", folder=folder, shape=args.shape,
                                              model=args.model))).get("failed"):
            sys.exit(f"scaling: cannot make the random model: {made['failed']}")
        model = folder if args.shape else args.model
        subset = os.path.join(folder, "subset.jsonl")
        with open(subset, "w") as file:  # the reference pass takes all pairs of the file
            file.writelines(json.dumps(row) + "\n" for _, row in rows[:3 * args.batch_size])
        result["processes"] = processes(model, subset, numbers, args.batch_size, 2, args.rounds)
        result["head"] = head(shapes, args.repeats)
        stepdpo.start_processes()
        result["sharing"] = sharing(model, lengths, count, args.repeats)
        torch.distributed.destroy_process_group()
    out = args.out or os.path.join(HERE, "results", f"scaling-{result['place']}.json")
    result["projection"] = projection(P, S, os.path.dirname(out))
    report(result)
    if args.plot:
        plot(result, args.plot)
    write(out, result)


if __name__ == "__main__":
    main()
