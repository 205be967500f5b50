"""What models differ in, as far as training has to know: which of them packed rows would change, how their
logits are scaled, how far their positions go, and the numbers that stand in no file.

A model that would be trained as something else than it computes is refused by name and with the reason,
before it takes any memory. The self-check of the trainer then compares what is left with its own forward.
"""

import inspect
import math

import torch
import transformers
from torch import nn

from files import InputError, refuse_model

OWN_ATTENTION = "it does not take its attention from transformers' interface"


def refuse_unsupported(model: nn.Module) -> None:
    """Raise InputError for a model that would be trained as something else than it computes."""
    name, config, head = type(model).__name__, model.config.get_text_config(), model.get_output_embeddings()
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if kinds or model._is_stateful:
        refuse_model(name, f"its layers ({', '.join(sorted(kinds)) or 'recurrent'}) connect tokens in other "
                           "ways than causal attention and sliding windows, which packed rows would mix up")
    if not model._can_set_attn_implementation():
        refuse_model(name, OWN_ATTENTION)
    if {*model.children()} != {model.base_model, head} or type(head) is not nn.Linear:
        refuse_model(name, "its logits are not those of its base model and one linear layer")
    if "position_ids" not in inspect.signature(model.get_decoder().forward).parameters:
        refuse_model(name, "it counts positions itself, but a packed row has many beginnings")
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
    dynamic and long RoPE use other frequencies as soon as one sequence of a row is longer."""
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
    """Give rotary frequencies and the like, which stand in no checkpoint, their numbers.

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
