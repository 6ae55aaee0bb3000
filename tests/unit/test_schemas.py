"""The published schemas beside the readers: real files fit, what a reader refuses does not, and their fields are the
same."""

from __future__ import annotations

import base64
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from conformance import kept_text
from conformance.certificate.reading import SURROUNDINGS
from conformance.certificate.times.kept import FORMAT as ROUNDS_FORMAT
from conformance.certificate.times.kept import ROUNDS, TABLE, WITHOUT_STATE, TimedCase, Times
from conformance.certificate.times.reading import (
    DEVICE,
    LEAST_US,
    MOST_BACKENDS,
    MOST_CASES,
    MOST_NAME,
    MOST_US,
    RATES,
    REASONS,
    rounds_from,
)
from conformance.certificate.writing import STATEMENT_FILE, TIMES
from conformance.certification import check_backend
from conformance.editions import DEVICES as CERTIFIED_ON
from conformance.levels import LEVELS
from conformance.plan import DEVICES
from conformance.rates import Rates
from conformance.report import DERIVED, LATER, VERDICTS, Report
from conformance.results import CheckResult, Evidence, Status
from conformance.schemas import OF, schema
from conformance.timing.side_by_side import ROUNDS as EACH
from conformance.timing.state import Watch
from conformance.untrusted import object_of
from conformance.waivers import WaiverError
from conformance.waivers.file import LONGEST, LONGEST_FIELD, MOST_WAIVERS, waivers_from
from conformance.waivers.waiver import FIELDS
from fp8moe.config import ACTIVATIONS
from fp8moe.measured import file as measured_file
from fp8moe.measured.rows import FORMATS, InvalidMeasuredTable, MeasuredDevice
from fp8moe.measured.rows import Certificate as MeasuredCertificate
from fp8moe.measured.table import MeasuredTable
from fp8moe.schemes import SCHEMES
from tests.unit.certificates import BlockAlone, evidence_in, invented, written
from tests.unit.command_line import no_variables, run  # noqa: F401 (a fixture)
from tests.unit.hostile import places, put
from tests.unit.measured_tables import LAYER, carried_over, rows_of, table_of
from tests.unit.timed_certificates import on_h200, times, with_times
from tests.unit.waiver_files import TODAY
from tests.unit.waiver_files import written as waivers_written

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

jsonschema = pytest.importorskip("jsonschema", reason="holds the schemas against files; part of fp8moe[test]")
ROOT = Path(__file__).parents[2]
ABSENT = object()
WRONG: tuple[Any, ...] = (None, True, 3, -1.5, "", "x", [], {}, [3], {"x": 3}, 10**400, "x" * 20_001, ABSENT)
"""Put in the place of every value; ABSENT: taken away."""


def validator(name: str) -> Any:
    return jsonschema.Draft202012Validator(schema(name))


def fits(name: str, value: Any) -> bool:
    return bool(validator(name).is_valid(value))


def smoke() -> dict[str, Any]:
    """A report as a run makes it, of one scheme; its budget ends it, so that what was not run is in it, too."""
    found: dict[str, Any] = json.loads(check_backend(BlockAlone, device="cpu", budget_s=1.0).to_json())
    return found


def little() -> dict[str, Any]:
    """A report with a value in every field."""
    waiver = dict.fromkeys(FIELDS, "x")
    told: dict[str, Any] = json.loads(invented(failing=1).to_json())
    told |= {"checks": told["checks"][:4], "excluded": told["excluded"][:2], "waivers": [waiver]}
    told["unshrunk"] = {"computes.equivalence v1:M=3": "v1:M=4"}
    told["checks"][2] |= {"statistics": {"E1": 0.5}, "measured": {"ratio": "inf"}, "scope": "all", "reproduce": "again"}
    return told


# -- the schemas themselves --


@pytest.mark.parametrize("name", OF)
def test_a_schema_is_one_and_tells_what_every_field_is(name: str) -> None:
    found = schema(name)
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["$id"] == f"urn:fp8moe:schema:{name}:1"
    assert "://" not in found["$id"]
    for where, each in _properties(found):
        assert each.get("description", "").endswith("."), where
    assert found["title"]


