//! `yang-song/score_sde_pytorch`: whole runs of predictor and corrector, of the probability flow, and
//! likelihoods, on a score in closed form.

use super::score_sde::{
    Process, corrector, flag, inverse_scaler, model, setting, steps, unstacked, word,
};
use crate::parity::compare::Check;
use crate::parity::fixture::{Fixture, values};
use crate::parity::unsupported;
use anyhow::Result;
use candle_core::Tensor;
use diffusion_core::denoiser::Call;
use diffusion_core::forward::marginal;
use diffusion_core::likelihood::{OdeLikelihood, Probe, bits_offset, bits_per_dim};
use diffusion_core::noise::RecordedNoise;
use diffusion_core::ode::{Control, DormandPrince};
use diffusion_core::sample::langevin::predictor_corrector;
use diffusion_core::sample::{
    AncestralScore, Corrector, Ctx, EulerMaruyama, Finish, FlowOde, Inpaint, Move, Planned,
    ReverseDiffusion, Solver, Step,
};
use diffusion_core::schedule::Point;
use diffusion_core::schedule::linear::linspace;
use diffusion_core::tensor::At;

/// The times of the authors' samplers: `N` of them from 1 to ε.
fn grid(process: Process, n: usize, eps: f64) -> Vec<Point> {
    let schedule = process.schedule();
    let times = linspace(1.0, eps, n);
    times.into_iter().map(|t| schedule.at(t)).collect()
}

fn eps(fixture: &Fixture, process: Process) -> Result<f64> {
    let usual = if matches!(process, Process::Ve(_)) {
        1e-5
    } else {
        1e-3
    };
    setting(fixture, "eps", usual)
}

/// Runs a plan with the predictor of the fixture.
fn predict(
    fixture: &Fixture,
    process: Process,
    (moves, noise_into_data): (Vec<Move>, bool),
    run: &mut dyn FnMut(&dyn Solver) -> Result<Tensor>,
    dress: &dyn Fn(PlanParts<'_>) -> Result<()>,
) -> Result<Tensor> {
    let n = steps(fixture)?;
    let chain = process.chain(n)?;
    let flow = flag(fixture, "probability_flow", false);
    macro_rules! planned {
        ($step:expr) => {{
            let mut plan = Planned::with_moves($step, moves);
            dress(PlanParts {
                corrector: &mut plan.corrector,
                constraint: &mut plan.constraint,
            })?;
            run(&plan)
        }};
    }
    match word(fixture, "predictor") {
        "euler_maruyama" => planned!(EulerMaruyama {
            steps: Some(n),
            lambda: if flow { 1.0 } else { 0.0 },
            noise_into_data,
            ..EulerMaruyama::new(process.schedule())
        }),
        "reverse_diffusion" => planned!(ReverseDiffusion {
            chain: Some(chain),
            flow,
            noise_into_data,
        }),
        "ancestral_sampling" => planned!(AncestralScore {
            chain: Some(chain),
            large: matches!(process, Process::Vp(_)),
            noise_into_data,
        }),
        name if is_none(name) => planned!(Stay),
        other => Err(unsupported(format!("the predictor {other}"))),
    }
}

fn is_none(name: &str) -> bool {
    name.is_empty() || name.eq_ignore_ascii_case("none")
}

/// What the authors call the predictor or corrector `none`: the sample stays as it is.
struct Stay;

impl Corrector for Stay {
    fn correct(&self, x: &Tensor, _: &Point, _: &mut Ctx<'_>) -> diffusion_core::Result<Tensor> {
        Ok(x.clone())
    }
}

impl Step for Stay {
    type Memory = ();

    fn order(&self) -> diffusion_core::sample::Order {
        diffusion_core::sample::Order::Unstated
    }

    fn step(
        &self,
        x: &Tensor,
        _: &Point,
        _: &Point,
        _: &mut Ctx<'_>,
        (): &mut (),
    ) -> diffusion_core::Result<Tensor> {
        Ok(x.clone())
    }
}

/// The parts of a plan that do not depend on its step.
struct PlanParts<'a> {
    corrector: &'a mut Option<Box<dyn Corrector>>,
    constraint: &'a mut Option<Box<dyn diffusion_core::sample::Constraint>>,
}

