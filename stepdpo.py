"""Step-DPO: preference optimization on pairs of single reasoning steps (Lai et al. 2024, arXiv:2406.18629).

Given a problem x, correct reasoning steps s_1..s_{k-1}, a correct next one s_win and a wrong one s_lose,
eq. (2) is

    L = -E log sigmoid( beta * [ log( pi(s_win  | x, s_<k) / pi_ref(s_win  | x, s_<k) )
                               - log( pi(s_lose | x, s_<k) / pi_ref(s_lose | x, s_<k) ) ] )

where pi is the model, and pi_ref the model before training. Only s_win and s_lose are trained on; all before
them is context.

    python stepdpo.py --model MODEL --data pairs.jsonl --output-dir OUT              # one process, CPU or GPU
    torchrun --nproc_per_node 8 stepdpo.py --model Qwen/Qwen2-7B-Instruct \\
        --data xinlai/Math-Step-DPO-10K --output-dir OUT

In reading order: the loss; the policy, a model that returns log-probabilities of spans; one optimizer step;
the training; building and sharding the model; the command. data.py says what a pair is and how it becomes
tokens, kernels.py why neither logits nor masks exist. What a run needs around the method is in runtime/: its
flags in flags.py, what comes before the first step in startup.py. "Collective" says that every rank must call
a function, because it waits for the others in there.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

from runtime.flags import flags, parse

if __name__ == "__main__":
    flags().parse_args()  # before the imports that take seconds, so that a wrong flag is told at once

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.utils.checkpoint import checkpoint

import data
from data import Batch, Pair
from kernels import linear_logps
from runtime import architectures, checkpoints, commands, gathering, offload, outputs, rows, startup, weights
from runtime.messages import InputError, print0, progress
from runtime.startup import Run, local_device

Config = argparse.Namespace  # the flags, by name

# --------------------------------------------------------------------------------------------------- the loss


def step_dpo_loss(
    policy_chosen_logps: Tensor,       # (B,) fp32, summed over the chosen span's tokens, nats
    policy_rejected_logps: Tensor,     # (B,)
    reference_chosen_logps: Tensor,    # (B,) of the model before training
    reference_rejected_logps: Tensor,  # (B,)
    beta: float,                       # > 0; strength of the pull towards the reference
) -> tuple[Tensor, Tensor, Tensor]:
    """Step-DPO loss, eq. (2) of arXiv:2406.18629.

    Returns (losses, chosen_rewards, rejected_rewards), each (B,); rewards are detached, in nats.
    Raises ValueError if shapes differ or beta <= 0.
    """
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    if any(x.shape != logps[0].shape for x in logps):
        raise ValueError(f"the four logps must have one shape, got {[tuple(x.shape) for x in logps]}")
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")

    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)  # beta log( pi / pi_ref )
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)  # eq. (2)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def losses_and_metrics(
    logps: Tensor,      # (2, B) fp32, of the chosen and the rejected spans under the policy, nats
    reference: Tensor,  # (2, B) under the reference
    lengths: Tensor,    # (2, B) how many tokens each span has
    config: Config,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, and what is logged of it. Training and evaluation both call this.

    Returns losses, (B,), whose mean over the global batch is minimized, and metrics, (B,) each, whose means
    are logged under TRL's names, so that plots overlay. Rewards of chosen spans may fall while training
    works: what counts is the margin.
    """
    chosen, rejected = logps
    losses, chosen_rewards, rejected_rewards = step_dpo_loss(chosen, rejected, *reference, config.beta)

    # The negative log-likelihood per token of the chosen span, as in Iterative RPO (arXiv:2404.19733).
    nll = -chosen / lengths[0]
    if config.nll_weight:
        losses = losses + config.nll_weight * nll

    return losses, {
        "loss": losses.detach(),
        "nll_loss": nll.detach(),
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": chosen_rewards > rejected_rewards,
        "logps/chosen": chosen.detach(),
        "logps/rejected": rejected.detach(),
    }


# ------------------------------------------------------------------------------------------------- the policy


