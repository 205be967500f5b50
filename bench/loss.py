#!/usr/bin/env python3
"""Per-token log-probabilities, forward and backward: time, memory and error of ours and of every peer.

    python bench/loss.py                                           # the GPU's shapes, or small ones on a CPU
    python bench/loss.py --shapes 64,32,1000 --repeats 2 --skip compiled --out /tmp/loss.json     # seconds
    pip install "liger-kernel[cutedsl]" cut-cross-entropy quack-kernels "nvidia-cutlass-dsl[cu13]"   # peers

All methods get the same hidden (T, D), weight (V, D), targets and random gradient per token, and return both
gradients. One that is not installed or cannot run here is listed with the reason.

torch        torch's own linear_cross_entropy, with its automatic options
liger        Liger's Triton kernels, all of the logits in chunks of tokens
liger-cute   Liger's CuTe kernels for sm_90 (its pull requests 1334 and 1370): as ours, per token
liger-tp     Liger's CUTLASS kernels for sm_90 (1422), made for tensor parallelism; here in a group of one
cce          cut-cross-entropy, with and without its filter of small gradients
quack        QuACK's chunked loss, which makes the gradients in its forward and so needs a sum
quack-logits QuACK's row kernels on all logits in 16 bit: what it has per token

The columns:

ms          median over the repeats of one forward and backward, by the clock; all methods take turns
x bare      that over the bare GEMMs in the same turns: logits, dhidden and dweight (6 T V D FLOPs) by the
            vendor's library, nothing else. Recomputing the logits makes it 8 T V D, so 1.33 at best
extra MB    (10^6 bytes) the most allocated at any moment of forward and backward, less the two gradients
            returned; inputs do not count. By torch's allocator after a warm-up: without BLAS's own scratch
logps       root mean square error against fp64 over all tokens, in nats
dhidden     |x - fp64| / |fp64| (norms) over 64 tokens
dweight     the same over 128 rows of weight that are some token's target
untargeted  the same over 128 rows that are nobody's: they only get softmax mass, which is what filters drop
per token   yes: an fp32 value for each token, and exact gradients for any gradient per token

Logits have standard deviation 4, targets a log-probability of about -3, as in a language model; errors and
filters depend on it. Written for liger-kernel and liger-cute-kernels 0.8.5, cut-cross-entropy 25.1.1,
quack-kernels 0.6.5 and nvidia-cutlass-dsl 4.8.1. No GPU has run liger-cute, liger-tp or the two of QuACK yet.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from common import (  # and the root to import from
    CUDA,
    HERE,
    announced_environment,
    extra_bytes,
    seconds,
    write,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels

SHAPES = ["1024,8192,152064", "2048,3584,152064", "4096,4096,128256", "512,2048,151936"] if CUDA else \
         ["256,576,49152", "64,896,151936"]  # on a CPU the heads of SmolLM2-135M and Qwen2-0.5B
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ERRORS = ("logps", "dhidden", "dweight", "untargeted")
Inputs = tuple[Tensor, Tensor, Tensor]  # hidden (T, D), weight (V, D), targets (T,)

# ---------------------------------------------------------------------------------------------------- methods
# Each makes a function (hidden, weight, targets) -> logps, and imports what it needs only then.


def compiled():
    @torch.compile(dynamic=False)
    def chunk_logps(h, w, t):
        logits = (h @ w.T).float()
        return logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(-1)

    def logps(h, w, t):  # the checkpoint drops each chunk's logits until backward
        chunks = zip(h.chunk(8), t.chunk(8), strict=True)
        return torch.cat([checkpoint(chunk_logps, hidden, w, targets, use_reentrant=False)
                          for hidden, targets in chunks])
    return logps


def torch_own():
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()  # without options it is plain logits
    return lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none", options=options)


def liger():
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused
    # bias, class weights, ignored target, z-loss, label smoothing, reduction; the first output is the loss
    return lambda h, w, t: -Fused.apply(h, w, t, None, None, -100, 0.0, 0.0, "none")[0]


def liger_cute():
    if torch.cuda.get_device_capability() != (9, 0):
        raise RuntimeError("needs sm_90; on others Liger runs plain torch in its place")
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as fused
    return lambda h, w, t: -fused.LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, t)


def liger_tp():
    import torch.distributed as dist
    from liger_cute_kernels import nvshmem
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyTPFunction as Fused
    from liger_kernel.ops.configure import FusedLinearCrossEntropyConfig, configure
    from liger_kernel.ops.cute.fused_linear_scaled_cross_entropy_tp import is_available
    if torch.cuda.get_device_capability() != (9, 0) or not is_available():
        raise RuntimeError("its kernels for sm_90 are not there; Liger runs plain torch in their place")
    is_first = not dist.is_initialized()  # of the shapes: nothing has been reserved before
    if is_first:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    is_configured = False  # this function is made anew for each shape, and each needs one reservation

    def logps(h, w, t):
        nonlocal is_configured
        if not is_configured:
            if not is_first:
                nvshmem.pool_clear_all()  # what was reserved for another shape cannot grow
            sizes = FusedLinearCrossEntropyConfig(max_tokens=len(t), hidden_size=h.shape[1],
                                                  local_vocab_size=len(w))
            if not configure(bootstrap_group=dist.group.WORLD, device=h.device, flsce=sizes):
                raise RuntimeError("its runtime could not be set up")
            is_configured = True
        return -Fused.apply(h, w, t, dist.group.WORLD)
    return logps


def cce(filter_eps: str | None):
    from cut_cross_entropy import linear_cross_entropy
    return lambda h, w, t: -linear_cross_entropy(h, w, t, reduction="none", filter_eps=filter_eps)


def quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy
    return lambda h, w, t: -chunked_linear_cross_entropy(h, w, t, reduction="sum")


def quack_logits():
    from quack.linear_cross_entropy import linear_cross_entropy_func
    return lambda h, w, t: -linear_cross_entropy_func(h, w, None, t, reduction="none", inplace_backward=True)


METHODS = {  # name: (maker, modules to be installed, whether it needs CUDA, what it gives per token)
    "ours": (lambda: kernels.linear_logps, (), False, "yes"),
    "plain": (lambda: kernels.plain_logps, (), False, "yes"),
    "compiled": (compiled, (), False, "yes"),
    "torch": (torch_own, (), False, "yes"),
    "liger": (liger, ("liger_kernel",), True, "yes"),
    "liger-cute": (liger_cute, ("liger_kernel", "cutlass", "tvm_ffi"), True, "yes"),
    "liger-tp": (liger_tp, ("liger_kernel", "liger_cute_kernels", "tvm_ffi"), True, "yes"),
    "cce": (lambda: cce(None), ("cut_cross_entropy",), True, "yes"),
    "cce-filter": (lambda: cce("auto"), ("cut_cross_entropy",), True, "gradients filtered"),
    "quack": (quack, ("quack", "cutlass"), True, "sum only"),
    "quack-logits": (quack_logits, ("quack", "cutlass"), True, "yes"),
}
PACKAGES = {  # by module
    "liger_kernel": "liger-kernel", "liger_cute_kernels": "liger-cute-kernels[cu13]",
    "tvm_ffi": "apache-tvm-ffi", "cutlass": "nvidia-cutlass-dsl[cu13]",
    "cut_cross_entropy": "cut-cross-entropy", "quack": "quack-kernels"}


def why_not(name: str, skip: list[str]) -> str | None:
    _, modules, needs_cuda, _ = METHODS[name]
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    if absent:
        return f"not installed: pip install {' '.join(PACKAGES[module] for module in absent)}"
    if needs_cuda and not CUDA:
        return "needs CUDA"
    return "left out by --skip" if name in skip else None


def bare_gemms(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    logits, dhidden, dweight = hidden @ weight.T, torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:  # logits stand in for their gradient: GEMMs on zeros would be faster
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.T, hidden, out=dweight)
    return run


# -------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def truth(inputs: Inputs, upstream: Tensor, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In fp64: all log-probabilities, dhidden[tokens] and dweight[rows] for upstream = dL/dlogps."""
    hidden, weight, targets = inputs
    hidden, upstream, hit = hidden.double(), upstream.double()[:, None], weight[targets].double()
    lse, dhidden = torch.full_like(upstream, float("-inf")), hit[tokens]
    for block in weight.split(4096):
        lse = torch.logaddexp(lse, (hidden @ block.double().T).logsumexp(1, keepdim=True))
    for block in weight.split(4096):
        dhidden -= (hidden[tokens] @ block.double().T - lse[tokens]).exp() @ block.double()
    softmax = (hidden @ weight[rows].double().T - lse).exp()
    dweight = (upstream * ((targets[:, None] == rows).double() - softmax)).T @ hidden
    return (hidden * hit).sum(1) - lse[:, 0], upstream[tokens] * dhidden, dweight


