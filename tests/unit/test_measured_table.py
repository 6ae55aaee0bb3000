"""The table of times and its file: written and read again, and every wrong, edited or cut one refused in words."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8moe import BackendSpec
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.config import ACTIVATIONS
from fp8moe.detection import DeviceInfo
from fp8moe.measured import (
    Certificate,
    InvalidMeasuredTable,
    LayerShape,
    MeasuredDevice,
    MeasuredRow,
    MeasuredTable,
    installed_versions,
)
from fp8moe.measured.curves import Curve
from fp8moe.measured.file import digest_of
from fp8moe.registry import SEED_ORDER
from fp8moe.schemes import SCHEMES
from tests.unit.measured_tables import DEVICES, PASSED, carried_over, rows_of, table_of

SHAPE = LayerShape(8, 2, 4096, 14336, "block")
SMALL = table_of(rows_of(SHAPE, {"TRITON": {1: 10.5, 16: 20.0}, "MARLIN": {16: 21.0}}))
NAMES = tuple(name for name, *_ in SEED_ORDER)


def shapes() -> st.SearchStrategy[LayerShape]:
    sizes = st.integers(1, 1 << 20)
    names = (st.sampled_from(sorted(SCHEMES)), st.sampled_from(ACTIVATIONS), st.sampled_from(("standard", "batched")))
    return st.builds(LayerShape, sizes, sizes, sizes, sizes, *names)


@st.composite
def tables(draw: st.DrawFn) -> MeasuredTable:
    keys = st.tuples(shapes(), st.integers(1, 1 << 20), st.sampled_from(NAMES))
    times = draw(st.dictionaries(keys, st.floats(1e-6, 1e12) | st.integers(1, 10**9), max_size=6))
    rows = [MeasuredRow(*key, us) for key, us in times.items()]
    certificates = draw(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(("smoke", "quick", "certify"))))
    text = st.text(max_size=8)
    return MeasuredTable(
        draw(st.sampled_from(list(DEVICES.values()))),
        {"fp8moe": "0.1.0", "torch": draw(st.sampled_from(("2.13.0", "2.11.0+cu130")))},
        draw(st.permutations(rows)),
        {name: Certificate(level, "2026-02-28", "ab" * 32) for name, level in certificates.items()},
        draw(text),
    )


@settings(max_examples=60, deadline=None)
@given(tables())
def test_a_table_written_and_read_again_is_the_same(table: MeasuredTable) -> None:
    again = MeasuredTable.loads(table.dumps())
    assert again == table
    assert again.dumps() == table.dumps()
    assert list(again.rows) == sorted(table.rows)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    carried_over("h100").save(path)
    assert MeasuredTable.load(path) == carried_over("h100")
    blanks = json.dumps(json.loads(path.read_text()), indent=4)
    assert MeasuredTable.loads(blanks) == carried_over("h100")  # how it is laid out does not matter


def test_copies_are_equal_and_a_table_is_frozen() -> None:
    table = carried_over("h200")
    assert pickle.loads(pickle.dumps(table)) == copy.deepcopy(table) == table
    with pytest.raises(TypeError):
        table.certificates["XPU"] = PASSED  # type: ignore[index]
    given_rows = list(table.rows)
    other = MeasuredTable(table.device, table.versions, given_rows)
    given_rows.clear()
    assert len(other.rows) == len(table.rows)


def test_hundreds_of_rows_are_a_few_kilobytes() -> None:
    tokens = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    rows = [
        MeasuredRow(LayerShape(256 // ranks, 8, 7168, 2048, "block"), count, name, 123.4 + count)
        for ranks in (1, 2, 4, 8, 16, 32)
        for count in tokens
        for name in ("TRITON", "MARLIN", "DEEPGEMM", "FLASHINFER_CUTLASS")
    ]
    assert len(rows) == 360
    assert len(table_of(rows).dumps().encode()) <= 6 * 1024


# -- what a file may not be --


def edited(change: Callable[[Any], Any], *, sealed: bool = True) -> str:
    """SMALL's file with a change; `sealed`: with a digest that fits it."""
    content = json.loads(SMALL.dumps())
    change(content)
    if sealed:
        content["digest"] = digest_of(content)
    return json.dumps(content)


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    return change


