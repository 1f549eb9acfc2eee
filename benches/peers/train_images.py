"""The training of `diffusion images train`, done by PyTorch, and both side by side.

    python train_images.py train MODEL OUT [--steps N] [--threads N]
    python train_images.py race OUT --diffusion target/release/diffusion [--preset NAME] [--config FILE] [--steps N]

`train` reads MODEL, a folder that our command wrote from `--data mnist`, and does the same job with
diffusers' `UNet2DModel`: the network of `unet/config.json`; process, loss, optimiser, learning rate,
clipping, moving average, label dropout, batch and steps of `run/config.toml`; the images and the split
of the built-in MNIST. It starts from weights of its own and draws its own noise. OUT is a folder of
diffusers that `diffusion images evaluate` reads. The faster of the contiguous and the channels-last
format is taken after a few steps of each, which are not counted.

`race` trains ours, trains the peer, evaluates both in the same way, and prints both times and both
evaluations; OUT/race.json has the numbers. Nothing else should run on the machine meanwhile.

Our time is that of the whole command, checkpoints included. The peer's is that of its loop, and of its
whole process beside it. Run with torch 2.15.0 and diffusers 0.42.1.
"""

import argparse
import copy
import gzip
import json
import math
import os
import subprocess
import sys
import time
import tomllib

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def mnist(folder):
    """The training images in [-1, 1] and their labels: of each class all but every fifth."""
    import torch

    def idx(name):
        with gzip.open(os.path.join(folder, name), "rb") as file:
            data = file.read()
        sizes = [int.from_bytes(data[4 + 4 * k:8 + 4 * k], "big") for k in range(data[3])]
        values = torch.frombuffer(bytearray(data[4 + 4 * data[3]:]), dtype=torch.uint8)
        return values.reshape(sizes)

    images, labels = idx("images-idx3-ubyte.gz"), idx("labels-idx1-ubyte.gz").long()
    seen, kept = {}, []
    for i, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] % 5:
            kept.append(i)
    return (images[kept].float() / 127.5 - 1).unsqueeze(1), labels[kept]


def refuse(field, found, known):
    raise SystemExit(f"run/config.toml: {field}: {found}; expected {known}")


def learning_rate(config):
    """The rate before step s, counted from 0."""
    schedule, base, steps = config["schedule"], config["lr"], config["steps"]
    kind, warmup = schedule["kind"], schedule.get("warmup", 0)

    def after(s):
        p = min(1.0, (s - warmup) / max(1, steps - warmup))
        if kind in ("constant", "constant_with_warmup"):
            return 1.0
        if kind == "linear":
            return max(0.0, 1 - p)
        if kind == "cosine":
            return max(0.0, (1 + math.cos(2 * math.pi * schedule.get("cycles", 0.5) * p)) / 2)
        if kind == "cosine_to_floor":
            floor = schedule.get("floor", 0.0)
            return floor + (1 - floor) * (1 + math.cos(math.pi * p)) / 2
        return refuse("train.schedule.kind", kind, "a constant, linear or cosine one")

    return lambda s: base * (s / warmup if s < warmup else after(s))


def ema_decay(rule):
    """The decay of update n, counted from 1; None without an average."""
    if rule["kind"] == "off":
        return None

    def decay(n):
        k = max(0, n - rule.get("update_after_step", 0) - 1)
        if k == 0:
            return 0.0
        if rule["kind"] == "warmup":
            value = 1 - (1 + k / rule.get("inv_gamma", 1.0)) ** -rule.get("power", 2 / 3)
        else:
            value = (1 + k) / (10 + k)
        return max(rule.get("min_decay", 0.0), min(rule.get("decay", 0.9999), value))

    return decay


def loss_weights(config, alpha_bar):
    """The weight of each timestep on the squared error of what the network predicts."""
    import torch

    snr = alpha_bar / (1 - alpha_bar)
    weight = config["weight"]
    if weight["kind"] == "simple":
        on_epsilon = torch.ones_like(snr)
    elif weight["kind"] == "min_snr":
        on_epsilon = (weight["gamma"] / snr).clamp(max=1)
    elif weight["kind"] == "velocity":
        on_epsilon = 1 / alpha_bar
    else:
        refuse("weight.kind", weight["kind"], "simple, min_snr or velocity")
    factor = {"epsilon": torch.ones_like(snr), "sample": snr, "v_prediction": alpha_bar}
    return (on_epsilon * factor[config["predicts"]]).float()


