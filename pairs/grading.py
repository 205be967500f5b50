r"""Which answers are right: text, then exact fractions, then (rarely, if installed) symbols.

Nothing approximates: 0.0005 is not 0.001, 50 is not 0.5, [0,1) is not (0,1), and a text that was cut off
before its answer has none.
"""

import importlib.util
import json
import math
import re
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction


def extract_answer(solution: str) -> str | None:
    r"""The last \boxed{...}, braces matched; else what follows the last "answer is" or "####" on its line."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*(\{?)", solution))
    if boxes:
        rest = solution[boxes[-1].end():]
        has_brace = boxes[-1][1]
        if has_brace:
            return _up_to_matching_brace(rest)
        words = rest.split()
        return words[0].strip("$.,") or None if words else None

    marks = list(re.finditer(r"answer is\b|####", solution, re.I))
    if not marks:
        return None
    line = solution[marks[-1].end():].split("\n")[0].strip(" \t:*")
    first_sentence = re.split(r"[.!?](?:\s|$)", line)[0]
    return first_sentence.strip(" \t*") or None


def _up_to_matching_brace(text: str) -> str | None:
    depth = 1
    for token in re.finditer(r"\\.|[{}]", text, re.S):
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
        if depth == 0:
            return text[:token.start()].strip() or None
    return None  # cut off inside the box


def is_correct(solution: str, answer: str) -> bool:
    """Whether the solution's final answer is `answer`. A single letter A-E is graded as multiple choice."""
    guess, answer = extract_answer(solution), extract_answer(answer) or answer
    if guess is None:
        return False
    choice = re.fullmatch(r"\s*\(?([A-E])\)?\s*", answer)
    if choice:
        return _chosen_letter(guess) == choice[1]
    return _same(_rewritten(guess), _rewritten(answer))


def _chosen_letter(guess: str) -> str | None:
    """"B" of "(B)", "B) 12 km", "option B", "b"; None of "A train"."""
    bare = re.sub(r"\\text\w*|\\math\w+|[{}$*]|^\s*(?:option|choice)\b", "", guess, flags=re.I).strip()
    letter = re.match(r"\(([A-Ea-e])\)|([A-E])(?=\s*[).:,]|$)|([a-e])$", bare)
    return letter[letter.lastindex].upper() if letter else None


# ----------------------------------------------------------------------------------- one way to write a value


REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"^\s*\$(.*)\$\s*$|^\s*\\[(\[](.*)\\[)\]]\s*$", r"\1\2"),  # $72$, \(72\)
    ("\u2212", "-"),
    ("\u00b2", "^2"),
    ("\u00b3", "^3"),
    ("\u03c0", r"\\pi"),
    ("\u221e", r"\\infty"),
    ("\u222a", r"\\cup "),
    (r"\\\$", "$"),
    (r"\\%", "%"),
    (r"\\(?:text\w*|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    # Sizes of brackets, spaces (also the comma in 1{,}234), degrees.
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;: ]|\{,\}|[~\u00a0\u00b0]|\^\s*\{?\\circ\}?", " "),
    (r"\\cdot|\\times|\u00d7", "*"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(frac|sqrt)\s*(\w)", r"\\\1{\2}"),  # \frac12
    (r"(\\frac\s*\{\w\})\s*(\w)", r"\1{\2}"),
    (r"^\s*\$\s*(-?[\d.,]+)\s*$", r"\1 dollars"),  # $5
    (r"\$", ""),
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])", lambda found: found[0].replace(",", "")),  # 1,234
    (r"\s+", " "),
)]


def _rewritten(text: str) -> str:
    # Stripped before every rule, because each may bare a space or a full stop at the end.
    for pattern, new in REWRITES:
        text = pattern.sub(new, text.strip().rstrip("."))
    return text.strip()


