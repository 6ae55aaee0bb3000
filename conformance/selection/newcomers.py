"""Two backends from outside the tree, for checks of the selector: one refuses everything, one takes everything."""

from __future__ import annotations

from typing import Any

from fp8moe import BackendSpec, FusedMoEActivationFormat, FusedMoEPermuteExpertsUnpermute, Reason


class _Newcomer(FusedMoEPermuteExpertsUnpermute):
    """It is selected, never run."""

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard


class RefusesAll(_Newcomer):
    """Its own predicate refuses."""

    @staticmethod
    def is_supported_config(*_: Any, **__: Any) -> tuple[bool, Reason | None]:
        return False, Reason.SCHEME


class TakesAll(_Newcomer):
    """Its own predicate accepts."""

    @staticmethod
    def is_supported_config(*_: Any, **__: Any) -> tuple[bool, Reason | None]:
        return True, None


REFUSING = BackendSpec("somebodys_refusing", RefusesAll)
ACCEPTING = BackendSpec("somebodys_accepting", TakesAll)
