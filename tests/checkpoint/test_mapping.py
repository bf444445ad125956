"""The rules that rename tensors, and the account of what became of each."""

import pytest
import torch

from d2ext.checkpoint.mapping import Rule, convert_weights, export_weights, shapes_of
from d2ext.errors import UserError


def zeros(**shapes):
    return {k.replace("__", "."): torch.zeros(v) for k, v in shapes.items()}


def convert(model, file, rules, **options):
    return convert_weights({k: tuple(v.shape) for k, v in model.items()}, file, rules, **options)


def test_fields_stand_for_numbers_words_or_anything():
    rule = Rule("a{x:*}.res{n}.{j}.{p:w}", "l{n-1}.{j+2}.{p}")
    assert rule.match("a.b.c.res3.0.weight") == {"x": ".b.c", "n": "3", "j": "0", "p": "weight"}
    assert rule.match("a.res12.7.bias")["x"] == ""
    for other in ("a.res.0.weight", "a.resx.0.weight", "a.res3.0.conv.weight", "b.res3.0.weight"):
        assert rule.match(other) is None
    assert rule.alternatives(rule.match("a.res3.0.weight")) == [("l2.2.weight",)]


def test_dots_in_patterns_are_dots():
    assert Rule("a.b", "x").match("aXb") is None


@pytest.mark.parametrize(
    "index, letter, count",
    [("0", "a", "a"), ("1", "b", "b1"), ("25", "z", "b25"), ("30", "?", "b30")],
)
def test_blocks_are_letters_or_a_letter_and_a_number(index, letter, count):
    rule = Rule("r{j}.c{i}", ["{j:letter}_{i:abc}", "{j:count}_{i:abc}"])
    fields = rule.match(f"r{index}.c2")
    assert rule.alternatives(fields) == [(f"{letter}_b",), (f"{count}_b",)]


def test_the_first_rule_and_the_first_present_alternative_count():
    file = {"old": torch.ones(2), "new": torch.zeros(2), "c": torch.full((2,), 3.0)}
    rules = [Rule("a", ["absent", "new", "old"]), Rule("{x:w}", "c")]
    found = convert({"a": torch.zeros(2), "b": torch.zeros(2)}, file, rules)
    assert found.weights["a"] is file["new"] and found.weights["b"] is file["c"]
    assert [(x.source, x.status) for x in found.entries] == [
        ("new", "used"),
        ("c", "used"),
        ("old", "unused"),
    ]


def test_transforms_get_all_their_tensors_and_none_for_absent_ones():
    def add(x, y, z):
        return x + y if z is None else x + y + z

    rules = [Rule("{n:w}", [("{n}.0", "{n}.1", "{n}.2?")], add, label="added")]
    file = {"a.0": torch.ones(1), "a.1": torch.ones(1), "b.0": torch.ones(1), "b.1": torch.ones(1)}
    file["b.2"] = torch.ones(1)
    found = convert(zeros(a=1, b=1, c=1), file, rules)
    assert {k: v.item() for k, v in found.weights.items()} == {"a": 2, "b": 3}
    assert [(x.status, x.source, x.note) for x in found.entries] == [
        ("used", "a.0", "added"),
        ("used", "b.0", "added"),
        ("missing", "c.0", ""),
    ]
    assert found.having("unused") == []


def test_shapes_that_differ_by_ones_are_reshaped_and_others_conflict():
    rules = [Rule("{n:w}", "{n}")]
    model = zeros(a=(4, 3), b=(4, 3, 1, 1), c=(3, 4), d=(1,))
    file = zeros(a=(4, 3, 1, 1), b=(4, 3), c=(4, 3), d=())
    file["a"] = torch.arange(12.0).reshape(4, 3, 1, 1)
    found = convert(model, file, rules)
    assert {x.target: x.status for x in found.entries} == {
        "a": "reshaped",
        "b": "reshaped",
        "c": "conflict",
        "d": "reshaped",
    }
    assert found.weights["a"].tolist() == torch.arange(12.0).reshape(4, 3).tolist()
    assert "c" not in found.weights
    with pytest.raises(
        UserError, match=r"1 tensors have another shape .*\(4, 3\) in the file, \(3"
    ):
        found.check("x", partial=True)


