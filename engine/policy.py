"""The policy: everything that one file configures, as frozen models with a default for all but the model.

Keys are part of the public surface: `tests/engine/test_policy.py` freezes them. Paths stay as they were written;
`engine.policyfile.LoadedPolicy.resolve` gives them their place. What cannot be said by types alone is in
`engine.policycheck`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_serializer

from engine.methodspec import AdaptationSpec, GateSpec, InterpolationSpec, MethodSpec, ReweightingSpec, SafeguardSpec
from policies.interfaces import MethodParams
from policies.units import Duration, PositiveDuration, Size
from streams.kafka_settings import KafkaSettings


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


def _device(name: str) -> str:
    if re.fullmatch("auto|cpu|cuda(:[0-9]{1,3})?", name) is None:
        raise ValueError(f"{name!r} is not a device. Expected: auto, cpu, cuda, or cuda:1 for the second one")
    return name


def _default_adaptation() -> AdaptationSpec:
    return AdaptationSpec.model_validate("auto")


Pattern = Annotated[str, AfterValidator(_regular_expression)]
Dimension = Annotated[int, Field(ge=1)]
Prefix = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$")]
Topic = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$")]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, descriptions from the literal under each field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class Inputs(Section):
    """How the inputs of records become what the model takes."""

    shape: Annotated[tuple[Dimension, ...], Field(min_length=1, max_length=8)]
    """Shape of one row as the model takes it, for instance ``[3, 32, 32]``."""
    dtype: Literal["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"] = "float32"
    """Type of the values in records."""
    scale: float = 1.0
    """Factor applied to the values, in float32."""
    offset: float = 0.0
    """Added after scaling."""
    layout: Literal["chw", "hwc"] = "chw"
    """Order of the dimensions in records; ``hwc`` is turned to channels first. For shapes of three dimensions."""


class Model(Section):
    """The model, and where it computes."""

    factory: Annotated[str, Field(min_length=1)]
    """What builds the model: ``./file.py:function`` beside this file, or ``package.module:function``."""
    weights: Path | None = None
    """Safetensors file to load into the model; none keeps what the factory gave."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """Where to compute: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads of one tensor operation on the CPU; none leaves it to PyTorch."""
    affinity: Literal["auto", "one_processor", "any"] = "auto"
    """Where the threads that run Python may run: together on one processor, which changes where others need it; on
    any; or ``auto``: on one where the model computes on the CPU with ``threads: 1``."""
    inputs: Inputs
    """How the inputs of records become what the model takes."""
    allowed_prefixes: tuple[Prefix, ...] = ()
    """Packages that ``factory`` may be imported from; installed entry points ``adaptd.models`` need not be listed."""


class Endpoint(Section):
    """One stream: a Kafka topic or a file, exactly one of the two."""

    kafka: Topic | None = None
    """Name of a topic."""
    file: Path | None = None
    """Path of a file ``.jsonl`` or ``.rec``; for a stream that is read also of a directory of them, each a partition,
    and for data of a recorded ``.npz``."""

    @property
    def place(self) -> tuple[str, str]:
        """What tells two streams apart: ``("kafka", topic)`` or ``("file", path)``."""
        return ("kafka", self.kafka) if self.kafka is not None else ("file", str(self.file))


class SourceEndpoint(Endpoint):
    """A stream to read."""

    follow: bool = False
    """For a file: go on as it grows, instead of ending where it ends."""

    @property
    def bounded(self) -> bool:
        """Whether the stream ends by itself."""
        return self.file is not None and not self.follow


class PredictionsEndpoint(Endpoint):
    """The stream that answers go to."""

    format: Literal["json", "binary"] = "json"
    """Form of the messages."""


class Streams(Section):
    """Where records come from and where answers go."""

    kafka: KafkaSettings | None = None
    """The Kafka cluster of all topics below."""
    data: SourceEndpoint
    """Events to answer."""
    feedback: SourceEndpoint | None = None
    """Labels and rewards for them; none means that labels never come."""
    predictions: PredictionsEndpoint
    """Answers."""
    dead_letters: Endpoint | None = None
    """Records that cannot be decoded; none counts and drops them."""

    @field_serializer("kafka")
    def _given(self, kafka: KafkaSettings | None) -> dict[str, Any] | None:
        # Its settings may have no effect together, and then refuse to be given at all: defaults are not repeated.
        return None if kafka is None else kafka.model_dump(mode="json", exclude_unset=True)

    def endpoints(self) -> Iterator[tuple[str, Endpoint]]:
        """Every configured stream with its key."""
        for key in ("data", "feedback", "predictions", "dead_letters"):
            endpoint = getattr(self, key)
            if endpoint is not None:
                yield key, endpoint


class Batching(Section):
    """When waiting events become a batch: whichever comes first."""

    max_size: Annotated[int, Field(ge=1, le=65536)] = 64
    """Most events in a batch."""
    max_delay: Duration = 0.02
    """Longest wait of an event for company."""


class Join(Section):
    """How inputs meet their feedback."""

    window: PositiveDuration = 86400.0
    """How long inputs wait for feedback, in event time."""
    max_bytes: Annotated[Size, Field(gt=0)] = 256_000_000
    """Most memory for waiting inputs."""
    max_disk_bytes: Size = 1_000_000_000
    """Most disk, below the state directory, for inputs that memory has no room for; 0 drops the oldest instead.
    They are part of every checkpoint, and cost more time than those in memory."""
    mode: Literal["store", "inline"] = "store"
    """``store`` keeps the inputs of events; ``inline`` takes them from the feedback itself and keeps none."""
    keep: Literal["needed", "all"] = "needed"
    """Which inputs ``store`` keeps. ``needed``: where labels are learned from all, where not those that are held out
    for the audit, and none where one model answers everything and always has: no adaptation, learning, gate or
    safeguard so far. ``all``: so that a policy that learns, or holds out more, can take over without missing what was
    answered before it."""


class Learning(Section):
    """Learning from labels."""

    enabled: bool | None = None
    """Whether labels are learned from; none means wherever feedback comes."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Takes the steps."""
    lr: Annotated[float, Field(gt=0, le=100)] = 1e-3
    """Learning rate."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest L2 norm of the gradient of a step, penalties included; a longer one is scaled down. None clips none."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay; decoupled for ``adamw``."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of ``sgd``; first decay of ``adam`` and ``adamw``."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    """Labelled rows of one step."""
    max_delay: Duration = 60.0
    """Event time after which a step takes fewer rows."""
    parameters: Literal["all", "norm", "head"] = "all"
    """What learns: everything, normalisation layers, or the last layer with parameters."""
    include: tuple[Pattern, ...] = ()
    """Regular expressions; if there are any, only parameters whose name one of them finds."""
    exclude: tuple[Pattern, ...] = ()
    """Regular expressions; no parameter whose name one of them finds."""
    mode: Literal["background", "inline"] = "background"
    """Learn beside serving, or between batches (slower, and the same on every machine)."""


class Audit(Section):
    """Feedback that is held out, by a hash of its id, and never learned from."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of joined feedback held out."""
    window: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Newest rows kept; source model, live model and release are scored on them."""


class Release(Section):
    """When new weights are proposed for release."""

    every: Annotated[int, Field(ge=0)] = 500
    """Joined labels between two attempts; 0 never attempts."""
    freeze_after: Annotated[int, Field(ge=0, le=1000)] = 5
    """So many rollbacks within twice as many attempts, without a release between them, and nothing adapts or learns any
    more: the release answers as it is until the policy changes. 0 for never."""


class Checkpoint(Section):
    """When state is saved and how much is kept."""

    every: PositiveDuration = 60.0
    """Time between two checkpoints."""
    keep: Annotated[int, Field(ge=3, le=1000)] = 3
    """Checkpoints kept; at least three, because the newest may be the one that a failing disk spoils."""
    patience: PositiveDuration = 600.0
    """How long the disk may refuse journal or checkpoints. Meanwhile the journal is tried again, and nothing is applied
    that it does not hold; then the daemon ends with exit code 74, having lost nothing."""
    allow_network: bool = False
    """Whether the state directory may be on a network file system, where a checkpoint may be lost after it was made."""


class Metrics(Section):
    """The HTTP server of ``/metrics``, ``/livez``, ``/readyz`` and ``/status``."""

    enabled: bool = True
    """Whether to serve."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9464
    """Port to listen on; 0 takes a free one."""


