"""Where methods are found by name: one line each here, or an entry point ``adaptd.methods`` of another distribution.

An entry point's name is ``kind.name`` (for instance ``adaptation.mine``) and its value ``module:Class``.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from policies.interfaces import Method, PolicyError

METHODS: dict[str, dict[str, str]] = {
    "adaptation": {
        "auto": "policies.adaptation.auto:Auto",
        "none": "policies.adaptation.none:NoAdaptation",
        "per_group": "policies.adaptation.per_group:PerGroup",
        "bn": "policies.adaptation.bn:BatchNormAdaptation",
        "class_bn": "policies.adaptation.class_bn:ClassAdjustedBatchNorm",
        "tent": "policies.adaptation.tent:Tent",
        "rotta": "policies.adaptation.rotta:RoTTA",
        "lame": "policies.adaptation.lame:LAME",
        "eta": "policies.adaptation.eata:ETA",
        "eata": "policies.adaptation.eata:EATA",
        "sar": "policies.adaptation.sar:SAR",
        "roid": "policies.adaptation.roid:ROID",
        "cmf": "policies.adaptation.cmf:CMF",
        "deyo": "policies.adaptation.deyo:DeYO",
        "delta": "policies.adaptation.delta:DELTA",
        "cotta": "policies.adaptation.cotta:CoTTA",
        "memo": "policies.adaptation.memo:MEMO",
        "petta": "policies.adaptation.petta:PeTTA",
        "rdumb": "policies.adaptation.rdumb:RDumb",
        "graded": "policies.adaptation.graded:GradedReset",
        "tribe": "policies.adaptation.tribe:TRIBE",
        "mezo": "policies.adaptation.mezo:MeZO",
        "note": "policies.adaptation.note:NOTE",
        "sotta": "policies.adaptation.sotta:SoTTA",
        "t3a": "policies.adaptation.t3a:T3A",
        "adanpc": "policies.adaptation.adanpc:AdaNPC",
        "drm": "policies.adaptation.drm:DRM",
        "nhl": "policies.adaptation.nhl:NHL",
        "foa": "policies.adaptation.foa:FOA",
    },
    "reweighting": {
        "age": "policies.reweighting.age:Age",
        "loss": "policies.reweighting.loss:Loss",
    },
    "safeguard": {
        "finite": "policies.safeguards.finite:Finite",
        "replay": "policies.safeguards.replay:Replay",
        "ewc": "policies.safeguards.ewc:EWC",
        "restore": "policies.safeguards.restore:Restore",
        "collapse": "policies.safeguards.collapse:Collapse",
    },
    "interpolation": {"linear": "policies.interpolation.linear:Linear"},
    "gate": {"flips": "policies.gates.flips:Flips"},
}


@cache
def known(kind: str) -> dict[str, str]:
    """Names of a kind and where each is implemented (``module:Class``), installed entry points included."""
    found = dict(METHODS[kind])
    for point in entry_points(group="adaptd.methods"):
        its_kind, _, name = point.name.partition(".")
        if its_kind == kind and name and name not in found:
            found[name] = point.value
    return found


def find(kind: str, name: str) -> type[Any]:
    """The class of a method.

    Raises:
        PolicyError: If no method of this kind has the name; the message gives the nearest one.
    """
    methods = known(kind)
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise PolicyError(f"no {kind} method is named {name!r}{hint} Known: {', '.join(sorted(methods))}")
    module, _, attribute = methods[name].partition(":")
    method = getattr(importlib.import_module(module), attribute)
    if not (isinstance(method, type) and issubclass(method, Method) and method.kind == kind):
        raise PolicyError(f"{methods[name]} is not a {kind} method")
    return method
