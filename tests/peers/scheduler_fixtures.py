"""Writes parity fixtures of diffusers' schedulers over many settings.

    python tests/peers/scheduler_fixtures.py OUT && cargo xtask parity OUT --strict

Data are normal, element by element, so that the model is known in closed form; the format is that of
the carried fixtures. Combinations that the library refuses, or where it is not finite, are left out.
"""

import itertools
import json
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file

warnings.filterwarnings("ignore")
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SHAPE = (2, 2, 3, 3)


def cases():
    """(system, class, config, call)"""
    def product(**choices):
        for values in itertools.product(*choices.values()):
            yield dict(zip(choices, values))

    ns = [1, 2, 3, 5, 12, 20]
    spreads = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]
    for order, kind, final, rule, n in itertools.product([1, 2, 3], ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"], ["zero", "sigma_min"], ["midpoint", "heun"], [3, 9, 20]):
        yield "dpmsolver_multistep", "DPMSolverMultistepScheduler", dict(SD, solver_order=order, algorithm_type=kind, final_sigmas_type=final, solver_type=rule), dict(num_inference_steps=n)
    for c in product(lower_order_final=[True, False], euler_at_final=[True, False], timestep_spacing=["linspace", "leading", "trailing"], prediction_type=["epsilon", "sample", "v_prediction"]):
        yield "dpmsolver_multistep", "DPMSolverMultistepScheduler", dict(SD, solver_order=3, **c), dict(num_inference_steps=7)
    for n in ns:
        for spread in spreads + [{"use_lu_lambdas": True}]:
            for beta in ["linear", "scaled_linear", "squaredcos_cap_v2"]:
                yield "dpmsolver_multistep", "DPMSolverMultistepScheduler", dict(beta_schedule=beta, **spread), dict(num_inference_steps=n, timestep_slack=1)
        for cls, system in [("DEISMultistepScheduler", "deis"), ("UniPCMultistepScheduler", "unipc"), ("DPMSolverSinglestepScheduler", "dpmsolver_singlestep"), ("SASolverScheduler", "sasolver")]:
            for spread in spreads:
                yield system, cls, dict(SD, **spread), dict(num_inference_steps=n, timestep_slack=1)
    for order, kind, final, rule, lower, n in itertools.product([1, 2, 3], ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"], ["zero", "sigma_min"], ["midpoint", "heun"], [True, False], [6, 7, 8]):
        yield "dpmsolver_singlestep", "DPMSolverSinglestepScheduler", dict(SD, solver_order=order, algorithm_type=kind, final_sigmas_type=final, solver_type=rule, lower_order_final=lower), dict(num_inference_steps=n)
    for c in product(solver_order=[1, 2, 3, 4], solver_type=["bh1", "bh2"], predict_x0=[True, False], lower_order_final=[True, False], final_sigmas_type=["zero", "sigma_min"]):
        yield "unipc", "UniPCMultistepScheduler", dict(SD, **c), dict(num_inference_steps=9)
    for c in product(prediction_type=["sample", "v_prediction"], timestep_spacing=["leading", "trailing"], disable_corrector=[[], [0, 2]]):
        yield "unipc", "UniPCMultistepScheduler", dict(SD, **c), dict(num_inference_steps=16)
        yield "deis", "DEISMultistepScheduler", dict(SD, prediction_type=c["prediction_type"], timestep_spacing=c["timestep_spacing"], solver_order=3), dict(num_inference_steps=16)
    for c in product(predictor_order=[1, 2, 3], corrector_order=[1, 2, 3], algorithm_type=["data_prediction", "noise_prediction"], lower_order_final=[True, False]):
        yield "sasolver", "SASolverScheduler", dict(SD, **c), dict(num_inference_steps=8)
    for n in [1, 2, 4, 7, 10, 13]:
        for spacing, skip, one, kind in itertools.product(["leading", "linspace", "trailing"], [True, False], [True, False], ["epsilon", "v_prediction"]):
            yield "pndm", "PNDMScheduler", dict(SD, timestep_spacing=spacing, skip_prk_steps=skip, set_alpha_to_one=one, prediction_type=kind), dict(num_inference_steps=n)
        for spacing, kind in itertools.product(["leading", "linspace", "trailing"], ["epsilon", "v_prediction"]):
            c = dict(SD, timestep_spacing=spacing, prediction_type=kind)
            for cls, system in [("EulerAncestralDiscreteScheduler", "euler_ancestral"), ("LMSDiscreteScheduler", "lms"), ("KDPM2DiscreteScheduler", "kdpm2"), ("HeunDiscreteScheduler", "heun"), ("EulerDiscreteScheduler", "euler")]:
                yield system, cls, c, dict(num_inference_steps=n)
            for order in [1, 2, 3]:
                yield "lms", "LMSDiscreteScheduler", c, dict(num_inference_steps=n, step={"order": order})
        for spread in spreads[1:]:
            for cls, system in [("LMSDiscreteScheduler", "lms"), ("KDPM2DiscreteScheduler", "kdpm2"), ("HeunDiscreteScheduler", "heun"), ("EulerDiscreteScheduler", "euler")]:
                yield system, cls, dict(SD, **spread), dict(num_inference_steps=n)
        for kind, clip, gamma in itertools.product(["epsilon", "sample", "v_prediction"], [True, False], [0.0, 0.3, 1.0]):
            yield "lcm", "LCMScheduler", dict(prediction_type=kind, clip_sample=clip), dict(num_inference_steps=n)
            yield "tcd", "TCDScheduler", dict(prediction_type=kind), dict(num_inference_steps=n, step={"eta": gamma})
        for spacing, one, kind, clip in itertools.product(["leading", "trailing"], [True, False], ["epsilon", "sample", "v_prediction"], [True, False]):
            yield "ddim_inverse", "DDIMInverseScheduler", dict(SD, timestep_spacing=spacing, set_alpha_to_one=one, prediction_type=kind, clip_sample=clip), dict(num_inference_steps=n, clean_start=True)
        for order, schedule, kind, algorithm, final in itertools.product([1, 2, 3], ["karras", "exponential"], ["epsilon", "v_prediction"], ["dpmsolver++", "sde-dpmsolver++"], ["zero", "sigma_min"]):
            yield "edm_dpmsolver_multistep", "EDMDPMSolverMultistepScheduler", dict(solver_order=order, sigma_schedule=schedule, prediction_type=kind, algorithm_type=algorithm, final_sigmas_type=final), dict(num_inference_steps=n)
        for shift, stochastic, terminal, spread in itertools.product([1.0, 3.0], [True, False], [None, 0.1], spreads):
            yield "flow_match_euler", "FlowMatchEulerDiscreteScheduler", dict(shift=shift, stochastic_sampling=stochastic, shift_terminal=terminal, **spread), dict(num_inference_steps=n)
        for linear in ["exponential", "linear"]:
            yield "flow_match_euler", "FlowMatchEulerDiscreteScheduler", dict(use_dynamic_shifting=True, time_shift_type=linear), dict(num_inference_steps=n, mu=1.3)
        for shift in [1.0, 2.0]:
            yield "flow_match_heun", "FlowMatchHeunDiscreteScheduler", dict(shift=shift), dict(num_inference_steps=n)
            for order in [1, 2, 3]:
                yield "dpmsolver_multistep", "DPMSolverMultistepScheduler", dict(solver_order=order, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift), dict(num_inference_steps=n)
                yield "unipc", "UniPCMultistepScheduler", dict(solver_order=order, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift), dict(num_inference_steps=n)
        for clip in [True, False]:
            yield "cm_stochastic_iterative", "CMStochasticIterativeScheduler", dict(clip_denoised=clip), dict(num_inference_steps=n)
        yield "ipndm", "IPNDMScheduler", {}, dict(num_inference_steps=n)
        for kind, clip in itertools.product(["epsilon", "sample"], [True, False]):
            yield "unclip", "UnCLIPScheduler", dict(prediction_type=kind, clip_sample=clip), dict(num_inference_steps=n)
        for order, kind, spacing, lower in itertools.product([1, 2, 3], ["dpmsolver++", "dpmsolver"], ["linspace", "leading", "trailing"], [True, False]):
            yield "dpmsolver_multistep_inverse", "DPMSolverMultistepInverseScheduler", dict(SD, solver_order=order, algorithm_type=kind, timestep_spacing=spacing, lower_order_final=lower), dict(num_inference_steps=n, clean_start=True)
    for beta in ["squaredcos_cap_v2", "exp"]:
        yield "heun", "HeunDiscreteScheduler", dict(beta_schedule=beta), dict(num_inference_steps=6)
    yield "ddpm", "DDPMScheduler", dict(beta_schedule="laplace"), dict(num_inference_steps=6)


def main(out):
    kept = 0
    for number, (system, cls, config, call) in enumerate(cases()):
        try:
            tensors = run(system, getattr(diffusers, cls), config, dict(call), number)
        except Exception as error:  # noqa: BLE001 (whatever the library refuses)
            print("left out:", system, config, call, str(error)[:80], file=sys.stderr)
            continue
        if tensors is None:
            continue
        inputs, outputs, config, call = tensors
        folder = out / f"scheduler.{system}.{number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        fixture = dict(
            name=f"scheduler.{system}.{number:04d}", kind="scheduler", system=system,
            source=f"diffusers {diffusers.__version__}, {cls}", config=config, call=call,
            tolerance=dict(abs=5e-4, rel=5e-4), notes="",
        )
        (folder / "fixture.json").write_text(json.dumps(fixture))
        save_file(inputs, folder / "inputs.safetensors")
        save_file(outputs, folder / "outputs.safetensors")
        kept += 1
    print(kept, "fixtures")


def plain(value):
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.floating, float)):
        value = float(value)
        return value if np.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def run(system, cls, config, call, seed):
    scheduler = cls(**config)
    config = plain(dict(scheduler.config, _class_name=cls.__name__))
    generator = torch.Generator().manual_seed(seed)
    noises = []

    def randn(shape, generator=None, device=None, dtype=None, layout=None):
        noises.append(torch.randn(shape, generator=generator_))
        return noises[-1].clone()

    generator_ = generator
    module = sys.modules[cls.__module__]
    kept = getattr(module, "randn_tensor", None)
    if kept is not None:
        module.randn_tensor = randn
    try:
        mu = torch.randn(SHAPE[1:], generator=generator) * 0.5
        s = torch.rand(SHAPE[1:], generator=generator) * 0.6 + 0.2
        arguments = {k: call[k] for k in ("num_inference_steps", "mu") if k in call}
        scheduler.set_timesteps(**arguments)
        start = getattr(scheduler, "init_noise_sigma", 1.0)
        x = torch.randn(SHAPE, generator=generator)
        x = mu + s * x if call.get("clean_start") else x * start
        flow = "FlowMatch" in cls.__name__ or config.get("use_flow_sigmas")
        edm = cls.__name__.startswith("EDM") or cls.__name__.startswith("CM")
        ve = system in ("euler", "euler_ancestral", "heun", "lms", "kdpm2")
        kind = config.get("prediction_type", "epsilon")
        coefficients = "sigma_flow" if flow else "edm" if edm else "sigma_vp" if ve else "ipndm" if system == "ipndm" else "alphas_cumprod"
        inputs = {"x_init": x.clone(), "mu": mu, "s": s}
        xs, step = [], call.get("step", {})
        sigmas = getattr(scheduler, "sigmas", None)
        for i, t in enumerate(scheduler.timesteps):
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(x, t)
            else:
                scaled = x
            if coefficients == "alphas_cumprod":
                bar = scheduler.alphas_cumprod[int(t)].double()
                a, b = bar.sqrt(), (1 - bar).sqrt()
            elif coefficients == "ipndm":
                a, b = scheduler.alphas[i].double(), scheduler.betas[i].double()
            else:
                index = scheduler.step_index if scheduler.step_index is not None else i
                sigma = sigmas[index].double()
                if system == "kdpm2" and not scheduler.state_in_first_order:
                    sigma = scheduler.sigmas_interpol[index].double()
                if system in ("heun", "flow_match_heun") and not scheduler.state_in_first_order:
                    sigma = sigmas[index].double()
                a, b = (1 - sigma, sigma) if flow else (torch.tensor(1.0), sigma) if edm else (1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt())
            seen = (x if edm else scaled).double()
            den = a * a * s.double() ** 2 + b * b
            eps = b * (seen - a * mu) / den
            x0 = mu + a * s.double() ** 2 * (seen - a * mu) / den
            if flow:
                out = eps - x0
            elif edm:
                sd = 0.5
                skip, scale = sd**2 / (b**2 + sd**2), b * sd / (b**2 + sd**2).sqrt()
                out = (x0 - skip * seen) / (-scale if kind == "v_prediction" else scale)
            elif system == "ipndm" or kind == "v_prediction":
                out = a * eps - b * x0
            else:
                out = x0 if kind == "sample" else eps
            if system == "unclip":
                # Its pipelines say where the step goes; left alone it goes one index down.
                after = scheduler.timesteps[i + 1 :]
                step = dict(prev_timestep=int(after[0]) if len(after) else None)
            x = scheduler.step(out.float(), t, x, **step).prev_sample
            if not torch.isfinite(x).all():
                return None
            xs.append(x.clone())
    finally:
        if kept is not None:
            module.randn_tensor = kept
    for k, noise in enumerate(noises):
        inputs[f"noise.{k}"] = noise
    outputs = {"xs": torch.stack(xs), "timesteps": scheduler.timesteps.clone().contiguous()}
    if outputs["timesteps"].dtype == torch.float64:
        outputs["timesteps"] = outputs["timesteps"].float()
    if sigmas is not None and cls.__name__ not in ("PNDMScheduler", "IPNDMScheduler"):
        outputs["sigmas"] = scheduler.sigmas.float().contiguous().clone()
    call.update(coefficients=coefficients, loop="standard", noise_count=len(noises))
    return inputs, outputs, config, call


if __name__ == "__main__":
    main(Path(sys.argv[1]))
