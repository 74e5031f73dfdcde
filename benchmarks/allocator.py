"""The allocator's model against recordings of real GPUs, and its speed.

    python benchmarks/allocator.py [FOLDER]

FOLDER (or the environment variable GALORE_MEM_CUDA_TRACES, or ../shared/data/cuda_traces) holds traces/*.json.gz, or
snapshots that torch.cuda.memory._dump_snapshot wrote (*.pickle). One row a device: what replayed as recorded when only
the addresses of new segments are taken from the recording, and the peak of reserved bytes when not even those are. Exit
code 1 if anything differs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from allocator_cases import random_program
from allocator_recordings import VARIABLE, real_traces

from galore_mem.allocator.expandable import new_allocator
from galore_mem.allocator.recorded import Comparison, compare
from galore_mem.allocator.replay import replay
from galore_mem.allocator.snapshot import read_snapshot
from galore_mem.allocator.start import start_state
from galore_mem.errors import InputError
from galore_mem.units import KIB, MIB

HEAD = (
    "recording | exact | allocations | segment events | blocks | retries | out of memory"
    " | peak allocated MiB | peak reserved MiB | with invented addresses"
)


def files(folder: Path | None) -> list[Path]:
    if folder is None:
        return real_traces()
    return sorted([*folder.glob("traces/*.json.gz"), *folder.glob("*.json.gz"), *folder.glob("*.pickle")])


def rows(path: Path) -> Iterator[tuple[str, Comparison, Comparison]]:
    """Name, and the comparisons with recorded and with invented addresses, of each device."""
    recording = read_snapshot(path)
    for device in recording.devices:
        start = start_state(device, recording.settings)
        name = path.name.split(".")[0] + (f":{device.device}" if len(recording.devices) > 1 else "")
        yield (
            name,
            compare(device, recording.settings, start=start),
            compare(device, recording.settings, start=start, invented=True),
        )


def show(name: str, found: Comparison, invented: Comparison) -> str:
    off = invented.peak_reserved_bytes / found.recorded_peak_reserved_bytes - 1
    return " | ".join(
        (
            name,
            "yes" if found.exact else f"no: {found.first_difference}",
            f"{found.allocations_matched}/{found.allocations}",
            f"{found.segment_events_matched}/{found.segment_events}",
            f"{found.blocks_matched}/{found.blocks}",
            str(found.retries),
            f"{found.out_of_memory_matched}/{found.out_of_memory}",
            f"{found.peak_allocated_bytes / MIB:.2f}",
            f"{found.peak_reserved_bytes / MIB:.0f}",
            "exact" if not off else f"{off:+.2%}",
        )
    )


def speed() -> None:
    """Events per second of processor time, on a program with 400 blocks alive on one stream."""
    sizes = (2 * KIB, 12 * KIB, 100 * KIB, MIB, 3 * MIB, 8 * MIB, 11 * MIB, 33 * MIB)
    for text, streams in (("one stream", (0,)), ("three streams", (0, 7, 8))):
        events = random_program(400_000, seed=1, sizes=sizes, streams=streams, live=400)
        begin = time.process_time()
        result = replay(events, new_allocator())
        seconds = time.process_time() - begin
        print(f"{text}: {len(events) / seconds:,.0f} events a second, {len(result.layout)} segments")


def main() -> int:
    paths = files(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    if not paths:
        print(f"no recordings: give a folder, or set {VARIABLE} (now {os.environ.get(VARIABLE)!r})", file=sys.stderr)
    else:
        print(HEAD)
    exact = invented = total = 0
    for path in paths:
        try:
            for name, found, without in rows(path):
                total += 1
                exact += found.exact
                invented += without.peak_reserved_bytes == found.recorded_peak_reserved_bytes
                print(show(name, found, without), flush=True)
        except InputError as error:
            print(f"{path.name} | {error}")
            total += 1
    print(f"{exact} of {total} exact; reserved peak exact with invented addresses: {invented} of {total}\n")
    speed()
    return int(exact < total or invented < total)


if __name__ == "__main__":
    raise SystemExit(main())
