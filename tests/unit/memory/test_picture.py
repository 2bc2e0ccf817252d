import importlib.util
import itertools
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from eightgig.errors import ConfigError
from eightgig.memory.picture import draw_plan, write_picture
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


def test_the_ending_decides_the_kind(tmp_path: Path) -> None:
    plan = _plan()
    write_picture(plan, tmp_path / "plan.SVG", title="E2B")
    assert (tmp_path / "plan.SVG").read_text(encoding="utf-8") == draw_plan(plan, title="E2B")
    with pytest.raises(ConfigError, match=r"plan\.jpg cannot be drawn") as error:
        write_picture(plan, tmp_path / "plan.jpg")
    assert "plan.svg" in error.value.fix


def test_a_png_is_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws PNG")
    write_picture(_plan(), tmp_path / "plan.png", title="E2B")
    content = (tmp_path / "plan.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 200


def test_without_matplotlib_a_png_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="matplotlib is not installed") as error:
        write_picture(_plan(), tmp_path / "plan.png")
    assert "pip install" in error.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_picture(_plan(), tmp_path / "file" / "plan.svg")
