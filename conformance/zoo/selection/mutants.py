"""All mutants of the selector, by name."""

from __future__ import annotations

from conformance.zoo.selection.demands import DEMANDS
from conformance.zoo.selection.devices import DEVICES
from conformance.zoo.selection.environment import ENVIRONMENT
from conformance.zoo.selection.errors import ERRORS
from conformance.zoo.selection.explanations import EXPLANATIONS
from conformance.zoo.selection.given import GIVEN
from conformance.zoo.selection.layers import LAYERS
from conformance.zoo.selection.plant import SelectorMutant
from conformance.zoo.selection.purity import PURITY
from conformance.zoo.selection.rules import RULES
from conformance.zoo.selection.scan import SCAN
from conformance.zoo.selection.schemes import SCHEMES_AND_ACTIVATIONS
from conformance.zoo.selection.spellings import SPELLINGS
from conformance.zoo.selection.toolkits import TOOLKITS

ALL: tuple[SelectorMutant, ...] = (
    *(*RULES, *DEMANDS, *SCAN),
    *(*ENVIRONMENT, *SPELLINGS),
    *(*DEVICES, *TOOLKITS, *SCHEMES_AND_ACTIVATIONS, *LAYERS),
    *(*EXPLANATIONS, *ERRORS),
    *(*PURITY, *GIVEN),
)
MUTANTS: dict[str, SelectorMutant] = {mutant.name: mutant for mutant in ALL}