class Head(nn.Module):
    """The language-model head. Asked with targets it returns their log-probabilities, and no logits exist."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # (V, D), (V,) or None

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)  # (..., V)
        if self.bias is None:
            return linear_logps(hidden, self.weight, targets)  # (T,)
        # The bias becomes one more column of the weight, and 1 its entry of hidden; seven columns of zeros
        # keep D a multiple of 8. This copies the weight: the few models with a bias (Phi, GPT-J) are small.
        bias = F.pad(self.bias[:, None], (0, 7))
        return linear_logps(F.pad(hidden, (0, 8), value=1.0), torch.cat([self.weight, bias], 1), targets)


class Policy(nn.Module):
    """A causal language model that maps a batch to the log-probabilities of its spans."""

    def __init__(self, model: nn.Module):
        super().__init__()
        architectures.refuse_unsupported(model)
        self.logit_scale = architectures.logit_scale(model)  # 1 but in a few models (Cohere, Granite)
        model.set_output_embeddings(Head(model.get_output_embeddings()))
        self.model = model
        self.name = type(model).__name__

    def forward(self, batch: Batch) -> Tensor:
        """(2, B) fp32: log-probabilities of the chosen and of the rejected spans, in nats."""
        # In here every layer's attention is kernels.packed_attention with these segments.
        with architectures.attending_to(self.name, batch.segments):
            hidden = self.model.base_model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
            ).last_hidden_state  # (1, L, D)

        # Only the places that predict a trained token reach the head. It is called as a module, because FSDP
        # gathers a module's weight for the time of its forward.
        hidden = self.logit_scale * hidden[0, batch.predict_at]  # (T, D)
        token_logps = self.model.get_output_embeddings()(hidden, batch.targets)  # (T,)
        zeros = token_logps.new_zeros(batch.span_lengths.numel())
        sums = zeros.index_add(0, batch.span_of, token_logps)  # of the tokens of each span
        return sums.view_as(batch.span_lengths).clone()  # FSDP hooks what a module returns; not a view

    def library_logp(self, prefix: list[int], span: list[int]) -> Tensor:
        """() fp32: log-probability of a span after its prefix by transformers' own forward and attention,
        which the self-check compares `forward` with."""
        ids = torch.tensor([prefix + span], device=local_device())  # (1, L)
        with architectures.library_attention(self.model):
            logits = self.model(ids, use_cache=False, logits_to_keep=len(span) + 1).logits
        predicting = logits[0, -len(span) - 1:-1].float()  # (S, V), of a span of S tokens
        return predicting.log_softmax(-1).gather(1, ids[0, -len(span):, None]).sum()


# ----------------------------------------------------------------------------------------- one optimizer step


def micro_batches(pairs: Sequence[Pair], indices: Sequence[int], config: Config,
                  desc: str | None = None) -> Iterator[tuple[list[int], Batch]]:
    """This rank's micro-batches of one global batch, with their pairs' indices. All ranks get as many."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    lengths = [pairs[i].tokens(config.share_prefix) for i in indices]
    plan = data.plan_micro_batches(lengths, ranks, config.tokens_per_micro_batch)

    for shares in progress(plan, desc, unit="batch") if desc else plan:
        own = [int(indices[j]) for j in shares[rank]]
        yield own, data.pack([pairs[i] for i in own], config.share_prefix).to(local_device())


def train_step(
    step: int,
    policy: Policy,
    optimizer: offload.ShardedAdamW,
    pairs: Sequence[Pair],
    indices: Sequence[int],  # of the pairs of this global batch
    reference: Tensor,       # (2, N) log-probabilities of all pairs under the reference
    config: Config,
) -> dict[str, float]:
    """One optimizer step. Returns its metrics, averaged over the global batch. Collective.

    Raises InputError, and leaves the model as it was, if the loss or the gradient is not finite.
    """
    began = time.perf_counter()
    of_micro_batches = []

    for own, batch in gathering.gathered_once(policy, micro_batches(pairs, indices, config), config):
        losses, metrics = losses_and_metrics(policy(batch), reference[:, own], batch.span_lengths, config)
        of_micro_batches.append(metrics)

        # The mean over the global batch, however many ranks and micro-batches it is cut into. FSDP averages
        # gradients over the ranks, and what is wanted is their sum.
        loss = losses.sum() / len(indices)
        (loss * dist.get_world_size()).backward()

    metrics = averages(of_micro_batches, len(indices))
    # The gradients stay sharded; the norm is that of all shards together.
    norm = optimizer.clip_grad_norm(config.max_grad_norm).full_tensor().item()
    if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
        some = ", ".join(pairs[i].where for i in indices[:5])
        raise InputError(f"step {step}: loss {metrics['loss']}, gradient norm {norm}; nothing was updated. "
                         f"Try a lower --learning-rate; the pairs: {some} ...")

    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - began
    tokens = sum(pairs[i].tokens(config.share_prefix) for i in indices)
    metrics |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"],
                "tokens_per_second": tokens / seconds, "pairs_per_second": len(indices) / seconds}
    if local_device().type == "cuda":
        metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return metrics


