"""Error messages: tests assert the key facts, and `tests/messages/` holds the full wording.

So that a sentence can be improved in one place, no test quotes it. `refused` and `says` check the facts (file, key,
value) and compare the whole message with the snapshot. `UPDATE_MESSAGES=1 make test` writes the snapshot anew.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgprune_cli.errors import UserError

TESTS = Path(__file__).parents[1]
SNAPSHOTS = TESTS / "messages"
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
    path = SNAPSHOTS / f"{test.split('::')[0].split('/')[0].removesuffix('.py')}.json"
    snapshot = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    lines = without_places(message).splitlines()
    if UPDATING:
        path.parent.mkdir(exist_ok=True)
        snapshot = dict(sorted((snapshot | {key: lines}).items()))
        path.write_text(json.dumps(snapshot, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    assert snapshot.get(key) == lines, f"not the message in {path.name}; UPDATE_MESSAGES=1 rewrites it: {message}"


def without_places(message: str) -> str:
    """Replace what differs from machine to machine: temporary directories, this checkout, the working directory."""
    message = re.sub(r"/\S*?/pytest-of-\w+/pytest-\d+/(popen-gw\d+/)?[^/\s:;,)'\"]+", "<tmp>", message)
    for place, name in ((str(TESTS.parent), "<checkout>"), (str(Path.cwd()), "<cwd>")):
        message = message.replace(place, name)
    return message
