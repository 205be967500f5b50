"""What models differ in, as far as training has to know: which of them packing would change, how their logits
are scaled, how far their positions go, and the buffers that stand in no file. And our attention for them all.

A model that would be trained as something else than it computes is refused by name and with the reason,
before it takes any memory. The self-check of the trainer then compares what is left with its own forward.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kernels import Segments, packed_attention
from runtime.messages import InputError, refuse_model
from runtime.weights import reading

OWN_ATTENTION = "it does not take its attention from transformers' interface"


def empty_model(folder: str) -> nn.Module:
    """The model of a folder's config.json with our attention, on the meta device: without any memory."""
    with reading(folder):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise InputError(f"{folder}: quantized weights cannot be trained (quantization_config in its "
                             "config.json); use the model they were made from")
    with torch.device("meta"):
        return model_of(config, f"{folder}/config.json", torch.float32)


def model_of(config: transformers.PretrainedConfig, where: str, dtype: torch.dtype) -> nn.Module:
    """A new model of a configuration, which is read in `where`, with our attention."""
    register_attention()
    with reading(where):
        name = (config.architectures or [config.model_type])[0]
    try:
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="segments", trust_remote_code=False)
    except Exception as error:  # whatever a configuration leads to
        if error.args == ("segments",):  # it looks its attention class up by that name
            refuse_model(name, OWN_ATTENTION)
        refuse_model(name, f"transformers cannot build it from {where} "
                           f"({type(error).__name__}: {' '.join(str(error).split())[:300]})")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that FSDP gathers one at a time."""
    named = [module for module in model.modules()
             if type(module).__name__ in (model._no_split_modules or ())]
    if named:
        return named
    # Older models do not name their decoder layers.
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def refuse_unsupported(model: nn.Module) -> None:
    """Raise InputError for a model that would be trained as something else than it computes."""
    name, config, head = type(model).__name__, model.config.get_text_config(), model.get_output_embeddings()
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if kinds or model._is_stateful:
        refuse_model(name, f"its layers ({', '.join(sorted(kinds)) or 'recurrent'}) connect tokens in other "
                           "ways than causal attention and sliding windows, which packing would mix up")
    if not model._can_set_attn_implementation():
        refuse_model(name, OWN_ATTENTION)
    if {*model.children()} != {model.base_model, head} or type(head) is not nn.Linear:
        refuse_model(name, "its logits are not those of its base model and one linear layer")
    if "position_ids" not in inspect.signature(model.get_decoder().forward).parameters:
        refuse_model(name, "it counts positions itself, but a packed sequence has many beginnings")
    for key in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if getattr(config, key, None):
            refuse_model(name, f"it caps its logits ({key} = {getattr(config, key)}), and none are made here")


def logit_scale(model: nn.Module) -> float:
    """What the model multiplies its logits by. The self-check finds those that do it in yet another way."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0        # Cohere multiplies by it
    divisor = getattr(config, "logits_scaling", None) or 1.0   # Granite and MiniCPM divide by it
    return divisor if config.model_type == "hyperclovax" else scale / divisor


def position_limit(model: nn.Module) -> float:
    """Tokens up to which a position means the same in every sequence: learned positions end there, and
    dynamic and long RoPE use other frequencies as soon as one pair is longer."""
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None) or math.inf]
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *rope.values()]:  # one for all layers, or one for each kind of layers
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limits.append(part["original_max_position_embeddings"])
    return min(limits)


def is_mixture(model: nn.Module) -> bool:
    """Whether tokens choose among experts."""
    return any("expert" in name or "moe" in name for name, _ in model.named_parameters())


def compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Give rotary frequencies and the like, which stand in no checkpoint, their values.

    The model's own initialisation computes them. Raises InputError for one that it leaves as it was.
    """
    owners = {}  # the model that a module belongs to, whose initialisation knows it
    for path, module in model.named_modules():
        is_model = isinstance(module, transformers.PreTrainedModel)
        owner = owners[path] = module if is_model else owners[path.rpartition(".")[0]]
        names = [name for name, _ in module.named_buffers(recurse=False)]
        for name in names:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if names:
            owner._init_weights(module)  # as from_pretrained does; parameters are still on meta

        for name in names:
            never_written = getattr(module, name)._version == 0  # torch counts changes in place
            if never_written and name in module._non_persistent_buffers_set:
                raise InputError(f"{type(model).__name__} is not supported: its buffer {path}.{name} is in "
                                 "no checkpoint, and the model's initialisation does not compute it")


# ------------------------------------------------------------------- our attention in transformers' interface

# The batch that is in the layers, where their attention finds it: not all models pass keyword arguments on.
_current = SimpleNamespace(name="", segments=None, calls=0)


@contextmanager
def attending_to(name: str, segments: Segments) -> Iterator[None]:
    """Within, the layers of a model attend as these segments do.

    Raises InputError at the end if none has asked for attention: the model has its own.
    """
    before = vars(_current).copy()
    _current.name, _current.segments, _current.calls = name, segments, 0
    try:
        yield
        if _current.calls == 0:
            refuse_model(name, OWN_ATTENTION)
    finally:
        vars(_current).update(before)


def attending_again() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For activation checkpointing: a layer that runs again in backward has the segments of its forward,
    whatever has gone through the layers since."""
    return nullcontext(), attending_to(_current.name, _current.segments)


def segment_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, L, d)
    key: Tensor,    # (1, H', L, d)
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:  # (1, L, H, d)
    """`packed_attention` of the batch in the layers, under transformers' names.

    Raises InputError where a model's attention is more than that.
    """
    for name, own in {"attention_mask": attention_mask, **others}.items():
        if name in ("attention_mask", "softcap", "s_aux", "position_bias") and own is not None:
            refuse_model(_current.name, f"{type(module).__name__} attends with {name}, which is more than "
                                    "causal attention and sliding windows")
    if not getattr(module, "is_causal", True):
        refuse_model(_current.name, f"{type(module).__name__} attends to what comes after a token")
    assert _current.segments is not None, "attention was called outside attending_to"
    _current.calls += 1
    return packed_attention(query, key, value, _current.segments, scaling, sliding_window), None


def register_attention() -> None:
    """Make our attention known to transformers, by the name "segments"."""
    # Segments have other lengths in every batch, and each would be compiled anew.
    attention = torch.compiler.disable(segment_attention)
    transformers.AttentionInterface.register("segments", attention)
    transformers.AttentionMaskInterface.register("segments", lambda *args, **kwargs: None)


@contextmanager
def library_attention(model: nn.Module) -> Iterator[None]:
    """Within, the model attends as transformers has it, to plain sequences."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation("segments")
