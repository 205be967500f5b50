"""Which architectures train exactly: each causal one that transformers knows is tried, tiny and random.

    python bench/architectures.py                          # all of them, in some minutes on two cores
    python bench/architectures.py --only 'qwen|llama' --out architectures.json

A model has a layer of each kind, and windows shorter than the pairs. The trainer takes three optimizer steps
on it, and so does a naive one: whole logits, one sequence at a time. The verdicts:

    equal      the losses agree, training moved them, and transformers finds the trained weights in the export
    refused    before the first optimizer step, by name: "... is not supported: why"
    differs    the losses or the exported weights are not what they should be: a bug of ours
    traceback  anything else that came out of the trainer, also an error without name or reason: a bug of ours
    not built  transformers itself does not build or save the model
"""

import argparse
import collections
import dataclasses
import json
import math
import multiprocessing.connection
import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from common import announced_environment, write
from naive import naive_training
from tqdm import tqdm

import conftest
import stepdpo  # before transformers' classes: it keeps hub kernels out
from runtime import weights
from runtime.messages import InputError

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES  # isort: skip

VERDICTS = ("equal", "refused", "differs", "traceback", "not built")
WORKERS, TIME_LIMIT, ALLOWED = 2, 300, 2e-4  # processes, seconds for each, difference of a loss
SMALL = {  # whole names of configuration fields -> the most they may be; the first that matches counts
    r"mamba_d_ssm": 128,
    r"qk_head_dim|mamba_d_head": 32,
    r"\w*vocab_size\w*|num_position_embeddings|encoder_hash_byte_group_vocab": 400,
    r"num_key_value_heads|swa_num_key_value_heads|kv_n_heads|num_kv_heads|n_groups|split_ngram_parts": 2,
    r"(\w+_)?(n|num)_(\w+_)?heads?|(\w+_)?attention_heads|n_routed_experts|(moe_)?num_(local_)?experts": 4,
    r"(\w+_)?(n|num)_(\w+_)?layers?|\w*layers|depth|num_blocks|num_experts_per_tok(en)?|moe_(top_?)?k": 2,
    r"(\w+_)?(head_dim|d_kv|rotary_dim|head_size|\w+_rank|d_state)|dim_head|kv_channels|hc_lowrank": 16,
    r"(\w+_)?hidden_size\w*|d_model|n_embd|dim_model|lru_width|emb_dim|embedding_size|\w*embed_dim": 64,
    r"\w*intermediate_size\w*|\w*ffn_dim|\w*ffn_hidden_size|dim_ff|dff|d_ff|mlp_dim|adapter_[io]\w+": 64,
    r"n_group|num_expert_group|topk_group|n_shared_experts|first_k_dense_replace|\w*token_(id|index)": 1,
    r"sliding_window(_size)?|attention_chunk_size|local_attention|attention_window_size|window_size": 20,
}
FILLED = ("head_dim", "num_key_value_heads", "moe_intermediate_size", "num_experts_per_tok",
          "n_routed_experts", "n_shared_experts")  # also where they are None
TWO, ROPE = dict(num_hidden_layers=2), dict(rope_type="default", rope_theta=1e4)
SPECIAL = {  # what an architecture needs besides, or has in its real models
    "cohere_compass_text": dict(rope_parameters=dict(full_attention=ROPE)),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8)),
    "falcon_h1": dict(mamba_d_head=32),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], num_layers=2),
    **dict.fromkeys(["granite", "granite_swa", "granitemoe", "granitemoeshared"], dict(logits_scaling=8.0)),
    "hyperclovax": dict(logits_scaling=0.5),
    **dict.fromkeys(["lfm2", "lfm2_moe"], dict(layer_types=["conv", "full_attention"], **TWO)),
    "mamba2": dict(head_dim=32),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"], **TWO),
    "qwen4_exp_text": dict(indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=32,
                           indexer_compress_ratio=4, head_dim=16, ngram_vocab_size_base=400),
    "reformer": dict(axial_pos_embds=False, attn_layers=["local", "local"]),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4,
                  attention_hidden_size=128, attention_head_dim=32),
}


def tiny_config(kind: type) -> transformers.PretrainedConfig:
    """A small configuration with a layer of each kind, at least two. Those inside it are small too."""
    usual, small = vars(kind()), {}
    fields = {field.name: usual.get(field.name) for field in dataclasses.fields(kind)}
    depth = fields.get("num_hidden_layers") or -1
    per_layer = {name: value for name, value in fields.items()
                 if isinstance(value, list | tuple) and len(value) == depth}
    kinds = list(dict.fromkeys(zip(*per_layer.values(), strict=True))) or [()]
    kinds *= 2 if len(kinds) == 1 else 1

    for name, value in fields.items():
        most = next((SMALL[pattern] for pattern in SMALL if re.fullmatch(pattern, name)), None)
        if isinstance(value, transformers.PretrainedConfig):
            small[name] = tiny_config(type(value))
        elif name in per_layer:
            small[name] = [values[list(per_layer).index(name)] for values in kinds]
        elif value is None and name in FILLED or most and type(value) is int:
            small[name] = most if value is None or name == "vocab_size" else min(most, value)
    if depth > 0:
        small["num_hidden_layers"] = len(kinds)
    if "kv_lora_rank" in fields:  # latent attention has as many key heads as heads
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "is_decoder" in fields:  # else models of BERT's family see the tokens that they predict
        small["is_decoder"] = True
    return kind(**small | SPECIAL.get(kind.model_type, {}))


