"""--gather-once changes how often layers are gathered and gradients reduced, and nothing else."""

import os
from argparse import Namespace
from collections import Counter
from unittest import mock

import pytest
import transformers
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

import stepdpo
from conftest import (
    launch,
    losses_of,
    make_config,
    make_flags,
    needs_cuda,
    read_metrics,
    run_in_processes,
    train_by_flags,
    weights_of,
)
from data import Pair
from runtime import planning
from runtime.gathering import gathered_once, with_gathering

MICRO = dict(max_grad_norm=0.3, tokens_per_micro_batch=300, epochs=1)  # clipped; several micro-batches


@pytest.mark.parametrize("options", [
    {}, dict(dtype="bfloat16", activation_checkpointing=True), dict(offload="gradients"), dict(offload="all")])
def test_one_process_trains_the_same_bits(workplace, tmp_path, options):
    for once in (False, True):
        stepdpo.train(make_config(workplace, tmp_path / str(once), gather_once=once, **MICRO, **options))
    assert weights_of(tmp_path / "True/model") == weights_of(tmp_path / "False/model")
    ours, theirs = read_metrics(tmp_path / "True"), read_metrics(tmp_path / "False")
    assert [line.get("grad_norm") for line in ours] == [line.get("grad_norm") for line in theirs]
    assert losses_of(tmp_path / "True") == losses_of(tmp_path / "False")


@pytest.mark.slow
@pytest.mark.parametrize("processes, options", [(2, {}), (2, dict(shard_size=1)), (3, dict(offload="gradients"))])
def test_several_processes_add_in_another_order(workplace, tmp_path, processes, options):
    for once in (False, True):
        flags = make_flags(workplace, tmp_path / str(once), gather_once=once, **MICRO, **options)
        run_in_processes(processes, tmp_path, train_by_flags, flags)
    assert losses_of(tmp_path / "True") == pytest.approx(losses_of(tmp_path / "False"), abs=2e-6)
    norms = [[line["grad_norm"] for line in read_metrics(tmp_path / name)] for name in ("True", "False")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("once", [False, True])
def test_groups_are_gathered_and_reduced_as_often_as_said(workplace, tmp_path, once):
    """Counted for an optimizer step: groups of parameters whose gathering is waited for, and reductions."""
    counts, batches = Counter(), []
    wait, reduce = _fsdp_param_group.FSDPParamGroup.wait_for_unshard, _fsdp_param_group.foreach_reduce

    def counted_wait(group):
        counts["gathered"] += group._all_gather_result is not None
        wait(group)

    def counted_reduce(*args):
        counts["reduced"] += 1
        return reduce(*args)

    def counted_step(step, policy, *args):
        counts.clear()
        metrics = train_step(step, policy, *args)
        batches.append((Counter(counts), len(list(stepdpo.micro_batches(args[1], args[2], args[-1])))))
        assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
        return metrics

    train_step = stepdpo.train_step
    with mock.patch.object(_fsdp_param_group.FSDPParamGroup, "wait_for_unshard", counted_wait), \
            mock.patch.object(_fsdp_param_group, "foreach_reduce", counted_reduce), \
            mock.patch.object(stepdpo, "train_step", counted_step):
        stepdpo.train(make_config(workplace, tmp_path / "out", gather_once=once, max_steps=2, **MICRO))

    for counted, micro_batches in batches:
        assert micro_batches > 1
        groups = counted["reduced"] // (1 if once else micro_batches)
        assert groups > 2
        if once:
            assert counted == {"gathered": groups, "reduced": groups}
        else:
            assert counted["reduced"] == groups * micro_batches
            # The head is not gathered again, as its backward follows its forward.
            assert counted["gathered"] > 1.5 * groups * micro_batches


PAIRS = [Pair([1] * 40, [1] * 10, [1] * 10, "")] * 16


@needs_cuda
@pytest.mark.parametrize("options", [{}, dict(offload="gradients"), dict(dtype="bfloat16")])
def test_on_cuda_it_trains_the_same(workplace, tmp_path, options):
    """To rounding: gradients on CUDA are not repeatable to the bit."""
    for once in (False, True):
        flags = make_flags(workplace, tmp_path / str(once), gather_once=once,
                           **{**MICRO, "dtype": "float32", **options})
        child = launch(flags, dict(os.environ, TRITON_INTERPRET="0"))
        output, _ = child.communicate(timeout=300)
        assert child.returncode == 0, output
    tolerance = 1e-2 if options.get("dtype") == "bfloat16" else 1e-5
    assert losses_of(tmp_path / "True") == pytest.approx(losses_of(tmp_path / "False"), abs=tolerance)


@needs_cuda
def test_on_cuda_a_plan_is_made(workplace, tmp_path):
    child = launch(make_flags(workplace, tmp_path / "out", max_steps=1), dict(os.environ, TRITON_INTERPRET="0"))
    output, _ = child.communicate(timeout=300)
    assert child.returncode == 0 and "gathering   once in an optimizer step, which takes 0" in output, output


def test_it_is_chosen_where_it_fits(workplace, tmp_path, capsys):
    config = make_config(workplace, tmp_path, tokens_per_micro_batch=128)
    folder = workplace / "qwen2"
    stepdpo.startup.start_processes()
    assert with_gathering(config, folder, PAIRS, None).gather_once is False
    assert capsys.readouterr().out == ""
    once = Namespace(**{**vars(config), "gather_once": True})
    needed = planning.Planner(transformers.AutoConfig.from_pretrained(folder), PAIRS, 1).plan(once).needs

    assert with_gathering(config, folder, PAIRS, needed + 1).gather_once is True
    assert ("gathering   once in an optimizer step, which takes 0.0 GB, with reserves 2.0, of 2.0 GB by plan"
            in capsys.readouterr().out)
    assert with_gathering(config, folder, PAIRS, needed - 1).gather_once is False
    assert "gathering   in every micro-batch, as once in an optimizer step" in capsys.readouterr().out
    assert with_gathering(once, folder, PAIRS, 0).gather_once is True  # as it was said


def test_a_model_that_cannot_be_planned_trains_without(workplace, tmp_path, capsys, monkeypatch):
    stepdpo.startup.start_processes()
    monkeypatch.setattr(planning, "count_layer", mock.Mock(side_effect=TypeError("no fake tensors here")))
    config = with_gathering(make_config(workplace, tmp_path), workplace / "qwen2", PAIRS, 85e9)
    assert config.gather_once is False
    assert "in every micro-batch, as no plan could be made (" in capsys.readouterr().out


def test_batches_come_one_ahead_and_all_of_them():
    said = []
    policy = mock.Mock(set_requires_gradient_sync=lambda sync: said.append(sync))
    for count in (1, 2, 3):
        said.clear()
        assert list(gathered_once(policy, range(count), Namespace(gather_once=True))) == list(range(count))
        assert said == [False] * (count - 1) + [True]
