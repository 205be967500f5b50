"""What models differ in: buffers that stand in no file, mixtures, and models that are refused by name and reason."""

import pytest
import torch
import transformers

import data
import stepdpo
from conftest import FAMILIES, default_flags, make_config, make_model, make_pairs
from runtime import architectures, startup
from runtime.messages import InputError

SMALL = dict(vocab_size=400, hidden_size=64, num_attention_heads=4, num_hidden_layers=2)


@pytest.mark.parametrize("config, message", [
    (transformers.BloomConfig(vocab_size=400, hidden_size=64, n_head=4, n_layer=2),
     "BloomForCausalLM is not supported: it does not take its attention from transformers' interface"),
    (transformers.GPTJConfig(vocab_size=400, n_embd=64, n_head=4, n_layer=2, rotary_dim=8),
     "GPTJForCausalLM is not supported: it does not take its attention from transformers' interface"),
    (transformers.Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=16,
                               final_logit_softcapping=None),
     "Gemma2ForCausalLM is not supported: Gemma2Attention attends with softcap"),
    (transformers.BartConfig(vocab_size=400, d_model=64, decoder_layers=1, decoder_attention_heads=4,
                             decoder_ffn_dim=48),
     "BartForCausalLM is not supported: it counts positions itself"),
    (transformers.Lfm2Config(**SMALL, intermediate_size=48, num_key_value_heads=2,
                             layer_types=["conv", "full_attention"]),
     r"Lfm2ForCausalLM is not supported: its layers \(conv\) connect tokens in other ways"),
    (transformers.HrmTextConfig(**SMALL, intermediate_size=48),
     "HrmTextForCausalLM is not supported: transformers cuts or joins the tensors in its files"),
], ids=lambda x: getattr(x, "model_type", ""))
def test_models_whose_attention_cannot_be_ours_are_refused_by_name(tokenizer, tmp_path, config, message):
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    startup.start_processes()
    with pytest.raises(InputError, match=message):
        policy = stepdpo.build(str(tmp_path), default_flags(dtype="float32"))
        policy(data.pack(make_pairs(tokenizer, 1)))


def test_models_that_cap_their_logits_are_refused_by_name():
    with pytest.raises(InputError, match="is not supported: it caps its .*final_logit_softcapping = 3"):
        stepdpo.Policy(make_model("llama", final_logit_softcapping=30.0))


def test_models_that_carry_state_along_a_batch_are_refused():
    model = make_model("llama")
    model._is_stateful = True
    with pytest.raises(InputError, match=r"its layers \(recurrent\) connect tokens in other ways"):
        stepdpo.Policy(model)


def test_heads_that_are_more_than_one_linear_layer_are_refused():
    model = make_model("llama")
    model.transform = torch.nn.Linear(64, 64)
    with pytest.raises(InputError, match="its logits are not those of its base model and one linear"):
        stepdpo.Policy(model)


@pytest.mark.parametrize("beyond", ["softcap", "s_aux", "position_bias", "attention_mask"])
def test_attention_beyond_causal_and_windows_is_refused_by_name(beyond):
    query = torch.randn(1, 2, 1, 8)
    refused = pytest.raises(InputError, match=f"Model is not supported: Module attends with {beyond}")
    with refused, architectures.attending_to("Model", data.pack([]).segments):
        architectures.segment_attention(torch.nn.Module(), query, query, query, **{beyond: 30.0})


def test_a_model_that_asks_for_no_attention_has_its_own_and_is_refused():
    with pytest.raises(InputError, match="Model is not supported: it does not take its attention from"):
        with architectures.attending_to("Model", data.pack([]).segments):
            pass


# ---------------------------------------------------------------------------- buffers, which stand in no file


# Frequencies that are scaled, of two kinds of layers, and scaled embeddings.
SPECIAL = ["llama3-rope", "yarn-rope", "gemma3-window"]


@pytest.mark.parametrize("family", [
    family if family in SPECIAL else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES])
def test_buffers_that_no_checkpoint_holds_come_out_right(tmp_path, family):
    make_model(family).save_pretrained(tmp_path)
    startup.start_processes()
    ours = stepdpo.build(str(tmp_path), default_flags()).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, a), (other, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert name == other and torch.equal(a, b)


def test_buffers_that_cannot_be_computed_are_an_error_and_never_garbage(workplace, monkeypatch):
    monkeypatch.setattr(transformers.Qwen2PreTrainedModel, "_init_weights", lambda self, module: None)
    startup.start_processes()
    config = make_config(workplace, "unused")
    with pytest.raises(InputError, match=r"its buffer model\.rotary_emb\.inv_freq is in no checkpoint"):
        stepdpo.build(config.model, config)
