"""The command line. A user's mistake ends with a sentence and an exit code, never with a stack trace."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from engine import __version__
from engine.errors import AdaptdError, StorageError, UsageError

app = typer.Typer(name="adaptd", no_args_is_help=True, add_completion=False, help="Online adaptation engine.")
checkpoints = typer.Typer(no_args_is_help=True, help="Look at checkpoints, and take weights out.")
app.add_typer(checkpoints, name="checkpoint")

PolicyArgument = Annotated[str, typer.Argument(metavar="POLICY", help="A policy file, or the name of a preset.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the policy.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def out(text: str) -> None:
    """Write a line to standard output."""
    typer.echo(text)


def _load(policy: str, overrides: list[str]) -> Any:
    from engine.policyfile import load

    return load(policy, overrides, os.environ)


@app.command()
def run(
    policy: PolicyArgument,
    set_: SetOption = [],  # noqa: B006 - typer reads the default, nobody changes it
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew; what the state directory holds is kept in a folder aside-N.")
    ] = False,
) -> None:
    """Run a policy on its streams until they end or SIGTERM comes."""
    from engine.launch import run_policy
    from engine.logs import configure_logs

    loaded = _load(policy, set_)
    configure_logs(loaded.policy.log)
    run_policy(loaded, fresh=fresh, read=lambda: _load(policy, set_))


@app.command()
def validate(
    policy: PolicyArgument,
    set_: SetOption = [],  # noqa: B006
    show: Annotated[bool, typer.Option("--show", help="Print the policy in force, secrets masked.")] = False,
) -> None:
    """Check a policy file, and that what it names is there. Asks no broker and runs no code of the model."""
    from engine.policyfile import effective
    from engine.preflight import check, unchecked

    loaded = _load(policy, set_)
    check(loaded)
    if show:
        out(effective(loaded.policy).rstrip())
    else:
        out(f"{policy}: valid")
        out(f"not checked: {unchecked(loaded)}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    from engine.policyfile import json_schema

    out(json.dumps(json_schema(), indent=2))


@app.command()
def init(directory: Annotated[Path, typer.Argument(help="Where to write.")] = Path()) -> None:
    """Write a commented policy file and a model file to start from."""
    from engine.scaffold import init as write

    for path in write(directory):
        out(f"wrote {path}")
    out(f"next: adaptd run {directory / 'policy.yaml'}")


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where streams, state and report go.")] = Path("adaptd-demo"),
    events: Annotated[int, typer.Option(min=1000, help="Events to send.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of the stream.")] = 0,
    json_: JsonOption = False,
) -> None:
    """Send drifting digits through the whole daemon, and show what adapting did."""
    from engine.demo.main import demonstrate

    demonstrate(directory, events=events, seed=seed, as_json=json_)


@app.command()
def backtest(
    policy: PolicyArgument,
    data: Annotated[Path, typer.Option(help="A recorded stream: .npz or .jsonl.")],
    label_delay: Annotated[int, typer.Option(min=0, help="Events by which labels are late.")] = 0,
    feedback_share: Annotated[float, typer.Option(min=0, max=1, help="Share of events whose label comes.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the choice of these events.")] = 0,
    set_: SetOption = [],  # noqa: B006
    json_: JsonOption = False,
) -> None:
    """Drive a policy over a recorded stream as fast as it goes.

    Of the figures: plain_events_per_second is the speed of the source model alone on the same batches, in turn;
    relative_speed is events_per_second by it, so 1 means that adapting costs nothing; agreement_with_source is the
    share of answers that the source model gives too; accuracies are over the labelled events, those whose label is a
    class of the model.
    """
    from engine.backtest import command
    from engine.logs import configure_logs
    from engine.policy import Log

    configure_logs(Log(level="warning"))
    report = command(_load(policy, set_), data, label_delay=label_delay, feedback_share=feedback_share, seed=seed)
    out(json.dumps(report, indent=2) if json_ else "\n".join(_lines(report)))


def _lines(report: dict[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in report.items():
        if isinstance(value, dict):
            below = [*_lines(value, indent + "  ")]
            yield from (f"{indent}{key}:", *below) if below else ()
        else:
            yield f"{indent}{key}: {value:.4f}" if isinstance(value, float) else f"{indent}{key}: {value}"


StateArgument = Annotated[Path, typer.Argument(metavar="STATE", help="The state directory.")]


def _store(state: Path) -> Any:
    from engine.checkpoint.store import CheckpointStore

    if not state.is_dir():
        raise UsageError(f"there is no state directory {state}")
    return CheckpointStore(state)


@checkpoints.command("ls")
def checkpoint_ls(state: StateArgument, json_: JsonOption = False) -> None:
    """List checkpoints, newest first."""
    rows = [_row(info) for info in _store(state).list()]
    if json_:
        out(json.dumps(rows, indent=2))
    for row in rows if not json_ else ():
        out("  ".join(f"{key}={value}" for key, value in row.items()))


def _row(info: Any) -> dict[str, Any]:
    manifest = info.manifest
    if manifest is None:
        return {"name": info.name, "step": info.step, "problem": info.problem}
    created = datetime.fromtimestamp(manifest.created, UTC).isoformat(timespec="seconds")
    return {"name": info.name, "step": info.step, "pinned": info.pinned, "bytes": manifest.size, "created": created}


@checkpoints.command("show")
def checkpoint_show(
    state: StateArgument,
    name: Annotated[str | None, typer.Argument(help="Its name or number; the newest if none is named.")] = None,
) -> None:
    """Print what a checkpoint says of itself."""
    store = _store(state)
    name = _name(store, name)
    info = store.verify(name)
    meta = json.loads((state / name / "meta.json").read_text())
    meta.pop("states", None)
    out(json.dumps({"manifest": info.manifest.model_dump(), "meta": meta}, indent=2))


def _name(store: Any, name: str | None) -> str:
    """The name of a checkpoint that is named in full, by its number, or not at all."""
    if name is None:
        found = store.list()
        if not found:
            raise UsageError(f"{store.directory} holds no checkpoints")
        return str(found[0].name)
    if name.isascii() and name.isdigit():
        from engine.checkpoint.folder import name_of

        return name_of(int(name))
    return name


@checkpoints.command("verify")
def checkpoint_verify(
    state: StateArgument,
    name: Annotated[str | None, typer.Argument(help="One checkpoint; all of them if none is named.")] = None,
) -> None:
    """Check every byte of checkpoints against their manifests, and that the journal beside them is whole."""
    from streams.journal import Journal

    store = _store(state)
    names = [_name(store, name)] if name else [info.name for info in store.list()]
    if not names:
        raise UsageError(f"{state} holds no checkpoints")
    bad = 0
    for each in names:
        try:
            store.verify(each)
        except AdaptdError as error:
            bad += 1
            out(f"{each}: {error}")
        else:
            out(f"{each}: good")
    torn = 0
    for path, damage in () if name else Journal(state).verify():
        torn += bool(damage)
        out(f"{path.name}: {damage or 'good'}")
    if bad:
        raise StorageError(f"{bad} of {len(names)} checkpoints cannot be used; a start passes over them")
    if torn:
        raise StorageError(f"{torn} journals are damaged; only checkpoints newer than those can be restored")


class Weights(StrEnum):
    """Which weights of a checkpoint to write."""

    release = "release"
    live = "live"


@checkpoints.command("export")
def checkpoint_export(
    state: StateArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The safetensors file to write.")],
    weights: Annotated[
        Weights, typer.Option(help="The release in force, or the live weights, which are what answers.")
    ] = Weights.release,
    name: Annotated[
        str | None, typer.Option("--checkpoint", help="Its name or number; the newest if none is named.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the weights of a checkpoint to a file, checked against its manifest; a daemon may be running."""
    from engine.checkpoint.export import export

    store = _store(state)
    found = export(store, _name(store, name), weights.value, file, force=force)
    what = f"release {found.release}" if weights is Weights.release else f"live weights after {found.step} updates"
    out(f"wrote {file}: {what}, {found.tensors} tensors, from {found.name}")