def _properties(found: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(found, dict):
        for key, value in found.get("properties", {}).items():
            yield f"{where}.{key}", value
        for key, value in found.items():
            yield from _properties(value, f"{where}.{key}")


def test_the_command_prints_them() -> None:
    assert json.loads(run("schema", "report").stdout) == schema("report")
    bundled = json.loads(run("schema", "evidence").stdout)
    assert bundled["$defs"]["report"] == schema("report")
    listed = run("schema").stdout
    assert all(f"urn:fp8moe:schema:{name}:1" in listed for name in OF)
    assert "did you mean report?" in run("schema", "reprot", status=64).stderr


# -- their fields are those of the readers --


def test_a_report_has_the_fields_of_its_class() -> None:
    found = schema("report")
    names = {field.name for field in fields(Report)}
    assert set(found["properties"]) == names | set(DERIVED)
    assert set(found["required"]) == (names | set(DERIVED)) - set(LATER)
    result = found["$defs"]["result"]
    assert set(result["properties"]) == {field.name for field in fields(CheckResult)}
    needed = {f.name for f in fields(CheckResult) if f.default is MISSING and f.default_factory is MISSING}
    assert set(result["required"]) == needed
    assert result["properties"]["status"]["enum"] == [one.value for one in Status]
    assert result["properties"]["evidence"]["enum"] == [one.value for one in Evidence]
    assert (
        result["properties"]["verdict"]["enum"] == list(VERDICTS) == list(found["properties"]["verdicts"]["required"])
    )
    assert found["properties"]["level"]["enum"] == list(LEVELS)
    assert found["properties"]["target"]["enum"] == [name for name in DEVICES if name != "auto"]
    assert set(CERTIFIED_ON) <= set(found["properties"]["target"]["enum"])


def test_a_certificate_has_the_fields_that_are_written(tmp_path: Path) -> None:
    evidence = evidence_in(written(tmp_path / "certificate"))
    found = schema("evidence")
    assert set(found["properties"]) == set(evidence)
    assert set(found["required"]) == set(evidence) - {"release", TIMES}  # which earlier ones lack
    assert set(SURROUNDINGS) < set(evidence)
    envelope, statement = _statement(tmp_path / "certificate")
    assert set(schema("envelope")["properties"]) == set(envelope)
    assert set(schema("statement")["properties"]) == set(statement)
    assert set(schema("statement")["properties"]["predicate"]["properties"]) == set(statement["predicate"])


def test_times_have_the_fields_of_their_reader() -> None:
    found = schema("rounds")["properties"]
    case = found["cases"]["items"]
    assert set(found) == set(schema("rounds")["required"])
    assert set(case["properties"]) == {field.name for field in fields(TimedCase)} == {*case["required"], "state"}
    assert set(case["properties"]["state"]["properties"]) == set(case["properties"]["state"]["required"])
    assert set(case["properties"]["state"]["properties"]) == set(Watch().figures())
    assert set(case["properties"]["state"]["properties"]["slower"]["items"]["enum"]) == REASONS
    assert set(found["device"]["properties"]) == DEVICE
    assert set(found["rates"]["properties"]) == {field.name for field in fields(Rates)} == RATES
    assert found["format"]["enum"] == [WITHOUT_STATE, ROUNDS_FORMAT]
    assert found["cases"]["maxItems"] == MOST_CASES
    us = case["properties"]["us"]
    assert us["maxProperties"] == case["properties"]["absent"]["maxProperties"] == MOST_BACKENDS
    assert us["propertyNames"]["maxLength"] == MOST_NAME
    assert us["additionalProperties"]["minItems"] == us["additionalProperties"]["maxItems"] == EACH
    bounds = us["additionalProperties"]["items"]
    assert (bounds["minimum"], bounds["maximum"]) == (LEAST_US, MOST_US)
    assert set(schema("evidence")["properties"][TIMES]["properties"]) == set(Times().told)


def test_a_measured_table_has_the_fields_of_its_reader() -> None:
    found = schema("measured")["properties"]
    shape = found["shapes"]["items"]
    assert set(found) == set(measured_file.KEYS) == set(schema("measured")["required"])
    assert set(shape["properties"]) == {*measured_file.SHAPE_KEYS, "tokens", "us"} == set(shape["required"])
    assert set(found["device"]["properties"]) == {field.name for field in fields(MeasuredDevice)}
    one = found["certificates"]["additionalProperties"]["properties"]
    assert set(one) == {field.name for field in fields(MeasuredCertificate)}
    assert shape["properties"]["scheme"]["enum"] == list(SCHEMES)
    assert shape["properties"]["activation"]["enum"] == list(ACTIVATIONS)
    assert shape["properties"]["format"]["enum"] == list(FORMATS)
    assert found["format"]["const"] == measured_file.FORMAT


def test_a_waiver_has_the_fields_of_its_reader() -> None:
    found = schema("waivers")["properties"]["waiver"]
    assert list(found["items"]["properties"]) == list(FIELDS) == found["items"]["required"]
    assert found["maxItems"] == MOST_WAIVERS
    for name in FIELDS[:-1]:
        assert found["items"]["properties"][name]["maxLength"] == LONGEST.get(name, LONGEST_FIELD)


# -- real files fit --


def test_kept_reports_fit() -> None:
    paths = [path for path in sorted(ROOT.glob("reports/**/*.json*")) if _is_report(path)]
    if not paths:
        pytest.skip("needs a checkout: the kept reports are in no distribution")
    assert len(paths) > 10
    for path in paths:
        told = json.loads(kept_text.read_text(path))
        told["checks"] = told["checks"][:: max(1, len(told["checks"]) // 200)]
        validator("report").validate(told)


def _is_report(path: Path) -> bool:
    try:
        Report.from_json(kept_text.read_text(path))
    except ValueError:
        return False
    return True


def test_a_fresh_report_and_a_certificate_fit(tmp_path: Path) -> None:
    validator("report").validate(smoke())
    validator("report").validate(little())
    folder = written(tmp_path / "certificate", invented(failing=1))
    validator("evidence").validate(evidence_in(folder))
    envelope, statement = _statement(folder)
    validator("envelope").validate(envelope)
    validator("statement").validate(statement)


def test_a_certificate_with_times_fits(tmp_path: Path) -> None:
    folder = with_times(tmp_path / "certificate")
    validator("evidence").validate(evidence_in(folder))
    validator("statement").validate(_statement(folder)[1])
    validator("rounds").validate(json.loads((folder / ROUNDS).read_text()))
    validator("measured").validate(json.loads((folder / TABLE).read_text()))


def _statement(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    envelope: dict[str, Any] = json.loads((folder / STATEMENT_FILE).read_text())
    return envelope, json.loads(base64.b64decode(envelope["payload"]))


def test_kept_measured_tables_fit() -> None:
    told = [json.loads(path.read_text()) for path in ROOT.glob("reports/h200/*/*.json")]
    tables = [each for each in told if each.get("format") == measured_file.FORMAT]
    assert tables or not (ROOT / "reports").exists()
    for each in (*tables, json.loads(carried_over("h200").dumps())):
        validator("measured").validate(each)


# -- what a reader refuses does not --


def changed(value: Any) -> Iterator[tuple[str, Any]]:
    """A value with every part in turn replaced by each wrong one, taken away, or with a field more."""
    for path in places(value):
        for wrong in WRONG:
            if not path and wrong is ABSENT:
                continue
            other = copy.deepcopy(value)
            if wrong is ABSENT:
                _take_away(other, path)
            else:
                whole = put(other, path, wrong)
                other = other if whole is None and path else whole
            yield f"{path} {str(wrong)[:20]}", other
        more = copy.deepcopy(value)
        at = more
        for step in path:
            at = at[step]
        if isinstance(at, dict):
            at["tomorrow"] = 1
            yield f"{path} tomorrow", more


def _take_away(value: Any, path: tuple[Any, ...]) -> None:
    for step in path[:-1]:
        value = value[step]
    del value[path[-1]]


def check_refusals(name: str, valid: Any, read: Callable[[Any], object], error: type[Exception]) -> None:
    """Everything that `read` refuses with `error` does not fit the schema; and there is much of it."""
    held, refused = validator(name), 0
    assert held.is_valid(valid)
    read(valid)
    for where, value in changed(valid):
        told = None
        try:
            read(value)
        except error as problem:
            told = problem
        refused += told is not None
        assert told is None or not held.is_valid(value), f"{where}: {told}"
    assert refused > 100


def test_a_report_that_is_refused_does_not_fit() -> None:
    check_refusals("report", little(), lambda told: Report.from_json(json.dumps(told)), ValueError)


def test_rounds_that_are_refused_do_not_fit() -> None:
    told = json.loads(times(1).files(on_h200().versions)[ROUNDS])

    def read(value: Any) -> object:
        return rounds_from(object_of(json.dumps(value), ROUNDS))

    check_refusals("rounds", told, read, ValueError)


def test_a_measured_table_that_is_refused_does_not_fit() -> None:
    rows = rows_of(LAYER, {"TRITON": {1: 23.5, 16: 99}, "MARLIN": {1: 34, 16: 101.25}})
    told = json.loads(table_of(rows, ("TRITON",)).dumps())

    def read(value: Any) -> object:
        if isinstance(value, dict) and str(value.get("digest")).startswith("sha256:"):
            value = {**value, "digest": measured_file.digest_of(value)}  # whoever edits the file can write one
        return MeasuredTable.loads(json.dumps(value))

    beyond = ("no backend of this name", "one for each number of tokens", "given twice")

    def read_what_can_be_said(value: Any) -> object:
        try:
            return read(value)
        except InvalidMeasuredTable as error:
            if any(text in str(error) for text in beyond):
                return None
            raise

    check_refusals("measured", told, read_what_can_be_said, InvalidMeasuredTable)


def test_waivers_that_are_refused_do_not_fit() -> None:
    content = tomllib.loads(waivers_written({}, {"case": "v1:M=16,scheme=channel_tok", "owner": "GEMM team"}))
    for waiver in content["waiver"]:
        waiver["expires"] = str(waiver["expires"])
    looked_up = ("no check of a case", "expected a range", "a URL, or an issue", "case ", "covers the same")

    def read(value: Any) -> object:
        if not isinstance(value, dict):
            raise WaiverError("a file of TOML is a table")
        try:
            return waivers_from(value, "waivers", today=TODAY)
        except WaiverError as error:
            if any(text in str(error) for text in looked_up):
                return None
            raise

    check_refusals("waivers", content, read, WaiverError)
