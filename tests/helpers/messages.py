"""Error messages: tests assert the key facts, and `tests/messages.json` holds the full wording.

So that a sentence can be improved in one place, no test quotes it. `refused` and `says` check the facts (file, key,
value) and compare the whole message with the snapshot. `make messages` writes the snapshot anew.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from pgprune_cli.errors import UserError

TESTS = Path(__file__).parents[1]
SNAPSHOT = TESTS / "messages.json"
UPDATING = bool(os.environ.get("UPDATE_MESSAGES"))

_counts: Counter[str] = Counter()


@contextmanager
def refused(*facts: str, error: type[Exception] = UserError) -> Iterator[None]:
    """Fail unless the body raises `error` with a message that holds every fact and matches the snapshot."""
    with pytest.raises(error) as caught:
        yield
    says(str(caught.value), *facts)


def says(message: str, *facts: str) -> None:
    """Fail unless `message` holds every fact and is the one in the snapshot of the running test."""
    for fact in facts:
        assert fact in message, f"{fact!r} is not in the message: {message}"
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0].removeprefix("tests/")
    _counts[test] += 1
    key = test if _counts[test] == 1 else f"{test} #{_counts[test]}"
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8")) if SNAPSHOT.exists() else {}
    lines = without_places(message).splitlines()
    if UPDATING:
        snapshot = dict(sorted((snapshot | {key: lines}).items()))
        SNAPSHOT.write_text(json.dumps(snapshot, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    assert snapshot.get(key) == lines, f"not the message in {SNAPSHOT.name}, which `make messages` rewrites: {message}"


def without_places(message: str) -> str:
    """Replace what differs from machine to machine: directories, and the version of transformers."""
    message = re.sub(r"/\S*?/pytest-of-\w+/pytest-\d+/(popen-gw\d+/)?[^/\s:;,)'\"]+", "<tmp>", message)
    for place, name in ((str(TESTS.parent), "<checkout>"), (str(Path.cwd()), "<cwd>")):
        message = message.replace(place, name)
    return message.replace(f"transformers {version('transformers')}", "transformers <version>")
