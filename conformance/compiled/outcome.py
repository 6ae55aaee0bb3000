"""What compiling one kernel for one target came to, and whether that is what the predicate claims."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from conformance.compiled.claims import Claims
from conformance.compiled.targets import CompileTarget
from conformance.results import Status

MOST_SPILLED = 32
"""Bytes a thread may keep in memory for want of registers: 8 of the 255 that it can have.

The limit is to tell a few values that outlive the loop (a stride, a pointer) from a tile that does not fit. The least
tile of a GEMM, 16 rows by 128 columns over 128 threads, takes 16 registers of each, 64 bytes, for its sums alone; half
of that is no tile. A spill within the limit stays in a figure of the report.
"""
SPILLED = "bytes spilled by a thread"
_OLDER = "claimed for unquantised weights alone, and the tiles are made for later devices; slow there, not wrong"
SPILLS_WAIVED = {"sm_75": _OLDER, "gfx1100": _OLDER}
"""Targets where spills, and nothing else, are waived, with the reason."""
LONGEST_REASON = 300


@dataclass(frozen=True)
class Facts:
    """What the compiler gave.

    Args:
        shared_bytes: of a program.
        tensor_columns: likewise.
        spilled_bytes: a thread's, see `spilled_nvidia` and `spilled_amd`.
        error: what it raised; everything else is 0 then.
    """

    shared_bytes: int = 0
    tensor_columns: int = 0
    spilled_bytes: int = 0
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """The verdict on a kernel for a target: passed, refused as declared (not_supported), failed, waived or not run."""

    target: str
    kernel: str
    status: Status
    reason: str = ""
    shared_bytes: int = 0
    tensor_columns: int = 0
    spilled_bytes: int = 0
    seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        data = json.loads(text)
        return cls(**data | {"status": Status(data["status"])})


def judge(
    target: CompileTarget, *, fp8: bool, claims: Claims, facts: Facts | None, refusal: str | None
) -> tuple[Status, str]:
    """Status and reason.

    Args:
        fp8: the kernel needs e4m3.
        facts: what the compiler gave; None where it was not asked.
        refusal: why our class does not construct; None where it does. Counts only where nothing is claimed.
    """
    if claims.covers(fp8):
        assert facts is not None
        wrong = _beyond(target, facts)
        if set(wrong) == {SPILLED} and target.name in SPILLS_WAIVED:
            return Status.WAIVED, f"{wrong[SPILLED]}: {SPILLS_WAIVED[target.name]}"
        return (Status.FAILED, "; ".join(wrong.values())) if wrong else (Status.PASSED, "")
    if refusal is None:
        return Status.FAILED, f"the predicate refuses {target.name} and TritonExperts constructs there"
    if not (target.without_e4m3 and fp8):
        return Status.NOT_SUPPORTED, f"refused by the predicate and by our class: {refusal}"
    assert facts is not None
    if not facts.error:
        return Status.FAILED, f"the predicate refuses {target.name}, which has no e4m3, and the kernel compiles"
    if "fp8e4nv" not in facts.error:
        return Status.FAILED, f"the compiler refuses it for another reason than e4m3: {short(facts.error)}"
    return Status.NOT_SUPPORTED, f"refused by the predicate, by our class and by the compiler: {short(facts.error)}"


def _beyond(target: CompileTarget, facts: Facts) -> dict[str, str]:
    """What keeps a compiled kernel from running well, or at all, by what it is; empty where nothing does."""
    if facts.error:
        return {"error": f"claimed by the predicate, and the compiler refuses: {short(facts.error)}"}
    limits = {
        "bytes of shared memory": (facts.shared_bytes, target.shared_bytes),
        "columns of tensor memory": (facts.tensor_columns, target.tensor_columns),
        SPILLED: (facts.spilled_bytes, MOST_SPILLED),
    }
    return {
        what: f"{value} {what}: {target.name} takes {limit}" for what, (value, limit) in limits.items() if value > limit
    }


def spilled_nvidia(resource_usage: str) -> int:
    """Bytes of a thread's stack, from `cuobjdump --dump-resource-usage`.

    Our kernels have no arrays, so all that ptxas puts on the stack is registers that it spilled, rounded up to 8.

    Raises:
        ValueError: the text has not exactly one kernel's.
    """
    found = re.findall(r"\bREG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)\b", resource_usage)
    if len(found) != 1:
        raise ValueError(f"no resource usage of one kernel in {resource_usage!r}")
    return sum(map(int, found[0]))


def spilled_amd(amdgcn: str) -> int:
    """Bytes of a thread's scratch memory, from the assembly's metadata.

    The counts of spilled registers there say less: a scalar register mostly goes to a lane of a vector register, and a
    vector register may go to an accumulation register, neither of them to memory.

    Raises:
        ValueError: the text has not exactly one kernel's.
    """
    found = re.findall(r"^\s*\.private_segment_fixed_size:\s+(\d+)\s*$", amdgcn, re.MULTILINE)
    if len(found) != 1:
        raise ValueError("no scratch size of one kernel in the assembly's metadata")
    return int(found[0])


def short(error: str) -> str:
    """An error's last lines as one; of Triton's the last is the cause, after the kernel's text."""
    lines = [line.strip() for line in error.splitlines() if line.strip(" ^")]
    cause = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no text")
    return cause if len(cause) <= LONGEST_REASON else cause[:LONGEST_REASON] + " ..."
