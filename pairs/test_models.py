"""Which models can be sampled from in this process: those that say the same in a padded batch as alone."""

import re

import pytest
import torch
import transformers

from conftest import write_jsonl
from pairs import __main__ as command_line
from pairs.sampling import LocalSampler, Settings
from runtime.messages import InputError

SMALL = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=None,
             initializer_range=0.5)
HYBRID = dict(layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
              linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2)
FEW_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                   shared_expert_intermediate_size=32)
BART = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, init_std=0.5)
REFUSED = {  # class of the configuration: its fields, and what the model does
    "Qwen3NextConfig": (HYBRID | FEW_EXPERTS, "fails there"), "Qwen3_5TextConfig": (HYBRID, "fails there"),
    "Lfm2Config": (dict(layer_types=["conv", "full_attention"]), "fails there"),
    "MambaConfig": (dict(state_size=8), "fails there"),
    "Mamba2Config": (dict(state_size=8, num_heads=8, n_groups=1, head_dim=8, expand=2), "fails there"),
    "RwkvConfig": ({}, "fails there"),
    "BartConfig": (BART, "says something else there than alone"),  # its positions go on over padding
}
GPT2 = dict(n_embd=32, n_head=4, n_layer=2)
TAKEN = {"MistralConfig": dict(sliding_window=12), "Gemma2Config": dict(sliding_window=12),
         "GPT2Config": GPT2}


def make(name: str, fields: dict, tokenizer, folder) -> str:
    """A folder with a tiny random model."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SMALL | dict(eos_token_id=tokenizer.eos_token_id) | fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_batches_change_is_refused_by_name_and_a_server_is_named(name, tokenizer, tmp_path):
    fields, problem = REFUSED[name]
    folder = make(name, fields, tokenizer, tmp_path / "model")
    problems = write_jsonl(tmp_path / "p.jsonl", [dict(prompt=f"Problem {i}?", answer="7") for i in range(3)])
    args = command_line.parse(["solve", "--model", folder, "--problems", problems, "--out",
                               str(tmp_path / "out"), "--max-new-tokens=8"])
    with pytest.raises(InputError) as error:
        command_line.run(args)
    message = str(error.value)
    assert message.isprintable() and len(message) < 1500
    assert re.search(rf"^\w+ is not supported: .*{re.escape(folder)} {problem}", message)
    assert f"start a server for it, as `vllm serve {folder}`, and pass --server" in message


@pytest.mark.parametrize("name", TAKEN)
def test_in_a_batch_a_model_says_what_it_says_alone(name, tokenizer, tmp_path):
    sampler = LocalSampler(Settings(make(name, TAKEN[name], tokenizer, tmp_path), temperature=0,
                                    max_new_tokens=5), tokenizer)
    prompts = [tokenizer(text).input_ids for text in ("a", "What is twice 5, please?", "x y z " * 9)]
    drawn = [pair for batch in sampler.sample([(ids, "n") for ids in prompts * 2]) for pair in batch]
    for i, continuation in drawn:
        ids = list(prompts[i % 3])
        for _ in range(continuation.tokens):
            with torch.inference_mode():
                ids.append(int(sampler.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert continuation.text == sampler._continuation(prompts[i % 3], ids[len(prompts[i % 3]):]).text


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 8])
def test_the_check_needs_no_more_positions_than_a_model_has(limit, tokenizer, tmp_path):
    folder = make("GPT2Config", GPT2 | dict(max_position_embeddings=limit), tokenizer, tmp_path)
    sampler = LocalSampler(Settings(folder, max_new_tokens=8), tokenizer)
    wanted = [([5] * n, "n") for n in range(1, limit)]
    drawn = [continuation.tokens for batch in sampler.sample(wanted) for _, continuation in batch]
    assert sorted(drawn) == list(range(1, limit))


def test_running_out_of_memory_is_no_refusal(tiny, tokenizer, monkeypatch):
    sampler = LocalSampler(Settings(tiny, max_new_tokens=8), tokenizer)

    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(sampler, "_read_prompts", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        list(sampler.sample([([5], "n")]))
