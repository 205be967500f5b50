"""An OpenAI-compatible server (vLLM, SGLang, ...), by nothing but the standard library."""

import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any

from files import InputError

TRIES = 6        # of a request
PAUSE = 1.0      # seconds before the second try; then twice as long each time
TIMEOUT = 600.0  # seconds for one try


def post(url: str, body: dict) -> dict:
    """POST JSON and return the JSON reply.

    Connection errors, broken replies, 408, 409, 429 and 5xx are tried again after a growing, jittered pause
    (or what Retry-After says); any other status is an InputError at once.
    """
    key = os.environ.get("OPENAI_API_KEY", "")  # never printed: servers repeat it in their errors
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"

    for attempt in range(TRIES):
        pause = PAUSE * 2**attempt * random.uniform(0.5, 1)
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}"
            with suppress(OSError, http.client.HTTPException):
                problem += ": " + error.read(500).decode(errors="replace")
            problem = problem.replace(key, "***") if key else problem
            if error.code not in (408, 409, 429) and error.code < 500:
                raise InputError(f"{url}: {problem}") from None
            retry_after = error.headers.get("Retry-After", "")
            if re.fullmatch(r"\d+(\.\d+)?", retry_after):
                pause = min(float(retry_after), 120)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not all JSON
            problem = f"{type(error).__name__}: {error}"
        if attempt < TRIES - 1:
            time.sleep(pause)
    raise InputError(f"{url}: gave up after {TRIES} tries, the last: {problem}; the same command continues")


def post_all(server: str, path: str, bodies: list[dict], concurrency: int,
             take: Callable[[dict], Any]) -> Iterator[tuple[int, Any]]:
    """Post all bodies to /v1/`path`, `concurrency` at a time; yields (index, take(reply)) as they come."""
    url = f"{server.rstrip('/').removesuffix('/v1')}/v1/{path}"

    def post_one(body: dict) -> Any:
        reply = post(url, body)
        try:
            return take(reply)
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{url}: not the reply of an OpenAI-compatible server ({type(error).__name__}: "
                             f"{error}): {json.dumps(reply)[:300]}") from None

    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = {pool.submit(post_one, body): i for i, body in enumerate(bodies)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
