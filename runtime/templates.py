"""A model's tokenizer and chat template: how they are read, and which of them would mislead a run."""

import re
from typing import Any

from runtime.messages import InputError

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate, which is no text


def read_tokenizer(model: str) -> Any:
    """Of a model's folder or hub name."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        is_empty = not tokenizer("1").input_ids  # without its files the library makes an empty one
    except Exception as error:  # whatever the reader of an odd file happens to run into
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{model}: its tokenizer cannot be read ({problem})") from None
    if is_empty:
        raise InputError(f"{model}: has no tokenizer")
    return tokenizer


def chat_turn(tokenizer: Any, user: str) -> str:
    """The user's turn in the tokenizer's chat template, and the assistant's turn opened."""
    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; pass "
                         "--template alpaca or --template deepseek-math, whichever the model was tuned with")
    turn = [{"role": "user", "content": user}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may fail in any way
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{tokenizer.name_or_path}: its chat template fails on {user[:60]!r} "
                         f"({problem!r})") from None
    if user.strip() not in text or HALF_CHARACTER.search(text):
        raise InputError(f"{tokenizer.name_or_path}: its chat template changes or drops the problem: "
                         f"{user[:60]!r} becomes {text[:200]!r}")
    return text
