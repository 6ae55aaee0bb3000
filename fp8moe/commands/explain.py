"""`fp8moe explain`: the selector's answer, as a table or as JSON with stable keys."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from fp8moe.commands.question import BadInput, Question
from fp8moe.commands.tables import FORMAT, console, platform_json, table
from fp8moe.counted import counted
from fp8moe.measured import InvalidMeasuredTable, MeasuredSelection, MeasuredTable, explain_measured
from fp8moe.measured.here import device_name_here
from fp8moe.platforms import Platform
from fp8moe.schemes import SCHEMES
from fp8moe.selector import Selection, Verdict

RULES = {
    "R1": "LoRA is on: TRITON, and nothing is checked",
    "R3": "VLLM_USE_FLASHINFER_MOE_FP8 is set",
    "R3b": "VLLM_USE_FLASHINFER_MOE_FP8 is on, and VLLM_FLASHINFER_MOE_BACKEND names the backend",
    "R3c": "VLLM_USE_FLASHINFER_MOE_FP8 is on: either FlashInfer backend, and no other",
    "R4": "VLLM_USE_DEEP_GEMM or VLLM_MOE_USE_DEEP_GEMM is set",
    "R4b": "VLLM_USE_DEEP_GEMM and VLLM_MOE_USE_DEEP_GEMM are on: DeepGEMM, and no other",
    "R5": "VLLM_TEST_FORCE_FP8_MARLIN is on: MARLIN, and no other",
    "R6b": "VLLM_ROCM_USE_AITER and VLLM_ROCM_USE_AITER_MOE are on: AITER, and no other",
    "R8": "the first in the order that takes the configuration",
    "R9": "none in the order takes the configuration",
    "measured": "the fastest by the table of times, among the certified that take the configuration",
}


def measured_answer(
    question: Question, platform: Platform, path: Path, tokens: int, *, here: bool, asked: bool
) -> MeasuredSelection:
    """The measured policy's answer.

    Args:
        path: the table's file.
        here: the platform is that of this machine, so that its name has to be the table's.
        asked: its libraries were named, so that the versions that are installed say nothing.

    Raises:
        BadInput: the file is no table that can be used.
    """
    try:
        times = MeasuredTable.load(path)
    except InvalidMeasuredTable as error:
        raise BadInput(f"--measured {error}") from None
    return explain_measured(
        question.config,
        *SCHEMES[question.layer.scheme],
        tokens=tokens,
        table=times,
        allow_vllm_cutlass=question.allow_vllm_cutlass,
        platform=None if here and not asked else platform,
        env=question.env,
        device=device_name_here() if here else None,
    )


def selection_json(selection: Selection, question: Question, name: str, platform: Platform) -> dict[str, Any]:
    """One answer of the selector, its question included."""
    error = selection.error
    return {
        "format": FORMAT,
        "platform": {"name": name, **platform_json(platform)},
        "question": question_json(question),
        "rule": selection.rule,
        "backend": None if selection.backend is None else selection.backend.value,
        "experts_cls": _class_path(selection.experts_cls),
        "error": None if error is None else {"type": type(error).__name__, "text": str(error)},
        "verdicts": [
            {
                "backend": verdict.backend.value,
                "supported": verdict.supported,
                "reason": None if verdict.reason is None else verdict.reason.value,
                "detail": verdict.detail,
                "consulted": verdict.consulted,
            }
            for verdict in selection.verdicts
        ],
        **({"measured": measured_json(selection)} if isinstance(selection, MeasuredSelection) else {}),
    }


def measured_json(selection: MeasuredSelection) -> dict[str, Any]:
    return {
        "tokens": selection.tokens,
        "device": asdict(selection.measured_on),
        "fallback": None if selection.fallback is None else selection.fallback.value,
        "why": selection.why,
        "seed": None if selection.seed is None else selection.seed.value,
        "times": [
            {
                "backend": time.backend.value,
                "us": time.us,
                "accepted": time.accepted,
                "certified": time.certified,
                "rows": list(time.rows),
                "detail": time.detail,
            }
            for time in selection.times
        ],
    }


def question_json(question: Question) -> dict[str, Any]:
    config, parallel = question.config, question.config.moe_parallel_config
    weight_key, activation_key = SCHEMES[question.layer.scheme]
    return {
        "model": question.layer.name,
        "num_experts": config.num_experts,
        "num_local_experts": config.num_local_experts,
        "experts_per_token": config.experts_per_token,
        "hidden_dim": config.hidden_dim,
        "intermediate_size_per_partition": config.intermediate_size_per_partition,
        "scheme": question.layer.scheme,
        "weight_key": None if weight_key is None else str(weight_key),
        "activation_key": None if activation_key is None else str(activation_key),
        "activation": config.activation,
        "is_act_and_mul": config.is_act_and_mul,
        "routing": config.routing_method.name,
        "logits_dtype": str(config.router_logits_dtype).removeprefix("torch."),
        "format": config.facets.activation_format.value[0],
        "parallel": asdict(parallel),
        "allow_vllm_cutlass": question.allow_vllm_cutlass,
        "lora": config.is_lora_enabled,
        "environment": dict(question.env),
    }


def _class_path(cls: type | None) -> str | None:
    return None if cls is None else f"{cls.__module__}:{cls.__qualname__}"


def print_selection(selection: Selection, question: Question, name: str, platform: Platform) -> None:
    out = console()
    out.print(Text(f"{name}: {platform}"))
    out.print(Text(_one_line(question)))
    verdicts = table("", "#", "backend", "verdict", "reason", "detail")
    for number, verdict in enumerate(selection.verdicts, 1):
        word, style = _verdict_word(selection, verdict)
        reason = "" if verdict.reason is None else verdict.reason.value
        verdicts.add_row(str(number), verdict.backend.value, Text(word, style=style), reason, Text(verdict.detail))
    out.print(verdicts)
    if isinstance(selection, MeasuredSelection):
        _print_times(selection)
    choice = "an error" if selection.backend is None else selection.backend.value
    out.print(Text(f"choice: {choice}, by rule {selection.rule}: {RULES[selection.rule]}", style="bold"))
    path = _class_path(selection.experts_cls)
    if selection.error is None:
        out.print(Text(f"class: {path or 'none, as upstream has it'}"))


def _print_times(selection: MeasuredSelection) -> None:
    out = console()
    if selection.times:
        rows = table(
            f"times of {selection.measured_on} at {counted(selection.tokens, 'token')}",
            "backend",
            "us",
            "certified",
            "detail",
        )
        for time in selection.times:
            us = "" if time.us is None else f"{time.us:.4g}"
            rows.add_row(time.backend.value, us, "yes" if time.certified else "no", Text(time.detail))
        out.print(rows)
    decided = "measured" if selection.fallback is None else f"not measured ({selection.fallback.value})"
    out.print(Text(f"{decided}: {selection.why}"))


def _verdict_word(selection: Selection, verdict: Verdict) -> tuple[str, str]:
    if verdict.backend == selection.backend:
        return "chosen", "bold green"
    word = "takes it" if verdict.supported else "refuses"
    return (word, "") if verdict.consulted else (f"{word} (not asked)", "dim")


def _one_line(question: Question) -> str:
    asked = question_json(question)
    parallel = asked["parallel"]
    env = " ".join(f"{name}={text!r}" for name, text in asked["environment"].items()) or "no variable set"
    flags = [name for name in ("lora", "allow_vllm_cutlass") if asked[name]]
    sizes = f"E={asked['num_experts']} k={asked['experts_per_token']} H={asked['hidden_dim']}"
    return "; ".join(
        (
            f"{asked['model'] or 'a layer'}: {sizes} I={asked['intermediate_size_per_partition']}",
            f"{asked['scheme']}, {asked['activation']}, {asked['routing']}, {asked['logits_dtype']} logits",
            f"{asked['format']}, tp={parallel['tp_size']} dp={parallel['dp_size']} ep={parallel['ep_size']} "
            f"{parallel['all2all_backend']}",
            *flags,
            env,
        )
    )


def print_all_platforms(answers: dict[str, tuple[Platform, Selection]], question: Question) -> None:
    out = console()
    out.print(Text(_one_line(question)))
    rows = table("", "device", "architecture", "choice", "rule", "why")
    for name, (platform, selection) in answers.items():
        error = selection.error
        choice = (
            Text(type(error).__name__, style="red") if error else Text(str(getattr(selection.backend, "value", "")))
        )
        why = RULES[selection.rule] if error is None else str(error).splitlines()[0]
        rows.add_row(name, platform.architecture, choice, selection.rule, Text(why))
    out.print(rows)
