"""DiffWave (Kong et al. 2021), section 3.2 of the paper."""

import math

import torch
from network import Network
from torch import nn
from torch.nn import functional as F


def imports():
    """Everything is imported above."""


class Embedding(nn.Module):
    def __init__(self, step, embedding):
        super().__init__()
        self.projection1 = nn.Linear(step, embedding)
        self.projection2 = nn.Linear(embedding, embedding)

    def forward(self, step):
        return F.silu(self.projection2(F.silu(self.projection1(step))))


class Residual(nn.Module):
    def __init__(self, mels, channels, embedding, dilation):
        super().__init__()
        self.dilated_conv = nn.Conv1d(
            channels, 2 * channels, 3, padding=dilation, dilation=dilation)
        self.diffusion_projection = nn.Linear(embedding, channels)
        self.conditioner_projection = nn.Conv1d(mels, 2 * channels, 1)
        self.output_projection = nn.Conv1d(channels, 2 * channels, 1)

    def forward(self, x, mel, step):
        y = x + self.diffusion_projection(step).unsqueeze(-1)
        y = self.dilated_conv(y) + self.conditioner_projection(mel)
        filtered, gate = torch.chunk(y, 2, dim=1)
        y = self.output_projection(torch.tanh(filtered) * torch.sigmoid(gate))
        residual, skip = torch.chunk(y, 2, dim=1)
        return (x + residual) / math.sqrt(2.0), skip


class DiffWave(nn.Module):
    def __init__(self, channels, layers, cycle, mels, step, embedding):
        super().__init__()
        self.input_projection = nn.Conv1d(1, channels, 1)
        self.diffusion_embedding = Embedding(step, embedding)
        self.residual_layers = nn.ModuleList(
            Residual(mels, channels, embedding, 2 ** (i % cycle)) for i in range(layers))
        self.skip_projection = nn.Conv1d(channels, channels, 1)
        self.output_projection = nn.Conv1d(channels, 1, 1)

    def forward(self, audio, mel, step):
        x = F.relu(self.input_projection(audio))
        step = self.diffusion_embedding(step)
        total = None
        for layer in self.residual_layers:
            x, skip = layer(x, mel, step)
            total = skip if total is None else total + skip
        x = total / math.sqrt(len(self.residual_layers))
        return self.output_projection(F.relu(self.skip_projection(x)))


def build(config, tensors):
    return Network(
        config["work"],
        tensors,
        make=lambda way: DiffWave(**config["config"]),
        forward=lambda model, way, inputs: model(inputs["audio"], inputs["mel"], inputs["step"]),
    )
