"""Single operations."""

import torch
from peer import Peer, compare, group
from torch.nn import functional as F


def imports():
    """What the memory of a case must not count."""
    import diffusers.models.resnet  # noqa: F401


def resnet_block(i, c):
    from diffusers.models.resnet import ResnetBlock2D

    channels = i["x"].shape[1]
    block = ResnetBlock2D(in_channels=channels, out_channels=channels,
                          temb_channels=i["temb"].shape[1])
    names = [name for name in i if name not in ("x", "temb")]

    def run(x, temb, **weights):
        return block(x, temb)

    # The arguments become the block's own parameters.
    for name in names:
        part, leaf = block, name.split(".")
        for step in leaf[:-1]:
            part = getattr(part, step)
        setattr(part, leaf[-1], torch.nn.Parameter(i[name].detach(), i[name].requires_grad))
        i[name] = getattr(part, leaf[-1])
    return run


#: What makes a function of the arguments from them and the settings.
OPS = {
    "matmul": lambda i, c: torch.matmul,
    "exp": lambda i, c: torch.exp,
    "conv2d": lambda i, c: lambda x, weight, bias: F.conv2d(
        x, weight, bias, c["stride"], c["padding"]),
    "conv1d": lambda i, c: lambda x, weight, bias: F.conv1d(
        x, weight, bias, padding=c["dilation"], dilation=c["dilation"]),
    "group_norm_silu": lambda i, c: lambda x, weight, bias: F.silu(
        F.group_norm(x, c["groups"], weight, bias, c["eps"])),
    "layer_norm": lambda i, c: lambda x, weight, bias: F.layer_norm(
        x, weight.shape, weight, bias, c["eps"]),
    "softmax": lambda i, c: lambda x: F.softmax(x, 1),
    "attention": lambda i, c: F.scaled_dot_product_attention,
    "linear": lambda i, c: F.linear,
    "silu": lambda i, c: F.silu,
    "gated_tanh": lambda i, c: lambda x: torch.tanh(x.chunk(2, 1)[0]) * torch.sigmoid(
        x.chunk(2, 1)[1]),
    "resnet_block": resnet_block,
}

#: Operations on maps, which have two memory formats.
MAPS = ("conv2d", "group_norm_silu", "resnet_block")

#: The order of positional arguments.
ORDER = {"matmul": "ab", "attention": "qkv"}


class Op(Peer):
    def __init__(self, config, tensors):
        self.config = config
        self.inputs, self.outputs = group(tensors, "inputs"), group(tensors, "outputs")
        self.gradients, self.seed = group(tensors, "gradients"), tensors.get("seed/y")
        if config["op"] in MAPS:
            self.ways = ("contiguous", "channels_last")

    def bind(self, way):
        """The function without arguments, and the arguments."""
        def place(tensor):
            if way == "channels_last" and tensor.dim() == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            tensor = tensor.clone(memory_format=torch.preserve_format)
            return tensor.requires_grad_(self.config["work"] == "fb")

        arguments = {name: place(tensor) for name, tensor in self.inputs.items()}
        op = self.config["op"]
        function = OPS[op](arguments, self.config)
        if op in ("matmul", "exp", "attention", "silu"):
            values = [arguments[name] for name in ORDER.get(op, "x")]
            return (lambda: function(*values)), arguments
        if op == "linear":
            values = [arguments[name] for name in ("x", "weight", "bias")]
            return (lambda: function(*values)), arguments
        return (lambda: function(**arguments)), arguments

    def check(self, way):
        function, arguments = self.bind(way)
        if self.config["work"] == "f":
            with torch.inference_mode():
                return compare("outputs", self.outputs, {"y": function()})
        y = function()
        y.backward(self.seed)
        gradients = {name: tensor.grad for name, tensor in arguments.items()}
        return max(compare("outputs", self.outputs, {"y": y}),
                   compare("gradients", self.gradients, gradients))

    def prepare(self, way, autocast=False, compiled=False):
        function, arguments = self.bind(way)
        if self.config["work"] == "f":
            def forward():
                with torch.inference_mode():
                    function()

            return forward
        arguments = list(arguments.values())
        ones = torch.ones_like(function())

        def both():
            for tensor in arguments:
                tensor.grad = None
            function().backward(ones)

        return both


class AdamW(Peer):
    """`torch.optim.AdamW` as it comes, foreach and fused, with an average by foreach."""

    ways = ("default", "foreach", "fused")
    also = ("default",)

    def __init__(self, config, tensors):
        self.config = config
        self.weights, self.inputs = group(tensors, "weights"), group(tensors, "inputs")
        self.outputs = group(tensors, "outputs")

    def update(self, way):
        config = self.config
        names = list(self.weights)
        parameters = [torch.nn.Parameter(self.weights[name].clone()) for name in names]
        average = [p.detach().clone() for p in parameters]
        for name, parameter in zip(names, parameters):
            parameter.grad = self.inputs[name].clone()
        optimiser = torch.optim.AdamW(
            parameters, lr=config["lr"], betas=tuple(config["betas"]), eps=config["eps"],
            weight_decay=config["weight_decay"], foreach=True if way == "foreach" else None,
            fused=True if way == "fused" else None)

        def step(decay):
            optimiser.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - decay)

        return step, names, parameters, average

    def check(self, way):
        step, names, parameters, average = self.update(way)
        for decay in self.config["decays"]:
            step(decay)
        theirs = dict(zip(names, parameters))
        theirs.update({f"ema-{name}": tensor for name, tensor in zip(names, average)})
        return compare("outputs", self.outputs, theirs)

    def prepare(self, way, autocast=False, compiled=False):
        step = self.update(way)[0]
        decay = self.config["decays"][-1]
        return lambda: step(decay)


def build(config, tensors):
    return (AdamW if config["op"] == "adamw_ema" else Op)(config, tensors)
