"""Features of pytorch-fid's Inception network against ours.

    python inception.py --store tests/parity/inception.safetensors
    python inception.py --binary target/release/inception_features [--seed 0] [--tolerance 1e-4]

The first stores the weights of the network with a sixteenth of its widths, images and features, for
the test of `diffusion-images`. The second makes random weights for the whole network, saves them with
torch.save as it is now and as it was before PyTorch 1.6 (the form of the published file), and
compares the features that `inception_features WEIGHTS IMAGES OUT` computes from each. Nothing is
downloaded: the published weights have the same names and shapes.

Made with torch 2.15, torchvision and pytorch-fid 0.3.0 on a CPU. The tolerance is relative to the
largest feature; two orders of summation in f32 differ by 2e-6 of it, measured against the same
network in f64. Exit code 0 when all agree, 1 when not, 77 when Python lacks what is needed.
"""

import argparse
import os
import subprocess
import sys
import tempfile

DIVISOR = 16


def network(divisor, seed):
    """pytorch-fid's network with random weights, every width divided by `divisor`."""
    import torch
    import torchvision
    from pytorch_fid import inception as fid

    torch.manual_seed(seed)
    # The constructor asks for the published weights; it gets none.
    blank = {}
    original = fid.load_state_dict_from_url
    fid.load_state_dict_from_url = lambda *_, **__: blank
    load = torchvision.models.Inception3.load_state_dict
    torchvision.models.Inception3.load_state_dict = lambda *_, **__: None
    try:
        whole = fid.fid_inception_v3()
        model = fid.InceptionV3([3], resize_input=True, normalize_input=True)
    finally:
        fid.load_state_dict_from_url = original
        torchvision.models.Inception3.load_state_dict = load

    def unit(old):
        conv = old.conv
        inputs = conv.in_channels if conv.in_channels == 3 else conv.in_channels // divisor
        outputs = conv.out_channels // divisor
        new = torchvision.models.inception.BasicConv2d(
            inputs, outputs, kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding)
        taps = inputs * conv.kernel_size[0] * conv.kernel_size[1]
        with torch.no_grad():
            new.conv.weight.normal_(0, (2 / taps) ** 0.5)
            new.bn.weight.uniform_(0.5, 1.5)
            new.bn.bias.normal_(0, 0.2)
            new.bn.running_mean.normal_(0, 0.2)
            new.bn.running_var.uniform_(0.5, 1.5)
            for tensor in new.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.half().float())  # Half the bytes to store.
        return new

    stem = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    for name in stem:
        setattr(whole, name, unit(getattr(whole, name)))
    for name, block in whole.named_children():
        if name.startswith("Mixed"):
            for part, old in list(block.named_children()):
                setattr(block, part, unit(old))
    # The wrapper resizes, scales and runs the very blocks of `whole`.
    model.blocks = torch.nn.ModuleList([
        torch.nn.Sequential(*[getattr(whole, n) for n in stem[:3]], torch.nn.MaxPool2d(3, 2)),
        torch.nn.Sequential(*[getattr(whole, n) for n in stem[3:]], torch.nn.MaxPool2d(3, 2)),
        torch.nn.Sequential(*[getattr(whole, f"Mixed_{n}") for n in
                              ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e")]),
        torch.nn.Sequential(*[getattr(whole, f"Mixed_{n}") for n in ("7a", "7b", "7c")],
                            torch.nn.AdaptiveAvgPool2d((1, 1))),
    ])
    return whole, model.eval()


def pictures(seed):
    """Grey and coloured images, smaller and larger than the network's, in [-1, 1]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = {"grey": (2, 1, 28, 28), "colour": (2, 3, 32, 24), "large": (1, 1, 20, 310)}
    return {name: (torch.rand(shape, generator=generator) * 2 - 1).half().float()
            for name, shape in shapes.items()}


def features(model, images):
    import torch

    with torch.inference_mode():
        zero_to_one = (images / 2 + 0.5).expand(-1, 3, -1, -1)
        return model(zero_to_one)[0].flatten(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store")
    parser.add_argument("--binary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    try:
        import pytorch_fid  # noqa: F401
        import torch
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        print(f"skipped: this Python has no torch, safetensors or pytorch-fid ({error})")
        return 77

    images = pictures(args.seed)
    if args.store:
        whole, model = network(DIVISOR, args.seed)
        state = {n: t for n, t in whole.state_dict().items()
                 if not n.startswith("fc.") and not n.endswith("num_batches_tracked")}
        tensors = {f"weights/{n}": t.half() for n, t in state.items()}
        tensors.update({f"images/{n}": t.half() for n, t in images.items()})
        tensors.update({f"features/{n}": features(model, t) for n, t in images.items()})
        save_file({n: t.contiguous() for n, t in tensors.items()}, args.store)
        exact = {n: features(model.double(), t.double()) for n, t in images.items()}
        gap = max(((exact[n] - tensors[f"features/{n}"].double()).abs().max() /
                   exact[n].abs().max()).item() for n in images)
        print(f"{args.store}: {os.path.getsize(args.store)} bytes; f32 differs from f64 by {gap:.1e}")
    if not args.binary:
        return 0

    whole, model = network(1, args.seed)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        at = lambda name: os.path.join(folder, name)  # noqa: E731
        torch.save(whole.state_dict(), at("new.pth"))
        torch.save(whole.state_dict(), at("old.pth"), _use_new_zipfile_serialization=False)
        save_file({n: t.contiguous() for n, t in images.items()}, at("images.safetensors"))
        expected = {n: features(model, t) for n, t in images.items()}
        for weights in ("new.pth", "old.pth"):
            subprocess.run([args.binary, at(weights), at("images.safetensors"),
                            at("features.safetensors")], check=True)
            ours = load_file(at("features.safetensors"))
            for name, theirs in expected.items():
                gap = ((ours[name] - theirs).abs().max() / theirs.abs().max()).item()
                good = ours[name].shape == theirs.shape and gap <= args.tolerance
                bad += not good
                print(f"  {weights:<8} {name:<8} {gap:10.2e}  {'ok' if good else 'DIFFERS'}")
    print(f"peer: {'all' if not bad else 'not all'} within {args.tolerance:g} of the largest feature")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
