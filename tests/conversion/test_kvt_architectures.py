"""KVT's architectures that timm has: k per stage and per kind of attention, as docs/notes/knn.md writes it.

One k for a whole model is what test_families.py tests, for all of them but DINO's name.
"""

import copy
import functools
from pathlib import Path

import pytest
import timm
import torch
from model_families import FAMILIES, fresh, images_for, randomise, settle
from selecting import selecting

import regard

PAGE = Path(__file__).resolve().parents[2] / "docs" / "notes" / "knn.md"

# Narrow and shallow, but with as many tokens in each stage as the published models have at 224 pixels.
PUBLISHED_SIZE = {
    "deit": ("deit_tiny_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 1}),
    "dino": ("vit_small_patch16_224.dino", {"depth": 2, "embed_dim": 24, "num_heads": 1}),
    "pit": ("pit_b_224", {"depth": (1, 2, 1), "base_dims": (8, 8, 8), "heads": (1, 2, 4)}),
    "visformer": ("visformer_tiny", {"depth": (1, 1, 2), "embed_dim": 64, "num_heads": 2}),
}

# Architecture -> what convert is given, and which modules then keep how many of how many keys.
PATTERNS = {
    "deit": ({"*": "knn(topk=100)"}, {"blocks.0.attn": (100, 197), "blocks.1.attn": (100, 197)}),
    "dino": ({"*": "knn(topk=0.5)"}, {"blocks.0.attn": (0.5, 197), "blocks.1.attn": (0.5, 197)}),
    "pit": (
        {"transformers.0.*": "knn(topk=520)", "transformers.1.*": "knn(topk=150)", "transformers.2.*": "knn(topk=45)"},
        {
            "transformers.0.blocks.0.attn": (520, 962),
            "transformers.1.blocks.0.attn": (150, 257),
            "transformers.1.blocks.1.attn": (150, 257),
            "transformers.2.blocks.0.attn": (45, 65),
        },
    ),
    "visformer": (
        {"stage2.*": "knn(topk=150)", "stage3.*": "knn(topk=45)"},
        {"stage2.0.attn": (150, 196), "stage3.0.attn": (45, 49), "stage3.1.attn": (45, 49)},
    ),
    "tnt": (
        {"*.attn_out": "knn(topk=0.5)"},
        {"blocks.0.attn_out": (0.5, 17), "blocks.1.attn_out": (0.5, 17)},
    ),
    "swin": (
        {"layers.0.*": "knn(topk=0.75)", "layers.*": "knn(topk=0.5)"},
        {
            "layers.0.blocks.0.attn": (0.75, 16),
            "layers.0.blocks.1.attn": (0.75, 16),
            "layers.1.blocks.0.attn": (0.5, 16),
            "layers.1.blocks.1.attn": (0.5, 16),
            "layers.2.blocks.0.attn": (0.5, 16),
        },
    ),
    "twins-svt": (
        {"blocks.*[13579].attn": "knn(topk=0.5)"},
        {"blocks.0.1.attn": (0.5, 4), "blocks.1.1.attn": (0.5, 4)},
    ),
    "volo": (
        {"network.2.*": "knn(topk=0.75)", "network.*": "knn(topk=0.5)"},
        {"network.2.0.attn": (0.75, 16), "network.3.0.attn": (0.5, 16), "network.4.0.attn": (0.5, 16)},
    ),
}


@functools.cache
def at_published_size(name: str):
    model_name, options = PUBLISHED_SIZE[name]
    torch.manual_seed(0)
    return settle(randomise(timm.create_model(model_name, num_classes=5, **options)).double(), images(name))


def images(name: str) -> torch.Tensor:
    if name not in PUBLISHED_SIZE:
        return images_for(name)
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model_of(name: str):
    return copy.deepcopy(at_published_size(name)) if name in PUBLISHED_SIZE else fresh(name)


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
@pytest.mark.parametrize("name", PATTERNS)
def test_k_per_stage_equals_the_oracle(name):
    """Logits below the k-th of their row are hidden in the model's own code, each module by its own k."""
    pattern, expected = PATTERNS[name]
    model, x = model_of(name), images(name)
    with torch.no_grad():
        dense = model(x)
        with regard.converted(model, dict.fromkeys(pattern, "knn(topk=1.0)"), example_inputs=x):
            torch.testing.assert_close(model(x), dense, rtol=1e-9, atol=1e-9)
        with regard.converted(model, pattern, example_inputs=x) as record:
            ours = model(x)
        assert {
            row.module: (regard.parse_mechanism(row.mechanism).topk, row.keys) for row in record.converted
        } == expected
        with selecting(model, 1.0, topk={module: topk for module, (topk, _) in expected.items()}):
            torch.testing.assert_close(ours, model(x), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(ours, dense, rtol=1e-3, atol=1e-3)


def test_the_page_writes_these_patterns():
    text = PAGE.read_text(encoding="utf-8")
    for name, (pattern, _) in PATTERNS.items():
        told = ", ".join(f'"{module}": "{mechanism}"' for module, mechanism in pattern.items())
        assert f"`{{{told}}}`" in text, name
    assert FAMILIES.keys() > PATTERNS.keys() - PUBLISHED_SIZE.keys()
