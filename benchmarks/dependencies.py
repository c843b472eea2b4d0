"""What an installation brings along, and under which licences.

    python benchmarks/dependencies.py --output docs/dependencies.md

Walks the requirements of the installed `tinycap` with all its extras, as their own metadata tells them, and writes a
Markdown table: package, installed version, the bound that this project asks for, licence, and what asks for it. Exits
with 1 where a package names no licence.
"""

import argparse
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packaging.requirements import Requirement

from tinycap.training.logs import write_text


# Licences that a package's metadata leaves out, and where they stand.
ELSEWHERE = {"pycocoevalcap": "none stated; its code is tylin/coco-caption's, BSD-2-Clause by the license.txt there"}
SPELLINGS = {
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache": "Apache-2.0",
    "BSD License": "BSD",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "ISC License (ISCL)": "ISC",
}


def licence_of(metadata) -> str:
    """The licence by the expression, else the classifiers, else the free text of a package's metadata."""
    if metadata.get("License-Expression"):
        return metadata["License-Expression"]
    classified = [
        entry.rpartition(" :: ")[2]
        for entry in metadata.get_all("Classifier") or []
        if entry.startswith("License ::") and entry != "License :: OSI Approved"
    ]
    named = classified or [(metadata.get("License") or "").strip().split("\n")[0][:60]]
    found = " AND ".join(SPELLINGS.get(name, name) for name in named)
    return ELSEWHERE.get(normal(metadata["Name"]), "") if found in ("", "UNKNOWN") else found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def walk(root: str, extras: tuple[str, ...]) -> dict[str, dict]:
    """Every package that `root` needs here, by name: `version`, `licence`, `bound` (of the root), `needed_by`."""
    found: dict[str, dict] = {}
    todo = [(root, extras, True)]
    while todo:
        name, wanted, is_root = todo.pop()
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            # A marker without an extra is decided by this machine alone.
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                continue
            needed = normal(requirement.name)
            if needed == normal(root):
                todo.append((root, tuple(requirement.extras), True))
                continue
            try:
                metadata = distribution(needed).metadata
            except PackageNotFoundError:
                # A build of torch for a CPU names none of the CUDA packages; others are not for this platform.
                continue
            entry = found.setdefault(needed, {"bound": "", "needed_by": set()})
            is_new = "version" not in entry
            entry.update(version=metadata["Version"], licence=licence_of(metadata))
            entry["needed_by"].add(normal(name))
            if is_root:
                entry["bound"] = str(requirement.specifier)
            if is_new or requirement.extras:
                todo.append((needed, tuple(requirement.extras), False))
    return found


def table(found: dict[str, dict]) -> str:
    lines = ["| package | asked for | here | licence | needed by |", "|---|---|---|---|---|"]
    for name, entry in sorted(found.items(), key=lambda item: (not item[1]["bound"], item[0])):
        lines.append(
            f"| {name} | {entry['bound']} | {entry['version']} | {entry['licence']} "
            f"| {', '.join(sorted(entry['needed_by']))} |"
        )
    return "\n".join(lines)


INTRODUCTION = """# Dependencies

What `pip install "tinycap[dev]"` brings along, with the licences that the packages state; those with a bound are asked
for by this project, the others by these. Written by `python benchmarks/dependencies.py`; do not edit.

"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", default="docs/dependencies.md", help="the Markdown file to write")
    args = parser.parse_args()
    found = walk("tinycap", ("evaluation", "train", "dev"))
    write_text(args.output, INTRODUCTION + table(found) + "\n")
    silent = sorted(name for name, entry in found.items() if not entry["licence"])
    print(f"{len(found)} packages, {sum(bool(entry['bound']) for entry in found.values())} asked for, to {args.output}")
    if silent:
        sys.exit(f"dependencies.py: error: expected a licence of every package, got none of {', '.join(silent)}")


if __name__ == "__main__":
    main()
