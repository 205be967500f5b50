"""Model folders: which of their files count, how weights get from them into shards, and back."""

import json
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import stepdpo
from bench.naive import naive_training
from conftest import (
    losses_of,
    make_config,
    make_flags,
    make_model,
    run_in_processes,
    start_ranks,
    train_by_flags,
)
from runtime import checkpoints, offload, startup, weights
from runtime.commands import run_command, waiting_for_disks
from runtime.messages import WAITED, InputError


def build(folder, *flags: str) -> stepdpo.Policy:
    startup.start_processes()
    config = stepdpo.parse(["--model", str(folder), "--data", "-", "--output-dir", "-",
                            "--dtype", "float32", *flags])
    return stepdpo.build(str(folder), config)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# ----------------------------------------------------------------------------------------- which files count


@pytest.fixture
def two_models(tiny, tmp_path):
    """A folder with a single file of weights, and shards with an index that hold another model's."""
    folder = tmp_path / "m"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    model.save_pretrained(folder, max_shard_size="20KB")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    assert (folder / "model.safetensors").exists() and (folder / "model.safetensors.index.json").exists()
    return folder


def name_the_index(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "model.safetensors.index.json"
    (folder / "config.json").write_text(json.dumps(config))


def make_the_index_stale(folder: Path) -> None:
    for path in folder.glob("model-*"):
        path.unlink()


@pytest.mark.parametrize("change", [lambda folder: None, name_the_index, make_the_index_stale])
def test_the_weights_that_count_are_those_that_transformers_loads(two_models, tmp_path, change):
    change(two_models)
    expected = transformers.AutoModelForCausalLM.from_pretrained(two_models).state_dict()
    policy = build(two_models)
    for name, x in policy.model.state_dict().items():
        assert torch.equal(x.full_tensor(), expected[name]), name

    # And so it is with what is exported, in which nothing is left to be taken for the model by others.
    out = tmp_path / "out"
    weights.export(policy, str(two_models), str(out))
    loaded = weights.weight_files(str(two_models))
    assert {path.name for path in out.glob("*.safetensors")} == {*loaded}
    assert (out / "model.safetensors.index.json").exists() == (len(loaded) > 1)
    for name, x in transformers.AutoModelForCausalLM.from_pretrained(out).state_dict().items():
        assert torch.equal(x, expected[name]), name


def test_a_model_is_known_by_the_weights_that_count(two_models):
    before = weights.model_identity(str(two_models))
    shards = sorted(two_models.glob("model-*"))
    shards[0].write_bytes(b"another")
    assert weights.model_identity(str(two_models)) == before
    name_the_index(two_models)
    with pytest.raises(InputError, match=shards[0].name):
        weights.model_identity(str(two_models))


@pytest.mark.parametrize("named", ["nowhere.safetensors", "../m2/model.safetensors", 7])
def test_weights_that_a_configuration_names_must_be_in_the_folder(tiny, tmp_path, named):
    shutil.copytree(tiny, tmp_path / "m"), shutil.copytree(tiny, tmp_path / "m2")
    config = json.loads((tmp_path / "m/config.json").read_text()) | {"transformers_weights": named}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: transformers_weights, .* must be a file inside"):
        weights.weight_files(str(tmp_path / "m"))


def test_named_chat_templates_are_of_the_model(tiny, tmp_path, monkeypatch):
    source, out = tmp_path / "m", tmp_path / "out"
    shutil.copytree(tiny, source)
    identity = weights.model_identity(str(source))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("{{ messages }}\r\n")
    (source / "onnx").mkdir()
    (source / "onnx/config.json").write_text("{}")
    with_templates = weights.model_identity(str(source))
    assert with_templates != identity
    (source / "additional_chat_templates/tools.jinja").write_text("{{ messages }} \r\n")
    assert weights.model_identity(str(source)) not in (identity, with_templates)

    weights.export(build(source), str(source), str(out))
    expected = bytes_of(source)
    del expected["onnx/config.json"]
    assert bytes_of(out) == expected
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template.keys() == {"default", "tools"}

    # And a model from the hub comes with them.
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options))
    weights.download("owner/name")
    names = ["additional_chat_templates/tools.jinja", "chat_template.jinja", "original/params.json"]
    assert [*filter_repo_objects(names, **asked)] == names[:2]