def _version(asked: bool) -> None:
    if asked:
        out(__version__)
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Online adaptation engine."""


@app.command()
def version() -> None:
    """Print the version."""
    out(__version__)


def main() -> None:
    """Entry point: runs a command and turns errors into sentences and exit codes."""
    # Read when PyTorch is loaded. By default its threads spin for milliseconds after each operation, which on shared
    # cores takes those away from the threads that are waited for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(standalone_mode=False)
    except BaseException as error:  # noqa: BLE001 - the one place where everything ends
        sys.exit(_explain(error))


def _explain(error: BaseException) -> int:
    """Write an error for the user and give the exit code."""
    error = _gravest(error)
    code = _exit_code(error)
    if code is not None:
        typer.echo(f"adaptd: {error}", err=True)
        return code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if hasattr(error, "exit_code") and hasattr(error, "show"):  # click's own usage errors
        error.show()
        return int(error.exit_code)
    if type(error).__name__ in ("Abort", "Exit"):
        return int(getattr(error, "exit_code", 130))
    traceback.print_exception(error)
    typer.echo(
        "adaptd: internal error; the state directory is as of the last checkpoint and can be used again", err=True
    )
    return 75 if "CUDA" in str(error) else 70


def _exit_code(error: BaseException) -> int | None:
    """The exit code of an error that a sentence explains; None for any other."""
    from streams.base import StreamError, StreamUnavailableError
    from streams.join import JoinError
    from streams.journal import JournalError

    if isinstance(error, AdaptdError):
        return error.exit_code
    if isinstance(error, StreamUnavailableError):
        return 69
    if isinstance(error, StreamError):
        return 78
    return 74 if isinstance(error, JournalError | JoinError) else None


def _gravest(error: BaseException) -> BaseException:
    """The error that tells most: of a group, the first that is explained and not merely what another one led to."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    return min((_gravest(each) for each in error.exceptions), key=lambda each: (_exit_code(each) or 70) == 69)


if __name__ == "__main__":
    main()
