"""Every registered adaptation on every kind of model: it adapts, or says at once what the model lacks."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from policies.interfaces import Adaptation, PolicyError
from policies.registry import known
from tests.policies.models import (
    CLASSES,
    MODELS,
    OTHERS,
    applied,
    batch_of,
    build,
    carried,
    draw,
    flat,
    source_model,
    stream,
    weights_of,
)

KINDS = [*MODELS, *OTHERS]
SOURCES = {name: source_model(name) for name in KINDS}
LACKS = r"no BatchNorm layer|no affine parameters in layers of type|two or more heads|needs a convolution"

WITHOUT_NORM = {"mlp", "conv"}
WITHOUT_BATCH_NORM = {"mlp", "conv", "mlp_layer_norm", "mlp_heads", "mlp_group_norm", "transformer", "tagger"}
ANY = {"adanpc", "auto", "cotta", "foa", "lame", "memo", "none", "t3a"}
BATCH_NORM = {"bn", "class_bn", "note", "per_group"}


def suits(name: str, model: str) -> bool:
    """Whether a method has something to adapt in a model of that kind."""
    if name == "drm":
        return model == "mlp_heads"
    if name == "nhl":
        return model in ("conv_bn", "conv")
    lacking = WITHOUT_BATCH_NORM if name in BATCH_NORM else WITHOUT_NORM
    return name in ANY or model not in lacking


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("name", sorted(known("adaptation")))
def test_a_method_adapts_any_kind_of_model_or_says_what_it_lacks(name: str, model: str) -> None:
    if not suits(name, model):
        with pytest.raises(PolicyError, match=LACKS) as refused:
            build("adaptation", name, {}, SOURCES[model])
        assert re.search("choose .*('none'|none)", str(refused.value)), "it offers another method"
        return
    method: Adaptation = build("adaptation", name, {}, SOURCES[model])
    torch.manual_seed(2)
    for number, rows in enumerate((12, 1, 1, 5)):
        groups = tuple(("a", "b", None)[row % 3] for row in range(rows))
        batch = replace(batch_of(draw(model, rows), 20 * number), groups=groups)
        logits = method.adapt(batch)
        method.update()
        assert logits.shape == (rows, CLASSES)
        assert bool(logits.isfinite().all())
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(method.context.model).values())
    restored: Adaptation = build("adaptation", name, {}, SOURCES[model], seed=99)
    restored.context.model.load_state_dict(carried(method.context.model.state_dict()))
    restored.load_state_dict(carried(method.state_dict()))
    assert flat(restored.state_dict()) == flat(method.state_dict())
    again = batch_of(draw(model, 3), 100)
    assert torch.equal(restored.adapt(again), method.adapt(again))


@pytest.mark.parametrize("model", [name for name in KINDS if name not in WITHOUT_NORM])
def test_the_norm_layers_of_every_kind_take_steps(model: str) -> None:
    method: Adaptation = build("adaptation", "tent", {"lr": 0.01}, SOURCES[model])
    before = weights_of(method.context.model)
    outcomes = []
    for batch in stream(model, 2) if model != "transformer" else [batch_of(draw(model, 16))] * 2:
        method.adapt(batch)
        outcomes.append(applied(method.update()))
    after = weights_of(method.context.model)
    assert outcomes == [True, True]
    assert {name for name in after if not torch.equal(after[name], before[name])} == method.adapted
