"""MLflow: RUN/mlruns, or the server that MLFLOW_TRACKING_URI names."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from cauc_dist.config import RunConfig
from cauc_dist.trackers import tracker as kept
from cauc_dist.trackers.tracker import End, Point, Setting

FOLDER = "mlruns"
METRICS, PARAMS = 1000, 100  # of one request, at most
ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Files, as a run folder is on a shared disk, where SQLite's locks are not to be trusted; MLflow 3 asks for a word.
    "MLFLOW_ALLOW_FILE_STORE": "true",
    # As they are, a server that is away holds the start of a run for a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""Of the environment, where it has none of its own."""


class MLflow:
    """A run of MLflow. Of a step that an earlier life has told already, nothing is told again."""

    def __init__(self, run: RunConfig, settings: Mapping[str, Setting]) -> None:
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder / FOLDER).absolute().as_uri()
        self._client: Any = MlflowClient(tracking_uri=uri)
        known = kept.ids(run.folder).get("mlflow")
        self._told = -1
        if known and self._exists(known):
            self._id = known
            self._client.update_run(known, status="RUNNING")
            self._told = max((int(m.step) for m in self._client.get_metric_history(known, "epoch")), default=-1)
        else:
            self._id = self._create(run, settings)
            kept.keep(run.folder, "mlflow", self._id)

    def log(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        new = [
            Metric(name, value, int(1000 * point.time), point.step)
            for point in points
            if point.step > self._told
            for name, value in point.values.items()
        ]
        for i in range(0, len(new), METRICS):
            self._client.log_batch(self._id, metrics=new[i : i + METRICS])

    def close(self, end: End) -> None:
        self._client.set_terminated(self._id, ENDS[end])

    def _exists(self, name: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_run(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False  # the earlier life was told to another server
        return True

    def _create(self, run: RunConfig, settings: Mapping[str, Setting]) -> str:
        from mlflow.entities import Param

        created = self._client.create_run(self._experiment(run.trackers.project), run_name=run.name)
        params = [Param(name, str(value)) for name, value in settings.items()]
        for i in range(0, len(params), PARAMS):
            self._client.log_batch(created.info.run_id, params=params[i : i + PARAMS])
        return str(created.info.run_id)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run of a sweep made it meanwhile
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)


def open_tracker(run: RunConfig, settings: Mapping[str, Setting], start: int) -> tuple[MLflow, str]:
    """With the line that says how to look at it, where that is a folder."""
    tracker = MLflow(run, settings)
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return tracker, ""
    return tracker, f"mlflow: files in {run.folder / FOLDER}; docs/trackers.md says how to look at them"
