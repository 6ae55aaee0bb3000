"""The words of a case: names and keys of its fields, the values they take, the error that a wrong one raises.

Nothing here imports torch; what the names of laws, regimes and schemes stand for is written elsewhere, and a test holds
the two together.
"""

from __future__ import annotations

import difflib

from fp8moe.config import ACTIVATIONS

SCHEME_NAMES = (
    "block",
    "tensor_static",
    "tensor_dyn",
    "tensor_tok",
    "channel_tok",
    "tensor_128",
    "none",
    "tensor_none",
    "channel_none",
    "block_none",
)
"""Names of `fp8moe.schemes.SCHEMES`, less nvfp4, whose weights are not FP8."""
DTYPES = ("bf16", "fp16")
LAWS = (
    "uniform",
    "skewed",
    "all_to_one",
    "one_each",
    "empty",
    "repeated",
    "masked",
    "last",
    "unnormalised",
    "router",
)
"""Routing laws; `conformance.laws` says what each is."""
VALUES = (
    "iid",
    "block_scales",
    "outlier_channels",
    "loud_quiet",
    "zero_blocks",
    "subnormals",
    "same_sign",
    "exact_grid",
    "one_hot",
    "bimodal_scales",
    "exact_sums",
    "single_block",
    "ties",
    "wide_groups",
    "near_limit",
    "overflow",
)
"""Value regimes; `conformance.regimes` says what each is."""
LAYOUTS = ("contiguous", "strided")

PLAIN_SIZES = {"experts": 8, "top_k": 2, "hidden": 256, "inter": 256}
SIZE_FIELDS = tuple(PLAIN_SIZES)
CHOICES = {
    "scheme": SCHEME_NAMES,
    "dtype": DTYPES,
    "activation": ACTIVATIONS,
    "law": LAWS,
    "values": VALUES,
    "layout": LAYOUTS,
}
FLAGS = ("bias", "weight_on_input", "fnuz")
KEYS = {
    "model": "model",
    "experts": "E",
    "top_k": "k",
    "hidden": "H",
    "inter": "I",
    "tokens": "M",
    "scheme": "scheme",
    "dtype": "dtype",
    "activation": "act",
    "law": "law",
    "values": "values",
    "ep": "ep",
    "bias": "bias",
    "weight_on_input": "on_input",
    "fnuz": "fnuz",
    "layout": "layout",
    "seed": "seed",
}
"""Key of each field in an id, in the order of the class, which is the order of an id."""


class InvalidCase(ValueError):
    """A case that cannot be; `field` names what is wrong."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"case {field}={_shown(value)}: expected {expected}")
        self.field = field


SHOWN = 200
"""Characters of a value in an error."""
NEWER = "written by a newer version of fp8moe? upgrade it"


def one_of(value: object, known: tuple[str, ...], *, written: bool = False) -> str:
    """The known names, and the one that was probably meant; `written` as of `hint`."""
    return ", ".join(known) + hint(value, known, written=written)


def hint(value: object, known: tuple[str, ...], *, written: bool = False) -> str:
    """What may be the matter with a name that is not known.

    Args:
        written: it is of an id that somebody's fp8moe wrote: where no name is near, theirs may know it.
    """
    close = difflib.get_close_matches(str(value)[:SHOWN], known, 1)
    return f" (did you mean {close[0]}?)" if close else f"; {NEWER}" if written else ""


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a huge number"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
