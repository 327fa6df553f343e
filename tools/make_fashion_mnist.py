"""Make the data set that ships with regard: a balanced, lossless extract of Fashion-MNIST.

    apt-get install dataset-fashion-mnist        # Debian; or take the four .gz files from the project's page
    python tools/make_fashion_mnist.py           # reads /usr/share/datasets/fashion-mnist

Writes `fashion_mnist_{train,test}.png` and `fashion_mnist_LICENSE.txt` into src/regard/data/assets. Each PNG is a
mosaic of 28 x 28 tiles: one row of the mosaic is one class, in the order of the class labels, so the labels need no
file. 600 training and 200 test images a class are drawn from the official training and test sets without replacement,
by a seeded generator; the same command gives the same pixels. Expected result: about 3.3 MB, in some seconds.

Fashion-MNIST: Xiao, Rasul and Vollgraf, 2017, arXiv 1708.07747, MIT licence.
"""

import argparse
import gzip
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 1708_07747
CLASSES = 10
TAKEN = {"train": ("train", 600), "test": ("t10k", 200)}
ASSETS = Path(__file__).resolve().parent.parent / "src" / "regard" / "data" / "assets"

LICENCE = """\
The images in fashion_mnist_train.png and fashion_mnist_test.png are an extract of Fashion-MNIST
(https://github.com/zalandoresearch/fashion-mnist), which comes under this licence:

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in IDX format: two zero bytes, type 8, rank, big-endian sizes, values."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: no IDX file of bytes")
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape([int(size) for size in shape])


def mosaic(images: np.ndarray, labels: np.ndarray, each: int, generator: np.random.Generator) -> np.ndarray:
    """(classes * 28, each * 28): one row of tiles a class, in the order of the source."""
    rows = []
    for label in range(CLASSES):
        chosen = np.sort(generator.choice(np.flatnonzero(labels == label), size=each, replace=False))
        rows.append(np.concatenate(list(images[chosen]), axis=1))
    return np.concatenate(rows, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    for split, (prefix, each) in TAKEN.items():
        images = read_idx(options.source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(options.source / f"{prefix}-labels-idx1-ubyte.gz")
        pixels = mosaic(images, labels, each, generator)
        target = options.out / f"fashion_mnist_{split}.png"
        temporary = target.with_name(target.name + ".part")
        Image.fromarray(pixels).save(temporary, format="png", optimize=True)
        temporary.replace(target)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        print(f"{target.name}: {target.stat().st_size:,} bytes, sha256 of the pixels {digest}")
    (options.out / "fashion_mnist_LICENSE.txt").write_text(LICENCE, encoding="utf-8")


if __name__ == "__main__":
    main()
