"""What damages inputs, and what may come of it: one clear line, in time and without much memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from pgprune_cli.errors import RunError, UserError

SHARE = float(os.environ.get("FUZZ", "1"))
"""How many times as many inputs as in the suite; `make fuzz` asks for more, and for others each time."""

SECONDS = 200
"""Longer than this for one input is a hang."""

MEMORY = 2 << 30
"""Bytes that one input may add to the most that the process ever held."""

tried: Counter[str] = Counter()
"""Inputs by test, and of them those that were refused; which conftest.py reports at the end."""


def examples(count: int, shrink: bool = True) -> settings:
    """The settings of a test that tries `count` inputs in the suite; slow ones do not look for a smaller one."""
    return settings(
        max_examples=max(1, round(count * SHARE)),
        deadline=None,
        derandomize=SHARE <= 1,
        database=None,
        phases=[phase for phase in Phase if shrink or phase is not Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """Of no kind that a reader could take for an error of its own."""


@contextmanager
def told(kind: str) -> Iterator[None]:
    """Whatever the input is: it is read, or refused with clear lines. Anything else fails, a hang and a flood too."""

    def late(*_: object) -> None:
        raise Hang(f"{kind}: an input took longer than {SECONDS} s")

    tried[kind] += 1
    most = peak()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    except (UserError, RunError) as error:
        tried[f"{kind}, refused"] += 1
        lines = str(error).splitlines()
        assert lines and all(line.strip() for line in lines), repr(str(error))
        assert len(lines) == 1 or kind.startswith("recipes"), repr(str(error))  # whose faults are all told at once
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        assert peak() - most < MEMORY, f"{kind}: an input took {(peak() - most) / 2**30:.1f} GB"


def peak() -> int:
    """Bytes of main memory that the process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


WORDS = st.sampled_from(
    ["", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "é" * 300, "layers.0.ffn", "F32", "llama", "nan"]
)
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3))
"""Values of JSON, odd ones before all."""


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that were `content` once: flipped, cut, doubled, with others in between."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(result)))
        match draw(st.sampled_from(["flip", "cut", "insert", "remove", "double"])):
            case "flip" if place < len(result):
                result[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del result[place:]
            case "insert":
                result[place:place] = draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del result[place : place + draw(st.integers(1, 40))]
            case "double":
                result[place:place] = result[max(0, place - 40) : place]
    return bytes(result)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A value of JSON in which one place, however deep, holds something else, or is gone."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        rest = {name: inner for name, inner in value.items() if name != key}
        match draw(st.sampled_from(["inside", "gone", "renamed"])):
            case "inside":
                return value | {key: draw(changed(value[key]))}
            case "gone":
                return rest
        return rest | {draw(WORDS): value[key]}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(changed(value[place])), *value[place + 1 :]]
    return draw(VALUES)


@st.composite
def rewritten(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(draw(changed(json.loads(content[8:end])))).encode()
    return len(header).to_bytes(8, "little") + header + content[end:]


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
