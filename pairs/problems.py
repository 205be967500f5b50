"""Problems with answers, in the formats people have them in, and solutions in numbered steps.

    Let's think step by step.
    Step 1: 3 boxes hold 3 * 4 = 12 pens.
    Step 2: After giving 5 away, 12 - 5 = 7 pens are left.
    The answer is: 7

A model is made to answer like that by beginning its answer for it (STEP_PREFIX).
"""

import os
import re
from typing import NamedTuple

from data import read_rows
from files import InputError, content_key

from .grading import extract_answer

STEP_PREFIX = "Let's think step by step.\nStep 1:"
FORMATS = """GSM8K: question, answer (ends in "#### N")
  MATH: problem, and answer or solution (ends in \\boxed{})
  Step-DPO's test files: instruction, answer (a list)
  AQuA: question, options, correct
  plain: prompt, answer"""


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
    problems: dict[str, Problem] = {}
    for where, row in read_rows(path):
        prompt, answer, reference = _fields(where, row)
        if not isinstance(prompt, str) or not prompt.strip() or answer is None or not str(answer).strip():
            raise InputError(f"{where}: the problem or its answer is missing or empty")
        if prompt not in problems:
            dataset = str(row.get("dataset") or os.path.basename(path).split(".")[0])
            reference = str(reference).strip() if reference else None
            problems[prompt] = Problem(dataset, prompt, str(answer).strip(), reference)
    return list(problems.values())


def _fields(where: str, row: dict) -> tuple:
    """(prompt, answer, reference) of a row in one of FORMATS."""
    reference = row.get("solution") or row.get("output") or row.get("rationale")

    if "question" in row and "options" in row and "correct" in row:
        options = [re.sub(r"^\s*\(?([A-Z])\s*\)\s*", r"(\1) ", str(option)) for option in row["options"]]
        return f"{row['question']}\nAnswer choices: {' '.join(options)}", row["correct"], reference

    if "question" in row and "answer" in row:
        worked, mark, answer = str(row["answer"]).rpartition("####")
        if not mark:
            raise InputError(f'{where}: "answer" must end in "#### N", as in GSM8K; for a bare answer '
                             'name the fields "prompt" and "answer"')
        return row["question"], answer, worked

    if "problem" in row and "solution" in row and "answer" not in row:
        return row["problem"], extract_answer(str(reference)), reference

    for name in ("problem", "instruction", "prompt"):
        if name in row and "answer" in row:
            answer = row["answer"]
            if isinstance(answer, list):
                answer = ", ".join(str(one) for one in answer)
            return row[name], answer, reference

    raise InputError(f"{where}: unknown format ({', '.join(row) or 'empty'}); known are\n  {FORMATS}")


class Step(NamedTuple):
    before: str  # all of the solution before the step's text: it ends in `Step k:`, without a trailing space
    text: str    # from there up to, without, the line break at the step's end


def find_steps(solution: str) -> list[Step] | None:
    """A step runs to the next line that begins `Step k:`; a step mentioned within a line is text.

    None if the lines that look like the beginning of a step are not exactly `Step 1:` .. `Step n:`, or if a
    step is empty: no guessing.
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