WRONG = [
    (put("format", value="fp8moe-measured/2"), "format='fp8moe-measured/2': expected 'fp8moe-measured/1'"),
    (lambda content: content.pop("source"), "the file lacks source"),
    (put("note", value=1), "the file has note on top"),
    (put("source", value=3), "source=3: expected a text"),
    (put("device", "name", value=""), "device: name='': expected a text such as 'NVIDIA H200'"),
    (put("device", value="H100"), "device: the object='H100': expected an object"),
    (lambda content: content["device"].pop("kind"), "device: the object lacks kind"),
    (put("versions", value={"torch": "2.13.0"}), "versions lacks 'fp8moe'"),
    (put("versions", "torch", value=2.13), "versions['torch']=2.13: expected a text"),
    (put("versions", value=[]), "versions=[]: expected an object"),
    (
        put("certificates", "TRITON", "level", value="gold"),
        "certificates['TRITON']: level='gold': expected one of smoke",
    ),
    (put("certificates", "TRITON", "date", value="24.11.2026"), "date='24.11.2026': expected a day such as 2026-11-24"),
    (put("certificates", "TRITON", "date", value="2026-02-30"), "date='2026-02-30': expected a day"),
    (put("certificates", "TRITON", "report", value="AB" * 32), "expected the report's SHA-256"),
    (put("certificates", "TRITON", value=True), "certificates['TRITON']: the object=True"),
    (put("certificates", "ACME", value={}), "certificates['ACME']: no backend of this name; known: AITER, "),
    (put("shapes", value={}), "shapes={}: expected a list"),
    (put("shapes", 0, value=1), "shapes[0]: the shape=1: expected an object"),
    (put("shapes", 0, "experts", value=0), "shapes[0]: experts=0: expected an integer of at least 1"),
    (put("shapes", 0, "top_k", value=True), "shapes[0]: top_k=True: expected an integer"),
    (put("shapes", 0, "hidden", value=4096.0), "shapes[0]: hidden=4096.0: expected an integer"),
    (put("shapes", 0, "intermediate", value=1 << 63), "shapes[0]: intermediate=9223372036854775808: expected"),
    (put("shapes", 0, "scheme", value="blocks"), "shapes[0]: scheme='blocks': expected one of block, "),
    (put("shapes", 0, "activation", value=["silu"]), "shapes[0]: activation=['silu']: expected one of silu, "),
    (put("shapes", 0, "format", value="ragged"), "shapes[0]: format='ragged': expected one of standard, batched"),
    (put("shapes", 0, "tokens", value=[]), "shapes[0]: tokens=[]: expected a list of numbers of tokens"),
    (put("shapes", 0, "tokens", 1, value=-16), "shapes[0]: tokens[1]=-16: expected an integer"),
    (put("shapes", 0, "tokens", 1, value=1), "rows: TRITON at 1 token of E=8 k=2"),
    (put("shapes", 0, "us", value=[]), "shapes[0]: us=[]: expected an object"),
    (put("shapes", 0, "us", "ACME", value=[1, 2]), "shapes[0]: us['ACME']: no backend of this name"),
    (put("shapes", 0, "us", "NONE", value=[1, 2]), "shapes[0]: us['NONE']: no backend of this name"),
    (put("shapes", 0, "us", "TRITON", value=[1.0]), "us['TRITON']=[1.0]: expected 2 times"),
    (put("shapes", 0, "us", "TRITON", 0, value=0), "us['TRITON'][0]: us=0: expected a positive, finite number"),
    (put("shapes", 0, "us", "TRITON", 0, value=-1.5), "us=-1.5: expected a positive"),
    (put("shapes", 0, "us", "TRITON", 0, value="10"), "us='10': expected a positive"),
    (put("shapes", 0, "us", "TRITON", 0, value=True), "us=True: expected a positive"),
    (put("shapes", 0, "us", "TRITON", 0, value=10**400), "us=1000000"),
    (lambda content: content["shapes"].append(content["shapes"][0]), "is there twice; keep one of the two"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words[:40] for _, words in WRONG])
def test_a_wrong_file_is_refused_in_words(change: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(InvalidMeasuredTable) as caught:
        MeasuredTable.loads(edited(change), where="times.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("times.json")


@pytest.mark.parametrize(
    "change",
    [
        put("device", "name", value="H200"),
        put("certificates", "XPU", value={"level": "certify", "date": "2026-11-24", "report": "0" * 64}),
        put("shapes", 0, "us", "TRITON", 0, value=1),
        put("versions", "torch", value="2.13.0"),
        put("source", value="elsewhere"),
        put("digest", value="sha256:" + "0" * 64),
        put("digest", value=None),
    ],
)
def test_an_edited_file_is_refused(change: Callable[[Any], Any]) -> None:
    with pytest.raises(InvalidMeasuredTable, match=r"digest=.*the file was edited or cut; copy it again"):
        MeasuredTable.loads(edited(change, sealed=False))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(SMALL.dumps().rstrip()) - 1))
