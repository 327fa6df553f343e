"""Print the two commands of the project as README.md has them: CI runs these very lines, so they cannot drift.

    python3 .ci/readme_lines.py README.md compare
    python3 .ci/readme_lines.py README.md test

They are the lines of the README's shell blocks that begin with `python -m pip install`; each ends in what it promises.
"""

import re
import sys
from pathlib import Path

ENDS = {"compare": "&& regard compare", "test": "&& python -m pytest"}


def readme_lines(text: str) -> dict[str, str]:
    """The commands by name.

    Raises:
        ValueError: the README has not exactly these two lines.
    """
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python -m pip install")]
    found = {name: [line for line in lines if line.endswith(end)] for name, end in ENDS.items()}
    if len(lines) != len(ENDS) or any(len(matching) != 1 for matching in found.values()):
        raise ValueError(f"README.md: expected one install line for each of {list(ENDS.values())}, found {lines}")
    return {name: matching[0] for name, matching in found.items()}


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in ENDS:
        sys.exit(f"usage: readme_lines.py README.md {{{','.join(ENDS)}}}")
    try:
        print(readme_lines(Path(sys.argv[1]).read_text(encoding="utf-8"))[sys.argv[2]])
    except (OSError, ValueError) as error:
        sys.exit(str(error))
