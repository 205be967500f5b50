"""One smoke test of each benchmark; speed itself is never tested."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ENVIRONMENT, HERE, make_rows, write_jsonl
from data import encode
from runtime.rows import read_rows


def bench(script: str, out: Path, *flags: str) -> tuple[dict, str]:
    result = subprocess.run([sys.executable, f"bench/{script}.py", *flags, "--out", str(out)], cwd=HERE,
                            text=True, capture_output=True, timeout=300, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(out.read_text()), result.stdout


@pytest.mark.slow
def test_loss_benchmark_measures_what_runs_here_and_names_what_does_not(tmp_path):
    report, text = bench("loss", tmp_path / "loss.json", "--shapes", "64,32,1000", "--repeats", "2", "--skip",
                         "compiled")
    results = report["shapes"]["64,32,1000"]
    for name in ("ours", "plain", "torch"):
        assert results[name]["seconds"] > 0 and results[name]["extra_bytes"] > 0
        assert all(results[name][key] < 1e-5 for key in ("logps", "dhidden", "dweight", "untargeted"))
    for name in ("liger", "liger-cute", "liger-tp", "cce", "cce-filter", "quack", "quack-logits"):
        assert re.search(rf"^{name} +missing: (not installed: pip install \S|needs CUDA)", text, re.MULTILINE)
    assert f"{'compiled':13}missing: left out by --skip" in text


@pytest.mark.slow
def test_the_stages_for_a_gpu_run_on_a_toy(tmp_path):
    # The others run the same scripts.
    stages = ["tests", "demo", "same-demo", "loss", "attention", "real", "profile"]
    environment = ENVIRONMENT | {"DRY": "1", "RESULTS": str(tmp_path), "PYTHON": sys.executable,
                                 "OMP_NUM_THREADS": "1"}

    def start(*stages: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", "bench/gpu.sh", *stages], cwd=HERE, text=True, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    for run in [start(*stages[::2]), start(*stages[1::2])]:  # most of their time is a single core's
        output, _ = run.communicate(timeout=600)
        assert run.returncode == 0, output
    done = {path.name.removesuffix("-cpu.json") for path in tmp_path.iterdir()}
    assert {stage for stage in done if not stage.startswith("tests-")} == {
        "demo", "same-demo", "loss", "attention", "real", "real-cpu-pairs.jsonl.gz", "profile-7b"}
    output, _ = start(*stages).communicate(timeout=60)
    assert output.count("done before") == len(stages), output


@pytest.mark.slow
def test_training_benchmark_measures_ours_and_another_checkout(tiny, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", make_rows(8))
    other = tmp_path / "other"
    shutil.copytree(HERE / "runtime", other / "runtime", ignore=shutil.ignore_patterns("tests"))
    for name in ("stepdpo.py", "data.py", "kernels.py"):
        shutil.copy(HERE / name, other)
    with open(other / "runtime/outputs.py", "a") as file:  # so that it can be told apart
        file.write("\nof_this = log\ndef log(config, line):\n    of_this(config, {**line, 'loss': 7.0})\n")

    report, text = bench("train", tmp_path / "train.json", "--model", tiny, "--data", pairs, "--batch-size=4",
                         "--steps=1", "--rounds=1", "--only=^ours$|other", "--other", str(other))
    assert set(report["table"]) == {"ours", "ours, other checkout"}
    assert report["table"]["ours"]["pairs_per_second"] > 0
    assert report["runs"]["ours"][0]["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert report["runs"]["ours, other checkout"][0]["loss"] == [7.0, 7.0]
    assert "ours over ours of the other checkout" in text


@pytest.mark.slow
def test_architectures_are_tried_and_judged(tmp_path):
    report, text = bench("architectures", tmp_path / "architectures.json",
                         "--only", "^(qwen2|whisper|bloom|musicgen)$")
    assert {name: verdict for name, (verdict, _) in report["verdicts"].items()} == {
        "qwen2": "equal", "whisper": "equal", "bloom": "refused", "musicgen": "not built"}
    assert "2 equal, 1 refused, 0 differs, 0 traceback, 1 not built of 4" in text


def test_corrupted_pairs_are_pairs_that_can_be_trained_on(tokenizer, tmp_path):
    worked = "He has 4*12=<<4*12=48>>48 pens.\nThen 48-8=<<48-8=40>>40 are left.\n#### 40"
    problems = write_jsonl(tmp_path / "gsm8k.jsonl", [dict(question=f"Pens of {i}?", answer=worked)
                                                      for i in range(510)])  # the last 500 are left alone
    subprocess.run([sys.executable, "bench/corrupted_pairs.py", problems, str(tmp_path / "out.jsonl"),
                    "--rows=7", "--eval-rows=3"], cwd=HERE, check=True, env=ENVIRONMENT)
    for name, count in (("out", 7), ("out.eval", 3)):
        rows = read_rows(str(tmp_path / f"{name}.jsonl"))
        assert len(encode(rows, tokenizer, "chat", None, "step")) == count
