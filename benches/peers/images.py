"""U-Nets: `diffusers.UNet2DModel`, contiguous and channels-last."""

import torch
from diffusers import UNet2DModel
from network import Network


def imports():
    """Everything is imported above."""


def build(config, tensors):
    sizes = {key: value for key, value in config["config"].items()
             if value is not None or key == "attention_head_dim"}

    def layout(model, inputs, way):
        if way == "channels_last":
            model = model.to(memory_format=torch.channels_last)
            inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
        return model, inputs

    return Network(
        config["work"],
        tensors,
        make=lambda way: UNet2DModel(**sizes),
        forward=lambda model, way, inputs: model(
            inputs["sample"], inputs["timestep"], return_dict=False)[0],
        ways=("contiguous", "channels_last"),
        layout=layout,
    )
