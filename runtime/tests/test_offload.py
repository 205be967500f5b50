"""Offloading: what is in host memory changes nothing but the place, and checkpoints know nothing of it."""

import os
import signal
from collections.abc import Callable

import pytest

import stepdpo
from conftest import launch, losses_of, make_config, make_flags, needs_cuda, read_metrics, weights_of
from runtime.flags import OFFLOADS

OFFLOADABLE = dict(max_grad_norm=0.3, tokens_per_micro_batch=300, epochs=1)  # clipped; in micro-batches


@pytest.fixture(scope="session")
def not_offloaded(workplace, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    stepdpo.train(make_config(workplace, out, **OFFLOADABLE))
    assert all(line["grad_norm"] > 0.3 for line in read_metrics(out))
    return out


@pytest.mark.parametrize("what", OFFLOADS)
def test_offloading_changes_nothing_but_the_place(workplace, not_offloaded, tmp_path, what):
    stepdpo.train(make_config(workplace, tmp_path / "out", offload=what, **OFFLOADABLE))
    assert weights_of(tmp_path / "out/model") == weights_of(not_offloaded / "model")
    for ours, theirs in zip(read_metrics(tmp_path / "out"), read_metrics(not_offloaded), strict=True):
        assert ours["loss"] == theirs["loss"] and ours["grad_norm"] == theirs["grad_norm"]


@pytest.mark.parametrize("before, after", [("gradients", None), (None, "moments"), ("moments", "all")])
def test_a_checkpoint_knows_nothing_of_offloading(workplace, not_offloaded, tmp_path, before, after):
    saves = dict(save_every=2, **OFFLOADABLE)
    stop_after(2, lambda: stepdpo.train(make_config(workplace, tmp_path / "b", offload=before, **saves)))
    assert len(losses_of(tmp_path / "b")) == 2
    stepdpo.train(make_config(workplace, tmp_path / "b", offload=after, resume=True, **saves))
    assert weights_of(tmp_path / "b/model") == weights_of(not_offloaded / "model")


def stop_after(steps: int, train: Callable[[], None]) -> None:
    """Run a training that is asked to stop, as by SIGTERM, in its optimizer step `steps`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        train_step = stepdpo.train_step

        def step_and_stop(step, *args):
            if step + 1 == steps:
                signal.raise_signal(signal.SIGTERM)
            return train_step(step, *args)

        patch.setattr(stepdpo, "train_step", step_and_stop)
        train()


@needs_cuda
@pytest.mark.parametrize("what", OFFLOADS)
def test_on_cuda_the_moments_visit_the_gpu_for_the_same_update(workplace, tmp_path, what):
    """Losses are equal to rounding: gradients on CUDA are not repeatable to the bit."""
    options = dict(dtype="float32", **OFFLOADABLE)
    for value in (None, what):
        flags = make_flags(workplace, tmp_path / str(value), offload=value, **options)
        child = launch(flags, dict(os.environ, TRITON_INTERPRET="0"))
        output, _ = child.communicate(timeout=300)
        assert child.returncode == 0, output
    assert losses_of(tmp_path / what) == pytest.approx(losses_of(tmp_path / "None"), abs=1e-5)
