"""What the site's pages say: all that the code has, in its words, and figures that follow from the formulas."""

from __future__ import annotations

import inspect
import json
import math
import re
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import typer

from conformance import bounds, plugin
from conformance.bounds import accumulation
from conformance.results import Evidence, Status
from fp8moe import selector
from fp8moe.cli import app
from fp8moe.envs import SELECTOR_VARIABLES
from fp8moe.platforms import PLATFORMS
from fp8moe.registry import SEED_ORDER, Reason
from tests.docs.conftest import PAGES, SOURCE, Page

pytest.importorskip("mkdocs", reason="the site is built with mkdocs, of the extra `docs`")

DOTTED = re.compile(r"(?P<module>(?:fp8moe|conformance)(?:\.[a-z_0-9]+)*)(?::(?P<name>[A-Za-z_0-9.]+))?")
REPORTS = SOURCE.parent / "reports"


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


@pytest.mark.parametrize("name", commands())
def test_the_reference_has_every_option_of_a_command(name: str, pages: dict[str, Page]) -> None:
    page = pages["options"]
    assert f"fp8moe {name}" in page.headings
    after = page.source.split(f'<h3 id="fp8moe-{name}">')[1]
    section = after.split("<h3")[0].split("<h2")[0]
    options = [option for given in commands()[name].params for option in (*given.opts, *given.secondary_opts)]
    long = [option for option in options if option.startswith("--")]
    assert [option for option in long if option not in section] == []
    assert len(section.split("<tr>")) > len(commands()[name].params)  # a row each, and the head


def test_the_reference_has_every_option_of_pytest_and_every_variable(pages: dict[str, Page]) -> None:
    told = " ".join(pages["options"].code)
    options = set(re.findall(r'"(--fp8moe-[a-z-]+)"', inspect.getsource(plugin.pytest_addoption)))
    assert len(options) >= 12
    markers = re.findall(r'"markers", "(\w+):', inspect.getsource(plugin.pytest_configure))
    assert [name for name in (*options, *markers, *SELECTOR_VARIABLES) if name not in told] == []
    for name in {*re.findall(r"FP8MOE_[A-Z_]+", sources("fp8moe"))}:
        assert name in told, name


def sources(package: str) -> str:
    folder = Path(str(import_module(package).__file__)).parent
    return "\n".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))


def test_the_reference_has_every_exit_status(pages: dict[str, Page]) -> None:
    section = pages["options"].source.split('id="exit-statuses"')[1].split("<h2")[0]
    rows = dict(re.findall(r"<td><code>fp8moe ([\w-]+)</code></td>\s*<td>(.*?)</td>", section))
    assert list(rows) == list(commands())
    for name, command in commands().items():
        statuses = re.findall(r"(\d+):\s", command.help.partition("Exit status")[2])
        assert re.findall(r"(\d+): ", rows[name]) == statuses, name


def test_the_selectors_page_has_every_rule_in_order(pages: dict[str, Page]) -> None:
    source = inspect.getsource(selector)
    deciding = set(re.findall(r'"(R\d[a-c]?)"', source))
    assert {"R1", "R3b", "R9"} <= deciding
    table = pages["selector"].source.partition("<table>")[2].partition("</table>")[0]
    rules = re.findall(r"<strong>(R\d[a-c]?)</strong>", table)
    assert rules == sorted(rules)
    assert {f"R{number}" for number in range(1, 10)} | deciding <= set(rules)


def test_the_selectors_page_has_every_backend_device_and_reason(pages: dict[str, Page]) -> None:
    page = pages["selector"]
    names = [name for name, _, _ in SEED_ORDER]
    assert [heading for heading in page.headings if heading in names] == names
    assert [name for name in PLATFORMS if name not in page.code] == []
    assert [reason.value for reason in Reason if reason.value not in page.code] == []


def test_a_report_is_read_in_the_words_of_the_code(pages: dict[str, Page]) -> None:
    told = pages["reading-a-report"].code
    assert [word.value for word in (*Status, *Evidence) if word.value not in told] == []


def test_a_certificates_page_is_described_as_it_is(pages: dict[str, Page]) -> None:
    template = files("conformance.certificate") / "templates/certificate.html.j2"
    headings = re.findall(r"<h2[^>]*>([^<{,]+)", template.read_text(encoding="utf-8"))
    assert len(headings) > 8
    described = pages["reading-a-report"].source.partition('id="a-certificate"')[2].lower()
    assert [heading for heading in headings if heading.lower() not in described] == []


def cells(page: Page, name: str) -> list[str]:
    """What stands beside a name in a table."""
    row = re.search(rf"<td>{re.escape(name)}</td>(.*?)</tr>", page.source, re.DOTALL)
    assert row, f"{page.file.name} has no row {name!r}"
    return re.findall(r"<td>(.*?)</td>", row[1])