def make_model(model_type: str, folder: str) -> None:
    """Write a tiny random model with a tokenizer."""
    config = tiny_config(transformers.CONFIG_MAPPING[model_type])
    config = type(config).from_dict(config.to_dict())  # as it will be read
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # zeros and ones would hide that they are left out
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    conftest.make_tokenizer().save_pretrained(folder)


def examine(model_type: str, folder: str) -> tuple[str, str]:
    """(verdict, reason) of one architecture."""
    model, out, naive, trained, export = f"{folder}/model", f"{folder}/out", None, {}, weights.export
    config = stepdpo.parse([
        f"--model={model}", f"--data={folder}/../pairs.jsonl", f"--output-dir={out}", "--batch-size=4",
        "--epochs=1", "--learning-rate=1e-3", "--dtype=float32", "--activation-checkpointing"])
    try:
        make_model(model_type, model)
        naive, _ = naive_training(config)
    except Exception as error:  # where transformers cannot run what it saved, the trainer must say so
        traceback.print_exc()
        if not os.path.exists(f"{model}/tokenizer.json"):
            return "not built", f"{error}"

    def remember_and_export(policy: stepdpo.Policy, *args: str) -> None:
        for name, tensor in policy.model.state_dict().items():
            trained[name] = getattr(tensor, "full_tensor", tensor.clone)().clone()
        export(policy, *args)

    weights.export = remember_and_export  # for good: this process ends soon
    try:
        stepdpo.train(config)
    except Exception as error:
        traceback.print_exc()
        by_name = re.match(rf"({CLASSES[model_type]}|{model_type}) is not supported: .", str(error))
        in_time = isinstance(error, InputError) and not os.path.exists(f"{out}/metrics.jsonl")
        return ("refused" if by_name and in_time else "traceback"), f"{type(error).__name__}: {error}"

    losses = [row["loss"] for row in conftest.rows_of(f"{out}/metrics.jsonl")]
    if naive is None:
        return "differs", "trains a model that transformers itself does not run"
    worst, moved = max(abs(a - b) for a, b in zip(losses, naive, strict=True)), abs(naive[-1] - math.log(2))
    again = transformers.AutoModelForCausalLM.from_pretrained(f"{out}/model", dtype=torch.float32)
    exported = again.state_dict()
    kept = exported.keys() == trained.keys() and all(torch.equal(exported[name], trained[name])
                                                     for name in exported)
    kept = kept and weights.weight_files(model) == weights.weight_files(f"{out}/model")
    verdict = "equal" if worst <= ALLOWED and moved > 1e-3 and kept else "differs"
    return verdict, f"losses differ by {worst:.1e}, moved by {moved:.1e}; exported: {'yes' if kept else 'NO'}"


def run(model_type: str, folder: str) -> None:
    """What a child process does: leave a log and a verdict in the folder."""
    os.makedirs(folder)
    log = os.open(f"{folder}/log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    Path(f"{folder}/verdict.json").write_text(json.dumps(examine(model_type, folder)))


def run_all(names: list[str], root: str) -> Iterator[tuple[str, list[str]]]:
    """Yields (model type, [verdict, reason]). Neither the crash of one nor a hang ends the rest."""
    fork, waiting, running = multiprocessing.get_context("fork"), list(names), {}
    while waiting or running:
        while waiting and len(running) < WORKERS:
            name = waiting.pop(0)
            process = fork.Process(target=run, args=(name, f"{root}/{name}"))
            process.start()
            running[name] = process, time.monotonic() + TIME_LIMIT

        multiprocessing.connection.wait([process.sentinel for process, _ in running.values()], timeout=1)
        for name, (process, deadline) in list(running.items()):
            if not process.is_alive() or time.monotonic() > deadline:
                process.kill()
                process.join()
                del running[name]
                left = Path(f"{root}/{name}/verdict.json")
                ended = ["traceback", f"crashed, or took more than {TIME_LIMIT} s ({process.exitcode})"]
                yield name, json.loads(left.read_text()) if left.exists() else ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose model type has this regular expression [all]")
    parser.add_argument("--out", help="the verdicts and their reasons, JSON")
    parser.add_argument("--keep", help="new folder for models, runs and logs [they are removed]")
    args = parser.parse_args()
    report, began, verdicts, counts = announced_environment(), time.monotonic(), {}, collections.Counter()
    names = [name for name in CLASSES if re.search(args.only, name)]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep or temporary
        os.makedirs(root, exist_ok=True)
        os.environ["STEPDPO_CACHE"] = f"{root}/cache"
        conftest.write_jsonl(Path(root) / "pairs.jsonl", conftest.make_rows(12))
        bar = tqdm(run_all(names, root), total=len(names), unit="model")
        for name, verdicts[name] in bar:
            counts[verdicts[name][0]] += 1
            bar.set_postfix(counts)

    for name in sorted(names, key=lambda name: VERDICTS.index(verdicts[name][0])):
        print(f"{verdicts[name][0]:10} {name:24} {' '.join(verdicts[name][1].split())[:200]}")
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
          + f" of {len(names)}, in {time.monotonic() - began:.0f} s")
    if args.out:
        write(args.out, report | {"counts": counts, "verdicts": verdicts})


if __name__ == "__main__":
    main()
