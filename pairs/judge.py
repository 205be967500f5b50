"""A judge: a model on a server that reads a solution and names the first wrong step."""

import re

from data import content_key

from .problems import Problem
from .sampling import Cache, post_all


class Judge:
    """Verdicts of one judge. Its replies are kept as samples are: to be read, and not to be paid twice."""

    def __init__(self, path: str, server: str, model: str, concurrency: int):
        self.cache = Cache(path, {"judge_model": model})
        self.server, self.model, self.concurrency = server, model, concurrency

    def first_errors(self, solutions: list[tuple[Problem, list[str]]]) -> list[int | None]:
        """Of each solution (or beginning of one), given as the texts of its steps, the first wrong step.

        0 if none is wrong; None if the judge does not answer exactly in the form asked for. Collective.
        """
        questions = [question(problem, steps) for problem, steps in solutions]
        keys = [content_key(text) for text in questions]
        missing = {key: text for key, text in zip(keys, questions, strict=True) if key not in self.cache.rows}
        here = list(missing.items())[self.cache.rank::self.cache.ranks]

        bodies = [{"model": self.model, "temperature": 0, "max_tokens": 2048, "stream": False,
                   "messages": [{"role": "user", "content": text}]} for _, text in here]
        for i, reply in post_all(self.server, "chat/completions", bodies, self.concurrency, _content):
            key, text = here[i]
            self.cache.add([{"key": key, "question": text, "reply": reply}])
        self.cache.share()
        return [first_error(self.cache.rows[key]["reply"], len(steps))
                for key, (_, steps) in zip(keys, solutions, strict=True)]


def _content(reply: dict) -> str:
    return "" + reply["choices"][0]["message"]["content"]


def question(problem: Problem, steps: list[str]) -> str:
    numbered = [f"Step {k}:{text}" for k, text in enumerate(steps, 1)]
    return "\n".join([
        "A student works on a problem, step by step. Find the first wrong step.",
        "\n### Problem", problem.prompt,
        f"\n### Reference {'solution' if problem.reference else 'answer'}",
        problem.reference or problem.answer,
        "\n### The student's steps", *numbered,
        "\nGo through the steps in order and stop at the first wrong one. A step is `incorrect` if it "
        "miscalculates, claims something false or misreads the problem; `neutral` if it only plans or "
        "restates; else `correct`, also where it goes another way than the reference. Explain briefly. "
        "Then end with a line `Verdict:` and one line for each step you went through, like these:\n"
        "Verdict:\nStep 1: correct\nStep 2: incorrect"])


def first_error(reply: str, steps: int) -> int | None:
    """The first wrong step by a judge's verdict, 0 if none is; None if it is not exactly as asked for."""
    before, mark, verdict = reply.rpartition("Verdict:")
    if not mark:
        return None

    words = []
    for line in re.split(r"[\n;]+", verdict.strip("\n ;")):
        found = re.fullmatch(r"Step (\d+): (correct|neutral|incorrect)\.?", line.strip("* \t"))
        if not found or int(found[1]) != len(words) + 1:
            return None
        words.append(found[2])

    if "incorrect" in words:  # must be the last: it should have stopped there
        return len(words) if words.index("incorrect") == len(words) - 1 and len(words) <= steps else None
    return 0 if len(words) == steps else None
