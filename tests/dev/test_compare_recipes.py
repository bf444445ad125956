"""dev/compare_recipes.py: what it trains, and that nothing is done twice."""

import json


def test_the_grid_takes_the_time_of_the_recipe_at_every_size(script, tmp_path, monkeypatch, capsys):
    trained = {}

    def train(self, name, seed, options, test=True):
        trained[name] = dict(option.split("=", 1) for option in options)
        size = float(name.partition("size x")[2].partition(",")[0] or 1)
        result = {"seconds": 10 * size**2, "AP": 30.0, "INPUT.MIN_SIZE_TEST": 320}
        result |= {"SOLVER.BASE_LR": 0.0005, "SOLVER.MAX_ITER": 768}
        (tmp_path / f"{self.prefix}, {name}, seed {seed}.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(script.Comparison, "run", train)
    arguments = script.argument_parser().parse_args([str(tmp_path), "grid"])
    script.compare_grid(script.Comparison(arguments), [1])
    grid = {name: options for name, options in trained.items() if name.startswith("size")}
    assert len(grid) == len(script.GRID) - 1 == 10  # one is the recipe
    assert trained["the recipe"] == {}
    assert grid["size x1.4, rate x2, time x1"] == {
        "RECIPE.IMAGE_SIZE": "448",
        "SOLVER.MAX_ITER": str(round(768 / 1.4**2)),
        "SOLVER.BASE_LR": "0.001",
    }
    assert capsys.readouterr().out.count("| size x") == 10


def test_a_training_that_is_there_is_not_done_again(script, tmp_path):
    arguments = script.argument_parser().parse_args([str(tmp_path), "ablation", "--table"])
    comparison = script.Comparison(arguments)
    assert comparison.run("the recipe", 1, []) is None  # --table trains nothing
    (tmp_path / f"{comparison.prefix}, the recipe, seed 1.json").write_text('{"AP": 1}')
    assert comparison.run("the recipe", 1, []) == {"AP": 1}