def test_everything_must_have_a_place_unless_partial():
    rules = [Rule("{n:w}", "{n}")]
    missing = convert(zeros(a=1, b=1), zeros(a=1), rules)
    with pytest.raises(UserError, match="'x.pth' .*1 tensors of the model are not in it, e.g. 'b'"):
        missing.check("x.pth")
    unused = convert(zeros(a=1), zeros(a=1, z__w=1), rules)
    with pytest.raises(UserError, match="1 tensors in it have no place in the model, e.g. 'z.w'"):
        unused.check("x.pth")
    for conversion in (missing, unused):
        conversion.check("x.pth", partial=True)
    explained = convert(zeros(a=1), zeros(a=1, z__w=1), rules, unused=[(r"z\..*", "a reason")])
    explained.check("x.pth")
    assert explained.having("unused")[0].note == "a reason"


def test_partial_importers_keep_what_no_rule_speaks_of():
    rules = [Rule("backbone.{n:w}", "{n}")]
    model = zeros(backbone__a=1, head__b=1)
    found = convert(model, zeros(a=1), rules, partial=True)
    assert [x.status for x in found.entries] == ["used", "kept"]
    found.check("x")
    assert [x.status for x in convert(model, zeros(a=1), rules).entries] == ["used", "missing"]
    # But of the part they fill, nothing may be missing.
    with pytest.raises(UserError, match="not in it, e.g. 'a'"):
        convert(model, {}, rules, partial=True).check("x")


def test_class_dependent_shapes_may_differ_for_fine_tuning_only():
    rules = [Rule("cls", "cls", per_class=True), Rule("{n:w}", "{n}")]
    found = convert(zeros(cls=4, a=2), zeros(cls=81, a=2), rules)
    with pytest.raises(UserError):
        found.check("x")
    found.check("x", other_classes=True)
    assert list(found.weights) == ["a"]
    with pytest.raises(UserError):
        convert(zeros(cls=4, a=2), zeros(cls=81, a=3), rules).check("x", other_classes=True)


def test_a_transform_that_fails_names_the_tensor():
    rules = [Rule("a", "b", lambda x: x[5])]
    with pytest.raises(UserError, match=r"tensor 'b' of shape \(2,\) cannot be converted: index 5"):
        convert(zeros(a=1), zeros(b=2), rules)


def test_the_table_has_a_line_per_tensor_and_the_totals():
    rules = [Rule("{n:w}", "x.{n}")]
    file = {"x.a": torch.zeros(2, 3), "x.c": torch.zeros(4, 1), "z": torch.tensor(0.0)}
    found = convert(zeros(a=(2, 3), b=1, c=4), file, rules, unused=[("z", "a counter")])
    found.title = "Test"
    assert found.table().splitlines() == [
        "in the model  in the file  shape   status",
        "a             x.a          2x3     used",
        "b             x.b          1       missing",
        "c             x.c          4       reshaped: from 4x1",
        "-             z            scalar  unused: a counter",
        "Test: 1 used, 1 reshaped, 1 unused, 1 missing",
    ]
    assert len(found.table(every=False).splitlines()) == 5


def test_constants_and_counters_of_a_model_are_not_asked_for():
    state = zeros(pixel_mean=3, pixel_std=3, a__num_batches_tracked=(), w=1)
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    assert shapes_of(state) == {"w": (1,)}


def test_rules_that_rename_go_both_ways():
    rules = [Rule("a{n}.{p:w}", ["b{n-1}.{p}", "old{n}.{p}"])]
    state = {"a3.weight": torch.ones(1), "a3.bias": torch.ones(1), "n.num_batches_tracked": None}
    back = export_weights(state, rules)
    assert set(back) == {"b2.weight", "b2.bias"} and back["b2.bias"] is state["a3.bias"]
    with pytest.raises(UserError, match="parameter 'c' has no name in the other program"):
        export_weights({"c": torch.ones(1)}, rules)
    with pytest.raises(UserError):
        export_weights({"c": torch.ones(1)}, [Rule("c", "d", lambda x: x)])