class Job:
    """The training, a step at a time."""

    def __init__(self, args, layout):
        import torch
        from diffusers import DDPMScheduler, UNet2DModel

        with open(os.path.join(args.model, "run", "config.toml"), "rb") as file:
            self.config = tomllib.load(file)
        train = self.train = self.config["train"]
        if args.steps:
            train["steps"] = args.steps
        if self.config["time"]["kind"] != "uniform":
            refuse("time.kind", self.config["time"]["kind"], "uniform")
        if train["accumulate"] != 1:
            refuse("train.accumulate", train["accumulate"], "1")
        torch.manual_seed(train["seed"])
        self.images, self.labels = mnist(args.data)
        sizes = UNet2DModel.load_config(os.path.join(args.model, "unet"))
        self.unet = UNet2DModel.from_config(sizes)
        self.unet.train().to(memory_format=layout)
        self.layout = layout
        self.scheduler = DDPMScheduler.from_pretrained(args.model, subfolder="scheduler")
        self.weights = loss_weights(self.config, self.scheduler.alphas_cumprod)
        self.parameters = list(self.unet.parameters())
        adamw = train["adamw"]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=train["lr"], betas=(adamw["beta1"], adamw["beta2"]),
            eps=adamw["eps"], weight_decay=adamw["weight_decay"], fused=True)
        self.rate, self.decay = learning_rate(train), ema_decay(train["ema"])
        self.average = [p.detach().clone() for p in self.parameters]
        self.order = torch.empty(0, dtype=torch.long)
        self.done, self.sum = 0, 0.0

    def items(self):
        """The next indices; each image once in an epoch, the next one begins where it ends."""
        import torch

        n = self.train["batch_size"]
        while len(self.order) < n:
            self.order = torch.cat([self.order, torch.randperm(len(self.images))])
        taken, self.order = self.order[:n], self.order[n:]
        return taken

    def step(self):
        import torch

        items = self.items()
        x0 = self.images[items].contiguous(memory_format=self.layout)
        given = {}
        if self.config["conditional"]:
            withheld = torch.rand(len(items)) < self.config["label_dropout"]
            null = self.unet.config.num_class_embeds - 1
            given["class_labels"] = torch.where(withheld, null, self.labels[items])
        noise = torch.randn_like(x0)
        t = torch.randint(len(self.weights), (len(items),))
        x = self.scheduler.add_noise(x0, noise, t)
        target = {"epsilon": lambda: noise, "sample": lambda: x0,
                  "v_prediction": lambda: self.scheduler.get_velocity(x0, noise, t),
                  }[self.config["predicts"]]()
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.done)
        self.optimiser.zero_grad(set_to_none=True)
        error = (self.unet(x, t, return_dict=False, **given)[0] - target).square()
        loss = (error.mean(dim=(1, 2, 3)) * self.weights[t]).mean()
        loss.backward()
        if self.train["clip_norm"] != "off":
            torch.nn.utils.clip_grad_norm_(self.parameters, self.train["clip_norm"])
        self.optimiser.step()
        self.done += 1
        if self.decay is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - self.decay(self.done))
        self.sum += loss.item()

    def save(self, out):
        import torch
        from diffusers import DDPMPipeline

        unet = copy.deepcopy(self.unet)
        if self.decay is not None:
            with torch.no_grad():
                for parameter, value in zip(unet.parameters(), self.average):
                    parameter.copy_(value)
        unet.to(memory_format=torch.contiguous_format)
        DDPMPipeline(unet=unet, scheduler=self.scheduler).save_pretrained(out)


