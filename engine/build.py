"""Building a core, sources and sinks from a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from engine.audit import Audit
from engine.core import Core
from engine.coretypes import CoreSettings
from engine.errors import PolicyFileError
from engine.host import Inputs, ModelHost, choose_device, trainable
from engine.learner import Learner
from engine.member import member_of
from engine.methods import Choice, Methods
from engine.policy import Endpoint, Learning, Policy
from policies.interfaces import PolicyError
from policies.norm import NormSelection
from policies.optimizers import SGD, Adam, AdamW
from streams.base import Sink, Source, Transactions
from streams.clients import client_of, sink_of, source_of, transactions_of
from streams.codec import InputSpec
from streams.files import FileSink, FileSource
from streams.join import JoinStore
from streams.journal import Kind
from streams.kafka_settings import KafkaSettings

if TYPE_CHECKING:
    from streams.clients import AnyClient, AnySource


def build_core(policy: Policy, model: nn.Module, *, background: bool, directory: Path | None) -> Core:
    """Build the core of a policy.

    Args:
        policy: What to build.
        model: What its factory gave, with its weights.
        background: Whether jobs may run beside serving.
        directory: Where inputs that memory has no room for may wait; None keeps them out of any file.

    Raises:
        PolicyFileError: If the model does not fit, or a method cannot run with it.
    """
    if policy.model.threads is not None:
        torch.set_num_threads(policy.model.threads)
    host = ModelHost(model, inputs_of(policy), choose_device(policy.model.device))
    choices = [Choice(*entry) for entry in policy.methods()]
    try:
        methods = Methods.build(choices, host, policy.seed)
    except PolicyError as error:
        raise PolicyFileError(str(error)) from error
    methods.stepper.clip_norm = policy.learning.clip_norm
    audit = Audit(policy.audit.window, host.inputs, host.device)
    names = _learned(policy.learning, host.learner) if policy.learns else []
    learned = [parameter for name, parameter in host.learner.named_parameters() if name in set(names)]
    learner = Learner(
        host,
        methods,
        audit,
        optimizer=_optimizer(policy.learning, learned or [nn.Parameter(torch.zeros(0))]),
        names=names,
        enabled=policy.learns,
    )
    joins = JoinStore(
        window=policy.join.window,
        max_bytes=policy.join.max_bytes,
        max_disk_bytes=policy.join.max_disk_bytes if directory is not None else 0,
        directory=directory,
    )
    settings = CoreSettings(
        batch_size=policy.learning.batch_size,
        max_delay=policy.learning.max_delay,
        audit_share=policy.audit.share,
        release_every=policy.release.every if policy.gate is not None else 0,
        store_inputs=policy.join.mode == "store",
        background=background,
        window=policy.join.window,
        freeze_after=policy.release.freeze_after,
        all_inputs=policy.join.keep == "all",
    )
    return Core(settings, host, methods, learner, audit, joins)


def inputs_of(policy: Policy) -> Inputs:
    """The form of the inputs that a policy names."""
    inputs = policy.model.inputs
    dtype = np.dtype(inputs.dtype).newbyteorder("<")
    return Inputs(tuple(inputs.shape), dtype, inputs.scale, inputs.offset, inputs.layout == "hwc")


def spec_of(policy: Policy) -> InputSpec:
    """The form of the inputs in records."""
    inputs = inputs_of(policy)
    return InputSpec(inputs.record_shape, inputs.dtype)


def _learned(learning: Learning, model: nn.Module) -> list[str]:
    """Names of the parameters that labels change.

    Raises:
        PolicyFileError: If there are none.
    """
    names = trainable(model, learning.include or (".",), learning.exclude)
    if learning.parameters == "norm":
        norms = NormSelection(layers=("batch", "layer", "group", "instance")).parameters(model)
        names = [name for name in names if name in norms]
    elif learning.parameters == "head":
        owners = [name.rpartition(".")[0] for name, _ in model.named_parameters()]
        names = [name for name in names if name.rpartition(".")[0] == owners[-1]]
    if not names:
        raise PolicyFileError("learning: no parameter of the model matches; widen 'parameters', 'include' or 'exclude'")
    return names


def _optimizer(learning: Learning, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    if learning.optimizer == "sgd":
        return SGD(parameters, lr=learning.lr, momentum=learning.momentum, weight_decay=learning.weight_decay)
    kind = Adam if learning.optimizer == "adam" else AdamW
    return kind(parameters, lr=learning.lr, betas=(learning.momentum, 0.999), weight_decay=learning.weight_decay)


def build_sources(policy: Policy, resolve: Callable[[Path], Path], state: Path) -> list[tuple[Source, dict[str, Kind]]]:
    """The sources of a policy, each with what its streams carry. One client reads all topics, one all files."""
    assert policy.streams is not None
    roles = [(Kind.DATA, policy.streams.data), (Kind.FEEDBACK, policy.streams.feedback)]
    wanted = [(kind, endpoint) for kind, endpoint in roles if endpoint is not None]
    found: list[tuple[Source, dict[str, Kind]]] = []
    for follow in (False, True):
        files = {
            stream_name(kind, endpoint): (kind, resolve(endpoint.file))
            for kind, endpoint in wanted
            if endpoint.file is not None and endpoint.follow == follow
        }
        if files:
            paths = {name: path for name, (_, path) in files.items()}
            kinds = {name: kind for name, (kind, _) in files.items()}
            found.append((FileSource(paths, follow=follow, state=state / f"files-{int(follow)}"), kinds))
    topics = {endpoint.kafka: kind for kind, endpoint in wanted if endpoint.kafka is not None}
    if topics:
        assert policy.streams.kafka is not None
        found.append((_kafka_source(tuple(topics), policy.streams.kafka, state), topics))
    return found


def _kafka_source(topics: tuple[str, ...], settings: KafkaSettings, state: Path) -> Source:
    """All topics through one consumer: in its group if one is named, else every partition of them."""
    if settings.group is None:
        return source_of(topics, settings)
    return source_of(topics, settings, group=settings.group, assignment="group", member=member_of(state))


def stream_name(kind: Kind, endpoint: Endpoint) -> str:
    """The name of a stream in ids, metrics and logs: its topic, or ``data`` and ``feedback`` for files."""
    return endpoint.kafka if endpoint.kafka is not None else kind.name.lower()


def build_delivery(
    policy: Policy, sources: Iterable[tuple[Source, object]], resolve: Callable[[Path], Path], state: Path
) -> tuple[Sink | None, Sink | None, Transactions | None]:
    """The sinks of answers and of dead letters, and what commits both with the offsets of the sources."""
    assert policy.streams is not None
    predictions, letters = policy.streams.predictions, policy.streams.dead_letters
    transactions, client = _transactions(policy, sources, state) if policy.delivery == "exactly_once" else (None, None)
    return (
        build_sink(policy, predictions, resolve, letters=False, client=client),
        build_sink(policy, letters, resolve, letters=True, client=client),
        transactions,
    )


def _transactions(
    policy: Policy, sources: Iterable[tuple[Source, object]], state: Path
) -> tuple[Transactions, AnyClient]:
    assert policy.streams is not None
    settings = policy.streams.kafka
    assert settings is not None
    assert settings.group is not None
    source = cast("AnySource", next(source for source, _ in sources if source.shared))  # the only one in a group
    member = member_of(state)
    client = client_of(settings, transactional_id=f"{settings.group}-{member}")
    return transactions_of(client, source, group=settings.group, owner=member), client


def build_sink(
    policy: Policy,
    endpoint: Endpoint | None,
    resolve: Callable[[Path], Path],
    *,
    letters: bool,
    client: AnyClient | None = None,
) -> Sink | None:
    """The sink of an endpoint; topics are written through ``client``, or each through one of its own."""
    if endpoint is None:
        return None
    if endpoint.file is not None:
        return FileSink(resolve(endpoint.file), envelope=letters)
    assert policy.streams is not None
    assert policy.streams.kafka is not None
    assert endpoint.kafka is not None
    # The writer tries again for as long as it takes; in between it says what it waits for.
    return sink_of(endpoint.kafka, client or client_of(policy.streams.kafka), send_timeout=2.0)
