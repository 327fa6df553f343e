"""`regard simulate` as a user types it."""

import json
import subprocess
import sys

import pytest

from regard.cli import main

VIDEO = ["simulate", "30x48x80", "--kernel-size", "18x24x24"]


def test_it_prints_the_published_bound(capsys):
    assert main([*VIDEO, "--stride", "2x1x8", "--share", "0.607"]) == 0
    said = capsys.readouterr().out
    for expected in ("18x24x24", "4x8x8", "2x8x8", "6.00x", "11.11x", "54 %", "2.02x", "of 900 static key tiles"):
        assert expected in said


def test_json_holds_the_whole_search(capsys):
    assert main([*VIDEO, "--search", "--vary", "stride", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert round(found[0]["simulation"]["speedup"], 2) == 3.27 and found[0]["change"] == 0
    assert found[-1]["simulation"]["efficiency"] == pytest.approx(1.0)
    assert all(one["pattern"]["kernel_size"] == [18, 24, 24] for one in found)


def test_one_number_stands_for_all_axes_and_axes_may_be_causal(capsys):
    assert main(["simulate", "32x32", "--kernel-size", "8", "--causal", "1", "--dynamic", "--json"]) == 0
    pattern = json.loads(capsys.readouterr().out)[0]["pattern"]
    assert pattern["kernel_size"] == [8, 8] and pattern["is_causal"] == [False, True]


def test_it_imports_no_torch():
    code = "import sys; from regard.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *VIDEO]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0 and "3.27x" in found.stdout, found.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["simulate"], "GRID"),
        (["simulate", "8xa", "--kernel-size", "3"], "regard simulate: GRID: expected whole numbers"),
        (["simulate", "8x8", "--kernel-size", "9"], "regard simulate: --kernel-size: axis 0: 9 keys"),
        (["simulate", "8x8", "--kernel-size", "3x3x3"], "regard simulate: --kernel-size: expected 2 whole numbers"),
        (["simulate", "8x8", "--kernel-size", "3", "--stride", "4"], "regard simulate: --stride: axis 0"),
        (["simulate", "8x8", "--kernel-size", "3", "--causal", "2"], "regard simulate: --causal: expected 'all'"),
        (["simulate", "8x8", "--kernel-size", "3", "--key-tile", "0"], "regard simulate: --key-tile: "),
        (["simulate", "8x8", "--kernel-size", "3", "--share", "2"], "regard simulate: --share: "),
        (["simulate", "8x8", "--kernel-size", "3", "--search", "--vary", "x"], "regard simulate: --vary: "),
    ],
)
def test_what_cannot_be_obeyed_is_named_in_one_line(arguments, named, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and named in err and err.count("\n") <= 2 and "Traceback" not in err
