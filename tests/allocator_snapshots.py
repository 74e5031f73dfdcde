"""One small snapshot in both formats, as the tests of `galore_mem.allocator.snapshot` need it."""

from __future__ import annotations

from typing import Any

from galore_mem.units import MIB

A = 0x7F00_0000_0000
FRAMES = [{"name": "forward", "filename": "model.py", "line": 3}]
# what torch 2.6 writes, cut down: a segment of 20 MiB with a live block of 5, one that was freed, and the free rest
SNAPSHOT: dict[str, Any] = {
    "segments": [
        {
            "device": 0, "address": A, "total_size": 20 * MIB, "allocated_size": 5 * MIB, "active_size": 5 * MIB,
            "requested_size": 5 * MIB - 7, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0),
            "is_expandable": False, "frames": FRAMES,
            "blocks": [
                {"address": A, "size": 5 * MIB, "requested_size": 5 * MIB - 7, "state": "active_allocated",
                 "frames": FRAMES},
                {"address": A + 5 * MIB, "size": 15 * MIB, "requested_size": 3, "state": "inactive", "frames": []},
            ],
        }
    ],
    "device_traces": [
        [
            {"action": "segment_alloc", "addr": A, "size": 20 * MIB, "stream": 0, "time_us": 1, "frames": FRAMES},
            {"action": "alloc", "addr": A, "size": 5 * MIB - 7, "stream": 0, "time_us": 2, "frames": FRAMES},
            {"action": "alloc", "addr": A + 5 * MIB, "size": 3 * MIB, "stream": 0, "time_us": 3, "frames": FRAMES},
            {"action": "free_requested", "addr": A + 5 * MIB, "size": 3 * MIB, "stream": 0, "time_us": 4},
            {"action": "free_completed", "addr": A + 5 * MIB, "size": 3 * MIB, "stream": 0, "time_us": 4},
            {"action": "oom", "device_free": 77, "size": 5, "stream": 0, "time_us": 5},
            {"action": "snapshot", "addr": 0, "size": 5 * MIB, "stream": 0, "time_us": 6},
        ],
        [],
    ],
    "allocator_settings": {
        "PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": -1, "garbage_collection_threshold": 0.0,
        "expandable_segments": False, "pinned_num_register_threads": 1,
        "roundup_power2_divisions": {str(2**n): 0 for n in range(16)},
    },
    "external_annotations": [],
}  # fmt: skip
TRACE: dict[str, Any] = {
    "schema": "cuda-alloc-trace/1",
    "devices": [
        {
            "device": 0,
            "events": [
                ["segment_alloc", A, 20 * MIB, 0, 1, 0], ["alloc", A, 5 * MIB - 7, 0, 2, 0],
                ["alloc", A + 5 * MIB, 3 * MIB, 0, 3, 0], ["free_requested", A + 5 * MIB, 3 * MIB, 0, 4, 0],
                ["free_completed", A + 5 * MIB, 3 * MIB, 0, 4, 0], ["oom", 77, 5, 0, 5, 0],
                ["snapshot", 0, 5 * MIB, 0, 6, 0],
            ],
            "segments": [
                {
                    "address": A, "total_size": 20 * MIB, "allocated_size": 5 * MIB, "stream": 0,
                    "segment_type": "large", "is_expandable": False, "pool": [0, 0],
                    "blocks": [
                        [A, 5 * MIB, 5 * MIB - 7, "active_allocated"], [A + 5 * MIB, 15 * MIB, 3, "inactive"],
                    ],
                }
            ],
        }
    ],
    "stacks": [["model.py:3:forward"]],
    "allocator_settings": SNAPSHOT["allocator_settings"],
}  # fmt: skip
