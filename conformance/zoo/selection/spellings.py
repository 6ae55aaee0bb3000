"""Mutants that spell a variable's values otherwise: what an integer, a word or a choice may look like."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from conformance.selection.ask import AITER, AITER_MOE, DEEP_GEMM, FLASHINFER, FLASHINFER_BACKEND, MARLIN, MOE_DEEP_GEMM
from conformance.zoo.selection.plant import Make, SelectorMutant, answering, reading
from fp8moe import MalformedVariable

CHOICES = ("throughput", "latency", "masked_gemm")


def spelt(variable: str, read: Callable[[str], str | None]) -> Make:
    """The variable's text reads as another; None: as if it were unset."""

    def change(env: dict[str, str]) -> None:
        text = env.pop(variable, None)
        new = None if text is None else read(text)
        if new is not None:
            env[variable] = new

    return reading(change)


def is_integer(text: str) -> bool:
    with suppress(ValueError):
        return int(text) is not None
    return False


def taken(parse: Callable[[str], int]) -> Callable[[str], str]:
    """What another parser makes of a text; what it refuses stays as it is."""

    def read(text: str) -> str:
        with suppress(ValueError):
            return str(int(parse(text)))
        return text

    return read


def refused(refuses: Callable[[str], bool]) -> Callable[[str], str]:
    """A text that a stricter parser refuses."""
    return lambda text: f"not {text}" if refuses(text) else text