/// A whole predictor-corrector run.
pub(super) fn pc_sampler(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let process = Process::of(fixture)?;
    let n = steps(fixture)?;
    let model = model(fixture, process)?;
    let mut points = grid(process, n, eps(fixture, process)?);
    points.push(Point::data(0.0));
    let name = word(fixture, "corrector");
    let corrects = !is_none(name);
    let mut moves = predictor_corrector(&points);
    if !corrects {
        moves.retain(|m| matches!(m, Move::Denoise(..)));
    }
    // In the order in which they are asked for: corrections first.
    let stacks = |name: &str| match fixture.inputs.get(name) {
        Some(stack) => unstacked(stack),
        None => Ok(Vec::new()),
    };
    let (mut predictors, correctors) = (stacks("predictor_noise")?, stacks("corrector_noise")?);
    if flag(fixture, "probability_flow", false) {
        // Drawn by the authors and multiplied by zero.
        predictors.clear();
    }
    let inner = if corrects { correctors.len() / n } else { 0 };
    let mut draws = Vec::new();
    for k in 0..n {
        draws.extend(correctors.iter().skip(k * inner).take(inner).cloned());
        draws.extend(predictors.get(k).cloned());
    }
    // A corrector stack may also be [N, n_steps, B, …].
    let rank = fixture.input("prior")?.rank();
    let mut noise = RecordedNoise::new(
        draws
            .into_iter()
            .map(|z| {
                if z.rank() > rank {
                    unstacked(&z)
                } else {
                    Ok(vec![z])
                }
            })
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .flatten(),
    );
    let x = fixture
        .input_f64("prior")?
        .affine(process.prior_std(), 0.0)?;
    let chain = process.chain(n)?;
    let items = x.dim(0)? as u64;
    let y = predict(
        fixture,
        process,
        (moves, !flag(fixture, "denoise", true)),
        &mut |solver| {
            let mut ctx = Ctx::new(&model, &mut noise, 0..items);
            Ok(solver.solve(x.clone(), &mut ctx, &mut ())?)
        },
        &|parts| {
            if corrects {
                *parts.corrector = Some(Box::new(corrector(fixture, process, name, &chain)?));
            }
            Ok(())
        },
    )?;
    check.stored(&fixture.outputs, "sample", &inverse_scaler(fixture, &y)?.0)
}

/// Inpainting by predictor and corrector. The authors paste at the level that a step has left.
pub(super) fn pc_inpainting(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let process = Process::of(fixture)?;
    let n = steps(fixture)?;
    let model = model(fixture, process)?;
    let points = grid(process, n, eps(fixture, process)?);
    let (data, mask) = (fixture.input_f64("data")?, fixture.input_f64("mask")?);
    let name = word(fixture, "corrector");
    // What is known is pasted after a correction that does nothing, too.
    let mut moves = Vec::new();
    for (k, at) in points.iter().enumerate() {
        moves.push(Move::Correct(*at));
        let last = k + 1 == n && flag(fixture, "denoise", true);
        let to = if last { Point::data(0.0) } else { *at };
        moves.push(Move::Denoise(*at, to));
    }
    let corrects = !is_none(name);
    let predicts = !is_none(word(fixture, "predictor"));
    let corrections = if corrects {
        setting(fixture, "n_steps", 1.0)? as usize
    } else {
        0
    };
    let mut draws = unstacked(&fixture.input_f64("noises")?)?;
    if predicts && flag(fixture, "probability_flow", false) {
        // Corrections, paste, prediction, paste: the prediction's is multiplied by zero.
        let mut place = 0;
        draws.retain(|_| {
            place += 1;
            (place - 1) % (corrections + 3) != corrections + 1
        });
    }
    let mut noise = RecordedNoise::new(draws);
    let prior = fixture
        .input_f64("prior")?
        .affine(process.prior_std(), 0.0)?;
    let x = ((&data * &mask)? + (mask.affine(-1.0, 1.0)? * prior)?)?;
    let chain = process.chain(n)?;
    let items = x.dim(0)? as u64;
    let y = predict(
        fixture,
        process,
        // Beside the mean of the known part stands the last sample, its noise included.
        (moves, true),
        &mut |solver| {
            let mut ctx = Ctx::new(&model, &mut noise, 0..items);
            Ok(solver.solve(x.clone(), &mut ctx, &mut ())?)
        },
        &|parts| {
            *parts.corrector = Some(if corrects {
                Box::new(corrector(fixture, process, name, &chain)?)
            } else {
                Box::new(Stay)
            });
            *parts.constraint = Some(Box::new(Inpaint::new(data.clone(), &mask)?));
            Ok(())
        },
    )?;
    // Where the signal fades the authors return the known part as it is at ε.
    let y = match points.last() {
        Some(end) if flag(fixture, "denoise", true) => {
            let known = marginal(&data, &data.zeros_like()?, At::All(*end))?;
            ((known * &mask)? + (mask.affine(-1.0, 1.0)? * y)?)?
        }
        _ => y,
    };
    check.stored(&fixture.outputs, "sample", &inverse_scaler(fixture, &y)?.0)
}

