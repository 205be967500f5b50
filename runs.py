"""What a run leaves on a disk, and finds there again: its output folder, its checkpoints, and the cache of
reference log-probabilities.

A checkpoint is one safetensors file for each shard of the model and kind of number (weights and AdamW's two
moments), and a state.json with their hashes:

    checkpoints/step-000200/    weights.0.safetensors  exp_avg.0.safetensors  exp_avg_sq.0.safetensors
                                weights.1.safetensors  ...                    state.json

Any number of processes can go on from it. Nothing here is a pickle, which could run code when it is read.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from argparse import Namespace
from typing import Any

import safetensors
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from files import (
    InputError,
    content_key,
    local_rank,
    lock,
    parse_json,
    print0,
    read_bytes,
    write_atomically,
    writing,
)
from storage import (
    is_of_first_copy,
    local_of,
    model_identity,
    reading,
    resolve,
    rows_of_shard,
    shard_of,
    weight_files,
)

# --------------------------------------------------------------------------------------------- output folders

WRITTEN = ("metrics.jsonl", "checkpoints", "model", "model.unfinished", "before.jsonl", "after.jsonl")
# What may change when a run goes on: the result stays the same, and of what is read only the content counts.
FREE = ("resume", "output_dir", "test_problems", "tokens_per_micro_batch", "eval_every", "save_every",
        "timeout", "share_prefix", "activation_checkpointing", "offload", "shard_size", "compile",
        "model", "reference", "data", "eval_data")


def claim_output_dir(config: Namespace) -> Any:
    """Take --output-dir for this run alone, until the result is dropped.

    Raises InputError, and touches nothing, if what is there might not be of this run.
    """
    out = config.output_dir
    if dist.get_rank() > 0:
        return None
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
    return lock(f"{out}/.lock")


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


def identity_of(folder: str, pairs: str, held_out: str, config: Namespace) -> dict[str, Any]:
    """What the result of a run depends on, as run.json holds it; the pairs by their fingerprints.

    Models are looked at by one rank of each node; the others have None for them.
    """
    models = {"model": folder}
    if config.reference:
        models["reference"] = resolve(config.reference)
    content = {"data": pairs, "eval_data": held_out}
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


def is_finished(identity: dict[str, Any], config: Namespace) -> bool:
    """Whether --resume finds the run already done. Raises InputError if it was started with other flags."""
    finished = [False]
    if dist.get_rank() == 0 and os.path.exists(f"{config.output_dir}/run.json"):
        refuse_changes(identity, config.output_dir)
        finished = [os.path.isdir(f"{config.output_dir}/model")]
    dist.broadcast_object_list(finished)
    return finished[0]


def refuse_changes(identity: dict[str, Any], out: str) -> None:
    """Raise InputError if the run in folder `out` was started with other flags, data or model."""
    path = f"{out}/run.json"
    before = parse_json(path, read_bytes(path))
    if not isinstance(before, dict) or not all(isinstance(before.get(name), dict) for name in identity):
        raise InputError(f"{path}: is not the record of a run; choose another --output-dir")

    changed = []
    for name, value in identity["config"].items():
        was = before["config"].get(name)
        if name not in FREE and was != value:
            changed.append(f"--{name.replace('_', '-')} {was} -> {value}")
    for name in {**identity["content"], **before["content"]}:
        if before["content"].get(name) != identity["content"].get(name):
            changed.append(f"content of --{name.replace('_', '-')}")
    if changed:
        raise InputError(f"--resume: {out} was started with another {', '.join(changed)}")


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


# ------------------------------------------------------------------------------------------------ checkpoints

MOMENTS = ("exp_avg", "exp_avg_sq")


def training_state(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Kind of number -> name of the parameter -> its rows that are here. Tied weights count once."""
    parameters = dict(policy.named_parameters())
    state = {"weights": {name: local_of(parameter) for name, parameter in parameters.items()}}
    for moment in MOMENTS:
        state[moment] = {name: local_of(optimizer.state[parameter][moment])
                         for name, parameter in parameters.items()}
    return state


def checkpoints_in(folder: str) -> list[str]:
    """Names, the newest first, of the checkpoints there; what else there is is not ours.

    Raises InputError for what is called like one, and is none: it is in the way.
    """
    present = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in present if re.fullmatch(r"step-\d{6,}", name)]
    for name in names:
        path = f"{folder}/{name}"
        if os.path.islink(path) or not os.path.isfile(f"{path}/state.json"):
            raise InputError(f"{path}: is no checkpoint, as it has no state.json; move it away")
    return sorted(names, key=lambda name: int(name[5:]), reverse=True)


