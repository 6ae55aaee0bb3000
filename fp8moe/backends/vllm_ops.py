"""vLLM's compiled operators, loaded from their files: vLLM itself is not imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from fp8moe.libraries import VLLM_OPS, vllm_operators
from fp8moe.registry import BackendUnavailable

REMEDY = f"install the vllm that is built for torch {torch.__version__}, or name a folder with its files in {VLLM_OPS}"


def operators(user: str, needed: Mapping[str, Sequence[str]]) -> Any:
    """Operators by name.

    Args:
        user: who asks, for errors.
        needed: by extension, "_C" or "_moe_C", the names of its operators. A process that has imported vLLM has them
            already, and nothing is loaded twice.

    Raises:
        BackendUnavailable: the files are not there, do not load, or lack an operator.
    """
    for extension, names in needed.items():
        if not all(hasattr(getattr(torch.ops, extension), name) for name in names):
            _load(user, extension)
    found: dict[str, Any] = {}
    for extension, names in needed.items():
        namespace = getattr(torch.ops, extension)
        missing = [name for name in names if not hasattr(namespace, name)]
        if missing:
            raise BackendUnavailable(
                f"{user}: vLLM's {extension} has no {', '.join(missing)}: another version or device; {REMEDY}"
            )
        found |= {name: getattr(namespace, name) for name in names}
    return SimpleNamespace(**found)


def _load(user: str, extension: str) -> None:
    try:
        path = vllm_operators()[extension]
        load: Callable[[str], None] = torch.ops.load_library
        load(str(path))
    except FileNotFoundError as error:
        raise BackendUnavailable(f"{user}: {error}; {REMEDY}") from None
    except (OSError, RuntimeError) as error:
        told = (str(error).strip().splitlines() or ["no text"])[0]
        raise BackendUnavailable(f"{user}: {path} does not load ({told}); {REMEDY}") from error
