"""dev/write_coverage.py: the table of CONTRIBUTING.md."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def summary(*numbers):
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    return {"summary": dict(zip(names, numbers))}


def test_files_are_added_up_by_package(script):
    files = {
        "d2ext/data/a.py": summary(10, 9, 4, 2),
        "d2ext/data/check/b.py": summary(10, 10, 0, 0),
        "d2ext/errors.py": summary(1, 1, 0, 0),
        "projects/HTC/htc/c.py": summary(20, 10, 2, 2),
        "tools/d.py": summary(9, 0, 0, 0),
    }
    assert script.table({"files": files}).splitlines()[2:] == [
        "| `d2ext/*.py` | 1 | 100% | 0 | - |",
        "| `d2ext/data` | 20 | 95% | 4 | 50% |",
        "| `projects/HTC` | 20 | 50% | 2 | 100% |",
        "| `tools` | 9 | 0% | 0 | - |",
        "| **all** | 50 | 60% | 6 | 67% |",
    ]


def test_the_page_has_a_place_for_it_and_the_command(script):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert text.count(script.FIRST) == text.count(script.LAST) == 1
    assert "`make coverage`" in text


def test_the_table_is_replaced_and_nothing_else(script, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.FIRST}old\n{script.LAST}\nafter\n")
    script.put(page, "new\n")
    assert page.read_text() == f"before\n{script.FIRST}new\n{script.LAST}\nafter\n"
