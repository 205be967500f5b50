"""How numbers get from a model folder into the shards of a model, and back.

A model folder is read by all ranks at once, each only its own rows of each tensor, and written again file by
file, so no rank ever holds a whole model. Nothing here is a pickle, which could run code when it is read.
"""

import collections
import hashlib
import itertools
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from runtime.commands import local_rank
from runtime.files import parse_json, read_bytes, writing
from runtime.messages import InputError, progress, refuse_model

BLOCK = 2**26  # numbers that are on their way at once: 256 MB in fp32
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# ---------------------------------------------------------------------------------------------- model folders


def resolve(name: str) -> str:
    """A local folder, or the hub model of that name brought to this machine. Collective."""
    is_folder = [os.path.isdir(name)] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(is_folder, is_folder[0])
    if all(is_folder):
        return name
    if any(is_folder):
        raise InputError(f"{name}: no such folder for rank {is_folder.index(False)}, while others have it")

    # It may take hours, which is longer than processes else wait for each other.
    waiting = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if dist.is_initialized() else None
    if local_rank() == 0:
        bring(name)
    if waiting:
        dist.barrier(waiting)
        dist.destroy_process_group(waiting)
    return bring(name, local_files_only=True)


def bring(name: str, **options) -> str:
    """The folder that a hub model has on this machine, once it is there."""
    from huggingface_hub import snapshot_download
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    unwanted = ["consolidated*", "original/*"]  # the same weights once more, in another format
    try:
        return snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted, **options)
    except Exception as error:  # the hub's client has a large family of errors of its own
        raise InputError(f"{name}: no such folder, and not to be had from the hub ({error})") from None


