import itertools
import xml.etree.ElementTree as ElementTree

from eightgig.memory.picture import draw_plan
from eightgig.memory.plan import Plan, make_plan
from eightgig.units import GIB
from tests.unit.memory import cases

SVG = "{http://www.w3.org/2000/svg}"


def _plan(**memory: object) -> Plan:
    config = cases.config(memory=memory, data={"max_length": 2048})
    return make_plan(cases.gemma("12B"), cases.card(), config)


def _bars(picture: str) -> list[tuple[str, float, float]]:
    root = ElementTree.fromstring(picture)
    return [
        (title.text or "", float(bar.attrib["x"]), float(bar.attrib["width"]))
        for bar in root.iter(f"{SVG}rect")
        if (title := bar.find(f"{SVG}title")) is not None
    ]


def test_bars_are_as_wide_as_their_bytes_and_lie_side_by_side() -> None:
    plan = _plan()
    bars = _bars(draw_plan(plan))
    items = {name: size for name, size in plan.breakdown.items() if size}
    assert len(bars) == len(items)
    scale = 720 / plan.budget_bytes
    for (_, _, width), size in zip(bars, items.values(), strict=True):
        assert abs(width - size * scale) <= 0.06
    for (_, x, width), (_, following, _) in itertools.pairwise(bars):
        assert abs(x + width - following) <= 0.11


def test_a_plan_over_its_budget_reaches_beyond_the_line() -> None:
    plan = _plan(budget=GIB)
    picture = draw_plan(plan, title="12B")
    assert "does not fit" in picture
    root = ElementTree.fromstring(picture)
    (line,) = root.iter(f"{SVG}line")
    *_, (_, x, width) = _bars(picture)
    assert float(line.attrib["x1"]) < x + width


def test_a_title_cannot_break_the_picture() -> None:
    picture = draw_plan(_plan(), title='<script>alert("x")</script> & more')
    root = ElementTree.fromstring(picture)
    assert not list(root.iter(f"{SVG}script"))
    assert "<script>alert" in root.attrib["aria-label"]


def test_the_picture_is_the_same_each_time() -> None:
    assert draw_plan(_plan()) == draw_plan(_plan())
