"""A hand-made comparison: figures chosen so that every verdict occurs."""

import math

import pytest

from regard.results import AttentionMap, Comparison, CostPoint, Crossover, Environment, EpochRecord, TrainingRun

TOKENS = (196, 784, 1600, 3136)
# Final accuracies by seed: knn(topk=0.5) is level with dense, knn(topk=0.125) loses by about one point.
ACCURACIES = {
    "dense": (0.812, 0.806, 0.815),
    "knn(topk=0.5)": (0.810, 0.811, 0.813),
    "knn(topk=0.125)": (0.802, 0.795, 0.806),
}
# Operator seconds at 196 tokens relative to dense, and the power of N by which the mechanism gains.
SPEEDS = {"dense": (1.0, 0.0), "knn(topk=0.5)": (1.15, 0.02), "knn(topk=0.125)": (1.3, 0.3)}


def make_run(mechanism: str, seed: int, accuracy: float, *, epochs: int = 8, finished: bool = True) -> TrainingRun:
    slower = SPEEDS[mechanism][0] if mechanism in SPEEDS else 1.0
    records = [
        EpochRecord(
            epoch=epoch,
            seconds=1.6 * slower * epoch + 0.05 * seed,
            train_loss=2.0 * math.exp(-epoch / 3) + 0.4,
            test_accuracy=accuracy * (1 - 0.7 * math.exp(-epoch / 1.7) * (8 - epoch) / 8),
        )
        for epoch in range(1, epochs + 1)
    ]
    return TrainingRun(
        mechanism=mechanism,
        seed=seed,
        model="small_vit",
        data="fashion-mnist-8k",
        recipe={"epochs": 8, "learning_rate": 1e-3},
        parameters=412_042,
        forward_flops=41_200_000,
        epochs=records,
        train_images_per_second=3750 / slower + 20 * seed,
        test_images_per_second=9100 / slower + 50 * seed,
        test_correct=[True, False],
        finished=finished,
        tokens=196,
    )


def make_costs(mechanism: str) -> list[CostPoint]:
    slower, gain = SPEEDS[mechanism]
    points = []
    for direction, factor in (("forward", 1.0), ("forward+backward", 3.1)):
        for tokens in TOKENS:
            seconds = 2e-3 * (tokens / 196) ** 1.9 * factor * slower * (196 / tokens) ** gain
            memory = int(6e5 + (0 if mechanism == "dense" else 90) * tokens * factor)
            points.append(
                CostPoint(
                    mechanism,
                    tokens,
                    1,
                    6,
                    64,
                    "float32",
                    direction,
                    "cpu",
                    seconds,
                    0.97 * seconds,
                    1.05 * seconds,
                    9,
                    flops=4 * 6 * 64 * tokens**2,
                    peak_memory=memory,
                )  # fmt: skip
            )
    return points


def make_map(mechanism: str, image_index: int, sharpness: float) -> AttentionMap:
    side, query = 7, (2 + image_index % 3, 3)
    raw = [
        [math.exp(-sharpness * math.hypot(row - query[0], column - query[1])) for column in range(side)]
        for row in range(side)
    ]
    total = sum(map(sum, raw))
    pixels = [[[int(255 * (row * column) / 729)] for column in range(28)] for row in range(28)]
    prediction = "Shirt" if mechanism.startswith("knn(topk=0.125") and image_index == 1 else "Coat"
    weights = [[one / total for one in row] for row in raw]
    return AttentionMap(mechanism, 0, image_index, "Coat", prediction, -1, query, weights, pixels)


def make_comparison() -> Comparison:
    mechanisms = list(ACCURACIES)
    return Comparison(
        settings={
            "data": "embedded",
            "mechanisms": mechanisms,
            "epochs": 8,
            "seeds": 3,
            "model": "small_vit",
            "device": "cpu",
        },
        environment=Environment(
            "Test machine", 2, 2, "avx512", "cpu", "3.11.7", "2.15.0", "1.0.31", "0.1.0", "abc1234", "2026-11-21"
        ),  # fmt: skip
        runs=[make_run(name, seed, ACCURACIES[name][seed]) for seed in range(3) for name in mechanisms],
        costs=[point for name in mechanisms for point in make_costs(name)],
        maps=[make_map(name, image, 0.3 + 0.6 * i) for image in range(4) for i, name in enumerate(mechanisms)],
        crossovers=[
            Crossover("knn(topk=0.5)", "forward", None),
            Crossover("knn(topk=0.125)", "forward", 470.0),
            Crossover("knn(topk=0.5)", "forward+backward", 2400.0),
            Crossover("knn(topk=0.125)", "forward+backward", 470.0),
        ],
        command="regard compare --epochs 8",
        seconds={"training": 181.0, "operators": 55.0, "maps": 0.8},
    )


@pytest.fixture
def comparison() -> Comparison:
    return make_comparison()
