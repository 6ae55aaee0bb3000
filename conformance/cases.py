"""A case: one configuration, its routing law, its values, its seed; and the id that names it, in a versioned grammar.

    v1:M=33,law=skewed,seed=7
    v1:model=deepseek-v3:ep64r1,M=128,values=block_scales

An id is `v1:` and `key=value` pairs joined by commas, from the characters `A-Za-z0-9._=,:+-` alone, so that it needs no
quotes in a shell and fits into a pytest node id. M is always there; every other field is left out where it has its
default. `parse` takes the fields in any order and `str` prints them in the order of the class. What a field means never
changes within a version: `tests/data/golden_case_ids.txt` watches that. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from conformance.models import MODELS, Split, SplitError, model_and_split
from conformance.vocabulary import (
    CHOICES,
    DTYPES,
    FLAGS,
    KEYS,
    LAWS,
    LAYOUTS,
    NEWER,
    PLAIN_SIZES,
    SCHEME_NAMES,
    SIZE_FIELDS,
    VALUES,
    InvalidCase,
    hint,
    one_of,
)
from fp8moe.config import NON_GATED_ACTIVATIONS

__all__ = [
    "DTYPES",
    "KEYS",
    "LAWS",
    "LAYOUTS",
    "SCHEME_NAMES",
    "VALUES",
    "VERSION",
    "Case",
    "InvalidCase",
    "given_by",
    "value_of",
]

VERSION = "v1"
LONGEST = 1000
"""Characters of an id; all fields together have some 250."""


@dataclass(frozen=True)
class Case:
    """One configuration and all that its tensors are drawn from. `conformance.build.build` makes the tensors.

    Args:
        model: a name of `conformance.models.MODELS` and a split, "deepseek-v3:tp8" or "qwen3-30b-a3b:ep8r1"; it
            gives `experts`, `top_k`, `hidden`, `inter`, `ep` and the routing method. None: a layer of no model.
        experts: E, over all ranks. 0 stands for the model's or, without a model, for 8; likewise below.
        top_k: k (2).
        hidden: H (256).
        inter: I (256), of one tensor-parallel partition.
        tokens: M.
        scheme: a name of `SCHEME_NAMES`.
        dtype: of the hidden states and the output.
        activation: a name of `fp8moe.config.ACTIVATIONS`; it also says whether the MLP is gated.
        law: routing law.
        values: value regime of hidden states and weights.
        ep: "size:rank" of expert parallelism, the experts split evenly; None: all experts are here.
        bias: both GEMMs have a bias.
        weight_on_input: the routing weight multiplies the hidden states; top-1 only.
        fnuz: weights are e4m3fnuz, the same numbers as without.
        layout: of the hidden states; "strided": rows lie apart, with NaN between them.
        seed: from 0 to 2^63 - 1.

    Raises:
        InvalidCase: (a ValueError) names the field, the value and what is expected.
    """

    model: str | None = None
    experts: int = 0
    top_k: int = 0
    hidden: int = 0
    inter: int = 0
    tokens: int = 16
    scheme: str = "block"
    dtype: str = "bf16"
    activation: str = "silu"
    law: str = "uniform"
    values: str = "iid"
    ep: str | None = None
    bias: bool = False
    weight_on_input: bool = False
    fnuz: bool = False
    layout: str = "contiguous"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (*SIZE_FIELDS, "tokens", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidCase(name, value, "an integer of at least " + ("1" if name in SIZE_FIELDS else "0"))
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidCase(name, getattr(self, name), "True or False")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise InvalidCase(name, getattr(self, name), f"one of {one_of(getattr(self, name), known)}")
        self._fill_in()
        self._check_relations()

    def _fill_in(self) -> None:
        """The sizes that were left open, from the model or plain ones; `ep` in its one spelling."""
        ep = None if self.ep is None else "{}:{}".format(*_parse_ep(self.ep))
        if ep == "1:0":
            ep = None
        for name, value in given_by(self.model).items():
            own = ep if name == "ep" else getattr(self, name)
            if self.model is not None and own not in (0, None, value):
                raise InvalidCase(
                    name, own, f"{value!r}, since model={self.model} gives it; leave {name} out, or leave model out"
                )
            object.__setattr__(self, name, own or value)
        if self.model is not None:
            spec, split = model_and_split(self.model)
            object.__setattr__(self, "model", f"{spec.name}:{split}")

    def _check_relations(self) -> None:
        if self.top_k > self.experts:
            raise InvalidCase("top_k", self.top_k, f"at most experts={self.experts}")
        if self.experts % self.ep_size:
            raise InvalidCase("ep", self.ep, f"a size that divides experts={self.experts}")
        if self.weight_on_input and self.top_k != 1:
            raise InvalidCase("weight_on_input", True, f"False, or top_k=1 instead of {self.top_k}")
        if self.fnuz and self.scheme == "none":
            raise InvalidCase("fnuz", True, "False with scheme=none, whose weights are not FP8")
        if self.law == "repeated" and self.top_k < 2:
            raise InvalidCase("law", self.law, f"another law, or top_k of at least 2 instead of {self.top_k}")
        used = self.experts - self.experts // 2
        if self.law == "empty" and (self.experts < 2 or self.top_k > used):
            raise InvalidCase(
                "law", self.law, f"another law, or at least 2 experts and top_k of at most half of them ({used})"
            )
        if self.seed >= 1 << 63:
            raise InvalidCase("seed", self.seed, "less than 2^63")

    @property
    def ep_size(self) -> int:
        return 1 if self.ep is None else _parse_ep(self.ep)[0]

    @property
    def ep_rank(self) -> int:
        return 0 if self.ep is None else _parse_ep(self.ep)[1]

    @property
    def local_experts(self) -> int:
        """Experts of this rank."""
        return self.experts // self.ep_size

    @property
    def gated(self) -> bool:
        """The first GEMM makes gate and up: w13 has 2I rows."""
        return self.activation not in NON_GATED_ACTIVATIONS

    @property
    def weight_bytes(self) -> int:
        """Bytes of this rank's w13 and w2, without scales."""
        per_expert = self.hidden * self.inter * (3 if self.gated else 2)
        return self.local_experts * per_expert * (2 if self.scheme == "none" else 1)

    def __str__(self) -> str:
        defaults = {field.name: field.default for field in fields(self)} | given_by(self.model) | {"tokens": None}
        pairs = [
            f"{key}={_print_value(getattr(self, name))}"
            for name, key in KEYS.items()
            if getattr(self, name) != defaults[name]
        ]
        return f"{VERSION}:{','.join(pairs)}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case with this id, its fields in any order.

        Raises:
            InvalidCase: another version, an unknown or repeated key, a value that does not fit.
        """
        version, colon, body = text.partition(":")
        if version != VERSION or not colon:
            later = re.fullmatch(r"v[0-9]+", version) is not None
            told = f"an id that starts with {VERSION!r}: and fields such as M=16,seed=1" + (
                f"; {NEWER}" if later else ""
            )
            raise InvalidCase("id", text, told)
        if len(text) > LONGEST:
            raise InvalidCase("id", text, f"at most {LONGEST} characters, not {len(text)}")
        names = {key: name for name, key in KEYS.items()}
        found: dict[str, Any] = {}
        for pair in body.split(",") if body else ():
            key, equals, value = pair.partition("=")
            if key not in names:
                what = f"{', '.join(names)}, not {key!r} (with the value {value!r})"
                raise InvalidCase("id", text, f"a key of {what}{hint(key, tuple(names), written=True)}")
            if not equals or not value:
                raise InvalidCase(names[key], value, f"{key}=VALUE in {text!r}")
            if names[key] in found:
                raise InvalidCase(names[key], value, f"{key} once in {text!r}")
            found[names[key]] = _parse_value(names[key], value)
            _check_known(names[key], value)
        return cls(**found)


def given_by(model: str | None) -> dict[str, Any]:
    """The fields that a model with its split supplies; without a model, the plain ones.

    Raises:
        InvalidCase: no such model, or a split that is malformed or does not divide it.
    """
    if model is None:
        return dict(PLAIN_SIZES, ep=None)
    try:
        spec, split = model_and_split(model)
    except SplitError as error:
        raise InvalidCase("model", model, str(error)) from None
    return {
        "experts": spec.experts,
        "top_k": spec.top_k,
        "hidden": spec.hidden,
        "inter": spec.inter // split.tp_size,
        "ep": _ep_of(split),
    }


def _ep_of(split: Split) -> str | None:
    return None if split.ep_size == 1 else f"{split.ep_size}:{split.rank}"


def _parse_ep(text: object) -> tuple[int, int]:
    """Size and rank of "4:1", or of "4/1"."""
    size, _, rank = text.replace("/", ":").partition(":") if isinstance(text, str) else ("", "", "")
    if not (_is_number(size) and _is_number(rank) and int(rank) < int(size)):
        raise InvalidCase("ep", text, "size:rank with 0 <= rank < size, such as 4:1")
    return int(size), int(rank)


def _print_value(value: object) -> str:
    return "on" if value is True else str(value)


def _check_known(name: str, text: str) -> None:
    """Whether a name in an id is one of this version.

    Raises:
        InvalidCase: it is none.
    """
    value, known = (text.partition(":")[0], tuple(MODELS)) if name == "model" else (text, CHOICES.get(name, (text,)))
    if value not in known:
        raise InvalidCase(name, text, f"one of {one_of(value, known, written=True)}")


def value_of(name: str, text: str) -> object:
    """The value that a field has in a case whose id says `text` for it.

    Raises:
        InvalidCase: a value that no case has.
    """
    value = _parse_value(name, text)
    if value not in CHOICES.get(name, (value,)):
        raise InvalidCase(name, value, f"one of {one_of(value, CHOICES[name])}")
    if name == "ep":
        size, rank = _parse_ep(text)
        return None if size == 1 else f"{size}:{rank}"
    return value


def _parse_value(name: str, text: str) -> object:
    if name in FLAGS:
        if text not in ("on", "off"):
            raise InvalidCase(name, text, "on or off")
        return text == "on"
    if name in (*SIZE_FIELDS, "tokens", "seed"):
        if not _is_number(text) or (name in SIZE_FIELDS and int(text) == 0):
            raise InvalidCase(name, text, f"an integer of at least {1 if name in SIZE_FIELDS else 0}, in digits")
        return int(text)
    return text


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 19
