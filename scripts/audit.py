"""Known vulnerabilities among the installed packages, by pip-audit, where the advisory database can be reached.

Whether it can is asked with a package that has a well-known one: a database that does not report that is none. Exits
with 1 where something that the package itself requires has a vulnerability that a newer version repairs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement

KNOWN = "jinja2==2.10"  # CVE-2019-10906, CVE-2020-28493 and later ones
SECONDS = 120

Found = list[dict[str, Any]]


def pip_audit(arguments: Sequence[str]) -> Found | None:
    """What pip-audit says of every package, or None where it cannot say."""
    with TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "-f", "json", "-o", str(report)]
        try:
            subprocess.run([*command, *arguments], capture_output=True, check=False, timeout=SECONDS)  # noqa: S603
        except subprocess.TimeoutExpired:
            return None
        return json.loads(report.read_text())["dependencies"] if report.is_file() else None


def canonical(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(name: str = "bayes_kf") -> set[str]:
    """What the package requires, and what that requires."""
    found: set[str] = set()
    ahead = [name]
    while ahead:
        try:
            lines = requires(ahead.pop()) or []
        except PackageNotFoundError:
            continue
        wanted = [Requirement(line) for line in lines]
        names = {canonical(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}
        ahead += names - found
        found |= names
    return found


def audit(ask: Callable[[Sequence[str]], Found | None] = pip_audit) -> int:
    """Print what is known; the exit status."""
    with TemporaryDirectory() as scratch:
        canary = Path(scratch) / "known.txt"
        canary.write_text(KNOWN + "\n")
        answer = ask(["--no-deps", "--disable-pip", "-r", str(canary)])
    if not any(package.get("vulns") for package in answer or []):
        print("skipped: the advisory database cannot be reached from here.")
        return 0
    found = ask(["--local", "--skip-editable"])
    if found is None:
        print("skipped: the advisory database stopped answering.")
        return 0
    ours, repairable = required(), 0
    for package in found:
        for known in package.get("vulns", []):
            fixed = ", ".join(known["fix_versions"]) or "no version yet"
            whose = "required" if canonical(package["name"]) in ours else "development only"
            repairable += whose == "required" and bool(known["fix_versions"])
            print(f"{package['name']} {package['version']} ({whose}): {known['id']}, repaired in {fixed}.")
    print(f"{len(found)} packages looked at.")
    return int(repairable > 0)


if __name__ == "__main__":
    sys.exit(audit())
