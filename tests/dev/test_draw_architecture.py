"""dev/draw_architecture.py: the committed picture shows docs/layers.json as it is."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


def shown(picture):
    """The table that a picture was drawn from."""
    return json.loads(ElementTree.parse(picture).getroot().find(f".//{DESCRIPTION}").text)


def test_the_committed_picture_shows_the_table_as_it_is(script):
    rows = json.loads(script.TABLE.read_text(encoding="utf-8"))["rows"]
    assert shown(script.PICTURE) == rows, "run python dev/draw_architecture.py"
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert f"({script.PICTURE.relative_to(ROOT / 'docs')})" in page


def test_every_name_has_a_block_and_lies_above_what_it_imports(script):
    rows = json.loads(script.TABLE.read_text(encoding="utf-8"))["rows"]
    (axes,) = script.draw(rows).axes
    places = {text.get_text(): text.get_position() for text in axes.texts}
    heights = [{round(places[name][1], 3) for name in row} for row in rows]
    assert all(len(of_row) == 1 for of_row in heights)
    heights = [y for (y,) in heights]
    assert heights == sorted(heights, reverse=True)
    assert {words for row in rows for words in row.values()} <= set(places)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert all(left < x < right and bottom < y < top for x, y in places.values())


def test_another_table_gives_another_picture(script, tmp_path, capsys):
    table = tmp_path / "table.json"
    table.write_text('{"rows": [{"tools": "above"}, {"d2ext.ops": "below"}]}')
    assert script.main(["--table", str(table), "--output", str(tmp_path / "a.svg")]) == 0
    assert shown(tmp_path / "a.svg") == [{"tools": "above"}, {"d2ext.ops": "below"}]
    assert script.main(["--output", str(tmp_path / "no/a.svg")]) == 1
    assert capsys.readouterr().err.startswith("error: cannot draw ")
