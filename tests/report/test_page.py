"""The page and its numbers as text: complete, escaped, self-contained."""

import json
import re

import numpy as np
import pytest

from d2ext.evaluation import coco_metrics, evaluate_coco
from d2ext.evaluation.bootstrap import bootstrap_interval
from d2ext.report import Words, write_numbers, write_report
from d2ext.report.measures import as_numbers, difference, kinds_of, measure
from d2ext.report.sources import load_truth

from tests.report.helpers import make_entry, make_models


@pytest.fixture
def models(shapes_few):
    return make_models(shapes_few)


def test_the_page_is_complete_and_needs_nothing_else(models, shapes_few, tmp_path):
    records, truth, entries = models
    path = tmp_path / "new/report.html"
    words = Words("A <title>", "Lead.", [("7 s", "in total")], [("Go on", "d2ext x")], ["machine"])
    measures = write_report(path, entries, truth, records, shapes_few, words)
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?://|src=\"(?!data:|\{)", page.replace(
        'href="data:,"', ""))  # fmt: skip
    assert page.count("<script") == 2 and "A &lt;title&gt;" in page
    assert "good &amp; &lt;fast&gt;" in page and "good & <fast>" not in page
    for name in ("Lead.", "7 s", "Go on", "machine", "cascade, stage by stage", "AP to the best"):
        assert name in page
    for own in measures:
        assert f"{own.tables['segm'].total['AP'].value:.1f}" in page
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])
    assert data["models"] == [entry.name for entry in entries]
    assert len(data["images"]) == len(truth.images)
    assert {len(image["found"]) for image in data["images"]} == {3}
    assert all(list(image["stages"]) == ["1"] for image in data["images"])
    assert all(len(image["stages"]["1"]) == 2 for image in data["images"])


def test_names_that_could_end_the_script_do_not(shapes_few, tmp_path):
    records, truth = load_truth(shapes_few)
    evil = "</script><script>alert(1)</script>"
    truth = truth._replace(class_names=[evil, *truth.class_names[1:]])
    entries = [make_entry(evil, truth)]
    write_report(tmp_path / "r.html", entries, truth, records, evil)
    assert "<script>alert" not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_numbers_are_those_of_the_evaluation(models):
    _, truth, entries = models
    measures = measure(entries, truth)
    for entry, own in zip(entries, measures):
        for kind in ("segm", "bbox"):
            expected = coco_metrics(evaluate_coco(truth, entry.detections, kind), truth.class_names)
            total = own.tables[kind].total
            for name, value in total.items():
                assert value.value == pytest.approx(expected[name], nan_ok=True)
            interval = bootstrap_interval(truth, entry.detections, kind)
            assert total["AP"][1:] == pytest.approx(interval)
            for label, name in enumerate(truth.class_names):
                own_class = own.tables[kind].classes[label]["AP"].value
                assert own_class == pytest.approx(expected[f"AP-{name}"], nan_ok=True)
    staged = measures[1].stages
    assert len(staged) == 3 and not measures[0].stages
    assert staged[-1]["segm"]["AP"] == pytest.approx(measures[1].tables["segm"].total["AP"].value)


def test_differences_are_of_the_same_draws(models):
    _, truth, entries = models
    good, _, weak = measure(entries, truth)
    found = difference(weak.tables["segm"], good.tables["segm"])
    assert found.low < found.value < found.high < 0
    same = difference(good.tables["segm"], good.tables["segm"])
    assert same == (0, 0, 0)
    # Much of what images have in common is not in the difference.
    widths = [x.tables["segm"].total["AP"] for x in (weak, good)]
    assert found.high - found.low < sum(x.high - x.low for x in widths)


def test_written_numbers_are_strict_json(models, tmp_path):
    _, truth, entries = models
    nothing = entries[0]._replace(name="blind", detections=[None] * len(truth.images))
    measures = measure([nothing], truth)
    write_numbers(str(tmp_path / "metrics.json"), [nothing], measures)

    def refuse(text):
        raise ValueError(text)

    text = (tmp_path / "metrics.json").read_text()
    values = json.loads(text, parse_constant=refuse)["blind"]
    assert values == as_numbers([nothing], measures)["blind"]
    assert values["segm/AP"] == 0 and values["calibration error"] is None


def test_a_model_of_boxes_only_is_compared_by_boxes(models, shapes_few, tmp_path):
    records, truth, entries = models
    boxes = [x and x._replace(masks=None) for x in entries[0].detections]
    own = entries[0]._replace(name="boxes", detections=boxes)
    assert kinds_of([own, entries[1]]) == ("bbox",)
    (measures, _) = write_report(
        tmp_path / "r.html", [own, entries[1]], truth, records, shapes_few
    )  # fmt: skip
    expected = coco_metrics(evaluate_coco(truth, boxes, "bbox"), truth.class_names)["AP"]
    assert measures.tables["bbox"].total["AP"].value == pytest.approx(expected)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Boxes" in page and "Masks</caption>" not in page


def test_many_classes_have_a_list_of_mix_ups_instead_of_a_table(models, shapes_few, tmp_path):
    records, truth, entries = models
    more = [f"more {i}" for i in range(20)]
    truth = truth._replace(
        class_names=[*truth.class_names, *more],
        category_ids=list(range(1, len(truth.class_names) + 21)),
    )
    write_report(tmp_path / "r.html", entries, truth, records, shapes_few, most=2)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'class="matrix"' not in page and re.search(r"<li>\w+ taken for \w+: \d+</li>", page)
    assert f"{len(truth.images) - 2} images are left out" in page


def test_charts_follow_the_reader_s_scheme():
    import base64

    from d2ext.report.charts import learning_charts, precision_recall_chart

    text = precision_recall_chart([np.linspace(1, 0, 101)] * 2)
    svg = base64.b64decode(text.partition(",")[2]).decode()
    assert svg.startswith("<svg") and "prefers-color-scheme:dark" in svg
    assert "currentColor" in svg and "#010203" not in svg and "http" not in svg.replace(
        "http://www.w3.org", "")  # fmt: skip
    assert learning_charts([[], [{"iteration": 1, "total_loss": 1.0}]], "segm") == []


def test_data_without_objects_and_pages_without_images_are_fine(models, shapes_few, tmp_path):
    records, truth, entries = models
    empty = truth._replace(images=[image._replace(annotations=[]) for image in truth.images])
    for compared in (entries, entries[:1]):
        measures = write_report(tmp_path / "r.html", compared, empty, records, shapes_few, most=0)
        assert np.isnan(measures[0].tables["segm"].total["AP"].value)
        page = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert not re.search(r">\s*-?nan", page)
        assert as_numbers(compared, measures)[compared[0].name]["segm/AP"] is None
