"""How weights get from a model folder into the shards of a model, and back.

A model folder is read by all ranks at once, each only its own rows of each tensor. It is written again by
rank 0, one gathered tensor after the other, so no rank ever holds a whole model. Nothing here is a pickle,
which could run code when it is read.
"""

import collections
import hashlib
import itertools
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from runtime import hub_kernels
from runtime.commands import local_rank, waiting_for_disks
from runtime.files import parse_json, read_bytes, writing
from runtime.messages import InputError, progress, refuse_model

hub_kernels.keep_out()  # before anything here asks transformers for a model

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHAT_TEMPLATES = "additional_chat_templates"  # the folder, beside chat_template.jinja, of those with names

# ---------------------------------------------------------------------------------------------- model folders


def resolve(name: str) -> str:
    """The folder of a model: `name` itself, or where the hub model of that name is on this machine.

    Collective: one rank of each node downloads what is not there.
    """
    is_folder = [os.path.isdir(name)] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(is_folder, is_folder[0])
    if all(is_folder):
        return name
    if any(is_folder):
        raise InputError(f"{name}: no such folder for rank {is_folder.index(False)}, while others have it")

    with waiting_for_disks():
        if local_rank() == 0:
            download(name)
    return download(name, local_files_only=True)


def download(name: str, **options) -> str:
    """Get a hub model onto this machine, if it is not there yet. Returns its folder."""
    from huggingface_hub import snapshot_download
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # in folders of the model's too
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
    """Safetensors file, as a path inside the model folder -> the names of its tensors. Sorted.

    A folder may have several sets of weights; these are the ones that transformers loads.
    """
    chosen = weights_or_index(folder)
    paths = files_of_index(folder, chosen) if chosen.endswith(".index.json") else [chosen]
    names = {}
    for path in paths:
        with reading(f"{folder}/{path}"), safe_open(f"{folder}/{path}", "pt") as file:
            names[path] = sorted(file.keys())
    return names


def files_of_index(folder: str, name: str) -> list[str]:
    """The files that an index of weights names, sorted. What is in them they say themselves."""
    index = f"{folder}/{name}"
    content = parse_json(index, read_bytes(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(path, str) for path in weight_map.values()):
        raise InputError(f'{index}: must have a "weight_map" of tensor names to files')
    for path in weight_map.values():
        if not is_file_inside(folder, path):
            raise InputError(f"{index}: {path!r} must be a file inside that folder")
    return sorted({*weight_map.values()})


def weights_or_index(folder: str) -> str:
    """The file of weights, or the index of several, that transformers loads: the one that config.json names,
    else a single file before an index."""
    config = f"{folder}/config.json"
    named = parse_json(config, read_bytes(config)).get("transformers_weights")
    if named is not None:
        if not is_file_inside(folder, str(named)):
            raise InputError(f"{config}: transformers_weights, {named!r}, must be a file inside that folder")
        return named
    for name in (SINGLE, INDEX):
        if os.path.isfile(f"{folder}/{name}"):
            return name
    raise InputError(f"{folder}: has no model.safetensors(.index.json); only safetensors weights are loaded")


def is_file_inside(folder: str, path: str) -> bool:
    """Whether a path, relative to a folder, is a file that does not stand outside of it."""
    return not os.path.isabs(path) and os.pardir not in path.split("/") and os.path.isfile(f"{folder}/{path}")


def text_files(folder: str) -> list[str]:
    """Configuration, tokenizer and chat templates, as paths inside a model folder. Sorted."""
    names = os.listdir(folder)
    if os.path.isdir(f"{folder}/{CHAT_TEMPLATES}"):
        templates = os.listdir(f"{folder}/{CHAT_TEMPLATES}")
        names += [f"{CHAT_TEMPLATES}/{name}" for name in templates if name.endswith(".jinja")]
    return sorted(name for name in names if name.endswith((".json", ".jinja", ".txt", ".model")))


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
    for name in text_files(path):
        digest.update(name.encode() + read_bytes(f"{path}/{name}"))

    has_weights = any(".safetensors" in name for name in os.listdir(path))  # else it is only a tokenizer
    for file_name in weight_files(path) if has_weights else ():
        file_path = f"{path}/{file_name}"
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
    """(which of a tensor's shards this rank has, how many there are).

    Copies of the model, of which there may be several, are cut alike: the mesh of ranks is (shards,) or
    (copies, shards).
    """
    if not isinstance(tensor, DTensor):
        return 0, 1  # a buffer, all of which each rank has
    mesh = tensor.device_mesh
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)