fn solver(fixture: &Fixture) -> Result<DormandPrince> {
    Ok(DormandPrince {
        rtol: setting(fixture, "rtol", 1e-5)?,
        atol: setting(fixture, "atol", 1e-5)?,
        control: Control::Whole,
        ..DormandPrince::default()
    })
}

/// The probability flow by RK45.
pub(super) fn ode_sampler(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let process = Process::of(fixture)?;
    let model = model(fixture, process)?;
    let sampler = FlowOde {
        schedule: process.schedule(),
        start: 1.0,
        end: eps(fixture, process)?,
        solver: solver(fixture)?,
        finish: if flag(fixture, "denoise", false) {
            Finish::Reversed(process.chain(steps(fixture)?)?)
        } else {
            Finish::None
        },
    };
    let z = fixture.input_f64("z")?;
    let mut noise = RecordedNoise::new([]);
    let mut ctx = Ctx::new(&model, &mut noise, 0..z.dim(0)? as u64);
    let y = sampler.solve(z, &mut ctx, &mut ())?;
    check.stored(&fixture.outputs, "sample", &inverse_scaler(fixture, &y)?.0)
}

/// Bits per dimension by the probability flow.
pub(super) fn likelihood(fixture: &Fixture, check: &mut Check) -> Result<()> {
    let process = Process::of(fixture)?;
    let model = model(fixture, process)?;
    let method = OdeLikelihood {
        prior_std: process.prior_std(),
        solver: solver(fixture)?,
        ..OdeLikelihood::new(process.schedule(), setting(fixture, "eps", 1e-5)?)
    };
    let data = fixture.input_f64("data")?;
    let probe = Probe::Vector(fixture.input_f64("epsilon")?);
    let mut noise = RecordedNoise::new([]);
    let mut call = Call {
        noise: &mut noise,
        items: 0..data.dim(0)? as u64,
        tracked: true,
    };
    let out = method.with_probe(&model, &data, &probe, &mut call)?;
    check.stored(&fixture.outputs, "z", &out.latent)?;
    // 7 − s(−1): 7 for data in [0, 1] scaled to [−1, 1], 8 for data that lies there already.
    let (_, lowest) = inverse_scaler(fixture, &data)?;
    let offset = bits_offset(256, 2.0) - lowest;
    let dims = data.elem_count() / data.dim(0)?;
    let bits: Vec<f64> = out
        .log_density
        .iter()
        .map(|log| bits_per_dim(-*log, dims) + offset)
        .collect();
    if let Some(stored) = fixture.outputs.get("bpd") {
        check.values("bpd", &bits, &values(stored)?);
    }
    Ok(())
}
