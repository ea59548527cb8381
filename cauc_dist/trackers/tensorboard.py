"""TensorBoard: event files in RUN/tensorboard, by the writer that comes with torch."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from cauc_dist.config import RunConfig
from cauc_dist.trackers.tracker import End, Point, Setting

FOLDER = "tensorboard"


class TensorBoard:
    """One event a step, on the disk when `log` returns. What an earlier life wrote from `start` on is taken back."""

    def __init__(self, run: RunConfig, settings: Mapping[str, Setting], start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter, summary  # 0.4 s, and the package tensorboard

        self._writer = cast(Any, SummaryWriter(str(run.folder / FOLDER), purge_step=start))  # its types are loose
        experiment, session, _ = cast(Any, summary).hparams(dict(settings), {"loss": 0.0})
        for part in (experiment, session):  # the tab that compares runs by their settings
            self._writer.file_writer.add_summary(part)
        self._writer.flush()

    def log(self, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            self._writer.file_writer.add_summary(Summary(value=values), point.step, point.time)
        self._writer.flush()

    def close(self, end: End) -> None:
        self._writer.close()


def open_tracker(run: RunConfig, settings: Mapping[str, Setting], start: int) -> tuple[TensorBoard, str]:
    """Nothing to say: it is always there."""
    return TensorBoard(run, settings, start), ""