def test_the_example_of_a_sum_follows_from_the_formula(pages: dict[str, Page]) -> None:
    """As a reader would work it out, with what the page says."""
    page = pages["bounds"]
    names = (
        "K",
        "z, the exact sum",
        "P, the largest prefix at every 128",
        "Q, the root of the sum of squared products",
    )
    k, z, p, q = (float(cells(page, name)[0]) for name in names)
    assert "eps32 = 2 u sqrt(K P^2 + (K + n^2) Q^2) + m u |z| + K t\n" in page.words
    u, n, m, t = 2**-24, accumulation.PRODUCT_ROUNDINGS, accumulation.SCALE_ROUNDINGS, accumulation.TINY
    eps = 2 * u * math.sqrt(k * p**2 + (k + n**2) * q**2) + m * u * abs(z) + k * t
    bound, computed, error, ratio = cells(page, "fp32")
    assert f"{eps:.6g}" == f"{float(bound):.6g}"
    assert float(error) > 0
    assert f"{float(error) / float(bound):.2f}" == ratio
    assert f"{abs(float(computed) - z):.2g}" == f"{float(error):.2g}"


def test_the_example_of_an_element_follows_from_the_formula(pages: dict[str, Page]) -> None:
    page = pages["bounds"]
    assert "E1 = |output - R| / (2 hulp(|R| + B0 + F) + B0 + F)\n" in page.words
    names = ("R, the recipe oracle's", "d = y - R", "B0, errors that add up", "F, flips", "hulp, half a bf16 spacing")
    columns = list(zip(*(map(float, cells(page, name)) for name in names), strict=True))
    limits, ratios = cells(page, "limit, 2 hulp + B0 + F"), cells(page, "E1 = &#124;d&#124; / limit")
    assert len(columns) == len(limits) == len(ratios) == 2
    for (r, d, smooth, flips, hulp), limit, ratio in zip(columns, limits, ratios, strict=True):
        assert hulp == 2.0 ** (math.floor(math.log2(abs(r) + smooth + flips)) - 8)
        assert f"{2 * hulp + smooth + flips:.6g}" == f"{float(limit):.6g}"
        assert f"{abs(d) / float(limit):.3f}" == ratio
    assert columns[0][2] < columns[1][2]  # what is not declared has the wider bound


def test_the_formulas_name_constants_that_are_there(pages: dict[str, Page]) -> None:
    known = {
        name
        for module in iter_modules(bounds.__path__)
        for name in vars(import_module(f"{bounds.__name__}.{module.name}"))
    }
    formulas = re.findall(r"<pre>.*?</pre>", pages["bounds"].source, re.DOTALL)
    named = {name for formula in formulas for name in re.findall(r"\b[A-Z]+(?:_[A-Z0-9]+)+\b|\b[A-Z]{4,}\b", formula)}
    assert len(named) > 6
    assert named - known - {"GEMM"} == set()


@pytest.mark.parametrize("name", sorted(PAGES - {"vendors"}))
def test_what_a_page_names_is_there(name: str, pages: dict[str, Page]) -> None:
    """Functions, classes and modules in the text."""
    named = [found for code in pages[name].code if (found := DOTTED.fullmatch(code))]
    assert len(named) > {"bounds": 20, "selector": 10}.get(name, -1)
    for found in named:
        value: Any = import_module(found["module"]) if is_module(found["module"]) else None
        owner, _, attribute = found["module"].rpartition(".")
        if value is None:
            value = getattr(import_module(owner), attribute)
        for part in (found["name"] or "").split("."):
            value = getattr(value, part) if part else value


def is_module(name: str) -> bool:
    try:
        import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def test_the_kill_score_is_that_of_the_newest_reports(pages: dict[str, Page]) -> None:
    if not REPORTS.is_dir():
        pytest.skip("a source distribution has no kept runs")
    page = pages["kill-score"]
    newest = max((REPORTS / "cpu").glob("*-zoo"))
    found = [content for file in newest.glob("*.json") if (content := json.loads(file.read_text(encoding="utf-8")))]
    assert found
    assert f"reports/cpu/{newest.name}" in page.words
    scores = re.findall(r"<td>(\d+)</td>\s*<td>(\d+)</td>\s*<td>[\d.]+%</td>", page.source)
    for content in found:
        for score in content["score"].values():
            assert not score["mutants"] or (str(score["mutants"]), str(score["killed"])) in scores
    families = page.source.partition('id="by-family"')[2].split("<h3")[1:]
    assert len(families) == len(scores)
    for score, section in zip(scores, families, strict=True):
        rows = re.findall(r"<td>(\d+)</td>\s*<td>(\d+)</td>", section)
        assert tuple(str(sum(map(int, column))) for column in zip(*rows, strict=True)) == score
        assert "zoo --score" in re.sub("<[^>]*>", "", section)  # whose words have colours of their own
