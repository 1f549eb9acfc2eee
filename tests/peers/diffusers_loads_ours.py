"""Repeats a run of ours with diffusers.

    peer_outputs MODEL OUT.safetensors
    python diffusers_loads_ours.py MODEL OUT.safetensors [--tolerance 1e-4]

Loads MODEL with DDPMPipeline.from_pretrained, runs it on the noise in OUT.safetensors, and prints a
table of the differences: timesteps, the sample after each step, and the images, the latter both
from the steps and from a call of the pipeline itself. Exit code 0 when all lie within the
tolerance, 1 when one does not, 77 when Python lacks what is needed.
"""

import argparse
import sys


def replay(tensors):
    """A stand-in for randn_tensor that hands out recorded noise."""
    queue = list(tensors)

    def randn_tensor(shape, generator=None, device=None, dtype=None, layout=None):
        if not queue:
            raise SystemExit("diffusers asks for more noise than was recorded")
        noise = queue.pop(0)
        if tuple(noise.shape) != tuple(shape):
            raise SystemExit(f"diffusers asks for noise {tuple(shape)}, recorded {tuple(noise.shape)}")
        return noise.clone()

    return randn_tensor, queue


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("outputs")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    try:
        import diffusers
        import torch
        from safetensors.torch import load_file
    except ImportError as error:
        print(f"skipped: this Python has no diffusers, torch or safetensors ({error})")
        return 77

    ours = load_file(args.outputs)
    noises = [ours[f"noise.{k}"] for k in range(sum(name.startswith("noise.") for name in ours))]
    steps, batch = ours["xs"].shape[0], ours["xs"].shape[1]
    pipe = diffusers.DDPMPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    scheduler_module = sys.modules[type(pipe.scheduler).__module__]
    pipeline_module = sys.modules[type(pipe).__module__]

    rows = []

    def compare(what, a, b):
        a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
        same_shape = a.shape == b.shape
        gap = (a - b).abs().max().item() if same_shape else float("inf")
        rows.append((what, gap, gap <= args.tolerance))

    with torch.inference_mode():
        scheduler_module.randn_tensor, left = replay(noises[1:])
        pipe.scheduler.set_timesteps(steps)
        compare("timesteps", pipe.scheduler.timesteps, ours["timesteps"])
        x = noises[0] * pipe.scheduler.init_noise_sigma
        for k, t in enumerate(pipe.scheduler.timesteps):
            x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
            compare(f"x after step {k + 1} of {steps}", x, ours["xs"][k])
        rows.append(("noise left over", float(len(left)), not left))
        images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        compare("images from the steps", images, ours["images"])

        pipeline_module.randn_tensor, left = replay(noises)
        scheduler_module.randn_tensor = pipeline_module.randn_tensor
        called = pipe(batch_size=batch, num_inference_steps=steps, output_type="np").images
        compare("images from the pipeline", called, ours["images"])

    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, {args.model}")
    for what, gap, good in rows:
        print(f"  {what:<28} {gap:10.2e}  {'ok' if good else 'DIFFERS'}")
    bad = sum(not good for _, _, good in rows)
    print(f"peer: {len(rows) - bad} of {len(rows)} within {args.tolerance:g}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
