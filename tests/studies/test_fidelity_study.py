"""The fidelity study on a tiny model: its points, what is on disk, resuming, and settings that cannot be obeyed."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from regard.conversion import record_attention
from regard.mixers import KNN, Dense, Multipole
from regard.results import FidelityStudy
from regard.studies import FidelitySettings, StudyInterrupted, study_fidelity
from regard.studies import fidelity as room
from regard.studies.near import near_share
from regard.studies.photographs import choose_photographs
from regard.studies.settings import SettingsError

MODEL = "vit_tiny_fidelity_test"
EXACT, HALF = "knn(topk=1.0)", "knn(topk=0.5)"


@timm.models.register_model
def vit_tiny_fidelity_test(pretrained=False, num_classes=0, dynamic_img_size=False, attn_layer=None, **_):
    options = {} if attn_layer is None else {"attn_layer": attn_layer}
    return timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=num_classes,
        global_pool="token",
        dynamic_img_size=dynamic_img_size,
        **options,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=0, dynamic_img_size=True)
    save_file({name: 4 * tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "w.safetensors")
    (folder / "photos").mkdir()
    for i in range(4):
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"p{i}.png")
    return folder


@pytest.fixture
def settings(inputs, tmp_path):
    def make(**changes):
        given = {"mechanisms": (EXACT, HALF), "layers": (HALF,), "sizes": (32,), "photos_count": 2, "model": MODEL}
        return FidelitySettings(
            inputs / "w.safetensors", inputs / "photos", **{**given, "out": tmp_path / "out", **changes}
        )

    return make


def run(settings):
    return study_fidelity(settings, show_progress=False)


def test_a_study_measures_every_mechanism_on_every_photograph(settings):
    study = run(settings(sizes=(32, 48)))
    found = [(point.mechanism, point.size, point.photo) for point in study.points]
    assert found == [(m, size, photo) for size in (32, 48) for photo in ("p0", "p2") for m in (EXACT, HALF)]
    for point in study.points:
        assert point.fidelity.patches == (point.size // 8) ** 2
        is_exact = point.mechanism == EXACT
        assert (point.fidelity.centred_cosine > 1 - 1e-6) == is_exact
        assert (point.layers is None) == is_exact
        keys = 1 + point.fidelity.patches
        assert point.near_share == (1.0 if is_exact else -(-keys // 2) / keys)
    heads = study.points[1].layers
    assert [len(layer) for layer in heads] == [2, 2]
    assert FidelityStudy.from_json((settings().out / "fidelity.json").read_text()).points == study.points
    assert set(study.dense_seconds) == {"32", "48"}


def test_what_is_on_disk_is_not_measured_again(settings, monkeypatch):
    first = run(settings())
    monkeypatch.setattr(room, "features_of", lambda *_args, **_kwargs: pytest.fail("measured again"))
    assert run(settings()).points == first.points


def test_what_is_on_disk_can_be_had_alone(settings, monkeypatch):
    first = run(settings(mechanisms=settings().mechanisms[:1], layers=()))
    assert [point.layers for point in first.points] == [None] * len(first.points)
    monkeypatch.setattr(room, "features_of", lambda *_args, **_kwargs: pytest.fail("measured"))
    study = study_fidelity(settings(), stored_only=True, show_progress=False)
    assert study.points == first.points
    assert set(study.settings["mechanisms"]) > {point.mechanism for point in study.points}


def test_a_stopped_study_keeps_what_is_finished_and_goes_on(settings, monkeypatch):
    measure, calls = room._Job.measure, []

    def stop_at_third(job, *question):
        calls.append(question)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(job, *question)

    monkeypatch.setattr(room._Job, "measure", stop_at_third)
    with pytest.raises(StudyInterrupted) as stopped:
        run(settings())
    assert stopped.value.study.interrupted
    assert len(stopped.value.study.points) == 2
    calls.clear()
    assert len(run(settings()).points) == 4
    assert len(calls) == 2, "the other two were found"


def test_a_broken_point_is_measured_again(settings):
    first = run(settings())
    for path in (settings().out / "points").iterdir():
        path.write_text(path.read_text()[:100])
    again = run(settings())
    assert [p.fidelity for p in again.points] == [p.fidelity for p in first.points]


def test_points_of_other_weights_are_refused(settings, inputs, tmp_path):
    run(settings())
    for path in (settings().out / "points").iterdir():
        content = json.loads(path.read_text())
        content["fingerprint"]["weights"] = "other"
        path.write_text(json.dumps(content))
    with pytest.raises(SettingsError, match="out: .* was made with weights='other'.*--overwrite"):
        run(settings())
    assert len(run(settings(overwrite=True)).points) == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mechanisms": ("knm",)}, "mechanisms: unknown name 'knm'.*known: knn"),
        ({"mechanisms": (HALF, HALF)}, "mechanisms: one is given twice"),
        ({"mechanisms": ()}, "mechanisms: give at least one"),
        ({"mechanisms": "knn"}, "mechanisms: expected a sequence"),
        ({"layers": ("dense",)}, "layers: dense is not among the mechanisms"),
        ({"sizes": (30,)}, "sizes: 30 is no multiple of the patch size 8; try 24"),
        ({"sizes": (0,)}, "sizes: expected whole numbers of pixels"),
        ({"photos_count": 5}, "photos: .* holds 4 photographs, 5 are asked for"),
        ({"photos_count": 0}, "photos_count: expected a whole number of at least 1, got 0"),
        ({"model": "vit_tiny_patch16_224"}, "weights: they do not fit vit_tiny_patch16_224"),
        ({"model": "vit_teeny"}, "model: timm cannot build 'vit_teeny'"),
    ],
)
def test_settings_that_cannot_be_obeyed(settings, changes, says):
    with pytest.raises(SettingsError, match=says):
        run(settings(**changes))


def test_missing_files_are_named(inputs, tmp_path):
    with pytest.raises(SettingsError, match="weights: .*none.safetensors cannot be read"):
        run(FidelitySettings(tmp_path / "none.safetensors", inputs / "photos", photos_count=1, model=MODEL))
    with pytest.raises(SettingsError, match="photos: .*nowhere cannot be read"):
        choose_photographs(tmp_path / "nowhere", 1)


def test_the_share_of_keys_near_is_counted(inputs):
    torch.manual_seed(1)
    model = timm.create_model(MODEL, num_classes=0, dynamic_img_size=True)
    calls = record_attention(model, torch.randn(1, 3, 32, 32))

    def share(mechanism):
        return near_share(mechanism, calls, num_prefix_tokens=1, grid_size=(4, 4))

    assert share(Dense()) == 1.0
    assert share(KNN(topk=3)) == pytest.approx(3 / 17)
    assert share(Multipole(num_clusters=4, near=4)) == pytest.approx(1.0)
    assert share(Multipole(num_clusters=4, near=0)) == pytest.approx(1 / 17), "the class token is always near"
    assert share(Multipole(num_clusters=16, near=5)) == pytest.approx(6 / 17), "a cluster for each key"
    assert 2 / 17 < share(Multipole(num_clusters=4, near=1)) < 14 / 17