def make_inputs(T: int, D: int, V: int, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        weight = torch.randn(V, D, dtype=dtype).mul_(4 * D**-0.5).requires_grad_()
        targets = torch.randint(V, (T,))
        hidden = (torch.randn(T, D, dtype=dtype) + weight.detach()[targets]).requires_grad_()
    return hidden, weight, targets


def try_method(name: str, inputs: Inputs) -> tuple[dict, Callable | None]:
    """(its errors and memory, or {"missing": why}; a call of it to be timed)."""
    print(f"{name} ...", file=sys.stderr, flush=True)  # names the culprit, if one hangs or crashes
    make, _, _, per_token = METHODS[name]
    try:
        run = forward_and_backward(make(), inputs, sum_only=per_token == "sum only")
        result = errors_of(run(), inputs, per_token)
        gradients = (inputs[0].numel() + inputs[1].numel()) * inputs[0].itemsize
        result["extra_bytes"] = extra_bytes(run) - gradients
    except Exception as failure:  # that a peer fails is a result
        seconds(lambda: None)     # but if it broke the device, the run ends here
        reason = (str(failure).strip() or "no message").splitlines()[0]
        return {"missing": f"{type(failure).__name__}: {reason}"[:160]}, None
    return result, run


def upstream_of(inputs: Inputs, sum_only: bool) -> Tensor:
    """A gradient per token, or ones for what only gives the sum."""
    hidden = inputs[0]
    if sum_only:
        return torch.ones(len(hidden), device=hidden.device)
    return torch.randn(len(hidden), generator=torch.Generator().manual_seed(1)).to(hidden.device)


def forward_and_backward(function: Callable, inputs: Inputs, sum_only: bool) -> Callable:
    upstream = upstream_of(inputs, sum_only)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        out = function(*inputs)
        gradient = None if sum_only else upstream.to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, inputs[:2], gradient)
    return run


