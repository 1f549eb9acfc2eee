//! The bound on data whose likelihood is known.

use super::*;
use crate::grid::Grid;
use crate::noise::CounterNoise;
use crate::oracle::{Gaussian, Mixture};
use crate::schedule::{BetaSchedule, Schedule, Table};
use candle_core::Device;
use diffusion_ops::rng::{Key, stream};

const N: usize = 256;

fn table() -> Table {
    BetaSchedule::ddpm(200).table(200).unwrap()
}

fn chain(steps: usize) -> Chain {
    Chain::new(&Grid::Trailing.points(&table(), steps).unwrap()).unwrap()
}

fn batch(rows: Vec<Vec<f64>>) -> Tensor {
    Tensor::new(rows, &Device::Cpu).unwrap()
}

/// Continuous data: the last step decodes with `σ̂²`, the others with the fixed variance.
fn dense(steps: usize, variance: Variance) -> Vlb {
    let chain = chain(steps);
    let variances: Vec<f64> = chain
        .hops()
        .iter()
        .map(|h| match variance {
            _ if h.into_data() => h.from.sigma_hat().powi(2),
            Variance::FixedSmall => h.log_small.exp(),
            _ => h.log_beta.exp(),
        })
        .collect();
    let chain = chain.with_variances(&variances).unwrap();
    Vlb::new(chain, variance, Decoder::Density)
}

/// Bits of −log p(x₀) an item, and their difference to the bound: mean and standard error.
fn gap(vlb: &Vlb, network: &dyn Denoiser, x0: &Tensor, log_p: &Tensor) -> (f64, f64) {
    let mut noise = CounterNoise::new(4, 0..N as u64);
    let bound = vlb.evaluate(network, x0, &mut noise, 0..N as u64).unwrap();
    let dims = x0.dim(1).unwrap() as f64;
    let exact = log_p
        .affine(-1.0 / (dims * std::f64::consts::LN_2), 0.0)
        .unwrap();
    let gap = Bound {
        total: (&bound.total - exact).unwrap(),
        ..bound
    };
    gap.mean().unwrap()
}

fn mixture() -> (Mixture, Tensor, Tensor) {
    let oracle = Mixture::new(
        vec![0.3, 0.7],
        vec![vec![-0.6, 0.4], vec![0.5, -0.2]],
        vec![0.2, 0.3],
    )
    .unwrap();
    let x0 = batch(oracle.samples(3, stream::TEST, N));
    let log_p = oracle.log_density(&x0, &Point::data(0.0)).unwrap();
    (oracle, x0, log_p)
}

#[test]
fn never_below_the_true_likelihood_and_tighter_with_more_steps() {
    let (oracle, x0, log_p) = mixture();
    for variance in [Variance::FixedSmall, Variance::FixedLarge] {
        let mut last = f64::INFINITY;
        for steps in [4, 20, 100] {
            let vlb = dense(steps, variance);
            let (mean, error) = gap(&vlb, &oracle, &x0, &log_p);
            assert!(mean > -4.0 * error, "{variance:?} {steps}: {mean} {error}");
            // Large β̃/β ratios next to the data make the small variance worse, not better.
            let falls = variance == Variance::FixedSmall || mean < last;
            assert!(falls, "{variance:?} {steps}: {mean} after {last}");
            last = mean;
        }
        assert!(variance == Variance::FixedSmall || last < 0.5, "{last}");
    }
}

/// Gaussian data: with the conditional variance the chain is the exact reversal at any T.
#[test]
fn the_optimal_variance_closes_the_gap_of_gaussian_data() {
    let c2 = 0.3f64.powi(2);
    let oracle = Gaussian::new(vec![0.0; 3], vec![0.3; 3]);
    let x0 = batch(
        (0..N as u64)
            .map(|i| {
                Key::new(1, stream::TEST)
                    .item(i)
                    .normal(3)
                    .iter()
                    .map(|z| 0.3 * z)
                    .collect()
            })
            .collect(),
    );
    let log_p = oracle.log_density(&x0, &Point::data(0.0)).unwrap();
    let variance_of = |p: &Point| p.alpha.powi(2) * c2 + p.sigma.powi(2);
    for steps in [1, 3, 10] {
        let chain = chain(steps);
        let optimal: Vec<f64> = chain
            .hops()
            .iter()
            .map(|h| {
                let cov = h.from.alpha / h.to.alpha * variance_of(&h.to);
                variance_of(&h.to) - cov.powi(2) / variance_of(&h.from)
            })
            .collect();
        let prior_std = variance_of(&chain.noisiest()).sqrt();
        let fixed = Vlb {
            prior_std,
            ..Vlb::new(chain, Variance::FixedSmall, Decoder::Density)
        };
        let vlb = Vlb {
            chain: fixed.chain.clone().with_variances(&optimal).unwrap(),
            ..fixed.clone()
        };
        let (mean, error) = gap(&vlb, &oracle, &x0, &log_p);
        assert!(mean.abs() < 4.0 * error, "{steps}: {mean} {error}");
        let (other, error) = gap(&fixed, &oracle, &x0, &log_p);
        assert!(
            steps == 1 || other > 4.0 * error,
            "{steps}: {other} {error}"
        );
    }
}

