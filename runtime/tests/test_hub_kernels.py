"""Hugging Face's package `kernels` beside our kernels.py: everything starts, and no kernel of the hub is used."""

import os
import subprocess
import sys

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from conftest import ENVIRONMENT, HERE, make_rows, write_jsonl

# What transformers would import, if it took the package for installed.
PACKAGE = "raise AssertionError('a module of the package kernels was imported')\n"
# Imported by Python at its start: says at the end of a process whether transformers would use hub kernels.
AT_THE_END = """
import atexit, sys
atexit.register(lambda: print("hub kernels:", "transformers" in sys.modules and __import__(
    "transformers.utils.import_utils", fromlist=["x"]).is_kernels_available()))
"""


@pytest.fixture
def installed(tmp_path):
    """The environment of a process that finds the package in a version that transformers takes."""
    folder = tmp_path / "site"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels/__init__.py").write_text(PACKAGE)
    (folder / "sitecustomize.py").write_text(AT_THE_END)
    about = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    return ENVIRONMENT | {"PYTHONPATH": str(folder), "STEPDPO_CACHE": str(tmp_path / "cache")}


def said_by(environment: dict, *words) -> str:
    ended = subprocess.run([sys.executable, *map(str, words)], cwd=HERE, text=True, env=environment,
                           capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_without_care_transformers_would_take_the_package_for_installed(installed):
    said = said_by(installed, "-c", "from transformers.utils.import_utils import is_kernels_available as x; x()")
    assert said == "hub kernels: True\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["stepdpo.py", "-m pairs solve", "demo/sft.py"])
def test_commands_start_and_build_a_model_without_kernels_of_the_hub(installed, tiny, tmp_path, command):
    out = tmp_path / "out"
    if command == "stepdpo.py":
        file = write_jsonl(tmp_path / "pairs.jsonl", make_rows(4))
        flags = ["--data", file, "--output-dir", out, "--max-steps=1", "--batch-size=4"]
    elif command == "demo/sft.py":
        rows = [dict(question="Tom has 3 pens and buys 4. How many?", answer="3+4=<<3+4=7>>7.\n#### 7")] * 4
        flags = ["--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--out", out, "--epochs=1"]
    else:
        problems = write_jsonl(tmp_path / "p.jsonl", [dict(prompt="What is 3 + 4?", answer="7")])
        flags = ["--problems", problems, "--out", out, "--max-new-tokens=4"]
    said = said_by(installed, *command.split(), "--model", tiny, *flags)
    assert said.endswith("hub kernels: False\n") and os.listdir(out)
