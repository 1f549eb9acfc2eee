"""Models that diffusers wrote, run by us.

    python ours_loads_diffusers.py --peer-outputs target/debug/peer_outputs --diffusion target/debug/diffusion
    python ours_loads_diffusers.py --store tests/parity

Makes models with random weights, with and without classes, in the ways in which diffusers saves
them (half precision, shards, pickles, moving averages, several schedulers).

`--peer-outputs` has each run by that program and repeats the run with diffusers on the same noise:
states after each step, and images, must agree within the tolerance (f32 in another order of
summation: measured below 4e-6; half-precision weights are widened on both sides). `--diffusion` has
`diffusion images sample` make pictures with DDIM, with and without guidance, and repeats those from
the same first noise: a pixel may be one level off, where rounding falls the other way. `--store`
writes the models with noise and results as fixtures for `cargo test`.

Exit code 0 when all agree, 1 when not, 77 when Python lacks what is needed. Run with diffusers 0.42.1
and torch 2.15.0 on a CPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

from common import Table, recorded, run, versions

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}

# name, what differs from SMALL, pipeline, scheduler with what differs from its defaults, labels,
# how it is saved, what classes.json says (nothing: every label is a class)
MODELS = [
    ("plain", {"sample_size": (8, 12), "in_channels": 2, "out_channels": 2},
     "DDPMPipeline", ("DDPMScheduler", {}), None, {}, None),
    ("classes", {"num_class_embeds": 4, "act_fn": "gelu"},
     "DDIMPipeline", ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}), [0, 3, 1], {}, None),
    ("classes_null", {"num_class_embeds": 4, "resnet_time_scale_shift": "scale_shift"},
     "DDPMPipeline", ("DDPMScheduler", {"prediction_type": "v_prediction",
                                        "rescale_betas_zero_snr": True,
                                        "timestep_spacing": "trailing"}),
     [3, 0, 2], {"max_shard_size": "20KB"}, {"null_class": 3}),
    ("classes_timestep", {"class_embed_type": "timestep", "freq_shift": 1, "flip_sin_to_cos": False},
     "DDPMPipeline", ("DDPMScheduler", {"prediction_type": "sample"}), [2, 0, 1], {},
     {"names": ["first", "second"], "null_class": 2}),
    ("half", {"downsample_type": "resnet", "upsample_type": "resnet", "in_channels": 3,
              "out_channels": 3},
     "DDPMPipeline", ("DDPMScheduler", {"variance_type": "fixed_large"}), None,
     {"variant": "fp16"}, None),
    ("pickles", {"num_class_embeds": 2, "add_attention": False},
     "DDIMPipeline", ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}), [1, 0, 1],
     {"safe_serialization": False, "max_shard_size": "20KB"}, None),
    ("average", {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
                 "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D")},
     "DDPMPipeline", ("DPMSolverMultistepScheduler", {}), None, {"average": True}, None),
    ("other_scheduler", {}, "DDPMPipeline", ("PNDMScheduler", {}), None, {}, None),
]
STEPS, BATCH = 4, 3


def build(index):
    """The network and the scheduler of a row, with weights of its own seed, none of them zero."""
    import diffusers
    import torch

    _, sizes, _, (scheduler, options), *_ = MODELS[index]
    torch.manual_seed(100 + index)
    unet = diffusers.UNet2DModel(**{**SMALL, **sizes}).eval()
    with torch.no_grad():
        for name, tensor in unet.named_parameters():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return unet, getattr(diffusers, scheduler)(**options)


def save(index, unet, scheduler, folder):
    """Saves a row's model as diffusers does, and gives the network that was saved."""
    import diffusers
    import torch
    from diffusers.training_utils import EMAModel

    _, _, pipeline, _, _, how, classes = MODELS[index]
    shutil.rmtree(folder, ignore_errors=True)
    how = dict(how)
    if how.pop("average", False):
        average = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)
        unet = type(unet).from_config(unet.config).eval()
        average.copy_to(unet.parameters())
        average.save_pretrained(os.path.join(folder, "unet_ema"))
    if how.get("variant") == "fp16":
        unet = unet.half().float()
    getattr(diffusers, pipeline)(unet=unet, scheduler=scheduler).save_pretrained(folder)
    own = os.path.join(folder, "unet")
    if os.path.exists(os.path.join(folder, "unet_ema")):
        # What the training script of diffusers leaves: the average in the network's place.
        shutil.rmtree(own)
        os.rename(os.path.join(folder, "unet_ema"), own)
    elif how:
        shutil.rmtree(own)
        half = torch.float16 if how.get("variant") == "fp16" else torch.float32
        unet.to(half).save_pretrained(own, **how)
        unet.to(torch.float32)
    if classes is not None:
        with open(os.path.join(folder, "classes.json"), "w", encoding="utf-8") as file:
            json.dump(classes, file)
    return unet


