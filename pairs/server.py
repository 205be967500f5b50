"""An OpenAI-compatible server (vLLM, SGLang, ...), by nothing but the standard library."""

import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any

from runtime.messages import InputError

TRIES = 6        # of a request
PAUSE = 1.0      # seconds before the second try; then twice as long each time
TIMEOUT = 600.0  # seconds for one try
LARGEST_REPLY = 2**26  # bytes


class Refused(InputError):
    """The server has answered, but not with what was asked for."""


def api_key() -> str:
    """OPENAI_API_KEY, without the line break of the file it was read from; "" if there is none."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError("OPENAI_API_KEY: holds a character that no key has; set it again")
    return key


def shown(text: str) -> str:
    """What a server or a library says, as one line without the key: servers repeat it in their errors."""
    if api_key():
        ways_to_write = [rf"(?:\\?{re.escape(character)}|%{ord(character):02x}|\\u{ord(character):04x})"
                         for character in api_key()]
        text = re.sub("".join(ways_to_write), "***", text, flags=re.I)
    printable = "".join(character if character.isprintable() else " " for character in text[:2000])
    return " ".join(printable.split())[:500]


def fetch(url: str, body: dict | None = None) -> Any:
    """The JSON reply to a request: a POST of JSON, or a GET if there is no body.

    Connection errors, broken replies, 408, 409, 429 and 5xx are tried again after a growing, jittered pause
    (or what Retry-After says). Any other status is Refused at once.
    """
    data, headers = None, {"Content-Type": "application/json"}
    if body is not None:
        data = json.dumps(body).encode()
    if api_key():
        headers["Authorization"] = f"Bearer {api_key()}"

    for attempt in range(TRIES):
        pause = PAUSE * 2**attempt * random.uniform(0.5, 1)
        try:
            request = urllib.request.Request(url, data, headers)
            with OPENER.open(request, timeout=TIMEOUT) as reply:
                return json.loads(read_all(reply))
        except urllib.error.HTTPError as error:
            kind, problem = Refused, f"{error.code} {error.reason}"
            with suppress(OSError, http.client.HTTPException):
                problem += ": " + error.read(65536).decode(errors="replace")
            may_pass = error.code in (408, 409, 429) or error.code >= 500 and error.code != 501
            if not may_pass:
                raise Refused(f"{url}: {shown(problem)}{hint(error.code, body)}") from None
            retry_after = error.headers.get("Retry-After", "")
            if re.fullmatch(r"\d+(\.\d+)?", retry_after):
                pause = min(float(retry_after), 120)
        except (OSError, http.client.HTTPException) as error:
            kind, problem = InputError, f"{type(error).__name__}: {error}"
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, thousands of brackets
            kind, problem = Refused, f"{type(error).__name__}: {error}"
        if attempt < TRIES - 1:
            time.sleep(pause)
    raise kind(f"{url}: gave up after {TRIES} tries, the last: {shown(problem)}; the same command continues")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another host must not get the key, nor make the samples."""

    def redirect_request(self, *args: Any) -> None:
        return None


OPENER = urllib.request.build_opener(NoRedirect)


def read_all(reply: http.client.HTTPResponse) -> bytes:
    """The body. Raises ValueError if it is too long, and TimeoutError if it comes too slowly."""
    parts, size, deadline = [], 0, time.monotonic() + TIMEOUT
    while True:
        part = reply.read1(2**16)
        parts.append(part)
        size += len(part)
        if not part:
            return b"".join(parts)
        if size > LARGEST_REPLY:
            raise ValueError(f"more than {LARGEST_REPLY} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"took more than {TIMEOUT} s")


def hint(status: int, body: dict | None) -> str:
    if body is None or status not in (400, 422):
        return ""
    return (f"; the fields sent are {', '.join(body)} (vLLM takes these, best started with "
            "`--generation-config vllm`)")


def ask(url: str, take: Callable[[Any], Any], body: dict | None = None) -> Any:
    """Fetch JSON and return take(reply). Raises Refused if `take` finds something odd."""
    reply = fetch(url, body)
    try:
        return take(reply)
    # A reply may be of any shape, so it fails where `take` first looks for what is not there.
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        odd = shown(f"({type(error).__name__}: {error}): {json.dumps(reply)}")
        raise Refused(f"{url}: not the reply of an OpenAI-compatible server {odd}") from None


def api_url(server: str, path: str) -> str:
    return f"{server.rstrip('/').removesuffix('/v1')}/v1/{path}"


def served_model(server: str, name: str) -> str:
    """The model that a server has under a name, and what it was loaded from, where the server tells (vLLM).

    Raises InputError if the server lists its models, and there is none of that name.
    """
    try:
        roots = ask(api_url(server, "models"),
                    lambda reply: {entry["id"]: entry.get("root") for entry in reply["data"]})
    except Refused:  # not every server has this list, or in this form
        return name
    if name not in roots:
        raise InputError(f"{server}: does not serve {name!r} (--server-model), "
                         f"but: {shown(', '.join(map(str, roots))) or 'nothing'}")
    root = roots[name]
    return f"{name} ({shown(str(root))})" if root and root != name else name


def post_all(server: str, path: str, bodies: list[dict], concurrency: int,
             take: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
    """Post all bodies to /v1/`path`, `concurrency` at a time; yields (index, take(reply)) as they come.

    After one that fails for good no other is begun.
    """
    url = api_url(server, path)
    pool = ThreadPoolExecutor(concurrency)
    has_failed = threading.Event()

    def post(body: dict) -> Any:
        if has_failed.is_set():
            raise CancelledError
        try:
            return ask(url, take, body)
        except BaseException:
            has_failed.set()
            raise

    try:
        futures = {pool.submit(post, body): i for i, body in enumerate(bodies)}
        for future in as_completed(futures):
            if not isinstance(future.exception(), CancelledError):
                yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