def errors_of(results: tuple[Tensor, Tensor, Tensor], inputs: Inputs, per_token: str) -> dict:
    out, dhidden, dweight = results
    hidden, weight, targets = inputs
    tokens = torch.arange(min(len(hidden), 64), device=hidden.device)
    is_target = torch.zeros(len(weight), dtype=torch.bool, device=hidden.device).index_fill_(0, targets, True)
    some, others = is_target.nonzero()[:128, 0], (~is_target).nonzero()[:128, 0]
    sum_only = per_token == "sum only"
    logps, true_dhidden, true_dweight = truth(inputs, upstream_of(inputs, sum_only), tokens,
                                              torch.cat([some, others]))

    def apart(x: Tensor, exact: Tensor) -> float:
        return ((x - exact).norm() / exact.norm()).item()

    error = (out - logps.sum()).abs() / len(hidden) if sum_only else (out - logps).square().mean().sqrt()
    if not sum_only and out.dtype != torch.float32:
        per_token = f"rounded to {str(out.dtype).removeprefix('torch.')}"
    return {"logps": error.item(), "dhidden": apart(dhidden[tokens], true_dhidden),
            "dweight": apart(dweight[some], true_dweight[:len(some)]),
            "untargeted": apart(dweight[others], true_dweight[len(some):]), "per_token": per_token}


def measure(inputs: Inputs, repeats: int, skip: list[str]) -> dict:
    """{"bare" and each method: its numbers, or "missing" with the reason}."""
    results, runs = {"bare": {}}, {"bare": bare_gemms(inputs[0].detach(), inputs[1].detach())}
    for name in METHODS:
        reason = why_not(name, skip)
        results[name], run = ({"missing": reason}, None) if reason else try_method(name, inputs)
        if run:
            runs[name] = run

    times = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(seconds(run))
    bare = median(times["bare"][1:])
    for name, (_, *timed) in times.items():  # the first turn warms up
        results[name] |= {"seconds": median(timed), "ratio": median(timed) / bare}
    return results


# -------------------------------------------------------------------------------------------------- reporting


def table(results: dict) -> list[str]:
    columns = "".join(f"{key:>12}" for key in ERRORS)
    lines = [f"{'':13}{'ms':>10}{'x bare':>8}{'extra MB':>10}{columns}  per token",
             f"{'bare GEMMs':13}{results['bare']['seconds'] * 1e3:10.2f}{1:8.2f}"]
    for name in METHODS:
        row = results[name]
        if "missing" in row:
            lines.append(f"{name:13}missing: {row['missing']}")
            continue
        ms, extra = row["seconds"] * 1e3, row["extra_bytes"] / 1e6
        errors = "".join(f"{row[key]:12.1e}" for key in ERRORS)
        lines.append(f"{name:13}{ms:10.2f}{row['ratio']:8.2f}{extra:10.1f}{errors}  {row['per_token']}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="T,D,V", default=SHAPES,
                        help=f"tokens, hidden size, vocabulary [{' '.join(SHAPES)}]")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if CUDA else "fp32", help="[%(default)s]")
    parser.add_argument("--repeats", type=int, default=11 if CUDA else 5, help="timed turns [%(default)s]")
    parser.add_argument("--skip", nargs="+", choices=METHODS, default=[], help="methods to leave out")
    parser.add_argument("--out", help="JSON [bench/results/loss-DEVICE.json]")
    args = parser.parse_args()
    if args.repeats < 1 or not all(re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2}", shape) for shape in args.shapes):
        parser.error("--repeats is positive, and each of --shapes three positive numbers T,D,V")

    report = announced_environment() | {"threads": torch.get_num_threads(), "dtype": args.dtype,
                                        "repeats": args.repeats, "shapes": {}}
    print(f"{args.dtype}, medians of {args.repeats} in turns")
    for shape in args.shapes:
        T, D, V = map(int, shape.split(","))
        results = measure(make_inputs(T, D, V, DTYPES[args.dtype]), args.repeats, args.skip)
        report["shapes"][shape] = results
        rate = 6e-12 * T * V * D / results["bare"]["seconds"]
        print(f"\nT={T} D={D} V={V}: the bare GEMMs reach {rate:.3g} TFLOP/s", *table(results),
              sep="\n", flush=True)
    write(args.out or f"{HERE}/results/loss-{report['place']}.json", report)


if __name__ == "__main__":
    main()
