"""The plots of a gate run: well-formed, legible, to scale, readable without colour, and in light as in dark."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from conformance.gate.baseline import Baseline
from conformance.gate.shown import svg, words
from conformance.gate.shown.history import LEVEL, Dated, dated, histories, worst
from conformance.gate.shown.history_plot import history_plot
from conformance.gate.shown.plots import ratio_plot, round_step
from conformance.gate.verdicts import Mode, Outcome, RunVerdict
from fp8moe.texts import visible
from tests.unit.gate_runs import HOSTILE, days, record, verdict, verdicts

SVG = "{http://www.w3.org/2000/svg}"
WIDEST = 7.9
"""Pixels of a character of a wide interface font at 12 pixels, bold; other sizes in proportion."""
NAMES = [
    f"acme_kernels.moe:AcmeExperts v1:scheme=channel_tok,E=256,k=8,H=7168,I=2048,M={k},law=skewed" for k in range(40)
]


def parsed(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    return root


def texts(root: ElementTree.Element) -> list[tuple[float, float, float, str]]:
    """Of every text its left and right end at most, its baseline, and what it says."""
    found = []
    for one in root.iter(f"{SVG}text"):
        said, style = one.text or "", one.get("class", "")
        wide = svg.CHAR if "f8-mono" in style else WIDEST * (15 / 12 if "f8-title" in style else 1)
        if "f8-strong" not in style and "f8-mono" not in style:
            wide *= 0.85
        x, y, width = float(one.get("x", "")), float(one.get("y", "")), svg.columns(said) * wide
        x -= {"start": 0.0, "middle": width / 2, "end": width}[one.get("text-anchor", "")]
        found.append((x, x + width, y, said))
    return found


def assert_legible(text: str) -> None:
    """No text leaves the picture or meets another on its line."""
    root = parsed(text)
    found = sorted(texts(root), key=lambda one: (one[2], one[0]))
    for left, right, y, said in found:
        assert left >= 0, said
        assert right <= float(root.get("width", "")), said
        assert 10 <= y <= float(root.get("height", "")), said
    for (_, right, y1, one), (left, _, y2, two) in pairwise(found):
        assert y1 != y2 or right <= left, (one, two)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("palette", [svg.LIGHT, svg.DARK])
@pytest.mark.parametrize("behind", ["ground", "band"])
def test_every_colour_stands_out(palette: dict[str, str], behind: str) -> None:
    for role in ("ink", "muted", *(outcome.value for outcome in Outcome)):
        light, dark = sorted((luminance(palette[role]), luminance(palette[behind])), reverse=True)
        # WCAG 2, success criterion 1.4.3, level AA, for text.
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (role, behind)


def test_palettes_have_the_same_roles_and_are_both_in_the_file() -> None:
    assert set(svg.LIGHT) == set(svg.DARK)
    text = ratio_plot(verdicts(NAMES))
    light, dark = text.split("@media (prefers-color-scheme:dark)")
    assert f".f8-slower{{color:{svg.LIGHT['slower']}}}" in light
    assert f".f8-slower{{color:{svg.DARK['slower']}}}" in dark


def test_ratio_plot_shows_every_cell_with_its_outcome_in_words() -> None:
    run = verdicts(NAMES)
    text = ratio_plot(run)
    assert_legible(text)
    found = texts(parsed(text))
    names = "".join(said for left, _, _, said in found if left == 16.0)
    for cell in run.cells:
        assert cell.cell.replace(" ", "") in names.replace(" ", "")
    for outcome in Outcome:
        # In the legend once, and in ten rows.
        assert sum(said == outcome.value for *_, said in found) == 1 + 10
    assert sum(said == words.Outcome.SLOWER.value for *_, said in found) == 11
    assert sum("noise too wide" in said for *_, said in found) == 10
    root = parsed(text)
    title, told = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert told is not None
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == f"{title.get('id')} {told.get('id')}"
    assert "10 slower, 10 inconclusive, 10 faster, 10 same" in (title.text or "")
    assert len(set(svg.MARKS.values())) == len(Outcome)


def places(text: str, outcome: Outcome) -> list[float]:
    """Where the marks of an outcome are in the plotting area, from above."""
    groups = [one for one in parsed(text).iter(f"{SVG}g") if one.get("class") == f"f8-{outcome.value}"]
    where = [re.findall(r"[\d.]+", one.get("transform", "")) for one in groups]
    return [float(x) for x, y in where if float(y) > 90 and float(x) < 735]


def test_ratio_plot_is_to_scale() -> None:
    ratios = [1.09, 1.06, 1.03]
    cells = [verdict(f"a v1:M={k}", Outcome.SLOWER, ratio) for k, ratio in enumerate(ratios)]
    cells += [verdict("b v1:M=1", Outcome.SAME, 1.0), verdict("c v1:M=1", Outcome.FASTER, 1 / 1.06)]
    text = ratio_plot(RunVerdict(Mode.STORED, tuple(cells), 1.0, 0.005))
    (one,), (less,), more = places(text, Outcome.SAME), places(text, Outcome.FASTER), places(text, Outcome.SLOWER)
    scale = [(x - one) / math.log(ratio) for x, ratio in zip(more, ratios, strict=True)]
    assert scale == pytest.approx([scale[0]] * 3, rel=0.01)  # coordinates have a tenth of a pixel
    assert one - less == pytest.approx(more[1] - one, abs=0.11)
    band = [one for one in parsed(text).iter(f"{SVG}rect") if one.get("class") == "f8-band"][-1]
    left, width = float(band.get("x", "")), float(band.get("width", ""))
    assert (left, left + width) == pytest.approx(
        (one - scale[0] * math.log1p(0.006), one + scale[0] * math.log1p(0.006)), abs=0.2
    )


def test_one_cell_far_off_does_not_squeeze_the_others() -> None:
    usual = [verdict(f"a v1:M={k}", Outcome.SAME, 1 + 0.001 * k) for k in range(9)]
    far = verdict("b v1:M=1", Outcome.SLOWER, 40.0)
    text = ratio_plot(RunVerdict(Mode.STORED, (*usual, far), 1.0, 0.005))
    assert_legible(text)
    same = places(text, Outcome.SAME)
    assert max(same) - min(same) > 10
    assert max(places(text, Outcome.SLOWER)) > max(same) + 100
    assert any("40.0000" in said for *_, said in texts(parsed(text)))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    text = ratio_plot(verdicts([name] * 4))
    assert_legible(text)
    tags = {one.tag.removeprefix(SVG) for one in parsed(text).iter()}
    assert tags == {"svg", "title", "desc", "style", "rect", "text", "line", "path", "g"}
    assert any(visible(name)[:40] in (one.text or "") for one in parsed(text).iter(f"{SVG}title"))
    history = history_plot(days({name: 0.1}, {name: 0.11}))
    assert_legible(history)
    assert any(said.startswith(visible(name)[:30].rstrip()) for *_, said in texts(parsed(history)))


def test_a_huge_run_is_cut_and_says_so() -> None:
    text = ratio_plot(verdicts([f"a v1:M={k}" for k in range(500)]))
    assert_legible(text)
    said = [said for *_, said in texts(parsed(text))]
    assert "440 cells more, of which 125 the same: not drawn here" in said
    assert sum("v1:M=" in one for one in said) == 60
    assert said.count("slower") == 1 + 60  # in the legend, and in every row that is drawn
    with pytest.raises(ValueError, match="rows=0"):
        ratio_plot(verdicts(NAMES), 0)


def test_nothing_measured_and_nothing_at_all() -> None:
    nothing = verdict("a v1:M=1", Outcome.INCONCLUSIVE, math.nan)
    for cells in ((nothing,), ()):
        assert_legible(ratio_plot(RunVerdict(Mode.STORED, cells, 1.0, 0.005)))
    assert places(ratio_plot(RunVerdict(Mode.STORED, (nothing,), 1.0, 0.005)), Outcome.INCONCLUSIVE) == []


@pytest.mark.parametrize(("about", "step"), [(0.021, 0.05), (0.02, 0.02), (0.6, 1.0), (1.0, 1.0), (3e-4, 5e-4)])
def test_steps_are_round(about: float, step: float) -> None:
    assert round_step(about) == pytest.approx(step)


def test_wrapped_loses_nothing_and_keeps_to_its_columns() -> None:
    name = "acme.moe:Experts v1:E=256,k=8,名前名前名前名前,H=7168"
    lines = svg.wrapped(name, 20, 9)
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert max(map(svg.columns, lines)) <= 20
    cut = svg.wrapped("x" * 99, 20, 2)
    assert [len(line) for line in cut] == [20, 20]
    assert cut[1].endswith("…")


def test_history_names_what_the_last_run_changed() -> None:
    runs = days(
        *({"up": 0.0, "down": 0.0, "lost": 0.0} for _ in range(4)), {"up": 0.05, "down": -0.05, "lost": math.nan}
    )
    found = histories(reversed(runs))
    assert found["up"].change == pytest.approx(0.05)
    assert [history.cell for history in worst(found, 2)] == ["up", "down"]
    assert str(found["up"]) == "last +5.13% against the mean before"
    assert str(found["lost"]) == "in the last run too few rounds were valid"
    assert str(histories(runs[:1])["up"]) == "nothing to compare the last run with"
    low, high = found["up"].points[0].limits
    expected = runs[0].record.cells["up"].estimate
    assert (low, high) == (math.exp(expected.low(LEVEL)), math.exp(expected.high(LEVEL)))
    assert low < 1 < high


def test_history_breaks_where_runs_are_not_comparable() -> None:
    runs = days({"a": 0.0}, {"a": 0.0}, {"a": 0.3}, {"a": 0.31})
    runs[2:] = [Dated(run.date, record({"a": 0.3 + 0.01 * k}, {"driver": "2"})) for k, run in enumerate(runs[2:])]
    assert histories(runs)["a"].change == pytest.approx(0.01)
    text = history_plot(runs)
    assert_legible(text)
    said = [said for *_, said in texts(parsed(text))]
    assert "[1] driver 1 became 2" in said
    assert said.count("[1]") == 1
    yardstick = [Dated("2026-12-01T00:00:00Z", record({"a": 0.3}, {"driver": "2"}, "compute"))]
    assert "yardstick memory became compute" in history_plot([*runs, *yardstick])
    # Three lines between four dates, but for the one that is broken.
    thin = [
        one
        for one in parsed(text).iter(f"{SVG}line")
        if one.get("class") == "f8-muted" and one.get("y1") != one.get("y2")
    ]
    ticks = [one for one in thin if one.get("x1") == one.get("x2")]
    assert (len(ticks), len(thin) - len(ticks)) == (4, 1)


def test_history_draws_every_run_and_chosen_cells() -> None:
    runs = [run for run in days(*({"a": 0.01 * k, "b": 0.5, "c": math.nan} for k in range(20))) for _ in range(3)]
    text = history_plot(runs, ["c", "a"])
    assert_legible(text)
    root = parsed(text)
    assert sum(1 for _ in root.iter(f"{SVG}circle")) == 60
    crosses = [one for one in root.iter(f"{SVG}path") if "too few valid rounds" in (one[0].text or "")]
    assert len(crosses) == 60
    assert not any(said == "b" for *_, said in texts(root))
    xs = sorted({float(one.get("cx", "")) for one in root.iter(f"{SVG}circle")})
    assert len(xs) == 60
    assert all(80 <= x <= 984 for x in xs)
    many = history_plot(days({f"cell {k}": 0.0 for k in range(50)}, {f"cell {k}": 0.001 * k for k in range(50)}))
    assert_legible(many)
    assert [said for *_, said in texts(parsed(many)) if said.startswith("cell")] == [
        f"cell {k}" for k in range(49, 43, -1)
    ]


def test_history_of_one_date_and_of_near_dates() -> None:
    assert_legible(history_plot(days({"a": 0.0})))
    near = [Dated(f"2026-11-01T0{hour}:00:00", record({"a": 0.001 * hour})) for hour in range(9)]
    text = history_plot(near)
    assert_legible(text)
    assert any(said == "2026-11-01 08:00" for *_, said in texts(parsed(text)))


def test_history_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match=r"cells=\['x'\]: expected some of \['a'\]"):
        history_plot(days({"a": 0.0}), ["x"])
    with pytest.raises(ValueError, match="there is no run"):
        history_plot([])
    with pytest.raises(ValueError, match="date='yesterday': expected ISO 8601"):
        history_plot([Dated("yesterday", record({"a": 0.0}))])


def test_dated_takes_all_records_of_baselines() -> None:
    records = [record({"a": 0.0}), record({"a": 0.1})]
    kept = Baseline("2026-11-01T00:00:00+00:00", "cuda", "GPU", {}, 0, "", "", {}, records)
    assert dated([kept, kept]) == [Dated(kept.date, one) for one in records * 2]
    assert Dated("2026-11-01T00:00:00Z", records[0]).when == Dated("2026-11-01T01:00:00+01:00", records[0]).when
    assert Dated("2026-11-01", records[0]).when == Dated("2026-11-01T00:00:00Z", records[0]).when
