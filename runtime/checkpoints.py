"""Checkpoints: written completely or not at all, read by any number of processes, checked by hashes.

One safetensors file for each shard of the model and kind of tensor (weights and AdamW's two moments), and a
state.json with their hashes:

    checkpoints/step-000200/    weights.0.safetensors  exp_avg.0.safetensors  exp_avg_sq.0.safetensors
                                weights.1.safetensors  ...                    state.json

Nothing here is a pickle, which could run code when it is read.
"""

import hashlib
import json
import os
import re
import shutil
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime import outputs
from runtime.commands import waiting_for_disks
from runtime.files import content_key, parse_json, read_bytes, write_atomically, writing
from runtime.messages import InputError, print0
from runtime.startup import Run
from runtime.weights import is_of_first_copy, local_of, reading, rows_of_shard, shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")


def start_or_resume(policy: nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> int:
    """Load the newest checkpoint, if there is one, and write run.json. Returns the optimizer steps done."""
    out = run.config.output_dir
    done, metrics = load_checkpoint(policy, optimizer, f"{out}/checkpoints")
    if dist.get_rank() == 0:
        outputs.write_record(run.identity, run.steps, run.config)
        write_atomically(f"{out}/metrics.jsonl", metrics)  # what came after the checkpoint comes again
    if done:
        print0(f"resuming    after optimizer step {done}")
    return done


def save(policy: nn.Module, optimizer: torch.optim.Optimizer, done: int, config: Namespace) -> None:
    """Save after `done` optimizer steps, with the metrics till then. Collective."""
    metrics = read_bytes(f"{config.output_dir}/metrics.jsonl").decode() if dist.get_rank() == 0 else ""
    save_checkpoint(policy, optimizer, f"{config.output_dir}/checkpoints", done, metrics)


def training_state(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Kind of tensor -> name of the parameter -> the rows that this rank has. Tied weights count once."""
    parameters = dict(policy.named_parameters())
    state = {"weights": {name: local_of(parameter) for name, parameter in parameters.items()}}
    for moment in MOMENTS:
        state[moment] = {name: local_of(optimizer.state[parameter][moment])
                         for name, parameter in parameters.items()}
    return state


def checkpoints_in(folder: str) -> list[str]:
    """The names of the checkpoints in a folder, the newest first. Whatever else is there is not ours.

    Raises InputError for what is named like a checkpoint and is none, as it stands in the way of one.
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
    """Write step-N, complete or absent. Those before it are removed once it is there. Collective."""
    path, rank = f"{folder}/step-{step:06d}", dist.get_rank()
    unfinished = f"{path}.unfinished"
    with waiting_for_disks() as all_are_here:
        if rank == 0:
            with writing(unfinished):
                shutil.rmtree(unfinished, ignore_errors=True)
                os.makedirs(unfinished)
        all_are_here()

        hashes = save_shard(policy, optimizer, unfinished)
        all_are_here()
        of_ranks = [{}] * dist.get_world_size()
        dist.all_gather_object(of_ranks, hashes)

        if rank == 0:
            hashes = {name: value for of_rank in of_ranks for name, value in of_rank.items()}
            _, shards = shard_of(next(policy.parameters()))  # all are cut alike
            state = {"step": step, "shards": shards, "sha256": hashes, "metrics": metrics}
            state["seal"] = seal_of(state)
            write_atomically(f"{unfinished}/state.json", json.dumps(state))
            with writing(path):
                if os.path.basename(path) in checkpoints_in(folder):
                    os.rename(path, f"{path}.damaged.unfinished")  # or this step would not have come again
                os.sync()  # the name must not reach the disk before the content
                os.rename(unfinished, path)
                remove_old_checkpoints(folder, os.path.basename(path))


def save_shard(policy: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> dict[str, str]:
    """Write this rank's shard of weights and moments. Returns file -> hash.

    Ranks of a further copy of the model have nothing new, and write nothing.
    """
    any_parameter = next(policy.parameters())  # all are cut alike
    if not is_of_first_copy(any_parameter):
        return {}
    shard, _ = shard_of(any_parameter)
    hashes = {}
    for kind, tensors in training_state(policy, optimizer).items():
        name = f"{kind}.{shard}.safetensors"
        local = {key: tensor.contiguous() for key, tensor in tensors.items()}
        with writing(f"{folder}/{name}"):
            save_file(local, f"{folder}/{name}")
            hashes[name] = hash_of(f"{folder}/{name}")
    return hashes


def remove_old_checkpoints(folder: str, newest: str) -> None:
    """Remove all checkpoints but the newest, and what a kill has left of others.

    They are renamed before, so that what is called step-N is always whole.
    """
    for name in checkpoints_in(folder):
        if name != newest:
            os.rename(f"{folder}/{name}", f"{folder}/{name}.unfinished")
    for name in os.listdir(folder):
        if re.fullmatch(r"step-\d{6,}.*\.unfinished", name):
            shutil.rmtree(f"{folder}/{name}", ignore_errors=True)


def seal_of(state: dict[str, Any]) -> str:
    """A hash of a checkpoint's state, kept in state.json, which shows that it is as it was written."""
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

    Without a checkpoint that is (0, ""). Raises InputError if there are some, and all are damaged.
    """
    damaged = []
    for name in checkpoints_in(folder):
        path = f"{folder}/{name}"
        found = [None] * dist.get_world_size()
        with waiting_for_disks():
            damage_here = what_is_damaged(path)  # each rank looks at its share
        dist.all_gather_object(found, damage_here)
        damage = [text for text in found if text]
        if not damage:
            with waiting_for_disks():
                return load_sound(policy, optimizer, path)
        print0(f"checkpoint  {path} is damaged ({damage[0]}): going on from the one before it")
        damaged.append(damage[0])
    if damaged:
        raise InputError(f"{folder}: no checkpoint can be read ({damaged[0]}); "
                         "remove that folder to begin again")
    return 0, ""


def what_is_damaged(path: str) -> str:
    """What is wrong with this rank's share of a checkpoint's files; "" if they are as they were written."""
    try:
        hashes = sorted(read_state(path)["sha256"].items())
        for name, expected in hashes[dist.get_rank()::dist.get_world_size()]:
            if hash_of(f"{path}/{name}") != expected:
                return f"{name} has changed"
        return ""
    except (InputError, OSError) as error:
        return str(error)


def load_sound(policy: nn.Module, optimizer: torch.optim.Optimizer, path: str) -> tuple[int, str]:
    """Load a checkpoint that is as it was written. Returns what `load_checkpoint` does."""
    state = read_state(path)
    for parameter in policy.parameters():
        moments = optimizer.state[parameter]
        if not moments:  # AdamW makes them in its first step; those in host memory are there already
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
    """Copy the rows that two shards of a tensor have in common; each has the rows [start, stop) of it."""
    first, last = max(here[0], there[0]), min(here[1], there[1])
    if first < last:
        rows[first - here[0]:last - here[0]].copy_(stored[first - there[0]:last - there[0]])