def store(root):
    import torch
    from safetensors.torch import save_file

    for index, (name, _, pipeline, (scheduler_class, _), labels, *_) in enumerate(MODELS):
        if scheduler_class == "PNDMScheduler":
            continue  # Only its table is read; there is no run of its own to compare.
        folder = os.path.join(root, f"pipeline.{name}")
        unet, scheduler = build(index)
        unet = save(index, unet, scheduler, folder)
        sizes = unet.config.sample_size
        height, width = sizes if isinstance(sizes, (tuple, list)) else (sizes, sizes)
        torch.manual_seed(7 + index)
        shape = (BATCH, unet.config.in_channels, height, width)
        noises = [torch.randn(shape) for _ in range(STEPS + 1)]
        given = None if labels is None else torch.tensor(labels)
        results, left = run(unet, scheduler, STEPS, noises, given)
        used = noises[:len(noises) - len(left)]
        gap, tolerance = "not measured (diffusers embeds a class as a time in f32 only)", 2e-5
        if unet.config.class_embed_type is None:
            exact, _ = run(unet.double(), scheduler, STEPS, [n.double() for n in noises], given)
            gap = (exact["xs"] - results["xs"]).abs().max().item()
            # Few steps through a wild network may carry rounding far.
            gap, tolerance = f"{gap:.1e}", max(tolerance, float(f"{4 * gap:.0e}"))
        golden = {f"noise.{k}": n for k, n in enumerate(used)} | results
        if given is not None:
            golden["labels"] = given
        save_file({n: t.contiguous() for n, t in golden.items()},
                  os.path.join(folder, "golden.safetensors"))
        fixture = {
            "name": f"pipeline.{name}", "kind": "pipeline",
            "system": "ddim" if pipeline == "DDIMPipeline" else "ddpm",
            "source": f"{versions()}, UNet2DModel in a {pipeline}; tests/peers/ours_loads_diffusers.py",
            "config": {}, "call": {"args": {"num_inference_steps": STEPS}},
            "tolerance": {"abs": tolerance, "rel": 2e-5},
            "notes": f"f32 on a CPU, random weights. Largest gap of the states to f64: {gap}.",
        }
        with open(os.path.join(folder, "fixture.json"), "w", encoding="utf-8") as file:
            json.dump(fixture, file, indent=1)
            file.write("\n")
        size = sum(os.path.getsize(os.path.join(at, f)) for at, _, fs in os.walk(folder) for f in fs)
        print(f"{folder}: {size} bytes, gap to f64 {gap}")


