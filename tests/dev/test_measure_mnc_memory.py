"""dev/measure_mnc_memory.py on a network that takes no time."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tool_reports_both_passes_and_a_plausible_peak(script, capsys):
    config = str(ROOT / "projects/MNC/configs/mnc_tiny.yaml")
    script.main(["--config-file", config, "--height", "96", "--width", "128", "MODEL.WEIGHTS="])
    lines = capsys.readouterr().out.splitlines()
    found = {name: float(value) for name, value in (line.split(": ") for line in lines)}
    assert 7e6 < found["parameters"] < 8e6
    assert 0 < found["candidates"] <= 2 * 60 and found["candidates"] % 2 == 0
    assert found["detections"] <= 50 and found["seconds"] >= 0
    assert 0.05 < found["weights_gib"] <= found["peak_gib"] < 100
