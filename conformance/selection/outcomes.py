"""Every way a selection can end as one number below 256, and the classifier that gives an answer its number."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from conformance.selection.facts import DEEP_GEMM, FLASHINFER, FLASHINFER_BACKEND, MOE_DEEP_GEMM
from conformance.selection.predicates import BACKENDS, REASONS
from fp8moe import BackendSpec, Fp8MoeBackend

NO_BACKEND = len(BACKENDS)
"""``(NONE, None)``; below it a backend's code means that backend with the class that belongs to it."""
WRONG_CLASS = NO_BACKEND + 1
"""Added to the code of a backend, or of NONE, that came with a class that is not its own."""
(
    MASKED_GEMM_HAS_NO_FP8,
    NO_FLASHINFER_FITS,
    NOTHING_FITS,
    MALFORMED_FLASHINFER,
    MALFORMED_FLASHINFER_BACKEND,
    MALFORMED_DEEP_GEMM,
    MALFORMED_MOE_DEEP_GEMM,
    NOT_A_BACKEND,
    OTHER_ERROR,
    UNNAMED_FAILURE,
) = range(2 * WRONG_CLASS, 2 * WRONG_CLASS + 10)
"""The errors that name no backend; then what a selector must never give: an answer that is no backend, an exception of
another type, a must-use error whose text lacks the backend's value."""
FIRST_FAILURE = 100

MALFORMED_CODES = {
    FLASHINFER: MALFORMED_FLASHINFER,
    FLASHINFER_BACKEND: MALFORMED_FLASHINFER_BACKEND,
    DEEP_GEMM: MALFORMED_DEEP_GEMM,
    MOE_DEEP_GEMM: MALFORMED_MOE_DEEP_GEMM,
}
_TEXTS = {
    NO_BACKEND: "(NONE, None)",
    MASKED_GEMM_HAS_NO_FP8: "ValueError: FlashInfer masked GEMM has no FP8",
    NO_FLASHINFER_FITS: f"NotImplementedError of {FLASHINFER}=1",
    NOTHING_FITS: "NotImplementedError: nothing fits",
    NOT_A_BACKEND: "an answer that is no (backend, class) pair",
    OTHER_ERROR: "an exception that the specification does not have here",
    UNNAMED_FAILURE: "a must-use error whose text lacks the backend's value, or without a reason",
} | {code: f"ValueError: {name} is malformed" for name, code in MALFORMED_CODES.items()}


_RULES_OF_NOT_IMPLEMENTED = {"R3c": NO_FLASHINFER_FITS, "R9": NOTHING_FITS}


def must_use_failure(backend: int, reason: int) -> int:
    """Code of the error of a must-use backend that failed for a reason."""
    return FIRST_FAILURE + backend * len(REASONS) + reason


def is_must_use_failure(code: int) -> bool:
    """Whether a code is one of ``must_use_failure``."""
    return FIRST_FAILURE <= code < FIRST_FAILURE + len(BACKENDS) * len(REASONS)


def must_use_parts(code: int) -> tuple[int, int]:
    """Backend and reason of a code of ``must_use_failure``."""
    return divmod(code - FIRST_FAILURE, len(REASONS))


def describe(code: int) -> str:
    """A code in words."""
    if code < NO_BACKEND:
        return BACKENDS[code].value
    if code in _TEXTS:
        return _TEXTS[code]
    if code < 2 * WRONG_CLASS:
        return f"{describe(code - WRONG_CLASS)} with a class that is not its own"
    if is_must_use_failure(code):
        backend, reason = must_use_parts(code)
        return f"ValueError of {BACKENDS[backend].value} with {REASONS[reason].name}"
    return f"outcome {code}"


class Classifier:
    """Gives a selector's answers and exceptions their codes.

    ``specs`` tells the class that belongs to each backend; FLASHINFER_TRTLLM and NONE come with None.
    """

    def __init__(self, specs: Iterable[BackendSpec]) -> None:
        classes: dict[Any, type | None] = {spec.backend: spec.experts_cls for spec in specs}
        classes[Fp8MoeBackend.FLASHINFER_TRTLLM] = None
        # Identity, not equality: an enum's hash is a Python call, and only the members themselves will do.
        self._answers: dict[int, tuple[int, Any]] = {
            id(backend): (code, classes.get(backend, NotImplemented)) for code, backend in enumerate(BACKENDS)
        }
        self._answers[id(Fp8MoeBackend.NONE)] = (NO_BACKEND, None)
        self._failures = {
            (id(backend), id(reason)): must_use_failure(b, r)
            for b, backend in enumerate(BACKENDS)
            for r, reason in enumerate(REASONS)
        }
        self._without_text = dict.fromkeys(range(256), 0)
        self._by_text: dict[tuple[type, str], int] = {}

    def result(self, answer: Any) -> int:
        """Code of what a selector returned."""
        if not isinstance(answer, tuple) or len(answer) != 2:
            return NOT_A_BACKEND
        known = self._answers.get(id(answer[0]))
        if known is None:
            return NOT_A_BACKEND
        code, experts_cls = known
        return code if answer[1] is experts_cls else code + WRONG_CLASS

    def error(self, error: BaseException) -> int:
        """Code of what a selector raised.

        An error may carry its backend and reason, or its rule, as data, and build its text only when asked. Then the
        text is compared with the data for the first errors of a code and for some of the later ones.
        """
        backend = getattr(error, "backend", None)
        if backend is not None:
            code = self._failures.get((id(backend), id(getattr(error, "reason", None))), UNNAMED_FAILURE)
            if not isinstance(error, ValueError):
                return OTHER_ERROR
            if self._is_text_due(code) and backend.value not in str(error):
                return UNNAMED_FAILURE
            return code
        code = _RULES_OF_NOT_IMPLEMENTED.get(getattr(error, "rule", ""), OTHER_ERROR)
        if isinstance(error, NotImplementedError) and code != OTHER_ERROR and not self._is_text_due(code):
            return code
        key = (type(error), str(error))
        code = self._by_text.get(key, -1)
        if code < 0:
            code = self._by_text[key] = _error_without_backend(error)
        return code

    def _is_text_due(self, code: int) -> bool:
        seen = self._without_text[code] = self._without_text[code] + 1
        return seen <= 100 or seen % 64 == 0

    def call(self, select: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
        """Code of one call."""
        try:
            answer = select(*args, **kwargs)
        except Exception as error:
            return self.error(error)
        return self.result(answer)


def _error_without_backend(error: BaseException) -> int:
    text = str(error)
    if isinstance(error, NotImplementedError):
        return NO_FLASHINFER_FITS if f"{FLASHINFER}=1" in text else NOTHING_FITS
    if isinstance(error, ValueError):
        # The option is spelt with an underscore; an error that lists the options does not say "masked GEMM".
        names_backend = any(re.search(rf"\b{backend.value}\b", text) for backend in BACKENDS)
        if re.search(r"masked ?gemm", text, re.IGNORECASE) and "FP8" in text and not names_backend:
            return MASKED_GEMM_HAS_NO_FP8
        for name, code in MALFORMED_CODES.items():
            if re.search(rf"\b{name}\b", text):
                return code
    return OTHER_ERROR
