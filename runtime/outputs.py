"""The output folder of a run, who may write to it and when --resume may go on; and the cache of reference
log-probabilities.
"""

import json
import os
import secrets
import shutil
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import safetensors
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import Pair
from runtime.commands import local_rank, waiting_for_disks
from runtime.files import add_lines, content_key, lock, parse_json, read_bytes, write_atomically, writing
from runtime.flags import flags
from runtime.messages import InputError, print0
from runtime.rows import fingerprint
from runtime.weights import model_identity, weight_files

# ------------------------------------------------------------------------------------------ the output folder

WRITTEN = ("metrics.jsonl", "checkpoints", "model", "model.unfinished", "before.jsonl", "after.jsonl")
# What may change when a run goes on: the result stays the same, and of what is read only the content counts.
FREE = ("resume", "output_dir", "test_problems", "tokens_per_micro_batch", "eval_every", "save_every",
        "timeout", "share_prefix", "activation_checkpointing", "offload", "shard_size", "gather_once",
        "compile", "model", "reference", "data", "eval_data")


@contextmanager
def claimed(config: Namespace) -> Iterator[None]:
    """Within, --output-dir is of this run alone.

    Raises InputError, and touches nothing, if what is there might not be of this run.
    """
    if dist.get_rank() > 0:
        yield
        return
    refuse_other_content(config)
    with lock(f"{config.output_dir}/.lock"):
        yield


def refuse_other_content(config: Namespace) -> None:
    """Raise InputError if --output-dir is no place for this run, or holds what might not be of it."""
    out = config.output_dir
    if os.path.lexists(out) and not os.path.isdir(out):
        raise InputError(f"--output-dir {out}: is not a folder")
    for source in (config.model, config.reference or config.model):
        if os.path.isdir(source) and is_inside(out, source):
            raise InputError(f"--output-dir {out}: must not be in {source}, which is read")

    refuse_other_kinds(out)

    if os.path.lexists(f"{out}/run.json"):
        if not config.resume:
            raise InputError(f"{out}: already holds a run; continue it with --resume (from its last "
                             "checkpoint, or else from the start), or choose another --output-dir")
    else:
        # Absent now, so what will be there by these names is of this run.
        for name in WRITTEN:
            if os.path.lexists(f"{out}/{name}"):
                raise InputError(f"{out}/{name}: is not of a run of this trainer, as there is no run.json "
                                 "beside it; choose another --output-dir")


def refuse_other_kinds(out: str) -> None:
    """Raise InputError for links, folders instead of files and the like: a run makes no such things."""
    for name in ("run.json", *WRITTEN):
        path, is_file = f"{out}/{name}", name.endswith((".json", ".jsonl"))
        is_right_kind = os.path.isfile(path) if is_file else os.path.isdir(path)
        if os.path.islink(path) or os.path.lexists(path) and not is_right_kind:
            kind = "file" if is_file else "folder"
            raise InputError(f"{path}: is not of a run of this trainer, which has a {kind} there; "
                             "move it away, or choose another --output-dir")
    if os.path.isdir(f"{out}/model") and not os.path.isfile(f"{out}/model/config.json"):
        raise InputError(f"{out}/model: is not of a run of this trainer; choose another --output-dir")


def is_inside(path: str, folder: str) -> bool:
    folder = os.path.realpath(folder)
    return os.path.commonpath([folder, os.path.realpath(path)]) == folder


def identity_of(folder: str, reference_folder: str, pairs: str, held_out: str,
                config: Namespace) -> dict[str, Any]:
    """What the result of a run depends on, as run.json holds it; the pairs by their fingerprints.

    Models are looked at by one rank of each node; the others have None for them.
    """
    models = {"model": folder}
    if config.reference:
        models["reference"] = reference_folder
    content = {"data": pairs, "eval_data": held_out}
    with waiting_for_disks():
        for name, path in models.items():
            content[name] = model_identity(path) if local_rank() == 0 else None
    return {"config": vars(config), "content": content}


