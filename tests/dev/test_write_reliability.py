"""docs/reliability.md: what the soak tests counted, and the outcome of every fault of the table."""

import json
from pathlib import Path

import pytest

from tests.soak.faults import FAULTS

PAGE = Path(__file__).resolve().parents[2] / "docs/reliability.md"


def test_counts_and_faults_are_listed(script, tmp_path, monkeypatch, capsys):
    records = {
        "kills": {"test": "killed_runs[1]", "kills": 3, "runs": 2},
        "fault_a": {"test": "fault[a]", "area": "Runs", "what": "a | b", "expected": "goes on"},
    }
    records["fault_a"] |= {"number": 0, "observed": "exit 0 <none>"}
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    script.main(str(tmp_path))
    text = (tmp_path / "page.md").read_text()
    assert "| killed runs | kills: 3, runs: 2 |" in text
    assert "| **Runs** | | |\n| a \\| b | goes on | exit 0 &lt;none> |\n" in text
    with pytest.raises(SystemExit, match="has no counts; run make soak"):
        script.main(str(tmp_path / "none"))


def test_the_page_has_every_fault_of_the_table_and_no_other(script):
    rows = [line.split(" | ")[:2] for line in PAGE.read_text().splitlines() if line[:2] == "| "]
    rows = [(what[2:], expected) for what, expected, *_ in rows if not what.startswith("| **")]
    wanted = [
        (script.cell(what), script.cell(expected))
        for faults in FAULTS.values()
        for what, expected, *_ in faults
    ]
    assert [row for row in rows if row in wanted] == wanted
    after = PAGE.read_text().partition("## Faults")[2]
    assert (
        sum(line[:2] == "| " and line[:4] != "| **" for line in after.splitlines())
        == len(wanted) + 1
    )
