"""What was run: recipe, data, code, machine, and where configurations differ."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cauc_dist import config, journal, recipes
from cauc_dist.provenance import without_secrets
from cauc_dist.report.hidden import Hidden
from cauc_dist.report.tags import note, table, text

FACTS = {
    "launcher": "launcher",
    "ranks": "ranks",
    "device": "device",
    "precision": "precision",
    "zero_stage": "ZeRO stage",
    "batch_size": "batch size, all ranks",
    "encode_chunk": "encoded at once, a rank",
    "scans": "training scans",
    "held_out": "held-out scans",
    "steps_per_epoch": "steps an epoch",
    "epochs": "epochs",
    "parameters": "parameters",
}
OWN = ("run", "name", "data.store")
"""Settings that differ between any two runs."""
Flat = dict[str, str]


def described(names: Sequence[str], runs: Sequence[Path], events: Sequence[list[dict[str, Any]]], hide: Hidden) -> str:
    """Tables of facts and of differences, and both files of each run, folded; in words where a file is not there."""
    configs, records = ([_json(run / file) for run in runs] for file in ("config.json", "provenance.json"))
    begun: list[dict[str, Any]] = [
        next((e for e in reversed(of) if e["event"] in journal.BEGINNINGS), {}) for of in events
    ]
    rows = [[title, *map(hide.scrub, map(show, configs, records))] for title, show in SHOWN.items()]
    rows += [[title, *(_plain(of.get(key, "")) for of in begun)] for key, title in FACTS.items()]
    parts = [table(["", *names], [row for row in rows if any(row[1:])])]
    flat = [flattened(c) for c in configs]
    parts += [_between(names, flat, hide), *(_against(n, f, hide) for n, f in zip(names, flat, strict=True))]
    parts += [_files(name, run, hide) for name, run in zip(names, runs, strict=True)]
    return "".join(parts)


def flattened(values: Mapping[str, Any], before: str = "") -> Flat:
    """`{"data": {"fold": 1}}` -> `{"data.fold": "1"}`."""
    found: Flat = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        found |= flattened(value, f"{before}{key}.") if inner else {f"{before}{key}": _plain(value)}
    return found


def _between(names: Sequence[str], flat: Sequence[Flat], hide: Hidden) -> str:
    if len(flat) < 2:
        return ""
    keys = dict.fromkeys(k for of in flat for k in of if k not in OWN)
    rows = [[k, *(hide.scrub(of.get(k, "")) for of in flat)] for k in keys if len({of.get(k) for of in flat}) > 1]
    title = "<h3>Where the runs differ</h3>"
    return title + (table(["setting", *names], rows) or note("In no setting but their names and stores."))


def _against(name: str, flat: Flat, hide: Hidden) -> str:
    recipe = flat.get("name", "")
    if recipe not in recipes.recipes():
        return ""
    theirs = flattened(json.loads(config.to_json(recipes.get(recipe))))
    rows = [[k, theirs.get(k, ""), hide.scrub(v)] for k, v in flat.items() if k not in OWN and v != theirs.get(k)]
    title = f"<h3>{text(name)} and its recipe</h3>"
    told = table(["setting", f"recipe {recipe}", name], rows)
    return title + (told or note(f"As the recipe {recipe} says, but for the folders."))


def _files(name: str, run: Path, hide: Hidden) -> str:
    told = ""
    for file in ("config.json", "provenance.json"):
        try:
            content = (run / file).read_text(encoding="utf-8", errors="replace")
        except OSError:
            content = "not there"
        told += f"<h4>{file}</h4><pre>{text(_scrubbed(content, hide))}</pre>"
    return f"<details><summary>{text(name)}: whole configuration and provenance</summary>{told}</details>"


def _scrubbed(content: str, hide: Hidden) -> str:
    """Value by value: escapes of JSON would hide an id from who looks for it."""

    def each(value: Any) -> Any:
        if isinstance(value, dict):
            return {hide.scrub(name): each(of) for name, of in value.items()}
        if isinstance(value, list):
            return [each(of) for of in value]
        return hide.scrub(value) if isinstance(value, str) else value

    try:
        return json.dumps(each(json.loads(content)), indent=1, ensure_ascii=False)
    except ValueError:
        return hide.scrub(content)


def _json(path: Path) -> dict[str, Any]:
    """{} where it is not there, or no object."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _commit(record: Mapping[str, Any]) -> str:
    git = record.get("git")
    if not isinstance(git, dict):
        return "not known" if record else ""
    return str(git.get("commit"))[:12] + (", with changes that were not committed" if git.get("dirty") else "")


def _machine(record: Mapping[str, Any]) -> str:
    machine = record.get("machine")
    return f"{machine.get('processor')}, {machine.get('cores')} cores" if isinstance(machine, dict) else ""


def _versions(record: Mapping[str, Any]) -> str:
    found = record.get("versions")
    return ", ".join(f"{name} {version}" for name, version in found.items()) if isinstance(found, dict) else ""


SHOWN = {
    "recipe": lambda c, r: _plain(c.get("name", "")),
    "objective": lambda c, r: _plain(flattened(c).get("objective.name", "")),
    "store": lambda c, r: Path(without_secrets(str(r.get("store", "")))).name,
    "store's fingerprint": lambda c, r: str(r.get("fingerprint", ""))[:16],
    "commit": lambda c, r: _commit(r),
    "machine": lambda c, r: _machine(r),
    "versions": lambda c, r: _versions(r),
    "written": lambda c, r: str(r.get("utc", "")),
}


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 100_000:
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
