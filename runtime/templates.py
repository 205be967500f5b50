"""A model's tokenizer and chat template: how they are read and applied, and what would mislead a run."""

import datetime
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from runtime.messages import InputError

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate, which is no text
TODAY = "strftime_now"  # the function by which chat templates print today's date


def read_tokenizer(model: str) -> Any:
    """The tokenizer of a model's folder or hub name, which cuts text as its tokenizer.json says."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if tokenizer.is_fast:
            _keep_to_its_file(tokenizer, model)
        is_empty = not tokenizer("1").input_ids  # without its files the library makes an empty one
    except Exception as error:  # whatever the reader of an odd file happens to run into
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{model}: its tokenizer cannot be read ({problem})") from None
    if is_empty:
        raise InputError(f"{model}: has no tokenizer")
    return tokenizer


def _keep_to_its_file(tokenizer: Any, model: str) -> None:
    """Put back what transformers drops of tokenizer.json: some classes (Qwen2, GPT2, GPTNeoX, Cohere) have
    a normalizer and a pre-tokenizer of their own, which cut text in other places."""
    from tokenizers import Tokenizer
    from transformers.utils import cached_file
    path = cached_file(model, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return
    file, backend = Tokenizer.from_file(path), tokenizer.backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = file.normalizer, file.pre_tokenizer
    backend.model, backend.decoder = file.model, file.decoder


def refuse_lost_text(tokenizer: Any, texts: Sequence[str], ids: list[list[int]],
                     places: Sequence[str]) -> None:
    """Raise InputError if a text cannot be had back from its token ids: another would be trained on."""
    if not tokenizer.is_fast:
        return
    given_back = tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    for text, again, place in zip(texts, given_back, places, strict=True):
        # Some put a space in front, and many compose letters and accents: that loses nothing.
        if unicodedata.normalize("NFC", text).strip() != unicodedata.normalize("NFC", again).strip():
            where = next((i for i, (a, b) in enumerate(zip(text, again, strict=False)) if a != b), len(again))
            start = max(0, where - 20)
            raise InputError(f"{place}: the tokenizer of {tokenizer.name_or_path} loses part of the text: "
                             f"{text[start:where + 40]!r} becomes {again[start:where + 40]!r}")


def control_tokens(tokenizer: Any) -> list[str]:
    """Tokens that must not come from the text of a problem or a step: they would end the user's turn, say."""
    return sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special})


def control_token_in(text: str, tokens: list[str]) -> str:
    """The first of the control tokens that stands in a text; "" if none does."""
    return next((token for token in tokens if token in text), "")


# --------------------------------------------------------------------------------------------- chat templates


def chat_turn(tokenizer: Any, user: str, template_args: dict[str, Any] | None = None) -> str:
    """The user's turn in the tokenizer's chat template, and the assistant's turn opened."""
    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path}: its tokenizer has no chat template; pass "
                         "--template alpaca or --template deepseek-math, whichever the model was tuned with")
    turn = [{"role": "user", "content": user}]
    text = _rendered(tokenizer, turn, template_args, add_generation_prompt=True)
    if user.strip() not in text or HALF_CHARACTER.search(text):
        raise InputError(f"{tokenizer.name_or_path}: its chat template changes or drops the problem: "
                         f"{user[:60]!r} becomes {text[:200]!r}")
    return text


def end_of_answer(tokenizer: Any, template: str, template_args: dict[str, Any] | None) -> tuple[str, int]:
    """What follows a whole answer: as the chat template ends an assistant's turn, else EOS. Text and id."""
    if template == "chat" and tokenizer.chat_template:
        answer = "The answer is: 2"
        turns = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": answer}]
        after = _rendered(tokenizer, turns, template_args).rpartition(answer)[2]
        ids = tokenizer(after, add_special_tokens=False).input_ids
        for token in ids:
            if token in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[token].special:
                return tokenizer.convert_ids_to_tokens(token), token
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path}: --span solution ends with EOS, "
                         "but the tokenizer has no eos_token")
    return tokenizer.eos_token, tokenizer.eos_token_id


def _rendered(tokenizer: Any, turns: list[dict], template_args: dict[str, Any] | None, **options: Any) -> str:
    args = dict(template_args or {})
    date = args.pop(TODAY, None)
    try:
        template = tokenizer.get_chat_template()
        if date:
            template = _on(date, template)
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **options, **args)
    except Exception as error:  # a template is a program, and may fail in any way
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{tokenizer.name_or_path}: its chat template fails on {turns[0]['content'][:60]!r} "
                         f"({problem!r})") from None


def _on(date: str, template: str) -> str:
    """A chat template, with what it prints of today's date printed of another."""
    def literal(call: re.Match) -> str:
        return json.dumps(datetime.date.fromisoformat(date).strftime(call["format"]))

    fixed = re.sub(TODAY + r"""\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""", literal, template)
    if f"{TODAY}(" in fixed:
        raise ValueError(f"it calls {TODAY} with a format that is no literal, so its date cannot be fixed")
    return fixed


def with_date(template_args: dict[str, Any] | None, tokenizer: Any, template: str,
              before: dict[str, Any] | None) -> dict[str, Any] | None:
    """The template's arguments, with a fixed date if it prints today's: that of `before`, the arguments this
    was started with, or today. Else what is rendered would be another text tomorrow. Collective."""
    asks = template == "chat" and tokenizer.chat_template and TODAY in tokenizer.get_chat_template()
    if not asks or TODAY in (template_args or {}):
        return template_args
    import torch.distributed as dist
    date = [(before or {}).get(TODAY) or datetime.date.today().isoformat()]
    if dist.is_initialized():
        dist.broadcast_object_list(date)  # it may be midnight
    return {**(template_args or {}), TODAY: date[0]}
