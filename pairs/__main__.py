"""Make step pairs from a model's own samples.

    python -m pairs build --model M --problems P.jsonl --out DIR     # the whole pipeline: DIR/pairs.jsonl
    python -m pairs solve --model M --problems P.jsonl --out DIR     # sampling and accuracy only
    torchrun --nproc_per_node N -m pairs build ...                   # the same, shared by N processes

`solve` with --samples 1 --temperature 0 is the evaluation. Stopped at any point, the same command continues.
What is sampled is kept in DIR, and never mixed with that of another model or other settings of sampling;
thresholds may change, and use the same samples.
"""

import argparse
import dataclasses
import fnmatch
import math
import os
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from runtime.commands import joining, run_command
from runtime.flags import INT, SHARE, TEMPLATE_ARGS, TEMPLATES, TEXT, URL, Parser, checked
from runtime.messages import InputError, print0
from runtime.outputs import is_inside

from .judge import Judge
from .problems import FORMATS, STEP_PREFIX, read_problems
from .sampling import Samples, Settings
from .server import api_key
from .stages import build, solve

COUNT = checked(int, lambda x: 1 <= x <= 10_000, "from 1 to 10,000")
TOKENS = checked(int, lambda x: 1 <= x <= 1_000_000, "from 1 to 1,000,000")
PART = checked(float, lambda x: 0 < x <= 1, "above 0, at most 1")
# Numbers near 0 cannot be divided by, and vLLM takes what is below 0.01 for 0.01.
TEMPERATURE = checked(float, lambda x: x == 0 or 0.01 <= x <= 100, "0, or from 0.01 to 100")
RATIO = checked(float, lambda x: 1 <= x < math.inf, "at least 1")
SWITCH = argparse.BooleanOptionalAction

# What is written to --out, beside what is sampled.
RESULTS = ("pairs.jsonl", "located.jsonl", "located_by_rollouts.jsonl", "located_by_judge.jsonl",
           "located_by_both.jsonl")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m pairs", description=__doc__, epilog=f"problems may look like\n  {FORMATS}\n"
                    "@FILE reads flags from FILE, written as on the command line; # starts a comment.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="build|solve")
    for name, text in (("build", "problems -> pairs"), ("solve", "problems -> graded solutions, accuracy")):
        command = commands.add_parser(name, help=text, description=__doc__)
        add_sampling_flags(command)
        if name == "build":
            add_stage_flags(command)
    args = parser.parse_args(argv)
    refuse_missing_flags(args, commands.choices[args.command])
    return args


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("problems and model").add_argument
    add("--model", type=TEXT, required=True, help="folder or hub name; with --server only for its tokenizer")
    add("--problems", type=TEXT, required=True,
        help="with answers: a .jsonl, .json or .parquet file or a hub dataset, as owner/name, "
             "owner/name:split or owner/name:config:split [its only split]")
    add("--out", type=TEXT, required=True, help="folder to write to, or to continue in")
    add("--samples", type=COUNT, default=2, help="solutions per problem; paper: 2 [2]")
    add("--step-prefix", action=SWITCH, default=True, help=f"begin each answer with {STEP_PREFIX!r}")
    add("--template", choices=TEMPLATES, default=Settings.template, help="around problem and answer [chat]")
    add("--template-args", type=TEMPLATE_ARGS, metavar="JSON",
        help="""variables of the chat template, as '{"enable_thinking": false}' [none]""")
    add("--instruction", help="text after the problem, '' for none [the template's own]")

    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=TEMPERATURE, default=Settings.temperature,
        help="0 takes the likeliest token [0.8]")
    add("--top-p", type=PART, default=Settings.top_p,
        help="sample among the likeliest tokens that together have this probability [0.95]")
    add("--max-new-tokens", type=TOKENS, default=Settings.max_new_tokens,
        help="tokens of a continuation at most; what is longer is cut off and counted [2048]")
    add("--seed", type=INT, default=Settings.seed,
        help="the same seed gives the same samples; servers need not comply [0]")
    add("--dtype", choices=("bfloat16", "float32"), help="[bfloat16 on CUDA, else float32]")
    add("--batch-tokens", type=INT, default=Settings.batch_tokens,
        help="samples x (prompt + --max-new-tokens) per batch: sets memory, which holds 1.5 "
             "times as many tokens, and up to 2.5 while prompts are read [131072 on CUDA, else 16384]")
    add("--cuda-graphs", action=SWITCH, default=Settings.cuda_graphs,
        help="on CUDA, capture the forward of one token as a graph; not yet tried on a GPU [no]")
    add("--server", type=URL,
        help="address of an OpenAI-compatible server to sample on, which must take token ids as prompts, as "
             "vLLM, SGLang and llama.cpp do (`transformers serve` does not) [this process]")
    add("--server-model", help="the model's name there")
    add("--concurrency", type=COUNT, default=Settings.concurrency,
        help="requests that a server has to answer at the same time [64]")


