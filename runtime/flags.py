"""The trainer's flags, and how flags are read: with hyphens or underscores, never abbreviated, from @FILE.

Nothing here imports torch, so that --help and a wrong flag are answered at once.
"""

import argparse
import datetime
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from runtime.files import read_bytes
from runtime.messages import InputError

TEMPLATES = ("chat", "alpaca", "deepseek-math")
OFFLOADS = ("moments", "gradients", "all")
DESCRIPTION = """Step-DPO: preference optimization on pairs of single reasoning steps (arXiv:2406.18629).

    python stepdpo.py --model MODEL --data pairs.jsonl --output-dir OUT              # one process, CPU or GPU
    torchrun --nproc_per_node 8 stepdpo.py --model Qwen/Qwen2-7B-Instruct \\
        --data xinlai/Math-Step-DPO-10K --output-dir OUT
"""

# --------------------------------------------------------------------------------------------- kinds of flags


def checked(kind: type, holds: Callable[[Any], bool], must: str) -> Callable[[str], Any]:
    """An argparse type: an int, float or str for which `holds` is true; else "must be ..."."""
    def parse(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {must}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


LARGEST = 10**12  # above all that makes sense, and below what overflows somewhere later
TEXT = checked(str, bool, "more than nothing")  # which an unset shell variable is
POSITIVE_INT = checked(int, lambda x: 0 < x <= LARGEST, "above 0 and at most 10^12")
POSITIVE_FLOAT = checked(float, lambda x: 0 < x < math.inf, "above 0")
INT = checked(int, lambda x: 0 <= x <= LARGEST, "at least 0 and at most 10^12")
NOT_NEGATIVE = checked(float, lambda x: 0 <= x < math.inf, "at least 0")
SHARE = checked(float, lambda x: 0 <= x <= 1, "from 0 to 1")
MINUTES = checked(float, lambda x: 0 < x <= 1e6, "above 0 and at most 1000000")
# Without a name and password in it, which messages would show.
URL = checked(str, lambda x: re.fullmatch(r"https?://[\w.:\[\]-]+(/[^\s@]*)?", x, re.A),
              "an address like http://localhost:8000")


def SOURCE_OR_SHARE(text: str) -> str | float:
    """A file or hub dataset; or, where no file is called that, a share of the training data."""
    try:
        share = float(text)
    except ValueError:
        return TEXT(text)
    if os.path.exists(text):
        return text
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"must be a file or above 0 and below 1, got {text}")
    return share


def TEMPLATE_ARGS(text: str) -> dict[str, Any]:
    """Variables of a chat template, as a JSON object."""
    try:
        args = json.loads(text)
        if not isinstance(args, dict):
            raise ValueError(f"it is of type {type(args).__name__}")
        if "strftime_now" in args:
            datetime.date.fromisoformat(args["strftime_now"])
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f'must be a JSON object like {{"enable_thinking": false}}, got {text} ({error})') from None
    return args


# ---------------------------------------------------------------------------------------- the trainer's flags


