"""The daemon as ``adaptd run`` starts it, which notes when it reads its first record.

python -m benchmarks.kafka_daemon POLICY
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from benchmarks.kafka_loops import note_start
from engine.launch import run_policy
from engine.logs import configure_logs
from engine.policyfile import load
from engine.reader import Reader
from streams.base import Record


def main() -> None:
    loaded = load(sys.argv[1], [], os.environ)
    configure_logs(loaded.policy.log)
    give = Reader._give  # noqa: SLF001

    def first(reader: Reader, records: Sequence[Record], since: float) -> None:
        Reader._give = give  # type: ignore[method-assign]  # noqa: SLF001
        note_start()
        give(reader, records, since)

    Reader._give = first  # type: ignore[method-assign]  # noqa: SLF001
    run_policy(loaded)


if __name__ == "__main__":
    main()
