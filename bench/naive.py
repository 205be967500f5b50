"""The trainer as plainly as it can be written: what the real one is compared with, step by step.

All logits, one sequence at a time, every prefix twice, fp32 on a CPU. It shares with the real one how rows
become token ids and which pairs go into which optimizer step, and nothing of the arithmetic.
"""

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

import data
from runtime.rows import read_pairs
from runtime.templates import read_tokenizer


def naive_training(config: argparse.Namespace) -> tuple[list[float], nn.Module]:
    """(the loss of each optimizer step, the trained model), by the trainer's flags."""
    policy = load(config.model)
    reference = load(config.reference) if config.reference else policy
    pairs, _ = read_pairs(read_tokenizer(config.model), config)
    with torch.no_grad():
        reference_logps = [logps_of(reference, pair) for pair in pairs]

    steps = config.epochs * data.steps_per_epoch(len(pairs), config.batch_size)
    steps = min(steps, config.max_steps or steps)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    for step in range(steps):
        of_pairs = []
        for i in data.indices_of_step(step, len(pairs), config.batch_size, config.seed):
            chosen, rejected = logps_of(policy, pairs[i])
            reference_chosen, reference_rejected = reference_logps[i]
            margin = (chosen - reference_chosen) - (rejected - reference_rejected)
            nll = -chosen / len(pairs[i].chosen)
            of_pairs.append(-logsigmoid(config.beta * margin) + config.nll_weight * nll)

        loss = torch.stack(of_pairs).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = config.learning_rate * share_of_rate(step, steps, config)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, policy


def load(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM  # not before runtime keeps hub kernels out
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logps_of(model: nn.Module, pair: data.Pair) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chosen and of the rejected span after the prefix, in nats."""
    sums = []
    for span in (pair.chosen, pair.rejected):
        ids = torch.tensor([pair.prefix + span])  # (1, L)
        logps = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)  # (L - 1, V)
        of_tokens = logps.gather(1, ids[0, 1:, None])[:, 0]
        sums.append(of_tokens[-len(span):].sum())
    return sums[0], sums[1]


def share_of_rate(step: int, steps: int, config: argparse.Namespace) -> float:
    """Linear warm-up, then cosine to 0."""
    warmup = math.ceil(round(config.warmup_ratio * steps, 6))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
