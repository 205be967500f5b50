"""Model folders: which of their files count, what a model that is written again keeps, waiting for disks."""

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
from conftest import start_ranks
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


# --------------------------------------------------------------------------------------------------- writing


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


@pytest.mark.parametrize("ranks, shard_size", [(2, 2), (3, 3), (2, 1), (4, 2)])
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


# --------------------------------------------------------------------------------------------------- waiting

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


@pytest.mark.parametrize("what", ["ends", "hangs elsewhere"])
def test_a_process_that_ends_or_hangs_elsewhere_is_an_error(tmp_path, what):
    ranks = start_ranks(2, tmp_path, _wait, what)
    ranks[1].join(100)
    assert ranks[1].exitcode == 2
    assert WAITED in (tmp_path / "said-1").read_text().splitlines()[-1]
    ranks[0].join(100)
