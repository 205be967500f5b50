"""What the benchmarks share: the record of device and versions, a clock, memory, the shapes of models."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts a CPU's memory, talks to stderr
import torch  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
from runtime import hub_kernels  # noqa: E402

hub_kernels.keep_out()

CUDA = torch.cuda.is_available()
PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "liger-kernel", "cut-cross-entropy",
            "quack-kernels", "nvidia-cutlass-dsl")
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362}  # dense bf16, SXM


def qwen2(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int,
          tied: bool) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary,
            "tie_word_embeddings": tied}


SHAPES = {
    "qwen2-0.5b": qwen2(896, 4864, 24, 14, 2, 151936, True),
    "qwen2-1.5b": qwen2(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2-7b": qwen2(3584, 18944, 28, 28, 4, 152064, False),
}


def environment() -> dict[str, Any]:
    """What a number means nothing without: device, versions, date, command, processes."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = device_name()
    return {"device": device, "place": device.lower().replace(" ", "-") if CUDA else "cpu", "cuda": CUDA,
            "versions": versions, "date": datetime.datetime.now().isoformat(timespec="minutes"),
            "command": shlex.join(["python", *sys.argv]),
            "processes": int(os.environ.get("WORLD_SIZE", 1)), "load_before": os.getloadavg()[0]}


def device_name() -> str:
    if CUDA:
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    return f"{model[1] if model else 'CPU'} ({os.cpu_count()} cores)"


def announced_environment() -> dict[str, Any]:
    """`environment`, printed before anything is timed, with a warning if other work would disturb."""
    found = environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(f"{found['device']}, {found['date']}, load {found['load_before']:.1f} before the start, {versions}")
    if found["load_before"] > 0.5 and not CUDA:
        print("WARNING: other work runs on this machine; do not quote these times")
    return found


def write(path: str, result: dict[str, Any]) -> None:
    from runtime.files import write_atomically
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {path}")


def seconds(run: Callable[[], Any]) -> float:
    """Of one call, with all that it starts on a GPU."""
    wait = torch.cuda.synchronize if CUDA else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def peak_bytes() -> int:
    """The most that this process has held: allocated on a GPU, or resident (VmHWM, because the ru_maxrss of a
    child includes its parent's)."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s*(\d+) kB", file.read())[1]) * 1024


def extra_bytes(run: Callable[[], None]) -> int:
    """The most that `run` holds at any moment beyond what was held before."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as record:
        run()
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def sizes(config) -> tuple[int, int]:
    """(parameters but embedding and head, V D) of a model of this configuration; nothing is allocated."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    body = sum(parameter.numel() for parameter in model.parameters() if parameter not in ends)
    return body, ends.pop().numel()
