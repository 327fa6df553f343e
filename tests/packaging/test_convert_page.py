"""docs/convert.md: its Python runs from top to bottom, on a small model in place of the pretrained one."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import regard

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "convert.md").read_text(encoding="utf-8")
PRETRAINED = '"vit_small_patch14_dinov2", pretrained=True, img_size=896'
SMALL = '"vit_small_patch14_dinov2", embed_dim=24, num_heads=2, img_size=112'


@pytest.mark.filterwarnings("ignore:regard. nothing was converted")  # on so few tokens nothing pays
def test_the_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE))
    assert code.count(PRETRAINED) == 1
    noise = np.random.default_rng(0).integers(0, 256, (2, 120, 140, 3), dtype=np.uint8)
    names = {"pictures": [Image.fromarray(pixels) for pixels in noise]}
    small = code.replace(PRETRAINED, SMALL).replace("**resolve_model_data_config(model)", "(3, 112, 112)")
    exec(compile(small, "docs/convert.md", "exec"), names)
    said = capsys.readouterr().out
    assert "12 of 12 attention modules converted" in said and "(asked for 0.995) on 2 pictures" in said
    assert json.loads((tmp_path / "pattern.json").read_text()) == names["tuning"].pattern
    regard.restore(names["model"])


@pytest.mark.parametrize(
    ("width", "side", "share"), [(384, 224, 0.10), (384, 518, 0.37), (384, 896, 0.64), (1024, 518, 0.18)]
)
def test_the_shares_told_are_those_of_the_formula(width, side, share):
    tokens = (side // 14) ** 2 + 1
    assert tokens / (tokens + 6 * width) == pytest.approx(share, abs=0.005)
