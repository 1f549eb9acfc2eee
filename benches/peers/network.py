"""Training steps and sampling calls of any network."""

import contextlib

import torch
from peer import Peer, compare, group

LEARNING_RATE = 1e-4
EMA_DECAY = 0.9999


class Network(Peer):
    """`make(way)` builds the module without weights, `forward(model, way, inputs)` runs it."""

    network = True

    def __init__(self, work, tensors, make, forward, ways=("eager",), layout=None):
        self.work = work
        self.weights = group(tensors, "weights")
        self.inputs = group(tensors, "inputs")
        self.outputs = group(tensors, "outputs")
        self.gradients = group(tensors, "gradients")
        self.make, self.forward, self.ways = make, forward, ways
        self.layout = layout or (lambda model, inputs, way: (model, inputs))

    def model(self, way):
        model = self.make(way)
        model.load_state_dict(self.weights, strict=True)
        model.train(self.work == "train")
        return self.layout(model, dict(self.inputs), way)

    def check(self, way):
        model, inputs = self.model(way)
        if self.work == "train":
            y = self.forward(model, way, inputs)
            torch.nn.functional.mse_loss(y, inputs["target"]).backward()
            gradients = {name: p.grad for name, p in model.named_parameters()}
            worst = compare("gradients", self.gradients, gradients)
        else:
            with torch.inference_mode():
                y = self.forward(model, way, inputs)
            worst = 0.0
        return max(worst, compare("outputs", self.outputs, {"y": y}))

    def release(self):
        self.weights = {}  # The model has its own.

    def prepare(self, way, autocast=False, compiled=False):
        model, inputs = self.model(way)
        run = torch.compile(model) if compiled else model

        def context():
            if autocast:
                return torch.autocast("cpu", dtype=torch.bfloat16)
            return contextlib.nullcontext()

        if self.work == "call":
            def call():
                with torch.inference_mode(), context():
                    self.forward(run, way, inputs)

            return call

        parameters = list(model.parameters())
        optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
        average = [p.detach().clone() for p in parameters]

        def step():
            optimiser.zero_grad(set_to_none=True)
            with context():
                y = self.forward(run, way, inputs)
            torch.nn.functional.mse_loss(y.float(), inputs["target"]).backward()
            optimiser.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - EMA_DECAY)

        return step