def refuse_other_nodes(identity: dict[str, Any], config: Namespace) -> None:
    """Raise InputError if the nodes of a run do not see the same --output-dir, data and model. Collective.

    Every rank writes its part of a checkpoint, so the output folder must be one. Of the rest each node may
    have a copy.
    """
    out, token = config.output_dir, [secrets.token_hex(8)]
    dist.broadcast_object_list(token)
    if dist.get_rank() == 0:
        write_atomically(f"{out}/.nodes", token[0])
    dist.barrier()

    try:
        is_shared = read_bytes(f"{out}/.nodes").decode() == token[0]
    except InputError:
        is_shared = False
    seen = [{}] * dist.get_world_size()
    dist.all_gather_object(seen, {"host": socket.gethostname(), "shared": is_shared, **identity["content"]})
    if dist.get_rank() == 0:
        os.unlink(f"{out}/.nodes")

    for rank, other in enumerate(seen):
        if not other["shared"]:
            raise InputError(f"--output-dir {out}: rank {rank} on {other['host']} has another folder there "
                             f"than rank 0 on {seen[0]['host']}; use one that all nodes share")
        for name in identity["content"]:
            if other[name] not in (None, seen[0][name]):
                raise InputError(f"--{name.replace('_', '-')}: rank {rank} on {other['host']} reads another "
                                 f"content than rank 0 on {seen[0]['host']}; use the same on all nodes")


def refuse_changes(identity: dict[str, Any], out: str) -> None:
    """Raise InputError if there is a run in folder `out` that was started with other flags, data or model."""
    path = f"{out}/run.json"
    if dist.get_rank() > 0 or not os.path.exists(path):
        return
    before = parse_json(path, read_bytes(path))
    if not isinstance(before, dict) or not all(isinstance(before.get(name), dict) for name in identity):
        raise InputError(f"{path}: is not the record of a run; choose another --output-dir")

    changed = []
    default_of = flags().get_default
    for name, value in identity["config"].items():
        # A flag that was not there yet when the run was started did what its default does.
        was = before["config"].get(name, default_of(name))
        if name not in FREE and was != value:
            changed.append(f"--{name.replace('_', '-')} {was} -> {value}")
    for name in {**identity["content"], **before["content"]}:
        if before["content"].get(name) != identity["content"].get(name):
            changed.append(f"content of --{name.replace('_', '-')}")
    if changed:
        raise InputError(f"--resume: {out} was started with another {', '.join(changed)}")


def recorded_flag(name: str, out: str) -> Any:
    """What a flag was in the run in folder `out`; None if there is none. On rank 0."""
    path = f"{out}/run.json"
    if dist.get_rank() > 0 or not os.path.exists(path):
        return None
    record = parse_json(path, read_bytes(path))
    config = record.get("config") if isinstance(record, dict) else None
    return config.get(name) if isinstance(config, dict) else None


def is_finished(out: str) -> bool:
    """Whether the run in folder `out` has exported its model, as its last act. Collective."""
    finished = [dist.get_rank() == 0 and os.path.isdir(f"{out}/model")]
    dist.broadcast_object_list(finished)
    return finished[0]


def refuse_full_disk(folder: str, config: Namespace) -> None:
    """Raise InputError if the model, with --save-every a checkpoint too, will not fit into --output-dir."""
    if dist.get_rank() > 0:
        return
    sizes = [os.path.getsize(f"{folder}/{file}") for file in weight_files(folder)]
    needed, free = sum(sizes), shutil.disk_usage(config.output_dir).free
    if config.save_every:
        needed += 3 * 4 * sum(sizes) // 2  # weights and two moments in 4 bytes; a model mostly has 2
    if free < needed:
        raise InputError(f"--output-dir {config.output_dir}: {needed / 1e9:,.1f} GB will be written there, "
                         f"and {free / 1e9:,.1f} GB are free")