def test_a_model_is_known_by_its_weights_its_tokenizer_and_its_template(tiny, tmp_path):
    def identity(change=None):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(tiny, tmp_path / "m")
        if change:
            change(tmp_path / "m")
        return weights.model_identity(str(tmp_path / "m"))

    def change_one_number(folder):
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] += 1e-3
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def change_template(folder):
        (folder / "chat_template.jinja").write_text("{{ messages }}")

    same = identity()
    assert same == identity(lambda folder: (folder / "notes.md").write_text("mine"))
    assert len({same, identity(change_one_number), identity(change_template)}) == 3
    assert weights.model_identity("owner/name") == "owner/name"


def test_parameters_of_a_model_are_counted_from_the_headers(workplace):
    model = transformers.AutoModelForCausalLM.from_pretrained(workplace / "qwen2-tied")
    assert weights.count_parameters(str(workplace / "qwen2-tied")) == model.num_parameters()


def test_files_of_a_model_may_stand_in_folders_but_not_outside_theirs(workplace, tmp_path):
    tensors = load_file(workplace / "qwen2" / "model.safetensors")
    shutil.copytree(workplace / "qwen2", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    where = {name: f"{'ab'[i % 2]}/model.safetensors" for i, name in enumerate(sorted(tensors))}
    for folder in "ab":
        (tmp_path / "m" / folder).mkdir()
        part = {name: tensors[name] for name in where if where[name][0] == folder}
        save_file(part, tmp_path / "m" / folder / "model.safetensors", metadata={"format": "pt"})
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))

    policy = build(tmp_path / "m")
    weights.export(policy, str(tmp_path / "m"), str(tmp_path / "out"))
    for folder in "ab":
        again = load_file(tmp_path / "out" / folder / "model.safetensors")
        assert again and all(torch.equal(again[name], tensors[name]) for name in again)

    for outside in ("../m2/model.safetensors", "/etc/model.safetensors"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, outside)}))
        with pytest.raises(InputError, match="index.json: '.*' must be a file inside that folder"):
            build(tmp_path / "m")


# ---------------------------------------------------------------------------------------------------- reading


