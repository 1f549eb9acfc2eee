//! Likelihoods of diffusion models, measured on digits of 8×8 pixels and 16 grey levels.
//!
//! `cargo xtask reproduce likelihood` runs this example and shows the results as a page.

mod autoregressive;
mod data;
#[path = "../shared/jobs.rs"]
mod jobs;
mod measure;
mod net;
mod train;

use train::{ChainLoss, Effort, Learns, System, Shape};

fn main() -> anyhow::Result<()> {
    let d = data::Digits::open("mnist")?;
    let b = diffusion_images::likelihood::baselines(&d.train, &d.test, 16)?;
    println!("{b:?} {:?}", d.test.dims());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).stack_size(32 << 20).build()?;
    let arg: Vec<String> = std::env::args().collect();
    let steps: u64 = arg[1].parse()?;
    let width: usize = arg[2].parse()?;
    let which = &arg[3];
    pool.install(|| -> anyhow::Result<()> {
        let t = std::time::Instant::now();
        if which.contains('a') {
            println!("ar {} in {:?}", autoregressive::bits(&d.train, &d.test, steps, 0)?, t.elapsed());
        }
        let effort = Effort { width, blocks: 3, steps, batch: 128 };
        let few = d.test.narrow(0, 0, 200)?;
        for (c, learns, fourier) in [
            ('s', Learns::Chain { cosine: false, loss: ChainLoss::Simple }, &[][..]),
            ('c', Learns::Chain { cosine: true, loss: ChainLoss::Simple }, &[]),
            ('h', Learns::Chain { cosine: true, loss: ChainLoss::Hybrid }, &[]),
            ('b', Learns::Chain { cosine: true, loss: ChainLoss::Bound }, &[]),
        ] {
            if !which.contains(c) { continue; }
            let s = System { name: "s", learns, fourier };
            let m = train::train(&s, effort, &d.train, 0)?;
            println!("{learns:?} trained {:.1} s, {} weights", m.seconds, m.parameters);
            let table = s.table()?;
            let net = m.denoiser();
            let t = std::time::Instant::now();
            let mo = measure::moments(&net, &table, &d.train.narrow(0, 0, 200)?, 1)?;
            println!("moments {:?}", t.elapsed());
            for k in [10, 25, 50, 100, 1000] {
                let kept = measure::steps(&table, k, None)?;
                let mut all = vec![("small", measure::Reverse::Small), ("large", measure::Reverse::Large), ("analytic", measure::Reverse::Analytic(&mo))];
                if m.variance { all.push(("learned", measure::Reverse::Learned)); }
                for (n, r) in all {
                    let t = std::time::Instant::now();
                    let v = measure::total(&measure::bound(&net, &table, &kept, r, &few, 0)?)?;
                    println!("  {k} {n} {:.3} ± {:.3} in {:?}", v.value, v.error, t.elapsed());
                }
                if k < 1000 {
                    let v = measure::steps(&table, k, Some(&mo)).and_then(|kept| measure::total(&measure::bound(&net, &table, &kept, measure::Reverse::Analytic(&mo), &few, 0)?));
                    println!("  {k} OT {v:?}");
                }
            }
            let t = std::time::Instant::now();
            println!("ode {:?} {:?}", measure::flow(&net, &d.test.narrow(0,0,64)?, false, 0)?, t.elapsed());
        }
        for (c, shape, fourier) in [('x', Shape::Fixed, &[][..]), ('y', Shape::Fixed, &[2, 3]), ('e', Shape::Ends, &[2, 3]), ('f', Shape::Free, &[])] {
            if !which.contains(c) { continue; }
            let s = System { name: "s", learns: Learns::Vdm(shape), fourier };
            let m = train::train(&s, effort, &d.train, 0)?;
            println!("{shape:?} {fourier:?} trained {:.1} s", m.seconds);
            let Some(gamma) = &m.gamma else { continue };
            let t = std::time::Instant::now();
            for steps in [None, Some(10), Some(100), Some(1000)] {
                println!("  {steps:?} {:?} {:?}", measure::vdm(&m, gamma, steps, 4, &d.test, 0)?, t.elapsed());
            }
            let f = gamma.schedule().freeze()?;
            println!("  gamma {:?} {:?} {:?}", f.gamma(0.0), f.gamma(0.5), f.gamma(1.0));
        }
        for (c, weight, time) in [
            ('1', diffusion_core::loss::Weight::Simple, diffusion_core::loss::TimeLaw::Uniform),
            ('2', diffusion_core::loss::Weight::Likelihood, diffusion_core::loss::TimeLaw::Uniform),
            ('3', diffusion_core::loss::Weight::Simple, diffusion_core::loss::TimeLaw::Likelihood),
        ] {
            if !which.contains(c) { continue; }
            let s = System { name: "s", learns: Learns::Flow { weight, time }, fourier: &[] };
            let m = train::train(&s, effort, &d.train, 0)?;
            println!("{weight:?} {time:?} trained {:.1} s", m.seconds);
            let net = m.denoiser();
            let t = std::time::Instant::now();
            println!("  sf {:?} {:?}", measure::score_flow(&net, &d.test, 4, 0)?, t.elapsed());
            println!("  ode {:?} {:?}", measure::flow(&net, &d.test.narrow(0,0,64)?, false, 0)?, t.elapsed());
            println!("  vlb {:?} {:?}", measure::total(&measure::bound_of_process(&net, 200, &few, 0)?)?, t.elapsed());
        }
        Ok(())
    })
}