@contextmanager
def reading(folder: str) -> Iterator[None]:
    """Turns what the libraries say about a bad model folder into an error that names the folder."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # an odd config.json raises whatever its first reader happens to run into
        raise InputError(f"{folder}: {type(error).__name__}: {' '.join(str(error).split())}") from None


# More than any model has. What is larger would fill the memory before anything could be said.
LIMITS = {"num_hidden_layers": 10_000, "num_labels": 10**6, "vocab_size": 10**8}


def check_config(folder: str) -> None:
    """Raise InputError if a model folder's config.json cannot be read, before anybody reads more of it."""
    path = f"{folder}/config.json"
    if not os.path.isdir(folder):  # a hub name, which the library reads
        return
    content = parse_json(path, read_bytes(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object, got {type(content).__name__}")
    for name, limit in LIMITS.items():
        value = content.get(name)
        if isinstance(value, int | float) and not value <= limit:
            raise InputError(f"{path}: {name} must be at most {limit}, got {value:g}")
    with reading(path):
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def weight_files(folder: str) -> dict[str, list[str]]:
    """Safetensors file, as a path inside the model folder -> the names of its tensors. Sorted."""
    single, index = f"{folder}/model.safetensors", f"{folder}/model.safetensors.index.json"
    if not os.path.isfile(index):
        if not os.path.isfile(single):
            raise InputError(f"{folder}: has no model.safetensors(.index.json); "
                             "only safetensors weights are loaded")
        with reading(folder), safe_open(single, "pt") as file:
            return {"model.safetensors": sorted(file.keys())}

    content = parse_json(index, read_bytes(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(path, str) for path in weight_map.values()):
        raise InputError(f'{index}: must have a "weight_map" of tensor names to files')
    files: dict[str, list[str]] = {}
    for name, path in sorted(weight_map.items(), key=lambda item: item[::-1]):
        is_inside_folder = not os.path.isabs(path) and os.pardir not in path.split("/")
        if not is_inside_folder or not os.path.isfile(f"{folder}/{path}"):
            raise InputError(f"{index}: {path!r} must be a file inside that folder")
        files.setdefault(path, []).append(name)
    return files


def count_parameters(folder: str) -> int:
    """How many parameters the tensors of a model folder hold; only their headers are read."""
    count = 0
    for path, names in weight_files(folder).items():
        with reading(folder), safe_open(f"{folder}/{path}", "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return count


def model_identity(path: str) -> str:
    """The name of a hub model; of a folder, a hash of what the model computes.

    Configuration, tokenizer and index count byte for byte. Of the weights the names, types and sizes of all
    tensors count, the bytes of small ones, and of large ones 16 samples each: reading all of a 145 GB model
    would take minutes.
    """
    if not os.path.isdir(path):
        return path
    digest = hashlib.sha256()
    for name in sorted(os.listdir(path)):
        file_path = os.path.join(path, name)
        if name.endswith((".json", ".jinja", ".txt", ".model")):
            digest.update(name.encode() + read_bytes(file_path))

    has_weights = any(name.startswith("model.safetensors") for name in os.listdir(path))  # else a tokenizer
    for file_name in weight_files(path) if has_weights else ():
        file_path = os.path.join(path, file_name)
        with reading(file_path), open(file_path, "rb") as file:
            header, tensors = read_header(file_path)
            digest.update(header[8:])
            for about in tensors.values():
                start, end = about["data_offsets"]
                _update_with_samples(digest, file, len(header) + start, end - start)
    return f"sha256:{digest.hexdigest()[:16]}"


def _update_with_samples(digest, file, start: int, length: int) -> None:
    """Add `length` bytes of a file to a hash: all of them up to 64 kB, else 16 times 4 kB, spread evenly."""
    samples, size = (16, 4096) if length > 65536 else (1, length)
    for i in range(samples):
        file.seek(start + i * (length - size) // max(1, samples - 1))
        digest.update(file.read(size))


# ------------------------------------------------------------------------------------------ shards and places


def rows_of_shard(length: int, shard: int, shards: int) -> tuple[int, int]:
    """The first row of a tensor that a shard has, and the one after its last."""
    rows = math.ceil(length / shards)  # FSDP cuts dimension 0 like torch.chunk
    return min(shard * rows, length), min((shard + 1) * rows, length)


def shard_of(tensor: Tensor) -> tuple[int, int]:
    """(which of its shards is here, how many there are). Copies of the model, of which there may be several,
    are cut alike: the mesh of ranks is (shards,) or (copies, shards)."""
    if not isinstance(tensor, DTensor):
        return 0, 1  # a buffer, all of which each rank has
    mesh = tensor.device_mesh
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)


def is_of_first_copy(tensor: DTensor) -> bool:
    mesh = tensor.device_mesh
    return mesh.ndim == 1 or mesh.get_local_rank(0) == 0


def local_of(tensor: Tensor) -> Tensor:
    """What is here of a sharded tensor. Moments in host memory are no DTensors, and all of them is here."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


class Place(NamedTuple):
    """Where in a model a stored tensor belongs: it is a tensor there, or one of those that were joined.

    Mixtures have their experts one by one in the files, gate and up apart, (F, D) each, and in the model all
    in one tensor (E, 2 F, D).
    """
    name: str                  # of the tensor in the model
    expert: int | None = None  # index in its dimension 0; None: all of it
    part: int = 0              # which of the equal parts of dimension 1 ...
    parts: int = 1             # ... of so many

    def shape(self, tensor: Tensor) -> list[int]:
        """That the stored tensor must have, `tensor` being the model's."""
        if self.expert is None:
            return [*tensor.shape]
        return [tensor.shape[1] // self.parts, *tensor.shape[2:]]


def places_in(model: nn.Module, stored_names: Iterable[str]) -> dict[str, Place]:
    """Where each stored tensor belongs. transformers may have renamed it since the files were written.

    Raises InputError if transformers cuts or joins tensors in other ways than the experts of mixtures.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_renamings,
        rename_source_key,
    )
    changes, names = get_model_conversion_mapping(model), dict.fromkeys(model.state_dict(), True)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    joins = [change for change in changes if isinstance(change, WeightConverter)]
    of_pattern = {pattern: join for join in joins for pattern in join.source_patterns}
    places = {}
    for stored in stored_names:
        places[stored], pattern = Place(stored), None
        if stored not in names:
            name, pattern = rename_source_key(stored, renamings, joins, model.base_model_prefix, names)
            places[stored] = Place(name)
        if pattern:
            join, by_number = of_pattern[pattern], pattern.replace("*.", r"(?P<expert>\d+)\.")
            number = re.search(by_number, apply_renamings(stored, renamings))
            if not joins_experts(join) or not number:
                refuse_model(type(model).__name__, "transformers cuts or joins the tensors in its files "
                                                   f"({stored} becomes part of {name})")
            parts = join.source_patterns
            places[stored] = Place(name, int(number["expert"]), parts.index(pattern), len(parts))
    return places


def joins_experts(change: Any) -> bool:
    """Whether a change of tensors stacks those of all experts, and then joins several kinds, if there are."""
    from transformers.core_model_loading import Concatenate, MergeModulelist
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in change.operations]
    several = len(change.source_patterns) > 1
    expected = [(MergeModulelist, 0), (Concatenate, 1)] if several else [(MergeModulelist, 0)]
    are_numbered = all(pattern.count("*.") == 1 for pattern in change.source_patterns)
    return kinds == expected and len(change.target_patterns) == 1 and are_numbered


def check_places(places: dict[str, Place], policy: nn.Module, folder: str) -> None:
    """Raise InputError if the stored tensors are not exactly what the model consists of."""
    tensors = policy.model.state_dict(keep_vars=True)
    ignored = ["inv_freq$", *policy.model._keys_to_ignore_on_load_unexpected]  # recomputed, or of no use
    found, unknown = collections.defaultdict(set), []  # tied: stored once or twice
    for stored, place in places.items():
        tensor = tensors.get(place.name)
        if tensor is not None and (place.expert is None or place.expert < len(tensor)):
            found[tensor].add(place[1:])
        elif tensor is not None or not any(re.search(pattern, place.name) for pattern in ignored):
            unknown.append(stored)

    missing = []
    for name, tensor in tensors.items():
        parts = max((parts for _, _, parts in found[tensor]), default=1)
        if not found[tensor]:
            missing.append(name)
        elif Place(name)[1:] not in found[tensor]:
            needed = itertools.product(range(len(tensor)), range(parts), [parts])
            missing += [f"{name}[{place[0]}]" for place in needed if place not in found[tensor]]
    if missing or unknown:
        raise InputError(f"{folder}: its tensors are not one to one those of {policy.name} "
                         f"(missing: {missing[:3]}, left over: {unknown[:3]})")


def blocks_of(place: Place, tensor: Tensor) -> Iterator[tuple[int, Any, Any]]:
    """Where the numbers of a stored tensor are, in its order and in blocks of at most BLOCK fp32 numbers.

    Yields (shard, index in that shard's rows of the model's tensor, index in the stored tensor).
    """
    shape, (_, shards) = place.shape(tensor), shard_of(tensor)
    if not shape:
        yield 0, ..., ...
        return
    at_once = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for shard in range(shards):
        start, stop = rows_of_shard(len(tensor), shard, shards)
        if place.expert is None:
            before, first, end = (), start, stop
        elif start <= place.expert < stop:  # FSDP cuts between experts
            before, first, end = (place.expert - start,), 0, shape[0]
            start = -place.part * shape[0]
        else:
            continue
        for row in range(first, end, at_once):
            last = min(row + at_once, end)
            yield shard, (*before, slice(row - start, last - start)), slice(row, last)


def is_finite(numbers: Tensor) -> bool:
    """As `isfinite().all()`, without a copy of them."""
    return numbers.numel() == 0 or all(math.isfinite(extreme) for extreme in numbers.aminmax())


# ------------------------------------------------------------------------------------------------- in and out


@torch.no_grad()
def load(policy: nn.Module, folder: str) -> None:
    """Fill the shards of policy.model: each rank reads only its own rows of each tensor, or its own experts.

    Raises InputError if the tensors in the folder are not, one to one, finite floats for those of the model.
    """
    files, tensors = weight_files(folder), policy.model.state_dict(keep_vars=True)
    places = places_in(policy.model, itertools.chain(*files.values()))
    check_places(places, policy, folder)

    bar, seen = progress(None, "loading", total=len(places), unit="tensor"), set()
    for path, names in files.items():
        with safe_open(f"{folder}/{path}", "pt") as file:
            for name in names:
                place = places[name]
                if place.name in tensors:
                    tensor = tensors[place.name]
                    is_full = (tensor, place[1:]) in seen
                    fill(tensor, place, file.get_slice(name), f"{folder}/{path}: {name}", is_full)
                    seen.add((tensor, place[1:]))
                bar.update()
    bar.close()


def fill(tensor: Tensor, place: Place, stored: Any, where: str, is_full: bool) -> None:
    """Copy what this rank has of a stored tensor. If that is full already, it must be the same."""
    shape = place.shape(tensor)
    if stored.get_shape() != shape:
        raise InputError(f"{where} must be {shape}, got {stored.get_shape()}")
    if tensor.is_floating_point() and stored.get_dtype() not in FLOATS:
        raise InputError(f"{where} is stored as {stored.get_dtype()}: quantized weights cannot be trained; "
                         "use the model they were made from")
    rows, (own_shard, _) = local_of(tensor), shard_of(tensor)
    for shard, here, there in blocks_of(place, tensor):
        if shard != own_shard:
            continue
        numbers = stored[there]
        if not is_finite(numbers):
            raise InputError(f"{where} holds numbers that are not finite: the file is damaged, "
                             "or the model is")
        if is_full and not torch.equal(rows[here], numbers.to(rows)):
            raise InputError(f"{where} differs from what it is tied to (tie_word_embeddings in config.json)")
        rows[here] = numbers.to(rows.device)


@torch.no_grad()
def export(policy: nn.Module, source: str, folder: str) -> None:
    """Write the folder `source` again with the trained numbers in it: same files, names and dtypes, so
    whatever loads one loads the other. Complete or absent, never half. Collective.

    Rank 0 writes, and the others send it what they have, block by block: nobody holds more of the model than
    his shard and a block.
    """
    is_writer, unfinished = dist.get_rank() == 0, f"{folder}.unfinished"
    if is_writer:
        with writing(unfinished):
            shutil.rmtree(unfinished, ignore_errors=True)
            os.mkdir(unfinished)
            for name in os.listdir(source):  # configuration, tokenizer, chat template: byte for byte
                if name.endswith((".json", ".jinja", ".txt", ".model")):
                    shutil.copy(f"{source}/{name}", unfinished)

    tensors, stored_in = policy.model.state_dict(), weight_files(source)
    places = places_in(policy.model, itertools.chain(*stored_in.values()))
    for path in progress(stored_in, "exporting", unit="file"):
        if is_writer:
            write_weights(tensors, places, f"{source}/{path}", f"{unfinished}/{path}")
        elif is_of_first_copy(next(policy.parameters())):
            send_weights(tensors, places, f"{source}/{path}")

    if is_writer:
        with writing(folder):  # a folder that is there and not empty is not replaced
            os.sync()  # the name must not reach the disk before the content
            os.rename(unfinished, folder)
    dist.barrier()


def read_header(path: str) -> tuple[bytes, dict[str, dict]]:
    """The beginning of a safetensors file, and what it says of each tensor, in the order of their bytes."""
    with reading(path), open(path, "rb") as file:
        start = file.read(8)
        header = file.read(*struct.unpack("<Q", start))
        tensors = {name: about for name, about in parse_json(path, header).items() if "data_offsets" in about}
    return start + header, dict(sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]))


def write_weights(tensors: dict[str, Tensor], places: dict[str, Place], source: str, path: str) -> None:
    """Write a file of weights again, with the numbers of the model where it has them. On rank 0."""
    header, stored = read_header(source)
    with writing(path), open(source, "rb") as before:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as after:
            after.write(header)
            for name, about in stored.items():
                place, (start, end) = places[name], about["data_offsets"]
                if place.name not in tensors:
                    before.seek(len(header) + start)
                    after.write(before.read(end - start))
                    continue
                for block in received_blocks(tensors[place.name], place, about["dtype"]):
                    if not is_finite(block):
                        raise InputError(f"{path}: not written, as {name} is no longer finite; "
                                         "lower the --learning-rate")
                    after.write(block.view(torch.uint8).numpy())
        shutil.copymode(source, path)


def received_blocks(tensor: Tensor, place: Place, dtype: str) -> Iterator[Tensor]:
    """The numbers of a stored tensor in its order, flat, in host memory. On rank 0."""
    for shard, here, there in blocks_of(place, tensor):
        if shard == 0:
            yield to_be_stored(local_of(tensor)[here], dtype)
            continue
        shape = place.shape(tensor)
        count = (there.stop - there.start) * math.prod(shape[1:])
        block = torch.empty(count, dtype=FLOATS[dtype])
        dist.recv(block, shard)  # of the first copy, whose shards are numbered like the ranks
        yield block


def send_weights(tensors: dict[str, Tensor], places: dict[str, Place], source: str) -> None:
    """What `received_blocks` waits for while a file is written, from this rank."""
    for name, about in read_header(source)[1].items():
        place = places[name]
        if place.name not in tensors:
            continue
        tensor = tensors[place.name]
        for shard, here, _ in blocks_of(place, tensor):
            if shard > 0 and shard == shard_of(tensor)[0]:
                dist.send(to_be_stored(local_of(tensor)[here], about["dtype"]), 0)


def to_be_stored(numbers: Tensor, dtype: str) -> Tensor:
    """Flat and in host memory. Cast before they are sent: two bytes are fewer than four."""
    return numbers.to("cpu", FLOATS.get(dtype, numbers.dtype)).reshape(-1)
