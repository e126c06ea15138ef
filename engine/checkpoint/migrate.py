"""From the meta data of one format of checkpoints to that of the next: pure functions, one for each step.

Files stay as they are: what has changed so far is how states refer to the tensors in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Meta = dict[str, Any]


def migrate(meta: Meta, written: int) -> Meta:
    """Bring the meta data of a checkpoint to the newest format.

    Args:
        meta: What ``meta.json`` holds; not changed.
        written: The format that its manifest names.
    """
    for step in _STEPS[written - 1 :]:
        meta = step(meta)
    return meta


def _with_names(meta: Meta) -> Meta:
    """Format 1 to 2: the states of optimizer and methods say of which they are.

    Format 1 was written in two ways, and the later one is that of format 2.
    """
    states = meta.get("states")
    if not isinstance(states, dict):
        return meta
    changed = dict(states)
    if "optimizer" in states:
        changed["optimizer"] = _optimizer(states["optimizer"])
    methods = states["policy"].get("methods") if isinstance(states.get("policy"), dict) else None
    if isinstance(methods, dict):
        named = {_place(place, kept): kept for place, kept in methods.items()}
        changed["policy"] = {**states["policy"], "methods": named}
    return {**meta, "states": changed}


def _optimizer(tree: Any) -> Any:
    """The values of each parameter alone; the kind is told from their names. Those of AdamW count as Adam's."""
    if not isinstance(tree, dict) or tree.keys() == {"kind", "state"}:
        return tree
    names = {name for values in tree.values() for name in values}
    return {"kind": "Adam" if "exp_avg" in names else "SGD", "state": tree}


def _place(place: str, kept: Any) -> str:
    """``safeguard0`` with the name of its method, for ``safeguard.replay``."""
    kind = place.rstrip("0123456789")
    return f"{kind}.{kept['name']}" if kind in ("safeguard", "reweighting") and kind != place else place


def _same(meta: Meta) -> Meta:
    """Format 2 to 3: another hash of the files."""
    return meta


_STEPS: tuple[Callable[[Meta], Meta], ...] = (_with_names, _same)
