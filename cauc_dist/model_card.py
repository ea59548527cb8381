"""A model card to begin with: what the run knows of an exported encoder, and what only its maker can add.

No names of subjects, no values of the metadata, no paths and no name of a host. N scans of a store.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.store.reader import Store
from cauc_dist.stream.plan import Rows
from cauc_dist.table import AFTER, KNN, Table

PLACES = (("run",), ("data", "store"), ("data", "stage"), ("engine", "deepspeed"), ("trackers",))
"""Settings that say where something was or went, not what was done."""
ASK = "**To be filled in:**"

TEXT = """# {name}

{encoder} of {shape}, pre-trained with the objective `{objective}` by cauc-dist {version}.

`cauc export` began this card with what the run knows; what only you know is marked {ask}

## Use

```python
import torch
from cauc_dist import load_encoder

encoder = load_encoder("FOLDER")  # this folder
scans = torch.rand(2, {axes})  # as `cauc ingest` takes them up
h = encoder(encoder.prepare(scans))  # (2, {width})
```

## Intended use

Research: features for probes, comparisons and fine-tuning, on scans that were ingested as those of the training. Not a
medical device; not for decisions on a person.
{ask} by whom, for which question, on which population it may be used, and for what it must not.

## Data

- Store `{store}`: {scans} scans of {subjects} subjects were trained on, {held} scans held out.
- Each scan: {shape}{grid}; normalised by `{normalise}`.
- Metadata that the objective read: {columns}.
- {ask} where the data come from, ages, sexes, sites, scanners, who was left out, how it was preprocessed.
- {ask} licence of the data, and whether its agreement lets a model that was trained on it be passed on.

## Training

{epochs} epochs of batches of {batch_size}, weights of step {step}{average}.

```json
{settings}
```

## Results

{results}

## Limits

- Other preprocessing, scanners, ages or diseases than those of the training: not tested.
- Features may tell what the objective was not given, such as sex, site, or who somebody is; the weights may retain
  something of the scans. Treat them as the data agreement says.
- Differences between groups of people were not examined. {ask} what you found.
- {ask} licence of the weights, whom to ask, how to cite; of the method: arXiv 2111.05643.
"""


def model_card(card: Mapping[str, Any], run: RunConfig, store: Store, parts: tuple[Rows, Rows], results: str) -> str:
    """Markdown, of the `card` of an export, its run, and `parts`: rows of the store to train and held out."""
    train, held = parts
    return TEXT.format(
        ask=ASK,
        name=run.name,
        encoder=f"Encoder `{run.encoder.name}`",
        shape=_shape(store.shape),
        axes=", ".join(map(str, store.shape)),
        width=card["width"],
        objective=run.objective.name,
        version=card["versions"]["cauc-dist"],
        store=store.name,
        scans=len(train),
        subjects=len({store.subjects[i] for i in train}),
        held=len(held),
        grid=_grid(card["voxel_mm"], card["orientation"]),
        normalise=run.data.normalise,
        columns=", ".join(f"`{name}`" for name in run.objective.columns) or "none",
        epochs=f"{run.epochs:g}",
        batch_size=run.batch_size,
        step=card["step"],
        average=f", their moving average of decay {card['ema']:g}" if card["ema"] else "",
        settings=_by_line(settings(run)),
        results=results,
    )


def settings(run: RunConfig) -> dict[str, Any]:
    """All of a run's settings but PLACES."""
    values = dataclasses.asdict(run)
    for *path, last in PLACES:
        part = values
        for word in path:
            part = part[word]
        del part[last]
    return values


def results(path: Path, run: RunConfig, store: Store, step: int) -> str:
    """The probes that `path`, of `cauc probe`, holds of a run, as Markdown; where there are none, how to get them.

    BadInput where the file is no such table.
    """
    try:
        table = Table.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"Not probed. {ASK} by `cauc probe RUN` and a new export, or by hand."
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path} holds no table ({type(error).__name__}: {error})",
            wanted="what `cauc probe` wrote",
            do="probe again, or remove it",
        ) from error
    if table.fingerprint != store.fingerprint or run.name not in table.steps:
        return f"The run's probe.json is of another store or run. {ASK} by `cauc probe RUN` and a new export."
    return "\n".join(_results(table, run.name, step))


def _results(table: Table, name: str, step: int) -> list[str]:
    ours = [method for method in table.scores if method in (name, *(name + end for end in (KNN, AFTER, AFTER + KNN)))]
    rows = {method.replace(name, "this encoder", 1): method for method in ours}
    rows |= {method: method for method in ("untrained", "raw voxels") if method in table.scores}
    head = ["", *(f"{column} ({table.scores[name][column].metric})" for column in table.columns)]
    lines = [head, ["---"] * len(head), ["chance", *(f"{table.chance[column]:.3g}" for column in table.columns)]]
    for told, method in rows.items():
        scores = [table.scores[method][column] for column in table.columns]
        lines.append([told, *(f"{s.value:.3g} [{s.low:.3g}, {s.high:.3g}]" for s in scores)])
    note = f"Probes of frozen features, fitted on {table.n_train} scans, scored on {table.n_test} held out"
    probed = "" if table.steps[name] == step else f"; probed at step {table.steps[name]}"
    cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return [*(f"| {line} |" for line in cells), "", f"{note}; [95 % bootstrap interval]{probed}."]


def _by_line(values: Mapping[str, Any]) -> str:
    """JSON, a line for each part."""
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()) + "\n}"


def _shape(shape: Sequence[int]) -> str:
    if len(shape) == 1:
        return f"{shape[0]} numbers"
    sides = " x ".join(map(str, shape[1:]))
    return f"{sides} {'voxels' if len(shape) == 4 else 'pixels'}, {shape[0]} channel{'s' * (shape[0] > 1)}"


def _grid(voxel_mm: Sequence[float] | None, orientation: str | None) -> str:
    """As far as the store knows it."""
    grid = "" if voxel_mm is None else f", {' x '.join(f'{mm:g}' for mm in voxel_mm)} mm"
    return grid if orientation is None else f"{grid}, {orientation}"
