"""What the scripts about diffusers' models share: recorded noise, runs of a pipeline, a table."""

import sys


def replay(tensors):
    """A stand-in for randn_tensor that hands out recorded noise, and what is left of it."""
    queue = list(tensors)

    def randn_tensor(shape, generator=None, device=None, dtype=None, layout=None):
        if not queue:
            raise SystemExit("diffusers asks for more noise than was recorded")
        noise = queue.pop(0)
        if tuple(noise.shape) != tuple(shape):
            raise SystemExit(f"diffusers asks for noise {tuple(shape)}, recorded {tuple(noise.shape)}")
        return noise.clone()

    return randn_tensor, queue


def run(unet, scheduler, steps, noises, labels=None):
    """Steps of a scheduler from recorded noise: timesteps, states, outputs, images; noise left."""
    import torch

    module = sys.modules[type(scheduler).__module__]
    before = getattr(module, "randn_tensor", None)
    module.randn_tensor, left = replay(noises[1:])
    given = {} if labels is None else {"class_labels": labels}
    xs, outputs = [], []
    with torch.inference_mode():
        scheduler.set_timesteps(steps)
        x = noises[0] * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            outputs.append(unet(scheduler.scale_model_input(x, t), t, **given).sample)
            x = scheduler.step(outputs[-1], t, x).prev_sample
            xs.append(x)
    module.randn_tensor = before
    return {
        "timesteps": scheduler.timesteps.double(),
        "xs": torch.stack(xs),
        "model_outputs": torch.stack(outputs),
        "images": (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous(),
    }, left


class Table:
    """Comparisons within a tolerance, printed as they are made."""

    def __init__(self, tolerance):
        self.tolerance, self.rows, self.bad = tolerance, 0, 0

    def note(self, what, gap, good):
        self.rows += 1
        self.bad += not good
        print(f"  {what:<46} {gap:10.2e}  {'ok' if good else 'DIFFERS'}")

    def compare(self, what, a, b, tolerance=None):
        import torch

        a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
        gap = (a - b).abs().max().item() if a.shape == b.shape else float("inf")
        self.note(what, gap, gap <= (self.tolerance if tolerance is None else tolerance))

    def verdict(self):
        print(f"peer: {self.rows - self.bad} of {self.rows} within {self.tolerance:g}")
        return 1 if self.bad else 0


def recorded(file):
    """The noise, and everything else, that `peer_outputs` wrote down."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    count = sum(name.startswith("noise.") for name in tensors)
    return [tensors[f"noise.{k}"] for k in range(count)], tensors


def versions():
    import diffusers
    import torch

    return f"diffusers {diffusers.__version__}, torch {torch.__version__}"