class StoredTensor:
    """As safetensors gives it, but it counts what is read."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.reads, self.get_shape = tensor, [], lambda: [*tensor.shape]
        self.get_dtype = lambda: "F32"

    def __getitem__(self, index):
        self.reads.append(self.tensor[index].numel())
        return self.tensor[index]


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_each_rank_reads_its_own_rows_or_experts_and_nothing_else(monkeypatch, shards):
    whole = torch.arange(5 * 6 * 4.0).view(5, 6, 4)  # 5 rows or experts; gate and up of (3, 4)
    in_one = {weights.Place("x"): StoredTensor(whole)}
    apart = {weights.Place("x", expert, part, 2): StoredTensor(whole[expert, 3 * part:3 * part + 3])
             for expert in range(5) for part in range(2)}
    for stored in (in_one, apart):
        for shard in range(shards):
            start, stop = weights.rows_of_shard(5, shard, shards)
            rows = torch.full_like(whole[start:stop], -1)
            monkeypatch.setattr(weights, "shard_of", lambda _, shard=shard: (shard, shards))
            monkeypatch.setattr(weights, "local_of", lambda _, rows=rows: rows)
            for place, tensor in stored.items():
                tensor.reads.clear()
                weights.fill(whole, place, tensor, "", is_full=False)
                if place.expert is not None and not start <= place.expert < stop:
                    assert not tensor.reads
            assert torch.equal(rows, whole[start:stop])
            assert sum(sum(tensor.reads) for tensor in stored.values()) == rows.numel()


def test_tensors_may_have_older_names_and_no_dimension(tmp_path):
    """Pythia's head is embed_out in its files, and they hold masks; Apertus has buffers of no dimension."""
    small = dict(vocab_size=400, hidden_size=64, num_attention_heads=4, num_hidden_layers=2,
                 intermediate_size=48)
    for config in (transformers.GPTNeoXConfig(**small),
                   transformers.ApertusConfig(**small, num_key_value_heads=2)):
        source, out = tmp_path / config.model_type, tmp_path / f"{config.model_type}-out"
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
        stored = load_file(source / "model.safetensors")
        if config.model_type == "gpt_neox":
            stored["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
        save_file(stored, source / "model.safetensors", metadata={"format": "pt"})

        policy = build(source)
        weights.export(policy, str(source), str(out))
        exported = load_file(out / "model.safetensors")
        assert exported.keys() == stored.keys()
        assert all(torch.equal(exported[name], stored[name]) for name in stored)


def test_experts_too_many_too_few_and_of_other_sizes_are_named(tmp_path):
    make_model("qwen3-moe").save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.experts.2.up_proj.weight"
    stored = load_file(path)
    expert = stored.pop(name)
    changes = [
        ({}, r"missing: \['model.layers.1.mlp.experts.gate_up_proj\[2\]'\], left over: \[\]"),
        ({name: expert, name.replace("s.2.", "s.3."): expert.clone()},
         r"missing: \[\], left over: \['model.layers.1.mlp.experts.3.up_proj.weight'\]"),
        ({name: expert[:-1].clone()}, r"experts.2.up_proj.weight must be \[24, 64\], got \[23, 64\]"),
        ({name: expert / 0}, "experts.2.up_proj.weight holds numbers that are not finite"),
    ]
    for change, message in changes:
        save_file(stored | change, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            build(tmp_path)


def test_experts_may_be_joined_in_the_files_too(tmp_path):
    model = make_model("qwen3-moe")
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    policy = build(tmp_path)
    for name, x in policy.model.state_dict().items():
        assert torch.equal(x.full_tensor(), model.state_dict()[name]), name


def test_only_joins_of_experts_are_taken_for_such():
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter
    stack, join = MergeModulelist(dim=0), Concatenate(dim=1)
    one, two, target = ["experts.*.a"], ["experts.*.a", "experts.*.b"], ["experts.c"]
    several = Concatenate(dim=1, num_shards_attribute="shards")
    for sources, operations, expected in [
            (one, [stack], True), (two, [stack, join], True),
            (one, [stack, several], False), (two, [stack], False), (["a"], [Transpose(0, 1)], False)]:
        change = WeightConverter(sources, target, operations=operations)
        assert weights.joins_experts(change) is expected, operations


# ---------------------------------------------------------------------------------------------------- writing


def test_export_keeps_the_files_names_and_dtypes_of_the_source(tmp_path):
    source = tmp_path / "source"
    model = make_model("qwen2-tied").bfloat16()
    model.save_pretrained(source, max_shard_size="20KB")
    policy = build(source)
    weights.export(policy, str(source), str(tmp_path / "out"))
    parts = sorted(path.name for path in source.glob("model-*-of-*.safetensors"))
    assert len(parts) > 2
    for name in parts:  # nothing was trained, and bf16 survives fp32
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    for (name, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_experts_in_any_order_and_dtype_are_gathered_once_and_come_back_as_they_were(tmp_path, monkeypatch):
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    # Those of one dtype come first in the bytes of a file, so the experts of a layer stand in two places.
    stored = {name: x.bfloat16() for name, x in load_file(path).items()}
    stored |= {name: x.float() for name, x in stored.items() if "experts.1" in name}
    save_file(stored, path, metadata={"format": "pt"})

    policy, calls = build(tmp_path / "m"), []
    full_tensor = torch.distributed.tensor.DTensor.full_tensor
    monkeypatch.setattr(torch.distributed.tensor.DTensor, "full_tensor",
                        lambda self, **options: calls.append(self.dtype) or full_tensor(self, **options))
    weights.export(policy, str(tmp_path / "m"), str(tmp_path / "out"))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "m")
    assert calls.count(torch.float32) == 2 * 2  # layers; gate with up, and down
    assert len(calls) == 2 * 2 + len(policy.model.state_dict())


@pytest.mark.parametrize("ranks, shard_size", [(2, 1), (3, 3), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_any_number_of_processes_and_copies_writes_the_same_files(tiny, tmp_path, ranks, shard_size):
    ranks = start_ranks(ranks, tmp_path, _build_and_export, tiny, str(tmp_path / "out"), shard_size)
    for rank in ranks:
        rank.join(200)
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks), (tmp_path / "said-0").read_text()
    assert bytes_of(tmp_path / "out") == bytes_of(Path(tiny))


def _build_and_export(source: str, out: str, shard_size: int) -> None:
    policy = build(source, "--shard-size", str(shard_size))
    weights.export(policy, source, out)
    dist.barrier()


@pytest.mark.parametrize("family", ["qwen3-moe", *(pytest.param(family, marks=pytest.mark.slow)
                                                  for family in ("qwen2-moe", "mixtral"))])
def test_mixtures_train_like_a_naive_trainer_and_their_experts_are_exported_one_by_one(
        workplace, tokenizer, tmp_path, monkeypatch, family):
    source, export, trained = tmp_path / "source", weights.export, {}
    make_model(family).save_pretrained(source, max_shard_size="60KB")
    tokenizer.save_pretrained(source)

    def remember_and_export(policy, *folders):
        trained.update({name: x.full_tensor() for name, x in policy.model.state_dict().items()})
        export(policy, *folders)

    monkeypatch.setattr(weights, "export", remember_and_export)
    config = make_config(workplace, tmp_path / "one", model=source, epochs=1)
    stepdpo.train(config)
    assert losses_of(tmp_path / "one") == pytest.approx(naive_training(config)[0], abs=1e-5)
    run_in_processes(2, tmp_path, train_by_flags, make_flags(workplace, tmp_path / "two", model=source, epochs=1))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)

    before, of_one, of_two = (tensors_of(x) for x in (source, tmp_path / "one/model", tmp_path / "two/model"))
    assert sum(".experts." in name for name in before) == 2 * 3 * 3  # layers, experts, gate and up and down
    assert before.keys() == of_one.keys() == of_two.keys()
    for name, x in of_one.items():
        assert not torch.equal(x, before[name]), name
        torch.testing.assert_close(of_two[name], x, atol=5e-5, rtol=0)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one/model").state_dict()
    assert trained.keys() == again.keys()
    assert all(torch.equal(trained[name], again[name]) for name in again)


# ---------------------------------------------------------------------------- waiting for disks and downloads


SECONDS = 2  # that ranks wait for each other, where they do not wait for a disk


def _wait_at_most(seconds: float) -> None:
    """As --timeout does, but after the start, which takes longer than a test has time for."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


def _write_slowly(source: str, out: str, shard_size: int, what: str) -> None:
    """Export, or save, on a disk that takes three times as long as ranks wait for each other."""
    policy = build(source, "--shard-size", str(shard_size))
    module, name = (shutil, "copymode") if what == "each file" else (os, "sync")
    write = getattr(module, name)

    def write_slowly(*arguments, **options):
        if name == "sync" or arguments[0].endswith(".safetensors"):
            time.sleep(3 * SECONDS)
        write(*arguments, **options)

    setattr(module, name, write_slowly)
    _wait_at_most(SECONDS)
    if what == "checkpoint":
        optimizer = offload.make_adamw(policy.parameters(), "moments", lr=0.1)
        checkpoints.save_checkpoint(policy, optimizer, out, 1, "")
    else:
        weights.export(policy, source, out)
    _wait_at_most(60)
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("what, shard_size, written", [
    ("the end of an export", 1, "config.json"),
    ("each file", 2, "model.safetensors.index.json"),
    ("checkpoint", 1, "step-000001/state.json"),
])
def test_a_disk_may_take_longer_than_processes_wait_for_each_other(tiny, tmp_path, what, shard_size, written):
    source = tmp_path / "m"
    shutil.copytree(tiny, source)
    (source / "model.safetensors").unlink()
    transformers.AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(source, max_shard_size="80KB")
    ranks = start_ranks(2, tmp_path, _write_slowly, str(source), str(tmp_path / "out"), shard_size, what)
    for rank in ranks:
        rank.join(200)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert [rank.exitcode for rank in ranks] == [0, 0], said
    assert (tmp_path / "out" / written).exists()


def _wait(what: str) -> None:
    startup.start_processes()
    _wait_at_most(SECONDS)
    late = dist.get_rank() == 0

    def command() -> None:
        with waiting_for_disks():
            if late and what == "ends":
                time.sleep(SECONDS)
                os._exit(9)
        if late:
            time.sleep(5 * SECONDS)
        dist.barrier()

    run_command("a command", command)


@pytest.mark.parametrize("what", ["ends", pytest.param("hangs elsewhere", marks=pytest.mark.slow)])
def test_a_process_that_ends_or_hangs_elsewhere_is_an_error(tmp_path, what):
    ranks = start_ranks(2, tmp_path, _wait, what)
    ranks[1].join(100)
    assert ranks[1].exitcode == 2
    assert WAITED in (tmp_path / "said-1").read_text().splitlines()[-1]
    ranks[0].join(100)


def _download_slowly() -> None:
    def snapshot_download(name, local_files_only=False, **_):
        time.sleep(0 if local_files_only else 2 * SECONDS)
        return f"/cache/{name}"

    huggingface_hub.snapshot_download = snapshot_download
    startup.start_processes()
    _wait_at_most(SECONDS)
    print(weights.resolve("owner/name"))
    dist.barrier()


def test_a_download_may_take_longer_than_processes_wait_for_each_other(tmp_path):
    for said in run_in_processes(2, tmp_path, _download_slowly):
        assert said == "/cache/owner/name\n"
