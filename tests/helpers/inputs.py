"""Makes damaged inputs, and checks what comes of them: each is accepted, or refused clearly, in time and memory."""

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
"""Multiplies the number of inputs. `make fuzz` asks for more than the suite, and for different ones each time."""

SECONDS_PER_INPUT = 200
"""An input that takes longer is a hang."""

MEMORY_PER_INPUT = 2 << 30
"""Bytes by which one input may raise the peak memory of the process."""

tried: Counter[str] = Counter()
"""Inputs by kind, and how many of each were refused. conftest.py reports them at the end."""


def examples(count: int, shrink: bool = True) -> settings:
    """Return the settings of a test that tries `count` inputs in the suite. Slow tests should not shrink failures."""
    return settings(
        max_examples=max(1, round(count * SHARE)),
        deadline=None,
        derandomize=SHARE <= 1,
        database=None,
        phases=[phase for phase in Phase if shrink or phase is not Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """Not an Exception, so that no reader handles it as an error of the input."""


@contextmanager
def accepted_or_refused(kind: str) -> Iterator[None]:
    """Fail unless the body accepts its input, or refuses it with a UserError or RunError of clear lines.

    Any other exception, a hang, or too much memory is a failure. Only recipes may have several lines, one per fault.
    """

    def hang(*_: object) -> None:
        raise Hang(f"{kind}: an input took longer than {SECONDS_PER_INPUT} s")

    tried[kind] += 1
    peak_before = peak_memory()
    handler_before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS_PER_INPUT)
    try:
        yield
    except (UserError, RunError) as error:
        tried[f"{kind}, refused"] += 1
        lines = str(error).splitlines()
        assert lines and all(line.strip() for line in lines), repr(str(error))
        assert len(lines) == 1 or kind.startswith("recipes"), repr(str(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler_before)
        growth = peak_memory() - peak_before
        assert growth < MEMORY_PER_INPUT, f"{kind}: an input took {growth / 2**30:.1f} GB"


def peak_memory() -> int:
    """Return the most bytes of main memory that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


ODD_TEXTS = st.sampled_from(
    ["", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "é" * 300, "layers.0.ffn", "F32", "llama", "nan"]
)
ODD_NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")]),
)
SCALARS = st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXTS)
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXTS, inner, max_size=3)
)
"""JSON values, mostly odd ones."""


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw damaged copies of `content`: bits flipped, bytes cut off, removed, repeated or inserted."""
    copy = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(copy)))
        match draw(st.sampled_from(["flip", "cut", "insert", "remove", "repeat"])):
            case "flip" if position < len(copy):
                copy[position] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del copy[position:]
            case "insert":
                copy[position:position] = draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del copy[position : position + draw(st.integers(1, 40))]
            case "repeat":
                copy[position:position] = copy[max(0, position - 40) : position]
    return bytes(copy)


@st.composite
def altered_json(draw: st.DrawFn, value: Any) -> Any:
    """Draw copies of a JSON value in which one value, at any depth, is replaced, renamed or removed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        rest = {name: inner for name, inner in value.items() if name != key}
        match draw(st.sampled_from(["alter", "remove", "rename"])):
            case "alter":
                return value | {key: draw(altered_json(value[key]))}
            case "remove":
                return rest
        return rest | {draw(ODD_TEXTS): value[key]}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        position = draw(st.integers(0, len(value) - 1))
        return [*value[:position], draw(altered_json(value[position])), *value[position + 1 :]]
    return draw(JSON_VALUES)


@st.composite
def with_altered_header(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw copies of a safetensors file with an altered header."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(draw(altered_json(json.loads(content[8:end])))).encode()
    return len(header).to_bytes(8, "little") + header + content[end:]


def write(path: Path, content: bytes) -> Path:
    """Write a file and the folders above it, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