def test_a_cut_file_is_refused(length: int) -> None:
    with pytest.raises(InvalidMeasuredTable, match="the file was edited or cut"):
        MeasuredTable.loads(SMALL.dumps()[:length])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(SMALL.dumps()) - 1), st.characters(min_codepoint=32, max_codepoint=126))
def test_a_changed_character_is_refused_or_changes_nothing(place: int, character: str) -> None:
    text = SMALL.dumps()
    try:
        again = MeasuredTable.loads(text[:place] + character + text[place + 1 :])
    except InvalidMeasuredTable:
        return
    assert again == SMALL  # a blank for a line's end, or the character that was there


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON"),
        ("[1]", "the file='list': expected a JSON object"),
        ("null", "expected a JSON object"),
        ("{}", "format=None"),
        (SMALL.dumps().replace("10.5", "NaN"), "a number='NaN': expected a finite one"),
        (SMALL.dumps().replace("10.5", "Infinity"), "a number='Infinity'"),
        (SMALL.dumps().replace('"TRITON":[', '"MARLIN":['), "MARLIN: given more than once"),
        ("[" * 100_000, "is no JSON"),
        ("1" * 5_000, "the file"),
    ],
    ids=["empty", "list", "null", "object", "nan", "infinity", "twice", "deep", "long"],
)
def test_what_is_no_table(text: str, words: str) -> None:
    with pytest.raises(InvalidMeasuredTable) as caught:
        MeasuredTable.loads(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidMeasuredTable, match=r"nowhere\.json cannot be read: No such file"):
        MeasuredTable.load(tmp_path / "nowhere.json")
    with pytest.raises(InvalidMeasuredTable, match="cannot be read"):
        MeasuredTable.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidMeasuredTable, match="it is no UTF-8 text"):
        MeasuredTable.load(tmp_path / "binary")


def test_backends_that_are_given_are_known() -> None:
    text = table_of([MeasuredRow(SHAPE, 1, "ACME", 1.0)]).dumps()
    with pytest.raises(InvalidMeasuredTable, match=r"us\['ACME'\]: no backend of this name"):
        MeasuredTable.loads(text)
    assert MeasuredTable.loads(text, backends=[BackendSpec("ACME", TorchExperts)]).rows[0].backend == "ACME"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MeasuredTable("H100", {"fp8moe": "0.1.0"}), "device='H100': expected a MeasuredDevice"),  # type: ignore[arg-type]
        (lambda: MeasuredTable(DEVICES["h100"], "0.1.0"), "versions='0.1.0': expected a mapping"),  # type: ignore[arg-type]
        (lambda: table_of([1]), "rows=1: expected MeasuredRow objects"),  # type: ignore[list-item]
        (lambda: table_of([], XPU=1), r"certificates\['XPU'\]=1: expected a Certificate"),  # type: ignore[arg-type]
        (lambda: table_of([MeasuredRow(SHAPE, 1, "XPU", us) for us in (1, 2)]), "XPU at 1 token of E=8"),
        (lambda: MeasuredRow("block", 1, "XPU", 1), "shape='block': expected a LayerShape"),  # type: ignore[arg-type]
        (lambda: MeasuredRow(SHAPE, 1, " ", 1), "backend=' ': expected a text such as 'TRITON'"),
        (lambda: MeasuredRow(SHAPE, 1, "XPU", float("nan")), "us=nan: expected a positive, finite number"),
    ],
)
def test_a_table_made_in_code_is_checked_too(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(InvalidMeasuredTable, match=words):
        make()


# -- certificates, devices, versions --


HERE = {"fp8moe": "0.1.0", "torch": "2.13.0"}


def report(**changes: Any) -> bytes:
    told = {"backend": "TRITON", "level": "certify", "verdict": "passed", "target": "cuda", "device": "H200"}
    told |= {"versions": HERE, "date": "2026-11-24T22:05:42+00:00"}
    return json.dumps(told | changes).encode()


def test_a_certificate_is_made_of_a_report_that_passed() -> None:
    name, certificate = Certificate.of_report(report(), DEVICES["h200"], HERE)
    assert (name, certificate.level, certificate.date, certificate.certified) == (
        "TRITON",
        "certify",
        "2026-11-24",
        True,
    )
    assert certificate.report != Certificate.of_report(report(seed=1), DEVICES["h200"], HERE)[1].report
    assert not Certificate.of_report(report(level="quick"), DEVICES["h200"], HERE)[1].certified


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (report(verdict="failed"), "report.verdict='failed': expected 'passed'; run fp8moe check until it is"),
        (report(verdict="incomplete"), "report.verdict='incomplete'"),
        (report(checks=[{"status": "passed"}, {"status": "waived"}]), "report.checks='1 waived': expected none"),
        (report(target="interpreter"), "report.target='interpreter': expected 'cuda'"),
        (report(device="H100 80GB HBM3"), "report.device='H100 80GB HBM3': expected 'H200'"),
        (report(backend=""), "report.backend=''"),
        (report(versions={"fp8moe": "0.1.0"}), "report.versions['torch']=None: expected '2.13.0', as here"),
        (report(versions=HERE | {"fp8moe": "0.0.9"}), "report.versions['fp8moe']='0.0.9': expected '0.1.0'"),
        (report(date=""), "date='': expected a day such as 2026-11-24"),
        (b"[]", "no report of one backend"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
    ],
)
def test_another_report_makes_no_certificate(given: bytes, words: str) -> None:
    with pytest.raises(InvalidMeasuredTable) as caught:
        Certificate.of_report(given, DEVICES["h200"], HERE)
    assert words in str(caught.value)


