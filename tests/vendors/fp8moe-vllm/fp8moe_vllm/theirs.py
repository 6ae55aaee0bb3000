"""vLLM's own selector: found, asked what ours is asked, its answer in the words of `answers`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any

import torch

from conformance.selection.draw import Call
from fp8moe import FusedMoEConfig, FusedMoEParallelConfig, QuantKey
from fp8moe.envs import SELECTOR_VARIABLES
from fp8moe.registry import BackendUnavailable
from fp8moe_vllm.answers import answer_of_vllm

SPECIFIED = "0.16.0"
"""The release whose selector fp8moe's specification restates."""
REMEDY = f"install vllm=={SPECIFIED} into an environment of its own, with the torch it is built for: pip install " + (
    f"vllm=={SPECIFIED}"
)
LAYERS = "vllm.model_executor.layers.fused_moe"
ORACLE = f"{LAYERS}.oracle.fp8"
QUANT = "vllm.model_executor.layers.quantization.utils.quant_utils"


class NotTaken(Exception):
    """Another version's types have no such value: the question cannot be put."""


def found_version() -> str:
    """The installed vLLM's, without what a build adds to it.

    Raises:
        BackendUnavailable: there is none, or it does not load.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # or it tells every choice
    vllm = load("vllm")
    if vllm.__file__ is None:  # a folder of that name is no package
        raise BackendUnavailable(f"fp8moe_vllm.selection: vllm is not installed; {REMEDY}")
    return str(need(vllm, "__version__")).partition("+")[0]


def load(module: str) -> Any:
    """
    Raises:
        BackendUnavailable: it is not there or does not load.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        told = "vllm is not installed" if error.name == "vllm" else f"{module} does not load ({error})"
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no text"])[0]
        told = f"{module} does not load ({type(error).__name__}: {first})"
    raise BackendUnavailable(f"fp8moe_vllm.selection: {told}; {REMEDY}")


def need(owner: Any, name: str) -> Any:
    """What a module or class of vLLM's calls so.

    Raises:
        BackendUnavailable: it has no such name.
    """
    if not hasattr(owner, name):
        raise BackendUnavailable(
            f"fp8moe_vllm.selection: {owner.__name__} has no {name}: another version than {SPECIFIED}? {REMEDY}"
        )
    return getattr(owner, name)


