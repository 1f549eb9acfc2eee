"""The residual network of CSDI (Tashiro et al. 2021), section 3 and appendix of the paper."""

import math

import torch
from network import Network
from torch import nn
from torch.nn import functional as F


def imports():
    """Everything is imported above."""


def transformer(channels, heads, batch_first):
    layer = nn.TransformerEncoderLayer(
        d_model=channels, nhead=heads, dim_feedforward=64, dropout=0.0, activation="gelu",
        batch_first=batch_first)
    return nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)


class Embedding(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.projection1 = nn.Linear(step, step)
        self.projection2 = nn.Linear(step, step)

    def forward(self, step):
        return F.silu(self.projection2(F.silu(self.projection1(step))))


class Residual(nn.Module):
    def __init__(self, channels, side, step, heads, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.diffusion_projection = nn.Linear(step, channels)
        self.cond_projection = nn.Conv1d(side, 2 * channels, 1)
        self.mid_projection = nn.Conv1d(channels, 2 * channels, 1)
        self.output_projection = nn.Conv1d(channels, 2 * channels, 1)
        self.time_layer = transformer(channels, heads, batch_first)
        self.feature_layer = transformer(channels, heads, batch_first)

    def attend(self, layer, tokens):
        """Tokens of shape [sequences, channels, length], as the convolutions have them."""
        if self.batch_first:
            return layer(tokens.transpose(1, 2)).transpose(1, 2)
        return layer(tokens.permute(2, 0, 1)).permute(1, 2, 0)

    def forward(self, x, side, step, sizes):
        features, length = sizes
        batch, channels, cells = x.shape
        y = x + self.diffusion_projection(step).unsqueeze(-1)
        if length > 1:
            y = y.reshape(batch, channels, features, length).permute(0, 2, 1, 3)
            y = self.attend(self.time_layer, y.reshape(batch * features, channels, length))
            y = y.reshape(batch, features, channels, length).permute(0, 2, 1, 3)
        if features > 1:
            y = y.reshape(batch, channels, features, length).permute(0, 3, 1, 2)
            y = self.attend(self.feature_layer, y.reshape(batch * length, channels, features))
            y = y.reshape(batch, length, channels, features).permute(0, 2, 3, 1)
        y = y.reshape(batch, channels, cells)
        y = self.mid_projection(y) + self.cond_projection(side)
        filtered, gate = torch.chunk(y, 2, dim=1)
        y = self.output_projection(torch.tanh(filtered) * torch.sigmoid(gate))
        residual, skip = torch.chunk(y, 2, dim=1)
        return (x + residual) / math.sqrt(2.0), skip


class Csdi(nn.Module):
    def __init__(self, channels, layers, heads, side, step, batch_first):
        super().__init__()
        self.input_projection = nn.Conv1d(2, channels, 1)
        self.diffusion_embedding = Embedding(step)
        self.residual_layers = nn.ModuleList(
            Residual(channels, side, step, heads, batch_first) for _ in range(layers))
        self.output_projection1 = nn.Conv1d(channels, channels, 1)
        self.output_projection2 = nn.Conv1d(channels, 1, 1)

    def forward(self, x, side, step):
        batch, inputs, features, length = x.shape
        x = F.relu(self.input_projection(x.reshape(batch, inputs, features * length)))
        side = side.reshape(batch, -1, features * length)
        step = self.diffusion_embedding(step)
        skips = []
        for layer in self.residual_layers:
            x, skip = layer(x, side, step, (features, length))
            skips.append(skip)
        x = torch.sum(torch.stack(skips), dim=0) / math.sqrt(len(skips))
        x = self.output_projection2(F.relu(self.output_projection1(x)))
        return x.reshape(batch, features, length)


def build(config, tensors):
    return Network(
        config["work"],
        tensors,
        make=lambda way: Csdi(**config["config"], batch_first=way == "batch_first"),
        forward=lambda model, way, inputs: model(inputs["x"], inputs["side"], inputs["step"]),
        ways=("sequence_first", "batch_first"),
    )
