"""Repeats a run of ours with diffusers.

    peer_outputs MODEL OUT.safetensors [--batch 3 --labels 3,0,10]
    python diffusers_loads_ours.py MODEL OUT.safetensors [--tolerance 1e-4]

Loads MODEL as a user of diffusers does, runs it on the noise and the labels in OUT.safetensors, and
prints a table of the differences: timesteps, the sample after each step, and the images. A network
with classes is loaded by `UNet2DModel.from_pretrained(MODEL, subfolder="unet")` and called with
`class_labels`; one without also runs in a call of `DDPMPipeline`, which cannot pass labels
(`diffusion convert MODEL OUT --class NAME` makes such a network of one that has them).

The tolerance is for f32 in another order of summation, over as many steps as there are: measured
below 4e-6 after 10 steps, and to be seen to fail when a sample is off by 1e-3. Exit code 0 when all
lie within it, 1 when one does not, 77 when Python lacks what is needed.

Run with diffusers 0.42.1 and torch 2.15.0 on a CPU.
"""

import argparse
import sys

from common import Table, recorded, replay, run, versions


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("outputs")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    try:
        import diffusers
        import safetensors  # noqa: F401
    except ImportError as error:
        print(f"skipped: this Python has no diffusers, torch or safetensors ({error})")
        return 77

    noises, ours = recorded(args.outputs)
    labels = ours.get("labels")
    steps, batch = ours["xs"].shape[0], ours["xs"].shape[1]
    # The whole folder must load whatever it holds; the network is the one that a user would load.
    pipe = diffusers.DDPMPipeline.from_pretrained(args.model)
    unet = diffusers.UNet2DModel.from_pretrained(args.model, subfolder="unet").eval()

    print(f"{versions()}, {args.model}")
    table = Table(args.tolerance)
    theirs, left = run(unet, pipe.scheduler, steps, noises, labels)
    table.compare("timesteps", theirs["timesteps"], ours["timesteps"], 0)
    for k in range(steps):
        table.compare(f"x after step {k + 1} of {steps}", theirs["xs"][k], ours["xs"][k])
    table.note("noise left over", float(len(left)), not left)
    table.compare("images from the steps", theirs["images"], ours["images"])
    if labels is None:
        pipe.set_progress_bar_config(disable=True)
        stand_in, left = replay(noises)
        for part in (pipe, pipe.scheduler):
            sys.modules[type(part).__module__].randn_tensor = stand_in
        called = pipe(batch_size=batch, num_inference_steps=steps, output_type="np").images
        table.compare("images from the pipeline", called, ours["images"])
    return table.verdict()


if __name__ == "__main__":
    sys.exit(main())
