"""The output folder of a run, and the cache of reference log-probabilities."""

import json
import shutil

import pytest
import torch.distributed as dist

import data
import stepdpo
from conftest import default_flags, losses_of, make_config, make_rows, numbered
from runtime import outputs, startup
from runtime.messages import InputError


def test_a_run_is_never_overwritten(workplace, run, tmp_path, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        stepdpo.train(make_config(workplace, run))
    with pytest.raises(InputError, match="pairs.jsonl: is not a folder"):
        stepdpo.train(make_config(workplace, workplace / "pairs.jsonl"))
    stepdpo.train(make_config(workplace, run, resume=True, eval_data=workplace / "eval.jsonl"))
    assert "finished    already" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_record_of_a_run_names_the_budget_that_was_chosen(workplace, tmp_path):
    stepdpo.train(make_config(workplace, tmp_path / "out", max_steps=1, tokens_per_micro_batch=None))
    assert json.loads((tmp_path / "out/run.json").read_text())["config"]["tokens_per_micro_batch"] == 1024


@pytest.mark.parametrize("change", ["data", "model"])
def test_nodes_that_read_other_things_are_told_so(monkeypatch, workplace, tmp_path, change):
    def gathered(seen, mine):
        seen[:] = [mine, mine | {change: "other", "host": "second"}]

    startup.start_processes()
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    with pytest.raises(InputError, match=f"--{change}: rank 1 on second reads another content than rank 0"):
        content = {"data": "a", "model": "b"}
        outputs.refuse_other_nodes({"content": content}, make_config(workplace, tmp_path))


def test_reference_logps_are_kept_and_read_again(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STEPDPO_CACHE", str(tmp_path / "cache"))
    stepdpo.train(make_config(workplace, tmp_path / "one", max_steps=1))
    assert "computed, kept in" in capsys.readouterr().out
    stepdpo.train(make_config(workplace, tmp_path / "two", max_steps=1, learning_rate=1e-4))
    assert "pairs read from" in capsys.readouterr().out
    assert losses_of(tmp_path / "one") == losses_of(tmp_path / "two")


def test_reference_logps_are_kept_under_what_they_depend_on(workplace, tokenizer, tmp_path):
    def path(model="qwen2", instruction=None, span="step", folder=workplace, **changes) -> str:
        pairs = data.encode(numbered(make_rows(3)), tokenizer, "chat", instruction, span)
        return outputs.cache_path(str(folder / model), pairs, default_flags(**{"dtype": "float32", **changes}))

    assert path() == path(learning_rate=1e-4)
    shutil.copytree(workplace / "qwen2", tmp_path / "qwen2", copy_function=shutil.copyfile)
    others = [dict(instruction="Think."), dict(span="solution"), dict(model="qwen2-tied"),
              dict(dtype="bfloat16"), dict(share_prefix=False),
              dict(folder=tmp_path)]  # written later, so it may be another
    assert len({path(), *(path(**changes) for changes in others)}) == 1 + len(others)
