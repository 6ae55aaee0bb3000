"""What a verdict is of: the schemes that the backend takes, and beside them those that it does not."""

from __future__ import annotations

from dataclasses import replace

from conformance.certificate.page import comparison, page
from conformance.vocabulary import SCHEME_NAMES
from fp8moe.config import ACTIVATIONS
from tests.unit.certificates import invented
from tests.unit.test_certificate_page import held

LEFT = "tensor_static, tensor_dyn, tensor_tok, channel_tok, tensor_128, none, tensor_none, channel_none, block_none"


def test_what_is_taken_and_what_is_not() -> None:
    assert invented().scope == f"takes 1 of 10 schemes: block (2 of 7 activations); does not take {LEFT}"
    one = replace(invented(), takes={"block": ["silu"]})
    assert one.scope == f"takes 1 of 10 schemes: block (silu alone); does not take {LEFT}"


def test_everything_and_nothing() -> None:
    everything = replace(invented(), takes=dict.fromkeys(SCHEME_NAMES, ACTIVATIONS))
    assert everything.scope == f"takes 10 of 10 schemes: {', '.join(SCHEME_NAMES)}"
    assert replace(invented(), takes={}).scope == f"takes 0 of 10 schemes: none; does not take block, {LEFT}"


def test_it_stands_below_the_headline_of_a_page() -> None:
    report = invented()
    assert f"</h1>\n<p><strong>{report.scope}</strong></p>" in page(held())
    everything = replace(report, takes=dict.fromkeys(SCHEME_NAMES, ACTIVATIONS))
    row = f'<th scope="row">schemes</th><td>{report.scope}</td><td>{everything.scope}</td>'
    assert row in comparison(held(), held(everything))
