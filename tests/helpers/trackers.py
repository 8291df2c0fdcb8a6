"""What a tracker was told."""

from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """Of all event files of a run, in order: by name and step; what was purged is gone."""
    from tensorboardX.proto.event_pb2 import Event

    actual: dict[str, dict[int, float]] = defaultdict(dict)
    for file in sorted((run / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16  # the length and its checksum before, a checksum after
            if event.session_log.status == event.session_log.START:
                for values in actual.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    actual[value.tag][event.step] = value.simple_value
    return actual