def is_of_first_copy(tensor: DTensor) -> bool:
    """Whether this rank belongs to the first copy of the model, which is the one that checkpoints keep."""
    mesh = tensor.device_mesh
    return mesh.ndim == 1 or mesh.get_local_rank(0) == 0


def local_of(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has: its shard, or all of what is no DTensor (buffers, and AdamW's
    moments in host memory)."""
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
        """The shape that the stored tensor must have, `tensor` being the model's."""
        if self.expert is None:
            return [*tensor.shape]
        return [tensor.shape[1] // self.parts, *tensor.shape[2:]]

    def within(self, tensor: Tensor, first: int = 0) -> Tensor:
        """The stored tensor as a view of the model's, of which `tensor` has the rows or experts from `first`
        on."""
        if self.expert is None:
            return tensor
        length = tensor.shape[1] // self.parts
        return tensor[self.expert - first, self.part * length:(self.part + 1) * length]


def places_in(model: nn.Module, stored_names: Iterable[str]) -> dict[str, Place]:
    """Where each stored tensor belongs; transformers may have renamed it since the files were written.

    Raises InputError if transformers cuts or joins tensors in other ways than the experts of mixtures.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_renamings,
        rename_source_key,
    )
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    joins = [change for change in changes if isinstance(change, WeightConverter)]
    join_of = {pattern: join for join in joins for pattern in join.source_patterns}
    names = dict.fromkeys(model.state_dict(), True)

    places = {}
    for stored in stored_names:
        name, pattern = stored, None
        if stored not in names:
            name, pattern = rename_source_key(stored, renamings, joins, model.base_model_prefix, names)
        if not pattern:
            places[stored] = Place(name)
            continue

        # The pattern is like "experts.*.up_proj.weight", and what stands for the star is the expert's number.
        join, with_number = join_of[pattern], pattern.replace("*.", r"(?P<expert>\d+)\.")
        found = re.search(with_number, apply_renamings(stored, renamings))
        if not joins_experts(join) or not found:
            refuse_model(type(model).__name__, "transformers cuts or joins the tensors in its files "
                                               f"({stored} becomes part of {name})")
        parts = join.source_patterns
        places[stored] = Place(name, int(found["expert"]), parts.index(pattern), len(parts))
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


def is_finite(tensor: Tensor) -> bool:
    """As `isfinite().all()`, without a copy."""
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in tensor.aminmax())


# --------------------------------------------------------------------------------------------------- reading


@torch.no_grad()
def load(policy: nn.Module, folder: str) -> None:
    """Fill the shards of policy.model: each rank reads only its own rows of each tensor, or its own experts.

    Raises InputError if the tensors in the folder are not, one to one, finite floats for those of the model.
    Collective.
    """
    files, tensors = weight_files(folder), policy.model.state_dict(keep_vars=True)
    places = places_in(policy.model, itertools.chain(*files.values()))
    check_places(places, policy, folder)

    bar, seen = progress(None, "loading", total=len(places), unit="tensor"), set()
    with waiting_for_disks():
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
    """Copy this rank's rows of a stored tensor. If they are there already, they must be the same."""
    shape = place.shape(tensor)
    if stored.get_shape() != shape:
        raise InputError(f"{where} must be {shape}, got {stored.get_shape()}")
    if tensor.is_floating_point() and stored.get_dtype() not in FLOATS:
        raise InputError(f"{where} is stored as {stored.get_dtype()}: quantized weights cannot be trained; "
                         "use the model they were made from")

    rows = local_of(tensor)
    if not shape:
        values = stored[...]
    else:
        start, stop = rows_of_shard(len(tensor), *shard_of(tensor))
        if place.expert is None:
            values = stored[start:stop]
        elif start <= place.expert < stop:  # FSDP cuts between experts
            rows, values = place.within(rows, first=start), stored[:]
        else:
            return

    if not is_finite(values):
        raise InputError(f"{where} holds numbers that are not finite: the file is damaged, or the model is")
    if is_full and not torch.equal(rows, values.to(rows)):
        raise InputError(f"{where} differs from what it is tied to (tie_word_embeddings in config.json)")
    rows.copy_(values)


# --------------------------------------------------------------------------------------------------- writing


@torch.no_grad()
def export(policy: nn.Module, source: str, folder: str) -> None:
    """Write the folder `source` again with the trained weights in it: same files, names and dtypes, so
    whatever loads one loads the other. Complete or absent, never half. Collective.

    All ranks gather one tensor after the other, and rank 0 writes it. So no rank holds more of the model
    than its shard and one tensor; the largest, an embedding, has 2.5 GB at 72B.
    """
    is_writer, unfinished = dist.get_rank() == 0, f"{folder}.unfinished"
    tensors, stored_in = policy.model.state_dict(), weight_files(source)
    places = places_in(policy.model, itertools.chain(*stored_in.values()))

    with waiting_for_disks() as all_are_here:
        if is_writer:
            with writing(unfinished):
                shutil.rmtree(unfinished, ignore_errors=True)
                copy_text_files(source, unfinished)

        for path in progress(stored_in, "exporting", unit="file"):
            write_weights(tensors, places, f"{source}/{path}", f"{unfinished}/{path}", all_are_here)

        if is_writer:
            with writing(folder):  # a folder that is there and not empty is not replaced
                os.sync()  # the name must not reach the disk before the content
                os.rename(unfinished, folder)


def copy_text_files(source: str, folder: str) -> None:
    """Make a folder with the configuration, tokenizer and chat templates of `source`, byte for byte."""
    os.mkdir(folder)
    for name in text_files(source):
        # An index of weights that are not loaded, and so not exported, would mislead other programs.
        if name != INDEX or weights_or_index(source) == INDEX:
            os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)
            shutil.copy(f"{source}/{name}", f"{folder}/{name}")


def read_header(path: str) -> tuple[bytes, dict[str, dict]]:
    """The beginning of a safetensors file, and what it says of each tensor, in the order of their bytes."""
    with reading(path), open(path, "rb") as file:
        start = file.read(8)
        header = file.read(*struct.unpack("<Q", start))
        tensors = {name: about for name, about in parse_json(path, header).items() if "data_offsets" in about}
    return start + header, dict(sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]))