def flags() -> "Parser":
    """The defaults are the paper's, where the paper has the thing."""
    parser = Parser("stepdpo.py", description=DESCRIPTION, epilog=(
        "@FILE reads flags from FILE, written as on the command line; # starts a comment."))
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("model and data").add_argument
    add("--model", type=TEXT, required=True, help="to train: a folder with safetensors, or hub name")
    add("--data", type=TEXT, nargs="+", required=True, metavar="FILE",
        help="step pairs: .jsonl, .json, .parquet files or hub datasets, as owner/name, owner/name:split or "
             "owner/name:config:split [its split train]")
    add("--output-dir", type=TEXT, required=True, help="for metrics.jsonl, run.json, checkpoints/, model/")
    add("--reference", type=TEXT, help="reference model [the model itself before training]")
    add("--span", choices=("step", "solution"), default="step",
        help="train on one reasoning step, or on whole solutions: plain DPO [step]")
    add("--template", choices=TEMPLATES, default="chat", help="around problem and answer [chat]")
    add("--instruction", help="text after the problem in the user turn, '' for none [the template's own]")
    add("--template-args", type=TEMPLATE_ARGS, metavar="JSON",
        help="""variables of the chat template, as '{"enable_thinking": false}'; "strftime_now": "2026-01-31"
        is today's date for templates that print it [none; the day on which the run was started]""")
    add("--max-length", type=POSITIVE_INT, default=1024,
        help="tokens of the prefix and the longer span; longer pairs are dropped and counted [1024]")

    add = parser.add_argument_group("the method").add_argument
    add("--beta", type=POSITIVE_FLOAT, default=0.4,
        help="strength of the pull towards the reference; paper: 0.4, and 0.5 for 72B [0.4]")
    add("--nll-weight", type=NOT_NEGATIVE, default=0.0, metavar="W",
        help="add W times the negative log-likelihood per token of the chosen step to the loss [0]")
    add("--learning-rate", type=POSITIVE_FLOAT, default=5e-7, help="at its peak; then cosine to 0 [5e-7]")
    add("--warmup-ratio", type=SHARE, default=0.1, help="share of optimizer steps in which it rises [0.1]")
    add("--batch-size", type=POSITIVE_INT, default=128, help="pairs per optimizer step of all ranks [128]")
    add("--epochs", type=POSITIVE_INT, default=8, help="passes over the pairs; paper: 8, above 30B 4 [8]")
    add("--max-steps", type=INT, default=0, help="end the schedule after so many optimizer steps [no limit]")
    add("--max-grad-norm", type=POSITIVE_FLOAT, default=1.0, help="clip the gradient to this norm [1.0]")
    add("--seed", type=INT, default=0, help="of the order of the pairs [0]")

    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add("--eval-data", type=SOURCE_OR_SHARE, metavar="FILE",
        help="held-out step pairs (file, or owner/name:split of a hub): the same metrics, no training; "
        "0.05 holds out 5%% of the problems")
    add("--eval-every", type=POSITIVE_INT, default=50, help="optimizer steps between evaluations [50]")
    add("--test-problems", type=TEXT, metavar="FILE",
        help="held-out problems with answers (file, or owner/name:split): at the end, greedy accuracy before "
        "and after, in answers of at most --max-length tokens; each process holds a whole model")
    add("--save-every", type=INT, default=0, help="optimizer steps between checkpoints [only at SIGTERM]")
    add("--resume", action=switch, default=False, help="continue from the last checkpoint in --output-dir, "
        "or from the start if there is none")

    add = parser.add_argument_group("memory and speed: the method stays the same").add_argument
    add("--tokens-per-micro-batch", type=POSITIVE_INT,
        help="tokens in one forward and backward of a rank [8192 on CUDA, 1024 on CPU]")
    add("--share-prefix", action=switch, default=True, help="lay out once what chosen and rejected share")
    add("--activation-checkpointing", action=switch,
        help="keep only each layer's input: less memory, 1/3 more work [on CUDA, not on CPU]")
    add("--offload", choices=OFFLOADS, help="keep in host memory AdamW's moments; these and the "
        "gradients; or all, with the weights. bench/plan.py says what a model needs [nothing]")
    add("--shard-size", type=POSITIVE_INT,
        help="processes that share one copy of the model, those of a node where it fits there [all]")
    add("--gather-once", action=switch, help="gather layers and reduce gradients once in an optimizer step, "
        "not in every micro-batch: 6 bytes per parameter on a GPU, 8 in float32 [where it fits; not on CPU]")
    add("--compile", action=switch, default=False, help="torch.compile each decoder layer")
    add("--dtype", choices=("bfloat16", "float32"),
        help="compute type; master weights are float32 [bfloat16 on CUDA, else float32]")
    add("--timeout", type=MINUTES, default=30.0,
        help="minutes that processes wait for each other before they give up [30]")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, with the defaults that depend on the device filled in.

    Those of --tokens-per-micro-batch and --gather-once depend on the pairs too: startup.py fills them in.
    """
    config = flags().parse_args(argv)
    import torch  # only now: a wrong flag is told before this takes its seconds
    cuda = torch.cuda.is_available()
    if config.activation_checkpointing is None:
        config.activation_checkpointing = cuda
    if config.dtype is None:
        config.dtype = "bfloat16" if cuda else "float32"
    return config


# ----------------------------------------------------------------------------------------- how flags are read


class Parser(argparse.ArgumentParser):
    """Flags with hyphens or underscores, never abbreviated; @FILE reads flags from a file, # is a comment."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        try:
            return super().parse_args(expand(words), namespace)
        except InputError as error:
            self.error(str(error))


def expand(words: Sequence[str], files: tuple[str, ...] = ()) -> list[str]:
    """The words, with those of FILE in the place of @FILE; `files` are those that it stands in."""
    expanded = []
    for word in words:
        if not word.startswith("@"):
            expanded.append(with_hyphens(word))
            continue
        path = word[1:]
        if os.path.realpath(path) in files:
            raise InputError(f"{path}: includes itself")
        for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
            try:
                words_of_line = shlex.split(line.decode(), comments=True)
                if b"\0" in line:
                    raise ValueError("a null byte")
            except ValueError as error:  # not text, or a quotation that does not end
                raise InputError(f"{path}:{number}: {error}") from None
            expanded += expand(words_of_line, (*files, os.path.realpath(path)))
    return expanded


def with_hyphens(word: str) -> str:
    """--learning_rate=1 as --learning-rate=1; values stay as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word
