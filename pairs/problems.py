"""Problems with answers, in the formats people have them in, and solutions in numbered steps.

    Let's think step by step.
    Step 1: 3 boxes hold 3 * 4 = 12 pens.
    Step 2: After giving 5 away, 12 - 5 = 7 pens are left.
    The answer is: 7

A model is made to answer like that by beginning its answer for it (STEP_PREFIX).
"""

import math
import os
import re
from typing import Any, NamedTuple

from runtime.files import content_key
from runtime.messages import InputError
from runtime.rows import is_on_hub, is_one_message, read_rows
from runtime.templates import HALF_CHARACTER

from .grading import extract_answer

STEP_PREFIX = "Let's think step by step.\nStep 1:"
FORMATS = """GSM8K: question, answer (ends in "#### N")
  MATH: problem, and answer or solution (ends in \\boxed{})
  Step-DPO's test files: instruction, answer (a list)
  AQuA: question, options, correct
  plain: prompt, answer"""
LONGEST_ANSWER = 10_000  # characters


class Problem(NamedTuple):
    dataset: str
    prompt: str
    answer: str
    reference: str | None  # a worked solution, for a judge

    def key(self, prefix: str) -> str:
        """The identity of this problem with the beginning of an answer."""
        return content_key(self.prompt, self.answer, prefix)


def read_problems(path: str) -> list[Problem]:
    """Problems in any of FORMATS; one that is there twice counts once.

    Raises InputError naming file and line; for an unknown format it lists the known ones.
    """
    problems: dict[str, tuple[str, Problem]] = {}
    name = os.path.basename(path.partition(":")[0] if is_on_hub(path) else path).split(".")[0]
    for where, row in read_rows(path):
        problem = _problem(where, row, name)
        first, known = problems.setdefault(problem.prompt, (where, problem))
        if problem.answer != known.answer:
            raise InputError(f"{where}: has the same problem as {first}, with another answer "
                             f"({known.answer[:80]!r} there, {problem.answer[:80]!r} here); remove one")
    return [problem for _, problem in problems.values()]


def _problem(where: str, row: dict, name: str) -> Problem:
    """The problem of a row in one of FORMATS; `name` is that of the dataset, if the row has none."""
    prompt, answer, reference = _fields(where, row)
    if isinstance(prompt, list):
        if not is_one_message(prompt):
            raise InputError(f"{where}: the problem must be text, or a list of one message of the user")
        prompt = prompt[0].get("content")
    answers = answer if isinstance(answer, list) else [answer]

    problem = Problem(_text(where, "dataset", row.get("dataset") or name),
                      _text(where, "problem", prompt),
                      ", ".join(_text(where, "answer", one) for one in answers).strip(),
                      _text(where, "worked solution", reference).strip() or None)
    if not problem.prompt.strip() or not problem.answer:
        raise InputError(f"{where}: the problem or its answer is missing or empty")
    if len(problem.answer) > LONGEST_ANSWER:
        raise InputError(f"{where}: the answer has {len(problem.answer):,} characters, and may have "
                         f"{LONGEST_ANSWER:,}; is it a worked solution?")
    return problem


def _text(where: str, name: str, value: Any) -> str:
    """A text or number as text, nothing as "". Raises InputError if it is anything else."""
    if value is None:
        return ""
    is_number = type(value) is int or type(value) is float and math.isfinite(value)  # True is an int too
    if not isinstance(value, str) and not is_number:
        raise InputError(f"{where}: the {name} must be text or a finite number, got {type(value).__name__}")
    if HALF_CHARACTER.search(str(value)):
        raise InputError(f"{where}: the {name} has half a character (a lone surrogate); "
                         "remove the row or repair it")
    return str(value)


def _fields(where: str, row: dict) -> tuple:
    """(prompt, answer, reference) of a row in one of FORMATS."""
    # A file of several formats has null where a row has no such field. But an answer that is null is missing.
    there = [name for name, value in row.items() if value is not None]
    reference = row.get("solution") or row.get("output") or row.get("rationale")

    if "question" in there and "options" in there and "correct" in row:
        if not isinstance(row["options"], list):
            raise InputError(f'{where}: "options" must be a list, got {type(row["options"]).__name__}')
        options = [re.sub(r"^\s*\(?([A-Z])\s*\)\s*", r"(\1) ", _text(where, "option", option))
                   for option in row["options"]]
        question = _text(where, "problem", row["question"])
        return f"{question}\nAnswer choices: {' '.join(options)}", row["correct"], reference

    if "question" in there and "answer" in row:
        worked, mark, answer = _text(where, "answer", row["answer"]).rpartition("####")
        if not mark:
            raise InputError(f'{where}: "answer" must end in "#### N", as in GSM8K; for a bare answer '
                             'name the fields "prompt" and "answer"')
        return row["question"], answer, worked

    if "problem" in there and "solution" in there and "answer" not in there:
        return row["problem"], extract_answer(_text(where, "worked solution", reference)), reference

    for name in ("problem", "instruction", "prompt"):
        if name in there and "answer" in row:
            return row[name], row["answer"], reference

    raise InputError(f"{where}: unknown format ({', '.join(there) or 'empty'}); known are\n  {FORMATS}")


class Step(NamedTuple):
    before: str  # all of the solution before the step's text: it ends in `Step k:`, without a trailing space
    text: str    # from there up to, without, the line break at the step's end


def find_steps(solution: str) -> list[Step] | None:
    """The numbered steps of a solution, or None if they are not clear.

    A step runs to the next line that begins `Step k:`; a step mentioned within a line is text. Nothing is
    guessed: the lines that look like the beginning of a step must be exactly `Step 1:` .. `Step n:`, and no
    step may be empty.
    """
    headings = []
    looks_like_a_step = re.finditer(r"^[^\w\n]*step[ \t]*\d+[^\w\n]*?[:.)]", solution, re.M | re.I)
    for found in looks_like_a_step:
        heading = re.compile(rf"[ \t]*Step {len(headings) + 1}:").match(solution, found.start())
        if heading is None:
            return None
        headings.append(heading)

    steps = []
    for k, heading in enumerate(headings, 1):
        end = headings[k].start() if k < len(headings) else len(solution)
        steps.append(Step(solution[:heading.end()], solution[heading.end():end].rstrip()))
    if not steps or not all(step.text.strip() for step in steps):
        return None
    return steps
