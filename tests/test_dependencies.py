"""The dependency policy of SECURITY.md, and the report of an audit."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from helpers.scripts import script_module
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
DIRECT = [
    (group, requirement)
    for group, texts in GROUPS.items()
    for requirement in map(Requirement, texts)
    if requirement.name != "pgprune"
]
FOR_USERS = ("", "gguf", "multi-gpu", "eval", "report", "recovery", "tensorboard")
"""The groups whose licences are looked at: what the others need is not installed here, or not passed on."""

FREE = re.compile(r"MIT|BSD|Apache|ISC|PSF|Python Software Foundation|MPL|Mozilla|Dual License|CNRI|Zlib|CC0|BSL", re.I)
LIBRARIES = {"chardet": "LGPL-2.1-or-later"}
"""Copyleft of the library alone, which is installed beside pgprune and not into it; lm_eval brings it."""


def listed() -> dict[str, str]:
    """Reasons by dependency, of the table in SECURITY.md."""
    text = (ROOT / "SECURITY.md").read_text().partition("| dependency | for | why |")[2]
    return {
        name: f"{place} {why}" for name, place, why in re.findall(r"^\| (\S+) \| ([^|]+) \| ([^|]*)\|$", text, re.M)
    }


@pytest.mark.parametrize(("group", "requirement"), DIRECT, ids=str)
def test_every_dependency_has_a_lower_bound_and_comes_from_pypi(group: str, requirement: Requirement) -> None:
    assert requirement.url is None
    assert any(bound.operator in (">=", "==", "~=") for bound in requirement.specifier), f"{group}: {requirement}"


def test_what_users_get_has_no_upper_bound() -> None:
    """An upper bound would keep upstream fixes from users."""
    of_users = [requirement for group, requirement in DIRECT if group in FOR_USERS]
    assert [str(package) for package in of_users if any(bound.operator != ">=" for bound in package.specifier)] == []


def test_every_dependency_is_in_the_policy_and_no_other() -> None:
    assert set(listed()) == {requirement.name for _, requirement in DIRECT}


def licence_of(name: str) -> str:
    about = metadata.metadata(name)
    classifiers = [text.rpartition("::")[2] for text in about.get_all("Classifier") or [] if text.startswith("License")]
    return "; ".join([about.get("License-Expression") or "", *classifiers, about.get("License") or ""])


def installed(name: str, extras: set[str], found: dict[str, str]) -> dict[str, str]:
    """Licences of a package and of all that it needs, as far as it is installed."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return found
    if key.startswith(("nvidia-", "cuda-")):  # of torch's builds for GPUs: CUDA itself, which is NVIDIA's
        return found
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return found
    found[key] = licence_of(name)
    for requirement in map(Requirement, needs):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            installed(requirement.name, requirement.extras, found)
    return found


def test_everything_that_users_get_may_be_used_changed_and_passed_on() -> None:
    actual: dict[str, str] = {}
    for group, requirement in DIRECT:
        if group in FOR_USERS:
            installed(requirement.name, requirement.extras, actual)
    assert len(actual) > 30
    assert {name: text for name, text in actual.items() if not FREE.search(text)} == {
        name: text for name, text in actual.items() if name in LIBRARIES and LIBRARIES[name] in text
    }


# --- the audit


def package(name: str, *vulnerabilities: dict, **more: str) -> dict:
    return {"name": name, "version": "1.0", "vulns": list(vulnerabilities)} | more


@pytest.mark.parametrize(
    ("packages", "lines", "is_well"),
    [
        ([package("a"), package("b")], ["packages audited: 2, skipped: 0, vulnerabilities: 0"], True),
        (
            [package("a", {"id": "CVE-1", "fix_versions": ["1.1", "2.0"]}), {"name": "b", "skip_reason": "unknown"}],
            ["a 1.0: CVE-1, fixed in 1.1, 2.0", "packages audited: 1, skipped: 1, vulnerabilities: 1"],
            False,
        ),
        ([{"name": "b", "skip_reason": "unknown"}], ["packages audited: 0, skipped: 1, vulnerabilities: 0"], False),
    ],
)
def test_audit_lists_vulnerabilities_and_fails_if_there_are_any_or_nothing_was_audited(
    packages: list[dict], lines: list[str], is_well: bool
) -> None:
    assert script_module("audit").verdict({"dependencies": packages}) == (lines, is_well)


@pytest.mark.parametrize(("options", "code"), [([], 1), (["--report"], 0)])
def test_audit_says_that_nothing_was_audited_when_pypi_does_not_answer(options, code, monkeypatch, capsys) -> None:
    script = script_module("audit")

    def time_out(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(script, "urlopen", time_out)
    monkeypatch.setattr("sys.argv", ["audit.py", "--venv", "nowhere", *options])
    assert script.main() == code
    assert "nothing was audited: timed out" in capsys.readouterr().out
