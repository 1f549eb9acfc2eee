"""Serves one case, computed by PyTorch, to the driver of `cargo xtask bench --against python`.

    peer.py probe
    peer.py serve NAME FOLDER --threads N [--compile] [--bf16]
    peer.py memory NAME FOLDER CALLS --threads N [--way WAY]

The protocol is that of `benches/src/serve.rs`, with three additions: the first line also holds the
difference of the results and the ways in which the work can be done, `run N WAY` chooses one, and
`memory` reads the case that `serve` of the other side left in FOLDER.

A module of the domain (`ops`, `images`, ...) gives `build(config, tensors) -> Peer`.
"""

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import time
import warnings

HERE = os.path.dirname(os.path.abspath(__file__))
WARM_UP = 3


class Peer:
    """A case of the other side. Subclasses give `ways`, `check` and `prepare`."""

    #: Names of the eager ways of doing the work; the fastest is reported.
    ways = ("eager",)
    #: Ways that are reported beside the fastest.
    also = ()
    #: Whether bf16 autocast and torch.compile make sense (whole networks).
    network = False

    def check(self, way):
        """The largest difference from the other side's results, relative to their size."""
        raise NotImplementedError

    def release(self):
        """Drops what is no longer needed once the work is prepared."""

    def prepare(self, way, autocast=False, compiled=False):
        """A function without arguments that does the work once."""
        raise NotImplementedError


def relative(ours, theirs, floor=0.0):
    """max |theirs - ours| / max(max |ours|, floor)."""
    import torch

    ours, theirs = ours.double(), theirs.detach().double().reshape(ours.shape)
    gap = (ours - theirs).abs().max().item()
    if gap != gap or not torch.isfinite(theirs).all():
        return float("inf")
    size = max(ours.abs().max().item(), floor)
    return gap / size if size > 0 else (0.0 if gap == 0 else float("inf"))


def compare(group, ours, theirs):
    """The largest relative difference of the tensors of a group.

    A tensor that is nearly zero beside the largest one (the gradient of a key's bias, which is
    zero but for rounding) is measured against a hundredth of that one.
    """
    floor = 0.01 * max(tensor.abs().max().item() for tensor in ours.values())
    missing = set(ours) - set(theirs)
    if missing:
        raise SystemExit(f"{group}: the peer computes no {', '.join(sorted(missing))}")
    return max(relative(tensor, theirs[name], floor) for name, tensor in ours.items())


def group(tensors, name):
    prefix = name + "/"
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def load(folder, results):
    from safetensors import safe_open

    with open(os.path.join(folder, "case.json"), encoding="utf-8") as file:
        config = json.load(file)
    tensors = {}
    with safe_open(os.path.join(folder, "case.safetensors"), framework="pt") as file:
        for name in file.keys():
            if results or not name.startswith(("outputs/", "gradients/")):
                # A copy: the file stays mapped no longer than it is read.
                tensors[name] = file.get_tensor(name).clone()
    return config, tensors


def build(name, folder, results=True):
    config, tensors = load(folder, results)
    module = importlib.import_module(name.split("/")[0])
    return module.build(config, tensors)


def say(**values):
    print(json.dumps(values), flush=True)


def timed(work, calls):
    wall, cpu = [], []
    for _ in range(calls):
        w, c = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - w)
        cpu.append(time.process_time() - c)
    return wall, cpu


def serve(arguments):
    import torch

    peer = build(arguments.name, arguments.folder)
    # One thread is compared by CPU time, more by wall time.
    clock = 1 if arguments.threads == 1 else 0
    difference = 0.0
    seconds, works = {}, {}
    for way in peer.ways:
        difference = max(difference, peer.check(way))
        work = peer.prepare(way)
        timed(work, 1)
        seconds[way] = statistics.median(timed(work, WARM_UP)[clock])
        works[way] = work
    best = min(seconds, key=seconds.get)
    also = [way for way in peer.also if way != best]
    works = {way: works[way] for way in [best, *also]}
    notes = []
    extra = []
    if peer.network and arguments.bf16:
        extra.append(("bf16", {"autocast": True}))
    if peer.network and arguments.compile:
        extra.append(("compiled", {"compiled": True}))
    for way, options in extra:
        try:
            work = peer.prepare(best, **options)
            timed(work, 2)
            works[way] = work
        except Exception as error:  # No compiler, or a processor without the instructions.
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            notes.append(f"{way}: not available ({first[:200]})")
    say(ready=True, difference=difference, way=best, seconds=seconds,
        ways=also + [way for way, _ in extra if way in works], notes=notes,
        version=torch.__version__)
    for line in sys.stdin:
        words = line.split()
        if words == ["quit"]:
            return
        if len(words) not in (2, 3) or words[0] != "run":
            raise SystemExit(f"request `{line.strip()}`; expected `run N [WAY]` or `quit`")
        wall, cpu = timed(works[words[2] if len(words) == 3 else best], int(words[1]))
        say(wall=wall, cpu=cpu)


def memory(arguments):
    """Resident before the case is read, and the peak after CALLS calls."""
    def status(field):
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1])
        raise SystemExit("this system does not tell the memory of a process; Linux does")

    # Modules are loaded before the measurement begins: their size is not the work's.
    importlib.import_module(arguments.name.split("/")[0]).imports()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    before = status("VmRSS")
    # Expected results would count as memory of the work.
    peer = build(arguments.name, arguments.folder, results=False)
    work = peer.prepare(arguments.way or peer.ways[0])
    peer.release()
    for _ in range(arguments.calls):
        work()
    say(before_kb=before, peak_kb=status("VmHWM"))


def main():
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("probe")
    for verb in ("serve", "memory"):
        sub = verbs.add_parser(verb)
        sub.add_argument("name")
        sub.add_argument("folder")
        if verb == "memory":
            sub.add_argument("calls", type=int)
            sub.add_argument("--way")
        sub.add_argument("--threads", type=int, required=True)
        sub.add_argument("--compile", action="store_true")
        sub.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, HERE)
    warnings.filterwarnings("ignore")
    # Modules import this file under its own name, not as `__main__`.
    sys.modules["peer"] = sys.modules["__main__"]

    import torch

    if arguments.verb == "probe":
        import diffusers
        import safetensors

        say(torch=torch.__version__, diffusers=diffusers.__version__,
            safetensors=safetensors.__version__)
        return
    torch.set_num_threads(arguments.threads)
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)
    torch.manual_seed(0)
    {"serve": serve, "memory": memory}[arguments.verb](arguments)


if __name__ == "__main__":
    main()