def averages(of_micro_batches: list[dict[str, Tensor]], pair_count: int) -> dict[str, float]:
    """Means of metrics, (B,) each in every micro-batch, over all pairs of all ranks. Collective."""
    names = list(of_micro_batches[0])
    sums = []
    for name in names:
        values = torch.cat([metrics[name] for metrics in of_micro_batches])
        sums.append(values.double().sum())
    totals = torch.stack(sums)
    dist.all_reduce(totals)
    return dict(zip(names, (totals / pair_count).tolist(), strict=True))  # one copy from the device


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up, then cosine to 0. Unlike in Hugging Face's schedule the first step's rate is not 0."""
    warmup = math.ceil(config.warmup_ratio * steps - 1e-9)  # 0.1 * 30 is 3.0000000000000004
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


# ----------------------------------------------------------------------------------------------- the training


def train(config: Config) -> None:
    """The whole run, from step pairs to a model folder. Collective."""
    startup.start_processes(config.timeout)
    with outputs.claimed(config):
        run = startup.prepare(config)
        if run is not None:  # else it was finished before
            train_prepared(run)


def train_prepared(run: Run) -> None:
    """The reference pass, the optimizer steps, the export."""
    config, pairs = run.config, run.pairs
    policy, reference, held_out_reference = reference_pass(run)
    optimizer = offload.make_adamw(policy.parameters(), config.offload,
                                   betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    with commands.noticing_stop_signals() as stop_asked:
        first = checkpoints.start_or_resume(policy, optimizer, run)
        began = time.perf_counter()
        bar = progress(range(first, run.steps), "training", initial=first, total=run.steps, unit="step",
                       leave=True)
        for step in bar:
            if step % config.eval_every == 0:
                evaluate(step, policy, run.held_out, held_out_reference, config)
            optimizer.param_groups[0]["lr"] = learning_rate(step, run.steps, config)
            indices = data.indices_of_step(step, len(pairs), config.batch_size, config.seed)
            metrics = train_step(step, policy, optimizer, pairs, indices, reference, config)
            outputs.log(config, {"step": step, **metrics})
            bar.set_postfix_str(f"loss {metrics['loss']:.4f}, margin {metrics['rewards/margins']:+.4f}, "
                                f"{metrics['pairs_per_second']:.1f} pairs/s", refresh=False)

            done = step + 1
            is_last = done == run.steps
            signal = 0 if is_last else commands.signal_on_any_rank(stop_asked)
            # The last step is saved too, because the export may find the disk full.
            is_due = config.save_every and (is_last or done % config.save_every == 0)
            if is_due or signal:
                checkpoints.save(policy, optimizer, done, config)
            if signal:
                print0(f"stopped     after optimizer step {done} of {run.steps}; "
                       "the same command with --resume continues")
                sys.exit(128 + signal)

    # The model comes last: a run is finished if and only if it is there.
    evaluate(run.steps, policy, run.held_out, held_out_reference, config)
    weights.export(policy, run.folder, f"{config.output_dir}/model")
    minutes = (time.perf_counter() - began) / 60
    print0(f"finished    {run.steps - first} optimizer steps of {run.steps} in {minutes:.1f} min",
           f"            metrics in {config.output_dir}/metrics.jsonl, model in {config.output_dir}/model")


def reference_pass(run: Run) -> tuple[Policy, Tensor, Tensor]:
    """The policy, checked, and the reference log-probabilities of training and held-out pairs, (2, N) each.

    The reference is the model before training, so the policy itself computes them, once, and no second model
    is held. With --reference that model computes them, and is freed.
    """
    policy = build(run.reference_folder, run.config)
    startup.describe(policy, run)
    startup.self_check(policy, run.reference_folder, run)
    reference = cached_logps(policy, "training", run.pairs, run)
    held_out_reference = cached_logps(policy, "held-out", run.held_out, run)

    if run.reference_folder != run.folder:
        del policy
        gc.collect()  # sharded layers point at each other, and two models may not fit
        policy = build(run.folder, run.config)
        startup.self_check(policy, run.folder, run)
    return policy, reference, held_out_reference


def cached_logps(policy: Policy, name: str, pairs: Sequence[Pair], run: Run) -> Tensor:
    """(2, N) log-probabilities of all pairs under the reference, from a file if they were computed before."""
    compute = partial(all_logps, policy, pairs, run.config, f"reference ({name})")
    return outputs.cached_logps(name, pairs, run.reference_folder, run.config, compute)


@torch.no_grad()
def all_logps(policy: Policy, pairs: Sequence[Pair], config: Config, desc: str) -> Tensor:
    """(2, N) fp32 on every rank: log-probabilities of the chosen and rejected spans of all pairs, in nats."""
    logps = torch.zeros(2, len(pairs), device=local_device())
    for own, batch in micro_batches(pairs, range(len(pairs)), config, desc):
        logps[:, own] = policy(batch)
    dist.all_reduce(logps)  # each pair was filled in by one rank
    return logps


@torch.no_grad()
def evaluate(step: int, policy: Policy, held_out: Sequence[Pair], reference: Tensor, config: Config) -> None:
    """Log and print the metrics of the held-out pairs, if there are any (figure 2 of the paper)."""
    if not held_out:
        return
    of_micro_batches = []
    for own, batch in micro_batches(held_out, range(len(held_out)), config, "evaluating"):
        _, metrics = losses_and_metrics(policy(batch), reference[:, own], batch.span_lengths, config)
        of_micro_batches.append(metrics)
    metrics = averages(of_micro_batches, len(held_out))

    if not math.isfinite(metrics["loss"]):
        raise InputError(f"step {step}: held-out loss {metrics['loss']}; nothing was exported. "
                         "Try a lower --learning-rate")
    outputs.log(config, {"step": step, **{f"eval/{name}": value for name, value in metrics.items()}})
    # Before the first step the policy is its own reference, and all rewards are 0.
    accuracy = f"{metrics['rewards/accuracies']:.1%}" if step > 0 or config.reference else "-"
    print0(f"step {step:4d}   held-out loss {metrics['loss']:.4f}, margin {metrics['rewards/margins']:+.4f}, "
           f"accuracy {accuracy}")


# -------------------------------------------------------------------------------------- building and sharding


def build(folder: str, config: Config) -> Policy:
    """The model in a folder, sharded over all ranks, in eval mode: training has no dropout either.

    It is built on the meta device, where parameters take no memory, then sharded, and only then do the shards
    get memory and their weights: no rank ever holds the whole model.
    """
    model = architectures.empty_model(folder)
    with weights.reading(folder):
        policy = Policy(model).eval()
        architectures.compute_buffers(model, local_device())
        shard(policy, config)
        weights.load(policy, folder)
    return policy


def shard(policy: Policy, config: Config) -> None:
    """FSDP2: each decoder layer is gathered while it runs; untied embedding and head too; then the rest."""
    model, device = policy.model, local_device()
    on_host = config.offload == "all"
    host_memory = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    wrap = partial(
        fsdp.fully_shard,
        mesh=startup.mesh_of_ranks(config.shard_size),
        mp_policy=fsdp.MixedPrecisionPolicy(getattr(torch, config.dtype), reduce_dtype=torch.float32),
        offload_policy=host_memory if on_host else fsdp.OffloadPolicy(),
    )

    for layer in architectures.decoder_layers(model):
        if config.compile:
            layer.forward = torch.compile(layer.forward)  # in the checkpoint: around it this would do nothing
        if config.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                    context_fn=architectures.attending_again)
        wrap(layer)

    # A weight that two modules share must be in the group of a module above both.
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    if not tied:
        wrap(embedding)
        wrap(head)
    wrap(policy, reshard_after_forward=True)  # else passes without gradients leave gathered parameters behind
    fsdp.register_fsdp_forward_method(policy, "library_logp")

    # Memory for the shards. Not `to_empty`, which would empty the buffers too.
    home = torch.device("cpu") if on_host else device
    policy._apply(lambda tensor: torch.empty_like(tensor, device=home) if tensor.is_meta else tensor)
    if tied:
        head.weight = embedding.weight  # _apply has made two of one


# ------------------------------------------------------------------------------------------------ the command


def train_and_compare(config: Config) -> None:
    """Train, and with --test-problems compare the model before and after."""
    rows.refuse_missing_library(*config.data, config.eval_data, config.test_problems)
    if config.test_problems:
        from pairs.problems import read_problems
        read_problems(config.test_problems)  # what is wrong with them must not show only at the end
    train(config)
    if config.test_problems:
        from pairs.stages import report_gain
        gc.collect()  # of the trained model, whose layers point at each other
        report_gain(weights.resolve(config.model), f"{config.output_dir}/model", config)


def main() -> None:
    commands.run_command("stepdpo.py", partial(train_and_compare, parse()))


if __name__ == "__main__":
    main()