def add_stage_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("locate: the first wrong step").add_argument
    add("--by", choices=("rollouts", "judge", "both", "human"), default="rollouts",
        help="who finds it: pass rates of the model's own rollouts; a judge; both, kept where they agree; or "
             "you: DIR/located.jsonl is then a file to fill in [rollouts]")
    add("--screen", type=COUNT, default=4, metavar="N",
        help="give up a problem if none of its first N samples is right, those of `solve` included [4]")
    add("--rollouts", type=COUNT, default=4, help="samples of a solution per wave of the search [4]")
    add("--max-rollouts", type=COUNT, default=48, help="give up a solution after so many [48]")
    add("--certainty", type=SHARE, default=0.9,
        help="a step is the first wrong one if that is at least so probable [0.9]")
    add("--max-recovery", type=PART, default=0.5,
        help="what part of the pass rate may be left after a wrong step, because models recover [0.5]")

    add = parser.add_argument_group("rectify: a right step in its place").add_argument
    add("--rectify-samples", type=COUNT, default=20,
        help="continuations of the right steps, those of `locate` among them; paper: 20 [20]")
    add("--check", choices=("rollouts", "judge"), default="rollouts", help="who says that a chosen step is "
        "right: a pass rate after it no lower than before it, or the judge [rollouts]")
    add("--check-rollouts", type=COUNT, default=8, help="samples for that pass rate [8]")
    add("--tries", type=COUNT, default=3, help="chosen steps checked per located error [3]")
    add("--max-length-ratio", type=RATIO, default=4.0,
        help="how many times longer or shorter than the rejected step a chosen one may be [4]")
    add("--pairs-per-step", type=COUNT, default=1, help="pairs that reject the same step [1]")
    add("--per-problem", type=COUNT, default=4, help="wrong solutions searched, and pairs made [4]")

    add = parser.add_argument_group("judge").add_argument
    add("--judge-url", type=URL, help="OpenAI-compatible server; its key is read from OPENAI_API_KEY")
    add("--judge-model", help="the judge's name there")


def needs_judge(args: argparse.Namespace) -> bool:
    return args.command == "build" and (args.by in ("judge", "both") or args.check == "judge")


def refuse_missing_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if bool(args.server) != bool(args.server_model):
        parser.error(f"--{'server' if args.server_model else 'server-model'} is needed too")
    for name in ("judge_url", "judge_model") if needs_judge(args) else ():
        if not getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} is needed too")


def refuse_bad_places(args: argparse.Namespace) -> None:
    """Raise InputError if --out is no place to write to, or holds what was not written by this command."""
    out = args.out
    if os.path.lexists(out) and not os.path.isdir(out):
        raise InputError(f"--out {out}: is not a folder")
    if os.path.isdir(args.model) and is_inside(out, args.model):
        raise InputError(f"--out {out}: must not be in the folder of --model {args.model}, which is read")

    folder, name = os.path.split(os.path.realpath(args.problems))
    ours = ("pairs.jsonl", "samples*.jsonl", "judge*.jsonl", "located*.jsonl")
    if folder == os.path.realpath(out) and any(fnmatch.fnmatch(name, pattern) for pattern in ours):
        raise InputError(f"--problems {args.problems}: is a file that this command writes in --out; "
                         "rename it, or choose another --out")

    samples = f"{out}/samples.jsonl"
    has_begun = os.path.isfile(samples) and os.path.getsize(samples) > 0
    for path in (f"{out}/{name}" for name in RESULTS):
        if os.path.islink(path) or os.path.isdir(path):
            raise InputError(f"{path}: is not a file that this command wrote; choose another --out")
        if os.path.exists(path) and not has_begun:
            raise InputError(f"{path}: was not made by this command, as there is nothing in samples.jsonl "
                             "beside it; choose another --out")


def run(args: argparse.Namespace, sampler=None, tokenizer=None) -> None:
    """The command; with another sampler and tokenizer than those of --model, if given."""
    began = time.monotonic()
    refuse_bad_places(args)
    problems = read_problems(args.problems)
    if args.server or needs_judge(args):
        api_key()  # which may be refused

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(args, name) for name in names})
    samples = Samples(f"{args.out}/samples.jsonl", settings, sampler, tokenizer)
    judge = None
    if needs_judge(args):
        judge = Judge(f"{args.out}/judge.jsonl", args.judge_url, args.judge_model, args.concurrency)
    solutions = solve(problems, samples, args.samples, STEP_PREFIX if args.step_prefix else "")
    if args.command == "build":
        build(solutions, samples, judge, args)
    tokens = torch.tensor(samples.tokens)
    if dist.is_initialized():
        dist.all_reduce(tokens)
    print0(f"{tokens:,} tokens sampled in {(time.monotonic() - began) / 60:.1f} minutes")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)

    def command() -> None:
        if "RANK" in os.environ:  # set by torchrun
            with joining():
                dist.init_process_group("gloo")
        run(args)

    run_command(f"pairs {args.command}", command)


if __name__ == "__main__":
    main()
