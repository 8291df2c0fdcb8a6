"""Known vulnerabilities of everything that is installed, by pip-audit, which asks pypi.org about every package.

    python scripts/audit.py --venv .venv-audit [--report]

pip-audit gets an environment of its own: its packages are not what it is to look at. Exit 1 for a vulnerability, and
where nothing could be looked at; with --report both are only said. What pypi.org does not know counts as skipped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from urllib.request import urlopen

ASKED = "https://pypi.org/pypi/pip-audit/json"
SECONDS = 600


def audit(venv: Path, installed: str) -> tuple[list[str], bool]:
    """Lines that say what is known of the packages in `installed`, and whether that is nothing bad.

    Raises OSError where pypi.org does not answer, SubprocessError where pip-audit cannot be had.
    """
    with urlopen(ASKED, timeout=5):
        pass
    program = venv / "bin" / "pip-audit"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=SECONDS)
        install = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "pip-audit"], check=True, timeout=SECONDS)
    options = ["--skip-editable", "--path", installed, "--format", "json", "--progress-spinner", "off"]
    ended = subprocess.run([program, *options], stdout=subprocess.PIPE, text=True, check=False, timeout=SECONDS)
    if not ended.stdout:
        raise subprocess.SubprocessError(f"pip-audit ended with {ended.returncode} and no answer")
    return verdict(json.loads(ended.stdout))


def verdict(answer: dict) -> tuple[list[str], bool]:
    """Return a line for each vulnerability in pip-audit's JSON and one with the counts; and whether it found none."""
    looked_at = [package for package in answer["dependencies"] if "skip_reason" not in package]
    lines = []
    for package in looked_at:
        for vulnerability in package["vulns"]:
            versions = ", ".join(vulnerability["fix_versions"]) or "no version yet"
            lines.append(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {versions}")
    skipped = len(answer["dependencies"]) - len(looked_at)
    lines.append(f"{len(looked_at)} packages looked at, {skipped} skipped, {len(lines)} vulnerabilities")
    return lines, bool(looked_at) and len(lines) == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True, help="where pip-audit is, or will be")
    parser.add_argument("--report", action="store_true", help="exit 0 whatever there is to say")
    options = parser.parse_args()
    try:
        lines, fine = audit(options.venv, sysconfig.get_path("purelib"))
    except (OSError, subprocess.SubprocessError) as error:
        lines, fine = [f"left out, nothing was looked at: {error}"], False
    for line in lines:
        print(f"pip-audit: {line}")
    return 0 if fine or options.report else 1


if __name__ == "__main__":
    sys.exit(main())