def against_steps(args, table, folder, row, unet, scheduler):
    """`peer_outputs` and diffusers on the same noise."""
    import torch

    name, _, _, (scheduler_class, _), labels, *_ = row
    if scheduler_class == "PNDMScheduler":
        return
    file = os.path.join(folder, "ours.safetensors")
    command = [args.peer_outputs, folder, file, "--steps", "10", "--batch", str(BATCH)]
    if labels is not None:
        command += ["--labels", ",".join(map(str, labels))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    noises, ours = recorded(file)
    theirs, left = run(unet, scheduler, 10, noises, None if labels is None else torch.tensor(labels))
    table.compare(f"{name}: timesteps", theirs["timesteps"], ours["timesteps"], 0)
    # Without clipping, a network with random weights lets states grow.
    size = max(1.0, theirs["xs"].abs().max().item())
    table.compare(f"{name}: states", theirs["xs"] / size, ours["xs"] / size)
    table.compare(f"{name}: images", theirs["images"], ours["images"])
    table.note(f"{name}: noise left over", float(len(left)), not left)


def against_pictures(args, table, folder, row, unet, scheduler):
    """`diffusion images sample` and diffusers' DDIM from the same first noise."""
    import diffusers
    import numpy as np
    import torch
    from PIL import Image

    name, _, _, _, labels, _, classes = row
    channels = unet.config.in_channels
    if channels == 2 or args.peer_outputs is None:
        return  # No picture has two channels; the first noise comes from the other program.
    # The first noise depends on the seed and the shape alone.
    file = os.path.join(folder, "ours.safetensors")
    plain = os.path.join(folder, "noise")
    unet_config = {**SMALL, "in_channels": channels, "out_channels": channels}
    diffusers.DDPMPipeline(diffusers.UNet2DModel(**unet_config),
                           diffusers.DDPMScheduler()).save_pretrained(plain)
    subprocess.run([args.peer_outputs, plain, file, "--steps", "1", "--batch", str(BATCH),
                    "--seed", "5"], check=True, stdout=subprocess.DEVNULL)
    first = recorded(file)[0][0]
    null = (classes or {}).get("null_class")
    cases = [(None, 1.0)] if labels is None else [(0, 1.0)]
    if null is not None:
        cases += [(0, 2.5), (None, 1.0)]
    for label, guidance in cases:
        out = os.path.join(folder, "out.png")
        command = [args.diffusion, "images", "sample", "--model", folder, "--out", out, "-q",
                   "-n", str(BATCH), "--columns", str(BATCH), "--sampler", "ddim", "--steps", "5",
                   "--grid", "leading", "--seed", "5", "--guidance", str(guidance)]
        if label is not None:
            command += ["--class", str(label)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        settings = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        settings.update(timestep_spacing="leading", steps_offset=0, clip_sample=True)
        ddim = diffusers.DDIMScheduler.from_config(
            {**settings, "set_alpha_to_one": True, "thresholding": False})
        ddim.set_timesteps(5)
        # Ours begins with the noise of the first step, diffusers with that of the end of the table.
        x = first * (1 - ddim.alphas_cumprod[ddim.timesteps[0]]).sqrt()
        with torch.inference_mode():
            for t in ddim.timesteps:
                def say(label):
                    given = {}
                    if unet.class_embedding is not None:
                        given["class_labels"] = torch.full((BATCH,), null if label is None else label)
                    return unet(x, t, **given).sample
                said = say(label)
                if guidance != 1.0:
                    said = say(None) + guidance * (said - say(None))
                # Ours takes the noise from the clipped prediction.
                x = ddim.step(said, t, x, use_clipped_model_output=True).prev_sample
        expected = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.int32)
        picture = np.array(Image.open(out)).astype(np.int32)
        picture = picture.reshape(picture.shape[0], picture.shape[1], -1)[:, :, :channels]
        # Images lie in a row, magnified to 32 pixels, with 2 pixels around each.
        height, width = expected.shape[2:]
        scale = -(-32 // max(height, width))
        worst = 0
        for k in range(BATCH):
            left = 2 + k * (scale * width + 2)
            found = picture[2:2 + scale * height:scale, left:left + scale * width:scale]
            found = torch.from_numpy(found.copy()).permute(2, 0, 1)
            worst = max(worst, (found - expected[k]).abs().max().item())
        what = f"{name}: picture, class {label}, guidance {guidance}"
        table.note(what, float(worst), worst <= 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-outputs")
    parser.add_argument("--diffusion")
    parser.add_argument("--store")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    try:
        import diffusers  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        print(f"skipped: this Python has no diffusers, torch or safetensors ({error})")
        return 77
    if args.store:
        store(args.store)
    if not (args.peer_outputs or args.diffusion):
        return 0
    print(versions())
    table = Table(args.tolerance)
    for index, row in enumerate(MODELS):
        with tempfile.TemporaryDirectory() as root:
            folder = os.path.join(root, row[0])
            unet, scheduler = build(index)
            unet = save(index, unet, scheduler, folder)
            if args.peer_outputs:
                against_steps(args, table, folder, row, unet, scheduler)
            if args.diffusion:
                against_pictures(args, table, folder, row, unet, scheduler)
    return table.verdict()


if __name__ == "__main__":
    sys.exit(main())
