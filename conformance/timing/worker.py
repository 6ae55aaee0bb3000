"""`python -m conformance.timing.worker`: times the cells of one checkout, as it is told on standard input.

A line of JSON comes in, one goes out. The protocol has a number, since the other end may be another version of us.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import torch

from conformance.cases import Case
from conformance.plan import resolve_target
from conformance.timing.cells import Prepared, TimedCell
from conformance.timing.graphs import replays
from conformance.timing.recorded import recorded
from conformance.timing.shared import Given, released
from conformance.timing.side_by_side import contenders, side_by_side
from conformance.timing.state import Watch
from conformance.versions import versions
from fp8moe.detection import describe_device

PROTOCOL = 2
DIGITS = 4
"""Of microseconds: far below the timer's resolution."""


class Server:
    """What the worker holds between two lines."""

    def __init__(self) -> None:
        self.kept: dict[str, Prepared] = {}

    def hello(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"protocol": PROTOCOL, "versions": versions(), "device": torch.cuda.get_device_name(0)}

    def make(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """A cell; on the tensors of "given", or else on its own, which it gives."""
        released()
        name, given = asked["cell"], asked["given"]
        cell = TimedCell.parse(name)
        made = cell.prepared(asked["count"], asked["more"], None if given is None else Given.received(given))
        self.kept[name] = made
        told = {"count": made.graph.count, "method": made.graph.method}
        return told | ({"given": made.tensors.sent()} if given is None else {})

    def drop(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        self.kept.pop(asked["cell"], None)
        return {}

    def replay(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        taken = replays([self.kept[asked["cell"]].graph], asked["turn"])
        return {"us": [replay.us for replay in taken], "at": [(replay.begin, replay.end) for replay in taken]}

    def record(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        self.kept.clear()
        record, state = recorded(asked["cells"], asked["planted"], asked["ours"])
        return {"record": json.loads(record.to_json()), "state": state}

    def beside(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """A case on every backend that could be selected and on "backend", or on that one alone; each round of each."""
        self.kept.clear()
        gc.collect()
        torch.cuda.empty_cache()
        case, target = Case.parse(asked["case"]), resolve_target(asked["target"])
        who, backend = contenders(case, target), asked["backend"]
        every = list(dict.fromkeys([*who.eligible, backend]))
        with Watch() as watch:
            times = side_by_side(case, [backend] if asked["alone"] else every, who.absent)
            torch.cuda.synchronize()  # what a call left behind shows here, and not in the next case
        device = describe_device()
        return {
            "selected": who.selected,
            "us": {name: [round(us, DIGITS) for us in rounds.tolist()] for name, rounds in times.us.items()},
            "absent": dict(times.absent),
            "left": [name for name in every if name not in times.us and name not in times.absent],
            "device": {name: getattr(device, name) for name in ("name", "kind", "architecture")},
            "state": watch.figures(),
        }


def serve(source: TextIO, sink: TextIO) -> None:
    """Answers until the input ends; what goes wrong is the answer."""
    server = Server()
    verbs = {
        "hello": server.hello,
        "make": server.make,
        "replay": server.replay,
        "record": server.record,
        "drop": server.drop,
        "beside": server.beside,
    }
    for line in source:
        asked = json.loads(line)
        try:
            answer = verbs[asked["verb"]](asked)
        except (Exception, SystemExit) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sink.write(json.dumps(answer) + "\n")
        sink.flush()


if __name__ == "__main__":
    # What a backend prints, in Python or below it, is no answer.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)
