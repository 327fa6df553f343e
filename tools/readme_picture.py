"""Make the README's picture from a finished comparison.

regard compare
python tools/readme_picture.py regard-compare/compare.json docs/images/compare.png
"""

import argparse
from pathlib import Path

from regard.report.picture import write_picture
from regard.results import Comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="the comparison's JSON")
    parser.add_argument("picture", type=Path, nargs="?", default=Path("docs/images/compare.png"))
    parser.add_argument("--width", type=int, default=1200, help="pixels")
    arguments = parser.parse_args()
    try:
        comparison = Comparison.from_json(arguments.comparison.read_text(encoding="utf-8"))
        write_picture(comparison, arguments.picture, width=arguments.width)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(arguments.picture)


if __name__ == "__main__":
    main()