class Log(Section):
    """Logs, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is written. What clients of Kafka say of connections that fail is a detail: ``debug``."""
    format: Literal["auto", "json", "text"] = "auto"
    """One JSON object a line, or text; ``auto`` writes text to a terminal alone."""


class Policy(Section):
    """The whole configured behaviour of one daemon."""

    version: Literal[1]
    """Version of this format."""
    preset: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] | None = None
    """A policy that ships with adaptd, merged under this file."""
    state: Path = Path("state")
    """Directory of checkpoints, journal and locks."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""
    model: Model
    streams: Streams | None = None
    """Without it the policy serves for ``adaptd backtest`` alone."""
    delivery: Literal["at_least_once", "exactly_once"] = "at_least_once"
    """What readers of the answers may rely on: after a crash some answers come again with the same id, or, with
    ``exactly_once``, readers of committed records see each once. That needs Kafka for every stream, and a group."""
    order: Literal["arrival", "time"] | None = None
    """Order of records of different streams: as they arrive, or merged by event time, the same in every run.
    None means ``time`` where every stream is a file read to its end, and else ``arrival``."""
    batching: Batching = Batching()
    join: Join = Join()
    adaptation: AdaptationSpec = Field(default_factory=_default_adaptation)
    """How the model adapts without labels."""
    reweighting: tuple[ReweightingSpec, ...] = ()
    """How labelled rows are weighted; the weights of all methods are multiplied."""
    learning: Learning = Learning()
    safeguards: tuple[SafeguardSpec, ...] = ()
    """What keeps the model from forgetting and from failing, in this order."""
    interpolation: InterpolationSpec | None = None
    """How weights for a release are combined; needs ``gate``."""
    gate: GateSpec | None = None
    """What decides on a release; needs ``interpolation``."""
    audit: Audit = Audit()
    release: Release = Release()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    log: Log = Log()

    @property
    def bounded(self) -> bool:
        """Whether every stream that is read ends by itself."""
        read = () if self.streams is None else (self.streams.data, self.streams.feedback)
        return all(endpoint.bounded for endpoint in read if endpoint is not None)

    @property
    def by_time(self) -> bool:
        """Whether records of different streams are merged by event time."""
        return self.order == "time" or (self.order is None and self.bounded)

    @property
    def in_background(self) -> bool:
        """Whether a daemon learns beside serving; streams merged by event time learn between batches instead."""
        return self.learning.mode == "background" and not self.by_time

    @property
    def learns(self) -> bool:
        """Whether labels are learned from (in a backtest: if there are any)."""
        if self.learning.enabled is not None:
            return self.learning.enabled
        return self.streams is None or self.streams.feedback is not None

    def specs(self) -> Iterator[tuple[str, MethodSpec]]:
        """Every chosen method with its key, in the order in which a policy lists them."""
        yield "adaptation", self.adaptation
        for index, reweighting in enumerate(self.reweighting):
            yield f"reweighting.{index}", reweighting
        for index, safeguard in enumerate(self.safeguards):
            yield f"safeguards.{index}", safeguard
        if self.interpolation is not None:
            yield "interpolation", self.interpolation
        if self.gate is not None:
            yield "gate", self.gate

    def methods(self) -> list[tuple[str, str, MethodParams]]:
        """Every chosen method as ``(kind, name, params)``."""
        return [(spec.kind, spec.method, spec.params) for _, spec in self.specs()]