def save_checkpoint(policy: nn.Module, optimizer: torch.optim.Optimizer, folder: str, step: int,
                    metrics: str) -> None:
    """Write step-N, complete or absent. Those before it are removed once it is read back. Collective."""
    path, rank = f"{folder}/step-{step:06d}", dist.get_rank()
    any_parameter = next(policy.parameters())  # all are cut alike
    shard, shards = shard_of(any_parameter)
    unfinished = f"{path}.unfinished"
    if rank == 0:
        with writing(unfinished):
            shutil.rmtree(unfinished, ignore_errors=True)
            os.makedirs(unfinished)
    dist.barrier()

    hashes = {}
    for kind, tensors in training_state(policy, optimizer).items():
        if not is_of_first_copy(any_parameter):
            break  # who has another copy of the model has nothing new
        name = f"{kind}.{shard}.safetensors"
        local = {key: tensor.contiguous() for key, tensor in tensors.items()}
        with writing(f"{unfinished}/{name}"):
            save_file(local, f"{unfinished}/{name}")
            hashes[name] = hash_of(f"{unfinished}/{name}")
    of_ranks = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, hashes)

    if rank == 0:
        hashes = {name: value for of_rank in of_ranks for name, value in of_rank.items()}
        state = {"step": step, "shards": shards, "sha256": hashes, "metrics": metrics}
        state["seal"] = seal_of(state)
        write_atomically(f"{unfinished}/state.json", json.dumps(state))
        with writing(path):
            if os.path.basename(path) in checkpoints_in(folder):
                os.rename(path, f"{path}.damaged.unfinished")  # or this step would not have come again
            os.sync()  # the name must not reach the disk before the content
            os.rename(unfinished, path)
            remove_old_checkpoints(folder, os.path.basename(path))
    dist.barrier()


def remove_old_checkpoints(folder: str, newest: str) -> None:
    """Also what a kill has left of others. Renamed before, so that what is called step-N is always whole."""
    for name in checkpoints_in(folder):
        if name != newest:
            os.rename(f"{folder}/{name}", f"{folder}/{name}.unfinished")
    for name in os.listdir(folder):
        if re.fullmatch(r"step-\d{6,}.*\.unfinished", name):
            shutil.rmtree(f"{folder}/{name}", ignore_errors=True)


def seal_of(state: dict[str, Any]) -> str:
    """What tells that a checkpoint's state.json is as it was written."""
    return content_key(json.dumps({name: value for name, value in state.items() if name != "seal"}))


def read_state(path: str) -> dict[str, Any]:
    """A checkpoint's state.json. Raises InputError if it is not as it was written for that folder."""
    state = parse_json(f"{path}/state.json", read_bytes(f"{path}/state.json"))
    if not isinstance(state, dict) or state.get("seal") != seal_of(state):
        raise InputError(f"{path}/state.json: has changed")
    names = [f"{kind}.{shard}.safetensors"
             for kind in ("weights", *MOMENTS) for shard in range(state["shards"])]
    if f"step-{state['step']:06d}" != os.path.basename(path) or sorted(names) != sorted(state["sha256"]):
        raise InputError(f"{path}/state.json: is not of this folder")
    return state


def hash_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def load_checkpoint(policy: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> tuple[int, str]:
    """Load the newest sound checkpoint. Returns (optimizer steps it has seen, metrics till then). Collective.

    (0, "") if there is none yet. Raises InputError if all that there are are damaged.
    """
    damaged = []
    for name in checkpoints_in(folder):
        path = f"{folder}/{name}"
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, what_is_damaged(path))  # each rank looks at its share
        damage = [text for text in found if text]
        if not damage:
            return _load_sound(policy, optimizer, path)
        print0(f"checkpoint  {path} is damaged ({damage[0]}): going on from the one before it")
        damaged.append(damage[0])
    if damaged:
        raise InputError(f"{folder}: no checkpoint can be read ({damaged[0]}); "
                         "remove that folder to begin again")
    return 0, ""


def what_is_damaged(path: str) -> str:
    """What is wrong with this rank's share of a checkpoint's files, "" if they are as they were written."""
    try:
        hashes = sorted(read_state(path)["sha256"].items())
        for name, expected in hashes[dist.get_rank()::dist.get_world_size()]:
            if hash_of(f"{path}/{name}") != expected:
                return f"{name} has changed"
        return ""
    except (InputError, OSError) as error:
        return str(error)


def _load_sound(policy: nn.Module, optimizer: torch.optim.Optimizer, path: str) -> tuple[int, str]:
    state = read_state(path)
    for parameter in policy.parameters():
        moments = optimizer.state[parameter]
        if not moments:  # AdamW has none before its first step; in host memory they have their place
            moments["step"] = torch.zeros((), device=parameter.device)
            moments.update({moment: torch.empty_like(parameter) for moment in MOMENTS})
        moments["step"].fill_(state["step"])

    for kind, tensors in training_state(policy, optimizer).items():
        for shard in range(state["shards"]):
            with reading(path), safe_open(f"{path}/{kind}.{shard}.safetensors", "pt") as file:
                for name, parameter in policy.named_parameters():
                    here = rows_of_shard(len(parameter), *shard_of(parameter))
                    there = rows_of_shard(len(parameter), shard, state["shards"])
                    copy_common_rows(tensors[name], here, file.get_slice(name), there)
    return state["step"], state["metrics"]


def copy_common_rows(rows: Tensor, here: tuple[int, int], stored: Any, there: tuple[int, int]) -> None:
    """Copy what two shards of a tensor have in common; each has the rows [start, stop) of it."""
    first, last = max(here[0], there[0]), min(here[1], there[1])
    if first < last:
        rows[first - here[0]:last - here[0]].copy_(stored[first - there[0]:last - there[0]])


# -------------------------------------------------------------------------------------------------- the cache


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
