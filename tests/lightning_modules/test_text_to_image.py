import pytest
import torch

from support.fine_tuning import module
from support.tiny import distance, tiny_ddpo


@pytest.mark.parametrize("stage", ["fine-tuning", "DDPO"])
def test_the_device_does_not_decide_the_first_weights(tiny_pipeline, tiny_classifiers, stage):
    def built(default_device):
        if stage == "DDPO":
            model = tiny_ddpo(tiny_pipeline, tiny_classifiers)
        else:
            model = module(tiny_pipeline, train="lora")
        # as Lightning does: on a GPU it is "cuda"
        with torch.device(default_device):
            model.configure_model()
        return model

    there, here = built("meta"), built("cpu")
    tensors = dict(there.named_parameters()) | dict(there.named_buffers())
    assert {t.device.type for t in tensors.values()} == {"cpu"}
    assert distance(tensors, dict(here.named_parameters()) | dict(here.named_buffers())) == 0
