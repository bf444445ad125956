"""What is around the code: the Makefile, continuous integration, hooks of git, the changelog, the
citation and the forms of issues agree with each other."""

import re
from pathlib import Path

import yaml

from d2ext.version import __version__

from tests.test_readme import make_targets, read

ROOT = Path(__file__).resolve().parents[1]


def test_the_changelog_is_versioned_newest_first():
    heads = re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.MULTILINE)
    form = r"(\d+\.\d+\.\d+) \((unreleased|\d{4}-\d\d-\d\d)\)"
    versions = [re.fullmatch(form, head) for head in heads]
    assert all(versions) and versions[0][1] == __version__
    numbers = [tuple(map(int, match[1].split("."))) for match in versions]
    assert numbers == sorted(set(numbers), reverse=True)
    assert all(match[2] != "unreleased" for match in versions[1:])


def test_the_citation_has_every_paper_once():
    citation = yaml.safe_load(read("CITATION.cff"))
    links = [reference["url"] for reference in citation["references"]]
    assert len(links) == len(set(links))
    for project in ("MNC", "FCIS", "HTC"):
        (paper,) = re.findall(r"\(https://arxiv.org/abs/([\d.]+)\)", read_readme(project))[:1]
        assert any(paper in link for link in links)


def read_readme(project):
    return read(f"projects/{project}/README.md")


def test_make_help_explains_every_target():
    text = read("Makefile")
    targets = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    assert set(targets) == make_targets()
    for target in targets:
        assert re.search(rf"^{target}:.*  ## \S", text, re.MULTILINE), f"{target} has no ## text"


def test_continuous_integration_runs_what_contributors_are_asked_to():
    commands = re.findall(r"^make (\w+)$", read(".ci/run"), re.MULTILINE)
    assert commands == ["lint", "docs", "test"]
    for name in commands:
        assert f"`make {name}`" in read("CONTRIBUTING.md")
        assert f"`make {name}`" in read(".github/pull_request_template.md")


def test_hooks_of_git_use_what_make_lint_uses():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded; versions are those installed
    for hook in repository["hooks"]:
        assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/")
        for word in hook["entry"].split():
            assert not word.startswith("tests/") or (ROOT / word).exists()


def test_forms_of_issues_ask_for_different_things():
    forms = [p for p in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if p.stem != "config"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form)
        ids = [part["id"] for part in form["body"]]
        assert len(ids) == len(set(ids))
