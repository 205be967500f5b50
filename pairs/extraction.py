r"""Where a text says its answer: in its last \boxed{...}, else behind the last mark that says one, as in

    #### 18
    The answer is therefore $18 a day, because 9 * 2 = 18.
    **Answer:** 18
    So 18 is the answer.
    The final answer is:
    $$18$$

"I hope the answer is helpful" speaks about an answer and says none. A text that was cut off before its answer
has none either: the last number of a text is never taken for it.
"""

import re


def extract_answer(solution: str) -> str | None:
    r"""The last \boxed{...}, braces matched; else what the last sentence that says the answer says it is."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*(\{?)", solution))
    if boxes:
        rest = solution[boxes[-1].end():]
        has_brace = boxes[-1][1]
        if has_brace:
            return _up_to_matching_brace(rest)
        words = rest.split()
        return words[0].strip("$.,") or None if words else None
    return _behind_a_mark(solution[-LONGEST_TEXT:])


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


# -------------------------------------------------------------------------- marks: "Answer:", "the answer is"

# Of a longer text the end is searched, and of more marks the last ones: only hostile texts have so many.
LONGEST_TEXT = 100_000
LAST_MARKS = 50
IS = (r"(?:is|are|equals|becomes|comes\ to|turns\ out\ to\ be"
      r"|(?:would|will|must|should|has\ to|have\ to)\ be)")
OF_WHAT = r"""(?: ,[^,.:\n]{1,60},                # The answer, in dollars, is
                | \ \([^()\n]{1,60}\)             # The answer (rounded) is
                | \ (?:to|for|in|of|as|we|I|you|that|when|if|rounded|expressed)\b [^.:?!\n]{1,60}?
                )"""                            # The answer to the question is
MARK = re.compile(rf"""
    ^[#*_>\ \t]{{0,10}} (?:the\ )? (?:final\ )? answer [*_:\ \t]{{0,10}} $   # "### Answer", and no more
  | \#{{4,}}                                                               # GSM8K's "#### 18"
  | (?<![\w.,/])                                                         # "$18$ is our final answer"
    (?: (?P<formula> \$[^$\n]{{1,99}}\$ | (?-i:\([A-E]\)|[A-E]))
      | (?P<number> -?\$?\d[\d.,/]*%? (?:\ [a-z]{{1,20}})?))
    \*{{0,2}} \ is\ (?:(?:the|our|my)\ )? (?:(?:final|right|correct)\ )? (?:answer|option|choice)\b
  | (?<![a-zA-Z/]) (?:ans(?:wers?)?|correct\ (?:option|choice))\b           # "The answer is", "Answer:"
    \*{{0,2}} (?: {OF_WHAT}? \s{{1,3}}{IS}\b | (?:\ \([^()\n]{{1,60}}\))? \s{{0,3}}(?P<colon>[:=\u2192]|->) )
  | \banswer\ (?=\(?[A-E]\)?\.?\s{{0,9}}$)                                 # "Answer D"
    """, re.I | re.M | re.X)


def _behind_a_mark(solution: str) -> str | None:
    words = None
    for mark in reversed(list(MARK.finditer(solution))[-LAST_MARKS:]):
        if _is_aside(solution, mark):
            continue
        said = mark["formula"] or mark["number"] or _said(solution[mark.end():])
        if said is None:  # the text ends here: it was cut off
            return None
        if not said or COMMENT.match(said):
            continue
        # "#### Explanation" and "this answer is surprising" are answers only where nothing else is one.
        is_heading = mark[0].startswith("#") and not re.search(r"[\d\\]", said)
        if not is_heading and not MERE_WORDS.match(said):
            return said
        words = words or said
    return words


# "Let me know if this answer is", "I hope that the answer is", "what the answer is".
ASIDE = re.compile(r"\b(?:if|whether|unless|suppose|assum\w+|hope|doubt|wrong|what|why|how|thought"
                   r"|n[o']t think)(?: you think)?(?: that)?"
                   r"(?: (?:the|this|that|my|our|your|final|correct|right))* ?$", re.I)
# "To check the answer: 6 * 3", "Explanation of the answer: We multiply".
OTHER_COLON = re.compile(r"\b(?:check|verif|confirm|review|expla|reason)"
                         r"|\b(?:about|behind|of|on|for|with) (?:\w+ )?$", re.I)


def _is_aside(solution: str, mark: re.Match) -> bool:
    """Whether a mark's sentence leaves open what the answer is, or its colon begins something else."""
    before = solution[max(0, mark.start() - 100):mark.start()]
    sentence = re.split(r"\n|[.!?:] ", before)[-1]
    return bool(ASIDE.search(sentence) or mark["colon"] and OTHER_COLON.search(sentence))


# ----------------------------------------------------------------------------- what stands behind a mark

ABOUT = r"(?:approximately|approx\.?|about|around|roughly)"
# What stands between a mark and the answer: "therefore", "clear:". The answer may stand in the next line.
LEAD = re.compile(rf"""(?:
    [\s:*=,_`>}}\u2192] | </?[a-z]+> | (?<=\n)[-\u2022]\ | \({ABOUT}\)
  | \b(?:{ABOUT} | therefore | thus | hence | then | just | indeed | finally | now | also | still | of\ course
      | in\ fact | equal\ to | given\ by | calculated\ as | as\ follows) (?!\w)
  | \b(?:(?!nearly)[a-z]+ly | so | most | always | [a-z]+\ to\ be
      | (?:the\ )?(?:number|integer|value|fraction|point|(?:ordered\ )?pair|interval|set))
    (?=,?\ (?:[a-z]+ly\ )?[-$\\\d(\[*])                 # only right before the value
  | \b(?:(?:very|quite|shown|given)\ )?
    (?:clear|obvious|simple|easy|correct|found|this|the\ following|below)\ ?[:,]
    )*""", re.I | re.X)
NOT_BUT = re.compile(r"n(?:ot|either)\b.*?(?:\bbut|, it is|, it's) (?:rather |it is )?", re.I)
# The end of a sentence, not of "3.5", of "Rs. 500" or of "5! = 120".
END = re.compile(r"(?<!\bRs)(?<!\bsq)[.?]\**(?=\s|$)|!\**(?=\s*$|\s+[A-Z])")
# "Tom has 18 apples", "that the total is 18": the value follows the verb, and no number stands before it.
VERB = re.compile(r"[^\d\\$=]*\b(?:is|are|was|were|equals?|totals?|gives?|has|have|had|gets?|makes?|costs?"
                  r"|weighs?|needs?|requires?|takes?|sells?|sold|earn(?:s|ed)?|spen[dt]s?|pays?|paid|save[sd]?"
                  rf"|uses?|eats?|ate|buys?|bought) (?:{ABOUT} )?(?=[*(-]*[$\\\d])")
# "18, because 9 * 2 = 18", "18, not 12", "18 as required", "18 (nine eggs times two)".
CLAUSE = re.compile(r",? (?:because|since|which|whereas)\b|,? and not\b"
                    r"|, (?:not|so|but|as|where|hence|thus|I)\b| I (?:hope|think|believe)\b"
                    r"| as (?:shown|required|expected|desired|given|stated|above)\b"
                    r"| (?:is|are|was|were) (?:the|left|needed|required|sold)\b"
                    r"| \((?:since|because)\b| \([^()\\]{0,80}[a-z]{3} [^()\\]{0,80}[a-z]{3}[^()\\]{0,80}\)$")


def _said(rest: str) -> str | None:
    """What the sentence behind a mark says: "" if it asks; None if the text ends before it does."""
    rest = rest[LEAD.match(rest).end():]
    if rest.startswith(("$$", r"\[")):
        closing = "$$" if rest[0] == "$" else r"\]"
        formula, is_closed, rest = rest[2:].partition(closing)
        if not is_closed:
            return None
        rest = formula.replace("\n", " ") + rest
    if not rest:
        return None

    line = rest.split("\n")[0]
    denied = NOT_BUT.match(line)
    line = line[denied.end():] if denied else line
    end = END.search(line)
    if end and end[0].startswith("?"):
        return ""
    sentence = line[:end.start()] if end else line

    verb = VERB.match(sentence)
    sentence = sentence[verb.end():] if verb else sentence
    clause = CLAUSE.search(sentence)
    sentence = sentence[:clause.start()] if clause else sentence
    return sentence.strip(" \t*`_,;:\"\u201c\u201d")


# Said about an answer: "this answer is correct", "my answer is rounded to 2 digits", "the answer is not 12".
COMMENT = re.compile(r"""(?:not|very|quite|also|most|both)?\ ?(?:
    (?:correct|incorrect|right|wrong|helpful|useful|clear|reasonable|sensible|plausible|valid|accurate|fine
      |good|great|ok|okay|acceptable|complete|satisfactory|what)
    (?= $ | [,;] | \ (?:and|or|for|to|by|with|as|in|on|if|but|too|enough|given|now|you|we|I)\b)
  | (?:in|on|by|to|of|for|from|as|with|within|based|found|shown|given|rounded|expressed|written|worth
      |obtained|expected|supposed|consistent|close|step|different|independent)\b
  | not\ \W*\d
    )""", re.I | re.X)
# Words that are seldom an answer: "surprising", "a whole number", "We multiply 9 by 2".
MERE_WORDS = re.compile(r"""
    (?:an?|the|at|between)\ [a-z\d]                           # a description
  | [a-z]+\ than\b                                            # a bound
  | (?!(?:yes|no|none|true|false|undefined|infinite|infinity)\b)
    [a-z]{2,}[^\d\\$=]*$                                     # in lower case and without a number
  | [a-zA-Z]{2,}[^\\$=\s]* (?:\ [^\\$=\s]+){3} [^\\$=]*$    # four words or more, and no formula
    """, re.X)