/// Half the scale lowers the bits of the density by one, and those of the levels not at all: the
/// bins shrink as well, and the bound stays above the same truth.
#[test]
fn a_change_of_scale_is_paid_by_the_jacobian() {
    let bits = |scale: f64| {
        let oracle = Gaussian::new(vec![0.0; 2], vec![0.3 * scale; 2]);
        let draw = |i| Key::new(1, stream::TEST).item(i).normal(2);
        let rows = (0..N as u64).map(|i| draw(i).iter().map(|z| 0.3 * scale * z).collect());
        let x0 = batch(rows.collect());
        let log_p = oracle.log_density(&x0, &Point::data(0.0)).unwrap();
        let (gap, error) = gap(&dense(50, Variance::FixedSmall), &oracle, &x0, &log_p);
        let exact = log_p.mean_all().unwrap().to_scalar::<f64>().unwrap();
        (super::super::bits_per_dim(-exact, 2), gap, error)
    };
    // A bin has the width 2/16 on the first scale and half of it on the second.
    let ((wide, gap1, e1), (narrow, gap2, e2)) = (bits(1.0), bits(0.5));
    assert!((narrow - wide + 1.0).abs() < 1e-9, "{narrow} {wide}");
    let level = super::super::dequantise::level_bits;
    assert!((level(narrow, 1.0 / 16.0) - level(wide, 2.0 / 16.0)).abs() < 1e-9);
    assert!(gap1 > -4.0 * e1 && gap2 > -4.0 * e2, "{gap1} {gap2}");
}

/// Batches with different steps give the terms that single steps give.
#[test]
fn a_mixed_batch_has_the_terms_of_its_items() {
    let (oracle, x0, _) = mixture();
    let x0 = x0.narrow(0, 0, 3).unwrap();
    let vlb = Vlb {
        clip: Clip::Static { range: 0.4 },
        ..Vlb::new(
            chain(10),
            Variance::FixedLarge,
            Decoder::Discretised { levels: 256 },
        )
    };
    let run = |x0: &Tensor, indices: &[usize]| -> Vec<f64> {
        let hops = vlb.chain.at(indices).unwrap();
        let at: Vec<Point> = hops.iter().map(|h| h.from).collect();
        let x_t = marginal(x0, &x0.affine(0.3, 0.1).unwrap(), At::Each(&at)).unwrap();
        let mut noise = CounterNoise::new(0, 0..1);
        let mut call = Call {
            noise: &mut noise,
            items: 0..1,
            tracked: false,
        };
        let said = oracle.predict(&x_t, At::Each(&at), &mut call).unwrap();
        let law = vlb.law(said, &x_t, &hops).unwrap();
        vlb.terms(&law, x0, &x_t, &hops).unwrap().to_vec1().unwrap()
    };
    let mixed = run(&x0, &[0, 4, 9]);
    for (i, index) in [0usize, 4, 9].iter().enumerate() {
        let single = run(&x0.narrow(0, i, 1).unwrap(), &[*index])[0];
        assert!((mixed[i] - single).abs() < 1e-12);
    }
}

/// Whatever the network calls its belief, the bound is the same.
#[test]
fn the_bound_does_not_depend_on_the_parameterisation() {
    use crate::denoiser::{PreviousX, from_fn};
    use crate::predict::Kind;
    let (oracle, x0, _) = mixture();
    let vlb = Vlb::new(chain(5), Variance::FixedSmall, Decoder::Density);
    let run = |vlb: &Vlb, network: &dyn Denoiser| {
        let mut noise = CounterNoise::new(4, 0..N as u64);
        let bound = vlb.evaluate(network, &x0, &mut noise, 0..N as u64).unwrap();
        bound.total.to_vec1::<f64>().unwrap()
    };
    let reference = run(&vlb, &oracle);
    let close = |a: &[f64]| a.iter().zip(&reference).all(|(a, b)| (a - b).abs() < 1e-8);
    for kind in [Kind::Epsilon, Kind::Velocity, Kind::Score] {
        let network = from_fn(|x: &Tensor, at: At<'_>, call: &mut Call<'_>| {
            oracle.predict(x, at, call)?.into_kind(kind, x, at)
        });
        assert!(close(&run(&vlb, &network)), "{kind:?}");
    }
    let steps: Vec<(Point, Point)> = vlb.chain.hops().iter().map(|h| (h.from, h.to)).collect();
    let previous = PreviousX {
        inner: from_fn(|x: &Tensor, at: At<'_>, call: &mut Call<'_>| {
            let x_0 = oracle.predict(x, at, call)?.value;
            let hop = vlb
                .chain
                .hops()
                .iter()
                .find(|h| h.from.t == at.points(1)[0].t)
                .unwrap();
            let mean = posterior_mean(x, &x_0, &vec![*hop; x.dim(0)?])?;
            Ok(Prediction::new(Kind::X0, mean))
        }),
        steps,
    };
    let vlb = Vlb {
        mean: Mean::Network,
        ..vlb.clone()
    };
    assert!(close(&run(&vlb, &previous)));
    assert_eq!(table().span(), (0.0, 199.0));
}