class Theirs:
    """vLLM's selector and the types that it takes; every class that it can choose is loaded.

    Raises:
        BackendUnavailable: vLLM or one of its modules does not load, or a name is not there.
    """

    def __init__(self) -> None:
        self.version = found_version()
        oracle, config, quant = load(ORACLE), load(f"{LAYERS}.config"), load(QUANT)
        self.select = need(oracle, "select_fp8_moe_backend")
        self.envs = load("vllm.envs")
        self._classes_of = need(oracle, "backend_to_kernel_cls")
        self.classes = {member.value: self._loaded(member) for member in need(oracle, "Fp8MoeBackend")}
        self._config, self._parallel = need(config, "FusedMoEConfig"), need(config, "FusedMoEParallelConfig")
        self._routing = need(config, "RoutingMethodType")
        self._key, self._scale, self._shape = (need(quant, n) for n in ("QuantKey", "ScaleDesc", "GroupShape"))
        self._fp8 = need(quant, "FP8_DTYPE")
        self._aiter = need(load("vllm._aiter_ops"), "rocm_aiter_ops")
        need(self._aiter, "refresh_env_variables")
        need(self.envs, "disable_envs_cache")
        self._activation: Any = None
        if self.version != SPECIFIED:
            with suppress(ImportError, AttributeError):  # a text there too
                self._activation = importlib.import_module(f"{LAYERS}.activation").MoEActivation
        else:
            for ours, theirs in ((FusedMoEConfig, self._config), (FusedMoEParallelConfig, self._parallel)):
                for field in fields(ours):
                    if field.name not in {one.name for one in fields(theirs)}:
                        raise BackendUnavailable(f"fp8moe_vllm.selection: vLLM's {theirs.__name__} has no {field.name}")

    def _loaded(self, member: Any) -> tuple[type, ...]:
        """The classes of a backend; none of NONE and of one that has no class."""
        try:
            found = self._classes_of(member)
        except (NotImplementedError, ValueError):
            return ()
        except Exception as error:
            raise BackendUnavailable(
                f"fp8moe_vllm.selection: the class of {member.value} does not load "
                f"({type(error).__name__}: {error}); {REMEDY}"
            ) from error
        return tuple(found) if isinstance(found, list) else (found,)

    def answer(self, call: Call) -> str:
        """
        Raises:
            NotTaken: another version has no such call.
        """
        config = self.config(call.config)
        keys = self.key(call.weight_key), self.key(call.activation_key)
        with environment(call.env):
            self.envs.disable_envs_cache()
            self._aiter.refresh_env_variables()  # it copies its variables when it is loaded
            try:
                backend, cls = self.select(config, *keys, call.allow_vllm_cutlass)
            except Exception as error:
                return answer_of_vllm(error)
        whose = "no class" if cls is None else "its class"
        if cls is not None and cls not in self.classes[backend.value]:
            whose = f"another class ({cls.__name__})"
        return f"{backend.value} with {whose}"

    def config(self, ours: FusedMoEConfig) -> Any:
        parallel = ours.moe_parallel_config
        given = {field.name: getattr(ours, field.name) for field in fields(ours)} | {
            "moe_parallel_config": self._made(self._parallel, _parallel_fields(parallel)),
            "intermediate_size": ours.intermediate_size_per_partition * parallel.tp_size,
            "num_logical_experts": ours.num_experts,
        }
        try:
            given["routing_method"] = self._routing[ours.routing_method.name]
            if self._activation is not None:
                given["activation"] = self._activation(ours.activation)
        except (KeyError, ValueError) as error:
            raise NotTaken(str(error)) from error
        made = self._made(self._config, given)
        for name in ("is_act_and_mul", "is_lora_enabled"):
            if getattr(made, name, None) != getattr(ours, name):
                raise NotTaken(f"{name} is not free")
        return made

    def _made(self, cls: Any, given: Mapping[str, Any]) -> Any:
        known = {field.name for field in fields(cls) if field.init}
        try:
            return cls(**{name: value for name, value in given.items() if name in known})
        except TypeError as error:
            raise BackendUnavailable(f"fp8moe_vllm.selection: vLLM's {cls.__name__}: {error}; {REMEDY}") from error
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise NotTaken(str(error)) from error

    def key(self, ours: QuantKey | None) -> Any:
        """The key of vLLM's type; on a device with fnuz numbers vLLM's named keys have their dtype."""
        if ours is None:
            return None
        second = None if ours.scale2 is None else self._desc(ours.scale2)
        return self._key(self._dtype(ours.dtype), self._desc(ours.scale), second, ours.symmetric)

    def _desc(self, ours: Any) -> Any:
        shape = self._shape(ours.group_shape.row, ours.group_shape.col)
        return self._scale(self._dtype(ours.dtype), ours.static, shape)

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        pair = (torch.float8_e4m3fn, self._fp8)
        return pair[1 - pair.index(dtype)] if dtype in pair and pair[0] != pair[1] else dtype


def _parallel_fields(parallel: FusedMoEParallelConfig) -> dict[str, Any]:
    given = {field.name: getattr(parallel, field.name) for field in fields(parallel)}
    return given | {"sp_size": 2 if parallel.is_sequence_parallel else 1}


@contextmanager
def environment(env: Mapping[str, str]) -> Iterator[None]:
    """The process's own, with none of the selector's variables but these, and these besides."""
    names = {*SELECTOR_VARIABLES, *env}
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(env)
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)