def _number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction, mixed number or a * 10^b; None for anything else."""
    n = r"(-?(?:\d{1,60}\.?\d{0,60}|\.\d{1,60}))"  # bounded, because longer ones take long
    text = re.sub(rf"\\frac\s*\{{\s*{n}\s*\}}\s*\{{\s*{n}\s*\}}", r" \1/\2", text).strip(" +")
    text = re.sub(r"^-\s+", "-", text)

    mixed = re.fullmatch(r"(-?)(\d{1,60}) (\d{1,60}) ?/ ?(0*[1-9]\d{0,60})", text)
    if mixed:
        sign, whole, above, below = mixed.groups()
        value = int(whole) + Fraction(int(above), int(below))
        return -value if sign else value

    scaled = re.fullmatch(rf"{n} ?\* ?10 ?\^ ?\{{?(-?\d\d?)\}}?", text)
    if scaled:
        return Fraction(scaled[1]) * Fraction(10) ** int(scaled[2])

    ratio = re.fullmatch(rf"{n}(?: ?/ ?{n})?", text)
    if not ratio:
        return None
    below = Fraction(ratio[2] or 1)
    return Fraction(ratio[1]) / below if below else None


# "5 million" is another number than 5, not 5 of some unit.
NOT_UNITS = {"dozen", "score", "hundred", "thousand", "million", "billion", "trillion", "half", "third",
             "quarter", "sin", "cos", "tan", "log"}


def _split_unit(text: str) -> tuple[str, str]:
    """("12.5", "mile per hour") of "12.5 miles per hour"; ("5 million", "") of "5 million"."""
    unit = r"(?:[a-zA-Z]{2,}|[mghslL])(?:[ /]+[a-zA-Z]+){0,3}(?: ?\^ ?\{?[23]\}?)?"
    found = re.fullmatch(rf"(.*\d\}}?)(?: ?(%|percent)|\s({unit}))", text)
    if not found or NOT_UNITS & set(found[0].lower().split()):
        return text, ""
    words = re.sub(r"[{} ]+", " ", found[3] or "%").lower().split()
    return found[1], " ".join(word.rstrip("s") for word in words)


def _split_name(text: str) -> tuple[str, str]:
    """("x", "5") of "x = 5"; ("f(x)", "3x") of "f(x) = 3x"; ("", "5") of "5"."""
    name = re.match(r"(?:[a-zA-Z](?:\([a-z]\))? ?= ?)?", text)[0]
    return name.strip("= "), text[len(name):]


def _members(text: str) -> tuple[str, list[str]]:
    """(brackets, members) of a tuple, interval or set, a bare list being a set; ("", [text]) of a value."""
    text = re.sub(r"\\([{}])", r"\1", text)
    parts, depth = [""], 0
    for token in re.findall(r"\\[a-zA-Z]+|\s(?:or|and)\s|.", text):
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        if depth == 0 and token.strip() in (",", r"\cup", "or", "and"):
            parts.append("")
        else:
            parts[-1] += token
    if len(parts) > 1:
        return "{}", [part.strip() for part in parts]

    if re.fullmatch(r"[(\[{].*,.*[)\]}]", text):
        inner = _members(text[1:-1])[1]
        if len(inner) > 1:
            return text[0] + text[-1], inner
    in_parentheses = re.fullmatch(r"\([^()]*\)", text)
    return "", [text[1:-1] if in_parentheses else text]


# -------------------------------------------------------------------------------------------- the same value?


def _same(guess: str, answer: str) -> bool:
    """Whether two answers, rewritten, are the same value. A unit or a name on one side only is ignored."""
    guess, guess_unit = _split_unit(guess)
    answer, answer_unit = _split_unit(answer)
    guess_name, guess = _split_name(guess)
    answer_name, answer = _split_name(answer)
    if guess_unit and answer_unit and guess_unit != answer_unit:
        return False
    if guess_name and answer_name and guess_name != answer_name:
        return False

    if guess.lower().replace(" ", "") == answer.lower().replace(" ", ""):
        return bool(guess)
    brackets, left = _members(guess)
    wanted_brackets, right = _members(answer)
    if brackets != wanted_brackets or len(left) != len(right):
        return False
    if brackets == "{}":  # in any order: each has its like on the other side
        every_guess = all(any(_same(a, b) for b in right) for a in left)
        return every_guess and all(any(_same(a, b) for a in left) for b in right)
    if brackets:
        return all(_same(a, b) for a, b in zip(left, right, strict=True))
    return _same_value(left[0], right[0])


def _same_value(guess: str, answer: str) -> bool:
    left, right = _number(guess), _number(answer)
    if left is not None and right is not None:
        return left == right
    # Words and numerals of other bases are not formulas: "east" and "seat" would be one product of letters.
    bare = re.sub(r"\\[a-zA-Z]+", "", guess + answer)
    if re.search(r"[a-zA-Z]{3}|[_%=<>]|[^\x00-\x7f]", bare):
        return False
    return _same_formula(guess, answer)


# math-verify ends endless computations (9^{9^9}) by SIGALRM, which works in a main thread only. So it runs
# in a process of its own, which is ended here if even that does not help.
WORKER = """import json, sys
from math_verify import parse, verify
for line in sys.stdin:
    answer, guess = (parse("$" + text + "$", parsing_timeout=3) for text in json.loads(line))
    print(json.dumps(bool(answer and guess and verify(answer, guess, timeout_seconds=3))), flush=True)"""
_worker, _worker_lock = None, threading.Lock()


def _same_formula(guess: str, answer: str, seconds: float = 15) -> bool:
    """By math-verify. False without that package, which is said once."""
    global _worker
    with _worker_lock:
        if _worker is None:
            _worker = _start_worker()
        if not _worker:
            return False
        with suppress(BrokenPipeError):
            _worker.stdin.write(json.dumps([answer, guess]).encode() + b"\n")
            _worker.stdin.flush()
            has_answered = select.select([_worker.stdout], [], [], seconds)[0]
            line = _worker.stdout.readline() if has_answered else b""
            if line:
                return json.loads(line)
        _worker.kill()
        _worker.communicate()
        _worker = None  # the next comparison starts a new one
        return False


def _start_worker() -> subprocess.Popen | bool:
    if importlib.util.find_spec("math_verify") is None:
        print("pairs: answers are compared as text and numbers only, not as formulas (that would need: "
              "pip install math-verify antlr4-python3-runtime==4.13.2)", file=sys.stderr)
        return False
    return subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL)


# ----------------------------------------------------------------------------------------------- how certain?


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share, by Wilson's formula, which also holds near 0 and 1."""
    share = right / n
    middle = share + z * z / 2 / n
    spread = z * math.sqrt(share * (1 - share) / n + z * z / 4 / n / n)
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def paired_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Difference of two accuracies on the same problems and its 95% interval, paired by problem."""
    changes = [a - b for a, b in zip(after, before, strict=True)]
    mean = sum(changes) / len(changes)
    spread = 1.96 * math.sqrt(sum((change - mean) ** 2 for change in changes)) / len(changes)
    return mean, mean - spread, mean + spread