SPELLINGS = (
    SelectorMutant(
        "flashinfer_takes_words",
        "VLLM_USE_FLASHINFER_MOE_FP8: int of the text, true is malformed",
        "true and yes are accepted",
        spelt(FLASHINFER, lambda text: "1" if text.lower() in ("true", "yes") else text),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=true",
    ),
    SelectorMutant(
        "flashinfer_empty_is_off",
        "the empty text is set and no integer",
        "an empty VLLM_USE_FLASHINFER_MOE_FP8 reads as 0",
        spelt(FLASHINFER, lambda text: text.strip() or "0"),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=empty",
    ),
    SelectorMutant(
        "deep_gemm_empty_is_unset",
        "is set: present in the environment, the empty string counts",
        "an empty VLLM_USE_DEEP_GEMM reads as unset",
        spelt(DEEP_GEMM, lambda text: text or None),
        "sel1:VLLM_USE_DEEP_GEMM=empty",
    ),
    SelectorMutant(
        "deep_gemm_takes_fractions",
        "1.0 is no integer",
        "1.0 is accepted",
        spelt(DEEP_GEMM, taken(lambda text: int(float(text)))),
        "sel1:VLLM_USE_DEEP_GEMM=1.0",
    ),
    SelectorMutant(
        "moe_deep_gemm_takes_prefixes",
        "0x1 is no integer",
        "0x1 is accepted, in the base that the prefix tells",
        spelt(MOE_DEEP_GEMM, taken(lambda text: int(text, 0))),
        "sel1:VLLM_MOE_USE_DEEP_GEMM=0x1",
    ),
    SelectorMutant(
        "deep_gemm_only_one_is_on",
        "any integer but 0 is true",
        "2 and -1 read as off",
        spelt(DEEP_GEMM, taken(lambda text: int(int(text) == 1))),
        "sel1:VLLM_USE_DEEP_GEMM=2",
    ),
    SelectorMutant(
        "flashinfer_negative_is_off",
        "-1 is true",
        "only positive integers are on",
        spelt(FLASHINFER, taken(lambda text: max(0, int(text)))),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=-1",
    ),
    SelectorMutant(
        "moe_deep_gemm_any_text_but_0_is_on",
        "-0 and 00 are false",
        "the text is compared with 0, not the integer",
        spelt(MOE_DEEP_GEMM, lambda text: text if text == "0" or not is_integer(text) else "1"),
        "sel1:VLLM_MOE_USE_DEEP_GEMM=-0",
    ),
    SelectorMutant(
        "deep_gemm_refuses_blanks",
        "blanks around an integer do not matter",
        "' 1 ' is refused",
        spelt(DEEP_GEMM, refused(lambda text: text != text.strip())),
        "sel1:VLLM_USE_DEEP_GEMM=blank-1-blank",
    ),
    SelectorMutant(
        "flashinfer_refuses_signs",
        "+1 is an integer",
        "+1 is refused",
        spelt(FLASHINFER, refused(lambda text: text.startswith("+"))),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=+1",
    ),
    SelectorMutant(
        "moe_deep_gemm_refuses_underscores",
        "1_0 is an integer",
        "1_0 is refused",
        spelt(MOE_DEEP_GEMM, refused(lambda text: "_" in text)),
        "sel1:VLLM_MOE_USE_DEEP_GEMM=1_0",
    ),
    SelectorMutant(
        "deep_gemm_refuses_leading_zeros",
        "01 is an integer",
        "01 is refused",
        spelt(DEEP_GEMM, refused(lambda text: len(text) > 1 and text.startswith("0"))),
        "sel1:VLLM_USE_DEEP_GEMM=01",
    ),
    SelectorMutant(
        "marlin_not_stripped",
        "VLLM_TEST_FORCE_FP8_MARLIN: strip, then lower",
        "' TRUE ' does not count",
        spelt(MARLIN, lambda text: text if text == text.strip() else "0"),
        "sel1:VLLM_TEST_FORCE_FP8_MARLIN=blank-1",
    ),
    SelectorMutant(
        "marlin_case_sensitive",
        "VLLM_TEST_FORCE_FP8_MARLIN is lowered",
        "TRUE and True do not count",
        spelt(MARLIN, lambda text: text if text == text.lower() else "0"),
        "sel1:VLLM_TEST_FORCE_FP8_MARLIN=True",
    ),
    SelectorMutant(
        "marlin_knows_only_1",
        "VLLM_TEST_FORCE_FP8_MARLIN=true is true",
        "only 1 counts, not true",
        spelt(MARLIN, lambda text: "1" if text.strip() == "1" else "0"),
        "sel1:VLLM_TEST_FORCE_FP8_MARLIN=true",
    ),
    SelectorMutant(
        "marlin_as_integer",
        "VLLM_TEST_FORCE_FP8_MARLIN=2 is false",
        "any integer but 0 counts",
        spelt(MARLIN, taken(lambda text: int(int(text) != 0))),
        "sel1:VLLM_TEST_FORCE_FP8_MARLIN=2",
    ),
    SelectorMutant(
        "marlin_takes_yes",
        "VLLM_TEST_FORCE_FP8_MARLIN=yes is false",
        "yes counts",
        spelt(MARLIN, lambda text: "1" if text == "yes" else text),
        "sel1:VLLM_TEST_FORCE_FP8_MARLIN=yes",
    ),
    SelectorMutant(
        "marlin_set_is_on",
        "VLLM_TEST_FORCE_FP8_MARLIN has no is-set test",
        "any text counts, 0 too",
        spelt(MARLIN, lambda text: "1"),
        "sel1:VLLM_TEST_FORCE_FP8_MARLIN=0",
    ),
    SelectorMutant(
        "marlin_refuses_nonsense",
        "VLLM_TEST_FORCE_FP8_MARLIN is never malformed",
        "a text that is no word raises",
        answering(
            lambda call, end: (
                end
                if call.env.get(MARLIN, "0").strip().lower() in ("0", "1", "true", "false")
                else MalformedVariable(MARLIN, call.env[MARLIN], "another text")
            )
        ),
        "sel1:VLLM_TEST_FORCE_FP8_MARLIN=yes",
    ),
    SelectorMutant(
        "aiter_stripped",
        "VLLM_ROCM_USE_AITER is lowered, not stripped",
        "' 1' counts",
        spelt(AITER, str.strip),
        "sel1:device=gfx942,VLLM_ROCM_USE_AITER=blank-1",
    ),
    SelectorMutant(
        "aiter_case_sensitive",
        "VLLM_ROCM_USE_AITER=True is true",
        "True does not count",
        spelt(AITER, lambda text: text if text == text.lower() else "0"),
        "sel1:VLLM_ROCM_USE_AITER=True",
    ),
    SelectorMutant(
        "aiter_as_integer",
        "VLLM_ROCM_USE_AITER=2 is false",
        "any integer but 0 counts",
        spelt(AITER, taken(lambda text: int(int(text) != 0))),
        "sel1:device=gfx942,VLLM_ROCM_USE_AITER=2",
    ),
    SelectorMutant(
        "aiter_knows_only_1",
        "VLLM_ROCM_USE_AITER=true is true",
        "only 1 counts, not true",
        spelt(AITER, lambda text: text if text == "1" else "0"),
        "sel1:VLLM_ROCM_USE_AITER=true",
    ),
    SelectorMutant(
        "aiter_moe_empty_is_unset",
        "an empty VLLM_ROCM_USE_AITER_MOE is set, and false",
        "the empty text reads as unset, and so as the default true",
        spelt(AITER_MOE, lambda text: text or None),
        "sel1:VLLM_ROCM_USE_AITER=1,VLLM_ROCM_USE_AITER_MOE=empty",
    ),
    SelectorMutant(
        "aiter_moe_any_word_is_on",
        "VLLM_ROCM_USE_AITER_MOE: everything but 1 and true is false",
        "everything but 0 and false is true",
        spelt(AITER_MOE, lambda text: "0" if text.lower() in ("0", "false") else "1"),
        "sel1:VLLM_ROCM_USE_AITER=1,VLLM_ROCM_USE_AITER_MOE=yes",
    ),
    SelectorMutant(
        "choice_case_insensitive",
        "VLLM_FLASHINFER_MOE_BACKEND is case-sensitive",
        "Latency is accepted",
        spelt(FLASHINFER_BACKEND, str.lower),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=Latency",
    ),
    SelectorMutant(
        "choice_stripped",
        "VLLM_FLASHINFER_MOE_BACKEND is exact",
        "'latency ' is accepted",
        spelt(FLASHINFER_BACKEND, str.strip),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=latency-blank",
    ),
    SelectorMutant(
        "choice_empty_is_unset",
        "an empty VLLM_FLASHINFER_MOE_BACKEND is malformed",
        "the empty text reads as unset",
        spelt(FLASHINFER_BACKEND, lambda text: text or None),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=empty",
    ),
    SelectorMutant(
        "unknown_choice_is_the_default",
        "any other VLLM_FLASHINFER_MOE_BACKEND is a ValueError",
        "an unknown name reads as latency",
        spelt(FLASHINFER_BACKEND, lambda text: text if text in CHOICES else "latency"),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=Latency",
    ),
)