def write_weights(tensors: dict[str, Tensor], places: dict[str, Place], source: str, path: str,
                  all_are_here: Callable[[], None]) -> None:
    """Write a file of weights again, with the model's tensors in the place of those of the same names.

    Collective: all ranks gather, and all but rank 0 have /dev/null for their file.
    """
    header, stored = read_header(source)
    is_writer = dist.get_rank() == 0

    def gathered_as(name: str) -> tuple[str, str]:
        return places[name].name, stored[name]["dtype"]

    with writing(path), open(source, "rb") as before:
        if is_writer:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path if is_writer else os.devnull, "wb") as after:
            after.write(header)
            present, whole = None, None
            # Sorted, so that experts which are one tensor in the model are gathered once.
            for name in sorted(stored, key=gathered_as):
                start, end = stored[name]["data_offsets"]
                before.seek(len(header) + start)
                after.seek(len(header) + start)
                if places[name].name not in tensors:  # the model has no use for it
                    after.write(before.read(end - start))
                    continue

                if present != gathered_as(name):
                    whole = values = None  # before the next one comes
                    all_are_here()  # also the writer, who comes from its disk
                    present = gathered_as(name)
                    whole = gather(tensors[places[name].name], stored[name]["dtype"])
                values = places[name].within(whole)
                if not is_finite(values):
                    raise InputError(f"{path}: not written, as {name} is no longer finite; "
                                     "lower the --learning-rate")
                if is_writer:
                    after.write(values.cpu().reshape(-1).view(torch.uint8).numpy())
        if is_writer:
            shutil.copymode(source, path)


def gather(tensor: Tensor, dtype: str) -> Tensor:
    """All of a tensor, on each rank of a copy of the model, in the dtype of a file. Collective."""
    tensor = tensor.to(FLOATS.get(dtype, tensor.dtype))  # before it is sent: two bytes, not four
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
