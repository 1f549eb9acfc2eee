//! `diffusion images likelihood`

use super::data::DataArgs;
use super::evaluate::opened;
use crate::out::out;
use crate::progress::Progress;
use crate::{Global, device, interrupt};
use anyhow::Result;
use clap::{Args, ValueEnum};
use diffusion_core::Report;
use diffusion_core::train::Cancel;
use diffusion_images::likelihood::{
    Baselines, BoundOptions, BoundReport, FlowOptions, FlowReport, ReverseVariance, baselines,
    bound, flow, levels,
};
use std::path::PathBuf;
use std::process::ExitCode;

pub const EXAMPLES: &str = "Examples:
  diffusion images likelihood --model digits-model
  diffusion images likelihood --model digits-model -n 100 --method vlb --steps 50 --variance analytic
  diffusion images likelihood --model digits-model -n 20 --method ode --importance 5

Bits per dimension of held-out images; lower is better. `vlb` is the variational bound: what the
prior, the steps and the decoder cost. `ode` is the density of the probability flow on images with
uniform noise in each level, a bound as well; compare each with its own kind. Below them stand
densities that any model should beat.";

/// How the likelihood is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// The variational bound.
    Vlb,
    /// The probability flow.
    Ode,
    /// Both.
    All,
}

/// The variance of the reverse steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VarianceName {
    /// That of q(x_s | x_t, x_0).
    Small,
    /// That of q(x_t | x_s).
    Large,
    /// What the network says.
    Learned,
    /// The optimal one, from the network's predictions on training images.
    Analytic,
}

/// Options of `diffusion images likelihood`.
#[derive(Args)]
pub struct Likelihood {
    /// Model folder.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    /// Number of held-out images; all of them when absent.
    #[arg(short, long)]
    n: Option<usize>,
    /// What is computed.
    #[arg(long, value_enum, default_value = "all")]
    method: Method,
    /// Steps of the bound, evenly over the table; all when absent.
    #[arg(long)]
    steps: Option<usize>,
    /// Variance of the bound's steps.
    #[arg(long, value_enum, default_value = "large")]
    variance: VarianceName,
    /// Training images for the statistics of the analytic variance.
    #[arg(long, default_value_t = 200, value_name = "IMAGES")]
    moments: usize,
    /// Draws of the noise within a level for the flow; more than one are weighted by importance, which
    /// tightens the bound.
    #[arg(long, default_value_t = 1, value_name = "DRAWS")]
    importance: usize,
    /// Compute the flow's divergence exactly, for images of at most 100 values: slow.
    #[arg(long)]
    exact: bool,
    /// Tolerance of the flow's solver.
    #[arg(long, default_value_t = 1e-4)]
    tolerance: f64,
    /// Images computed at a time; does not change the result.
    #[arg(long, default_value_t = 64)]
    batch: usize,
}

/// Everything found.
struct Found {
    images: usize,
    levels: usize,
    bound: Option<BoundReport>,
    flow: Option<FlowReport>,
    baselines: Baselines,
}

pub fn run(args: &Likelihood, global: &Global) -> Result<ExitCode> {
    let device = device::device(&global.device)?;
    let seed = global.seed.unwrap_or(0);
    let (model, splits) = opened(&args.model, &args.data, &device)?;
    let (train, test) = (&splits.train, &splits.test);
    check(args, test.len())?;
    let count = args.n.unwrap_or(test.len());
    // Evenly over the data, which may be sorted.
    let items: Vec<usize> = (0..count).map(|i| i * test.len() / count).collect();
    let test = test.select(&items)?;
    if !model.classes().is_empty() && model.classes() != test.classes() {
        let found = format!("classes {}", test.classes().join(", "));
        return Err(Report::new("--data", found)
            .expected(format!("{}, as in the model", model.classes().join(", ")))
            .remedy("give the data that the model was trained on")
            .config()
            .into());
    }
    let ((known, count), (held_out, _)) = (levels(train)?, levels(&test)?);
    let baselines = baselines(&known, &held_out, count)?;
    let cancel = Cancel::new();
    interrupt::listen(&cancel)?;
    let progress = || Progress::new(test.len() as u64, global.quiet, &cancel);
    let (mut found_bound, mut found_flow) = (None, None);
    if args.method != Method::Ode {
        let options = BoundOptions {
            steps: args.steps,
            variance: match args.variance {
                VarianceName::Small => ReverseVariance::Small,
                VarianceName::Large => ReverseVariance::Large,
                VarianceName::Learned => ReverseVariance::Learned,
                VarianceName::Analytic => ReverseVariance::Analytic,
            },
            moment_images: args.moments,
            batch: args.batch,
            seed,
        };
        let shown = progress();
        let result = bound(&model, train, &test, &options, &mut |done| shown.at(done));
        shown.done();
        found_bound = Some(result?);
    }
    if args.method != Method::Vlb {
        let options = FlowOptions {
            exact: args.exact,
            draws: args.importance,
            tolerance: args.tolerance,
            batch: args.batch,
            seed,
        };
        let shown = progress();
        let result = flow(&model, &test, &options, &mut |done| shown.at(done));
        shown.done();
        found_flow = Some(result?);
    }
    report(
        &Found {
            images: test.len(),
            levels: count,
            bound: found_bound,
            flow: found_flow,
            baselines,
        },
        global,
    )?;
    Ok(ExitCode::SUCCESS)
}

fn check(args: &Likelihood, held_out: usize) -> Result<()> {
    let count = args.n.unwrap_or(held_out);
    if count == 0 || count > held_out {
        return Err(Report::new("-n", count)
            .expected(format!("1 to {held_out}, the held-out images"))
            .config()
            .into());
    }
    for (option, value) in [
        ("--batch", args.batch),
        ("--importance", args.importance),
        ("--moments", args.moments),
    ] {
        if value == 0 {
            return Err(Report::new(option, 0)
                .expected("at least 1")
                .config()
                .into());
        }
    }
    Ok(())
}

fn report(found: &Found, global: &Global) -> Result<()> {
    if global.json {
        let all = serde_json::json!({
            "images": found.images,
            "levels": found.levels,
            "bound": found.bound,
            "flow": found.flow,
            "baselines": found.baselines,
        });
        out!("{all}");
        return Ok(());
    }
    out!(
        "bits per dimension of {} held-out images, {} grey levels",
        found.images,
        found.levels
    );
    if let Some(bound) = &found.bound {
        out!(
            "variational bound      {:8.3} ± {:.3}   {} steps",
            bound.total.mean,
            bound.total.error,
            bound.count
        );
        out!("  decoder              {:8.3}", bound.decoder);
        for part in &bound.steps {
            let name = format!("steps {} to {}", part.first, part.last);
            out!("  {name:20} {:8.3}", part.bits);
        }
        out!("  prior                {:8.3}", bound.prior);
    }
    if let Some(flow) = &found.flow {
        out!(
            "probability flow       {:8.3} ± {:.3}   from sigma {:.4}, {:.0} evaluations",
            flow.total.mean,
            flow.total.error,
            flow.start_sigma,
            flow.evaluations
        );
    }
    out!("uniform                {:8.3}", found.baselines.uniform);
    out!("histogram of pixels    {:8.3}", found.baselines.histogram);
    if let Some(gaussian) = found.baselines.gaussian {
        out!("Gaussian, covariance   {gaussian:8.3}");
    }
    Ok(())
}
