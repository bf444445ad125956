"""`d2ext completion`: what a shell offers after the Tab key."""

import shutil
import subprocess
import sys

import pytest

from d2ext.cli.main import COMMANDS

pytest.importorskip("shtab", reason="shtab is not installed (make install brings it)")
BASH = shutil.which("bash")


@pytest.fixture
def offered(script, tmp_path, capsys):
    """`offered(word, ...)`: what bash offers for the last word of a line of `d2ext`."""
    assert script.main(["bash"]) == 0
    (tmp_path / "d2ext.bash").write_text(capsys.readouterr().out)

    def offers(*words):
        line = " ".join(f"'{word}'" for word in ("d2ext", *words))
        call = (
            f"source d2ext.bash; COMP_WORDS=({line}); COMP_CWORD={len(words)}; "
            '_shtab_d2ext; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        process = subprocess.run(
            [BASH, "--norc", "-c", call], cwd=tmp_path, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        return process.stdout.split()

    return offers


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_bash_completes_commands_options_configs_and_files(offered, tmp_path):
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "folder").mkdir()
    assert set(COMMANDS) <= set(offered(""))
    assert offered("tra") == ["train"]
    assert "--register" in offered("compare", "--re")
    assert "--shares" in offered("split", "--sh")
    assert "labelme" in offered("convert", "la")
    found = offered("train", "htc_t")
    assert "htc_tiny" in found and not any(name.startswith("mnc") for name in found)
    assert "photo.jpg" in offered("predict", "--input", "pho")
    assert offered("compare", "--data", "fol")[0].rstrip("/") == "folder"
    assert offered("compare", "--data", "pho") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_all_commands_too(script, shell, capsys):
    assert script.main([shell]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS) and "htc_tiny" in text


def test_without_shtab_one_line_says_what_to_install(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert script.main(["bash"]) == 1
    assert capsys.readouterr().err == (
        "error: completion needs shtab, which is not installed; run pip install shtab\n"
    )