def write_record(identity: dict[str, Any], steps: int, config: Namespace) -> None:
    """Write run.json: all that the run was started with. On rank 0."""
    packages = ("torch", "triton", "transformers", "safetensors", "numpy")
    record = {**identity, "config": vars(config),  # tokens per micro-batch filled in
              "optimizer_steps": steps, "processes": dist.get_world_size(),
              "device": device_name(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
              "versions": {package: version(package) for package in packages}}
    write_atomically(f"{config.output_dir}/run.json", json.dumps(record, indent=2) + "\n")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def log(config: Namespace, line: dict[str, float]) -> None:
    """Add a line to metrics.jsonl."""
    if dist.get_rank() == 0:
        add_lines(f"{config.output_dir}/metrics.jsonl", json.dumps(line, allow_nan=False) + "\n")


# ------------------------------------------------------------------- the cache of reference log-probabilities


def cached_logps(name: str, pairs: Sequence[Pair], folder: str, config: Namespace,
                 compute: Callable[[], Tensor]) -> Tensor:
    """(2, N) log-probabilities of pairs under the model in a folder: from the cache, or computed and kept.

    Collective. Rank 0 alone reads and writes: other nodes may have other disks.
    """
    if not pairs:
        return torch.empty(2, 0)
    is_reader = dist.get_rank() == 0
    path, found, kept = "", [None], False
    with waiting_for_disks():
        if is_reader:
            path = cache_path(folder, pairs, config)
            found = [read_cached(path, (2, len(pairs)))]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        print0(f"reference   log-probabilities of {name} pairs read from {path}")
        return found[0].to("cuda" if torch.cuda.is_available() else "cpu")

    logps = compute()
    with waiting_for_disks():
        if is_reader:
            kept = write_cached(path, logps)
    print0(f"reference   log-probabilities of {name} pairs computed" + (f", kept in {path}" if kept else ""))
    return logps


def cache_path(folder: str, pairs: Sequence[Pair], config: Namespace) -> str:
    """In $STEPDPO_CACHE, by default ~/.cache/stepdpo, under a hash of the model's files, the token ids (so of
    data, template, span and tokenizer) and what changes the arithmetic."""
    # Large tensors are only sampled, so the time of writing counts: a model retrained in place is another.
    written = [os.stat(f"{folder}/{file}").st_mtime_ns for file in weight_files(folder)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    key = content_key(model_identity(folder), str(written), fingerprint(pairs), config.dtype,
                      str(config.share_prefix), device, torch.__version__, transformers.__version__)
    cache = os.environ.get("STEPDPO_CACHE") or os.path.expanduser("~/.cache/stepdpo")
    return os.path.join(cache, f"{key}.safetensors")


def write_cached(path: str, tensor: Tensor) -> bool:
    """Keep a tensor. Says so if that is not possible: then it will be computed again."""
    tensor = tensor.cpu().contiguous()
    try:
        with writing(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # safetensors writes under another name first, so this needs no care of ours
            save_file({"tensor": tensor}, path, metadata={"hash": _hash_of_numbers(tensor)})
    except InputError as error:
        print0(f"cache       {error}")
        return False
    return True


def read_cached(path: str, shape: tuple[int, ...]) -> Tensor | None:
    """A kept tensor, or None. Says so if it is there and damaged."""
    if not os.path.isfile(path):
        return None
    try:
        with safe_open(path, "pt") as file:
            tensor, expected = file.get_tensor("tensor"), (file.metadata() or {}).get("hash")
    except (OSError, safetensors.SafetensorError):
        tensor, expected = torch.empty(0), None
    is_right = tensor.shape == shape and tensor.dtype == torch.float32 and tensor.isfinite().all()
    if is_right and _hash_of_numbers(tensor) == expected:
        return tensor
    print0(f"cache       {path} is damaged: computed again")
    return None


def _hash_of_numbers(tensor: Tensor) -> str:
    return content_key(tensor.numpy().tobytes().hex())