def train(args):
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    layouts = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
    seconds = {}
    for name, layout in layouts.items():
        job = Job(args, layout)
        job.step()
        begin = time.perf_counter()
        for _ in range(3):
            job.step()
        seconds[name] = time.perf_counter() - begin
    best = min(seconds, key=seconds.get)
    job = Job(args, layouts[best])
    steps = job.train["steps"]
    begin = time.perf_counter()
    while job.done < steps:
        job.step()
        if job.done % max(1, steps // 10) == 0 and not args.quiet:
            print(f"step {job.done} of {steps}, mean loss {job.sum / job.done:.4f}, "
                  f"{time.perf_counter() - begin:.1f} s", file=sys.stderr)
    loop = time.perf_counter() - begin
    job.save(args.out)
    classes = os.path.join(args.model, "classes.json")
    if os.path.exists(classes):
        with open(classes, encoding="utf-8") as file, \
                open(os.path.join(args.out, "classes.json"), "w", encoding="utf-8") as copied:
            copied.write(file.read())
    print(json.dumps({"model": args.out, "steps": steps, "seconds": loop, "format": best,
                      "mean_loss": job.sum / steps, "threads": torch.get_num_threads(),
                      "torch": torch.__version__}))


def race(args):
    os.makedirs(args.out, exist_ok=True)
    ours, peer = os.path.join(args.out, "ours"), os.path.join(args.out, "peer")
    with open(os.path.join(ROOT, ".cargo", "config.toml"), "rb") as file:
        variables = tomllib.load(file)["env"]
    # The same allocator for both, and as many threads.
    env = {**os.environ, **variables}
    threads = str(args.threads or os.cpu_count())

    def run(command, **more):
        print("$ " + " ".join(command), file=sys.stderr)
        begin = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **more)
        return json.loads(done.stdout.strip().splitlines()[-1]), time.perf_counter() - begin

    command = [args.diffusion, "images", "train", "--data", "mnist", "--out", ours, "--json", "-q",
               "--validate-every", "0", "--threads", threads]
    command += ["--preset", args.preset] if args.preset else []
    command += ["--config", args.config] if args.config else []
    command += ["--steps", str(args.steps)] if args.steps else []
    said, seconds = run(command)
    result = {"steps": said["steps"], "threads": int(threads),
              "ours": {"seconds": seconds}, "peer": {}}
    command = [sys.executable, os.path.abspath(__file__), "train", ours, peer, "--threads", threads]
    said, seconds = run(command, env=env)
    result["peer"] = {"seconds": said["seconds"], "process_seconds": seconds,
                      "format": said["format"], "torch": said["torch"]}
    for side, folder in (("ours", ours), ("peer", peer)):
        command = [args.diffusion, "images", "evaluate", "--model", folder, "--data", "mnist",
                   "--json", "-q", "--guidance", str(args.guidance)]
        command += ["-n", str(args.n)] if args.n else []
        said, _ = run(command)
        result[side]["evaluation"], result["floor"] = said["samples"], said["floor"]
    result["ratio"] = result["ours"]["seconds"] / result["peer"]["seconds"]
    with open(os.path.join(args.out, "race.json"), "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)

    def figure(evaluation, name):
        value = evaluation.get(name)
        if not value:
            return "-"
        if "value" in value:
            return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        return f"{value['mean']:.4f} ± {value['std']:.4f}"

    a, b, floor = result["ours"], result["peer"], result["floor"]
    print(f"{result['steps']} steps, {threads} threads, guidance {args.guidance}")
    print(f"{'':<20}{'ours':>26}{'PyTorch':>26}{'real images':>26}")
    print(f"{'training, s':<20}{a['seconds']:>26.1f}{b['seconds']:>26.1f}")
    for name in ("frechet", "kernel", "accuracy"):
        print(f"{name:<20}" + "".join(f"{figure(e, name):>26}" for e in
                                      (a["evaluation"], b["evaluation"], floor)))
    for name in ("precision", "recall", "density", "coverage"):
        print(f"{name:<20}" + "".join(f"{e['manifold'][name]:>26.3f}" for e in
                                      (a["evaluation"], b["evaluation"], floor)))
    print(f"ours / PyTorch: {result['ratio']:.2f} ({b['format']}, torch {b['torch']}, "
          f"whole process {b['process_seconds']:.1f} s)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    sub = verbs.add_parser("train")
    sub.add_argument("model")
    sub.add_argument("out")
    sub.add_argument("--data", default=os.path.join(ROOT, "data", "mnist"))
    sub.add_argument("--quiet", action="store_true")
    sub.set_defaults(run=train)
    other = verbs.add_parser("race")
    other.add_argument("out")
    other.add_argument("--diffusion", required=True)
    other.add_argument("--preset")
    other.add_argument("--config")
    other.add_argument("--guidance", type=float, default=1.0)
    other.add_argument("-n", type=int)
    other.set_defaults(run=race)
    for each in (sub, other):
        each.add_argument("--steps", type=int)
        each.add_argument("--threads", type=int)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
