"""Report known vulnerabilities of all installed packages. pip-audit asks pypi.org about each of them.

    python scripts/audit.py --venv .venv-audit [--report]

pip-audit gets a virtual environment of its own, so that its own packages are not audited. Exits with 1 if there is a
vulnerability, or if nothing could be audited. With --report it always exits with 0. Packages that pypi.org does not
know count as skipped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from urllib.request import urlopen

PYPI = "https://pypi.org/pypi/pip-audit/json"
TIMEOUT = 600
"""Seconds for installing pip-audit, and for running it."""


def audit(venv: Path, packages: str) -> tuple[list[str], bool]:
    """Audit the packages in a directory. Returns the lines to print, and whether all is well.

    Raises OSError if pypi.org does not answer, SubprocessError if pip-audit cannot be installed or run.
    """
    with urlopen(PYPI, timeout=5):
        pass
    program = venv / "bin" / "pip-audit"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=TIMEOUT)
        install = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "pip-audit"], check=True, timeout=TIMEOUT)
    options = ["--skip-editable", "--path", packages, "--format", "json", "--progress-spinner", "off"]
    ended = subprocess.run([program, *options], stdout=subprocess.PIPE, text=True, check=False, timeout=TIMEOUT)
    if not ended.stdout:
        raise subprocess.SubprocessError(f"pip-audit exited with {ended.returncode} and printed nothing")
    return verdict(json.loads(ended.stdout))


def verdict(report: dict) -> tuple[list[str], bool]:
    """Return the lines to print for pip-audit's JSON report, and whether all is well.

    There is one line for every vulnerability, and a last line that counts.
    """
    audited = [package for package in report["dependencies"] if "skip_reason" not in package]
    lines = []
    for package in audited:
        for vulnerability in package["vulns"]:
            versions = ", ".join(vulnerability["fix_versions"]) or "no version yet"
            lines.append(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {versions}")
    skipped = len(report["dependencies"]) - len(audited)
    counts = f"packages audited: {len(audited)}, skipped: {skipped}, vulnerabilities: {len(lines)}"
    return [*lines, counts], bool(audited) and not lines


def main() -> int:
    """Run the audit and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True, help="where pip-audit is, or will be, installed")
    parser.add_argument("--report", action="store_true", help="always exit with 0")
    options = parser.parse_args()
    try:
        lines, is_well = audit(options.venv, sysconfig.get_path("purelib"))
    except (OSError, subprocess.SubprocessError) as error:
        lines, is_well = [f"nothing was audited: {error}"], False
    for line in lines:
        print(f"pip-audit: {line}")
    return 0 if is_well or options.report else 1


if __name__ == "__main__":
    sys.exit(main())
