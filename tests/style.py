"""Check for words that the style guide of CONTRIBUTING.md bans. ``make check`` runs it as a script."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

EXCLUDED = (
    ":!tests/benchmarks/results",  # recorded with their field names
    ":!tests/benchmarks/*.py",  # which write those fields
    ":!tests/compatibility",  # written by version 0.1
    ":!tests/style.py",
)
"""Tracked files that are not checked, as git pathspecs."""

BINARY = (".png", ".safetensors", ".parquet", ".gz", ".pt")

BANNED = {
    r"told": "logged, passed, reported, ...",
    r"anew": "again, or re-",
    r"mend(s|ed|ing)?": "fix",
    r"borne|unasked": "plain words",
    r"for ever": "permanently",
    r"goes on|going on": "continues, resumes",
    r"stands for|stands in|lies in": "is",
    r"what it is of": "the noun",
    r"pictures?": "image",
    r"text gap": "modality gap",
    r"yardstick|like[ -]for[ -]like": "reference, comparable",
    r"barred|crowded": "excluded, incomplete",
    r"at so many times|whatever (the|its)": "proportional, for any, independent of",
}


def findings(text: str) -> list[tuple[int, str, str]]:
    """Return line number, word and advice for every banned word."""
    found = []
    for pattern, advice in BANNED.items():
        for match in re.finditer(rf"\b({pattern})\b", text, re.IGNORECASE):
            found.append((text.count("\n", 0, match.start()) + 1, match.group(), advice))
    return sorted(found)


def main() -> int:
    """Print every finding in the tracked files; return 1 if there is one."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", ".", *EXCLUDED]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    count = 0
    for name in sorted(filter(None, listed)):
        path = ROOT / name
        if path.suffix in BINARY or not path.is_file():
            continue
        for line, word, advice in findings(path.read_text(encoding="utf-8")):
            print(f"{name}:{line}: '{word}' is a banned word; use: {advice}")
            count += 1
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main())