def test_a_report_of_the_suite_has_what_a_certificate_needs() -> None:
    from conformance.report import Report
    from conformance.results import CheckResult, Status

    passed = [CheckResult(verdict, "a check", Status.PASSED, "TRITON") for verdict in ("selects", "computes")]
    written = Report("TRITON", "TRITON", "certify", 0, "cuda", "H200", HERE, passed, date="2026-11-24T22:05:42+00:00")
    name, certificate = Certificate.of_report(written.to_json().encode(), DEVICES["h200"], HERE)
    assert (name, certificate.certified) == ("TRITON", True)


def test_features_of_an_architecture_do_not_count() -> None:
    from fp8moe import PLATFORMS, Platform

    device = MeasuredDevice("AMD Instinct MI300X", "rocm", "gfx942:sramecc+:xnack-")
    assert device.differs(PLATFORMS["mi300x"], None) is None
    assert device.differs(Platform("rocm", gcn_arch="gfx942:xnack+"), "AMD Instinct MI300X") is None
    assert "this is rocm gfx950" in str(device.differs(PLATFORMS["mi355x"], None))
    assert DEVICES["h100"].differs(PLATFORMS["h200"], None) is None  # kind and architecture are the same
    assert "this is H200" in str(DEVICES["h100"].differs(PLATFORMS["h200"], "H200"))


def test_installed_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    import fp8moe
    from fp8moe.measured import here

    assert installed_versions("fp8moe", "torch", "no-such-package") == {
        "fp8moe": fp8moe.__version__,
        "torch": metadata.version("torch"),
    }
    info = DeviceInfo("cuda", "H200", "sm90", 1, None, None, None, None, None)
    monkeypatch.setattr(here, "describe_device", lambda: info)
    here.device_name_here.cache_clear()
    assert here.device_name_here() == "H200"
    here.device_name_here.cache_clear()


# -- interpolation --


@given(st.dictionaries(st.integers(1, 1 << 20), st.floats(1e-3, 1e9), min_size=1, max_size=6), st.integers(1, 1 << 20))
def test_a_time_lies_between_its_neighbours(points: dict[int, float], tokens: int) -> None:
    curve = Curve.of("TRITON", points.items())
    time, rows = curve.time(tokens), curve.around(tokens)
    assert (time is None) == (not rows) == (not min(points) <= tokens <= max(points))
    if time is None:
        return
    if tokens in points:
        assert (time, rows) == (points[tokens], (tokens,))
        return
    low, high = rows
    assert low < tokens < high
    assert not any(low < other < high for other in points)
    log_us = curve.log_time(tokens, math.log(tokens))
    assert log_us is not None
    ends = sorted((math.log(points[low]), math.log(points[high])))
    assert ends[0] <= log_us <= ends[1]
