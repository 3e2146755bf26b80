import json
import sys

import pytest

from benchmarks import ddpo
from benchmarks.measure import Epoch, Seconds, Stopwatch, now, summary

NAMED = {
    "rollout_images_per_s", "rollout_images_per_cpu_s", "update_image_timesteps_per_s",
    "update_image_timesteps_per_cpu_s", "epoch_s", "epoch_cpu_s", "peak_rss_mb", "peak_gpu_mb",
    "share_of_peak", "parts", "ratio_deviation", "reward_curve",
}  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--one-pass", "--updates=1"]], ids=["ddpo", "one pass"])
def test_the_real_module_is_driven_and_its_figures_agree(tiny_pipeline, monkeypatch, capsys, more):
    options = [
        tiny_pipeline, "--steps=3", "--samples=8", "--micro-batch=4", "--updates=2", "--epochs=3",
        "--warmup=1", "--guidance=3", "--train=lora", "--lr=1e-3", "--clip-range=1e-2",
        "--precision=32", "--device=cpu", "--seed=1", "--reward=brightness",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["benchmarks.ddpo", *options, *more])
    ddpo.main()
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= NAMED
    assert set(found["parts"]) == {"text", "unet_forward", "backward", "vae", "reward", "rest"}
    assert sum(found["parts"].values()) == pytest.approx(found["epoch_cpu_s"], rel=0.5)
    assert found["parts"]["unet_forward"] > found["parts"]["text"]
    assert len(found["reward_curve"]) == 3
    assert len(set(found["reward_curve"])) == 3
    assert all(0 < reward < 1 for reward in found["reward_curve"])
    assert 0 <= found["ratio_deviation"] < 1e-5
    assert 0 < found["share_of_peak"] < 1
    assert found["peak_rss_mb"] > 200
    sampling = 8 / found["rollout_images_per_cpu_s"]
    training = 24 / found["update_image_timesteps_per_cpu_s"]
    assert sampling + training == pytest.approx(found["epoch_cpu_s"], rel=0.3)


def test_the_warm_up_must_leave_an_epoch(tiny_pipeline, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", tiny_pipeline, "--epochs=2", "--warmup=2"])
    with pytest.raises(SystemExit):
        ddpo.main()
    assert "allowed are 0 to 1" in capsys.readouterr().err


def spin(seconds):
    end = now().cpu + seconds
    while now().cpu < end:
        pass


def test_a_part_inside_another_is_counted_once():
    watch = Stopwatch()
    with watch.part("outer"):
        spin(0.02)
        watch.timed("inner", spin)(0.04)
    assert watch.spent["inner"].cpu == pytest.approx(0.04, rel=0.3)
    assert watch.spent["outer"].cpu == pytest.approx(0.02, rel=0.3)


def test_the_figures_are_medians():
    epochs = [
        Epoch(Seconds(n, n), Seconds(2 * n, n), Seconds(4 * n, 3 * n), 0.5) for n in (1, 2, 90)
    ]
    found = summary(epochs, samples=16, pairs=80)
    assert found["rollout_images_per_s"] == 8
    assert found["update_image_timesteps_per_s"] == 20
    assert found["update_image_timesteps_per_cpu_s"] == 40
    assert (found["epoch_s"], found["epoch_cpu_s"]) == (8, 6)
