"""The files that `simulate` writes beside its answer: a picture of the run, and the run for PyTorch's viewer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from galore_mem.allocator.settings import parse_settings
from galore_mem.errors import InputError
from galore_mem.report import timeline
from galore_mem.simulate.explain import POINTS
from galore_mem.simulate.result import SimulateResult
from galore_mem.simulate.snapshot import write as write_run
from galore_mem.spec.files import shown_path


class Files:
    """Where to write, checked before anything runs. Raises `InputError`."""

    def __init__(self, picture: Path | None, snapshot: Path | None, device: str, methods: Sequence[str] | None) -> None:
        self.picture, self.snapshot = picture, snapshot
        for path in (picture, snapshot):
            if path is not None and not path.absolute().parent.is_dir():
                raise InputError(f"cannot write {shown_path(path)}: there is no such folder")
        if picture is not None:
            timeline.check(picture)
        if snapshot is not None and snapshot.suffix.lower() != ".pickle":
            raise InputError(f"cannot write {shown_path(snapshot)}: a snapshot is a .pickle file")
        if snapshot is not None and device != "cuda":
            raise InputError("--snapshot is the CUDA allocator's history; leave it out with --device cpu")
        if snapshot is not None and methods is not None and len(methods) != 1:
            raise InputError("--snapshot is of one run; name one method with --method")

    @property
    def points(self) -> int | None:
        """Points of a timeline; None where none is drawn."""
        return None if self.picture is None else POINTS

    def write(self, result: SimulateResult, alloc_conf: str) -> None:
        """Writes what was asked for. Raises `InputError` where it cannot be."""
        if self.picture is not None:
            drawn = timeline.picture(result, self.picture.suffix.lower())
            try:
                self.picture.write_bytes(drawn)
            except OSError as error:
                raise InputError(f"cannot write {shown_path(self.picture)}: {error.strerror or error}") from None
        if self.snapshot is None:
            return
        if len(result.estimates) != 1:
            raise InputError(
                f"--snapshot is of one run, and these are {len(result.estimates)}; name one --implementation"
            )
        [made] = result.estimates
        assert made.run is not None
        settings = parse_settings(alloc_conf)
        capacity = None if made.fits is None else made.fits.capacity_bytes
        other = 0 if capacity is None else min(made.outside_allocator_bytes, capacity)
        write_run(self.snapshot, made.run, settings, capacity, other)
