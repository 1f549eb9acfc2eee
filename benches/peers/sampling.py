"""Samplers without their network: diffusers' schedulers, their `step` in a loop."""

import copy

import diffusers
import torch
from peer import Peer, compare, group


def imports():
    """Everything is imported above."""


class Run(Peer):
    def __init__(self, config, tensors):
        options = dict(config["scheduler"])
        cls = getattr(diffusers, options.pop("_class_name"))
        self.scheduler = cls.from_config(options)
        self.scheduler.set_timesteps(config["steps"])
        self.inputs, self.outputs = group(tensors, "inputs"), group(tensors, "outputs")

    def run(self):
        # A fresh state without the cost of the tables.
        scheduler = copy.copy(self.scheduler)
        for name in ("model_outputs", "ets", "derivatives", "timestep_list"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, list(getattr(scheduler, name)))
        x, epsilon = self.inputs["x"], self.inputs["epsilon"]
        scales = hasattr(scheduler, "scale_model_input")
        with torch.inference_mode():
            for t in scheduler.timesteps:
                if scales:
                    scheduler.scale_model_input(x, t)
                x = scheduler.step(epsilon, t, x, return_dict=False)[0]
        return x

    def check(self, way):
        return compare("outputs", self.outputs, {"x": self.run()})

    def prepare(self, way, autocast=False, compiled=False):
        return self.run


def build(config, tensors):
    return Run(config, tensors)
