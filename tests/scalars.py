"""What TensorBoard would show of a folder, read from its record files without TensorBoard."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event as Record
from tensorboardX.proto.event_pb2 import SessionLog
from tensorboardX.record_writer import masked_crc32c


def records(path: Path) -> Iterator[Record]:
    """Give the records of a file: length and its checksum, content and its checksum.

    What ends in the middle of a record was written by a process that was ended there.
    """
    data = path.read_bytes()
    while len(data) >= 12:
        size, size_sum = struct.unpack("<QI", data[:12])
        if len(data) < 12 + size + 4:
            return
        content, (content_sum,) = data[12 : 12 + size], struct.unpack("<I", data[12 + size :][:4])
        assert size_sum == masked_crc32c(data[:8])
        assert content_sum == masked_crc32c(content)
        yield Record.FromString(content)
        data = data[16 + size :]


def read(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Return (step, value, time) of each tag, in the order written.

    A session that starts at a step hides what an earlier one wrote of it and of later ones.
    """
    found: dict[str, list[tuple[int, float, float]]] = {}
    for path in sorted(folder.glob("*tfevents*")):
        for record in records(path):
            if record.session_log.status == SessionLog.START:
                for tag, points in found.items():
                    found[tag] = [point for point in points if point[0] < record.step]
            for value in record.summary.value:
                found.setdefault(value.tag, []).append(
                    (record.step, value.simple_value, record.wall_time)
                )
    return found


def steps(folder: Path, tag: str) -> list[int]:
    """Return the steps at which there is a value."""
    return [step for step, _, _ in read(folder)[tag]]
