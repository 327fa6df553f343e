"""The README: its two lines are where CI finds them, its example runs, its links lead somewhere."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
readme_lines = runpy.run_path(str(ROOT / ".ci" / "readme_lines.py"))["readme_lines"]


def test_ci_finds_the_two_lines():
    assert readme_lines(README) == {
        "compare": "python -m pip install -e . && regard compare",
        "test": "python -m pip install -e '.[test]' && python -m pytest",
    }


@pytest.mark.parametrize(
    "text",
    [
        README.replace("&& regard compare", "&& regard compare --epochs 1"),
        README.replace("```bash", "```text"),
        README + "\n```bash\npython -m pip install -e . && regard compare\n```\n",
    ],
    ids=["changed", "no shell block", "twice"],
)
def test_a_drifted_readme_is_refused(text):
    with pytest.raises(ValueError, match=r"README\.md: expected one install line"):
        readme_lines(text)


def test_the_python_example_runs(tmp_path):
    (example,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("knn_attention: ")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/README.md", "docs/convert.md", "docs/development.md"]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not missing
