//! Schedules and grids against numbers that were computed apart from them.
//!
//! Levels and rates: the formulas of the papers in 50 decimal digits, rounded to f64. Indices: the
//! rules of diffusers 0.42 as NumPy 2.4 evaluates them, for every number of steps of every table,
//! folded into one number each.

#![allow(clippy::unwrap_used, clippy::panic)] // Helper functions of tests, which clippy does not see as such.
#![allow(clippy::excessive_precision, clippy::approx_constant)] // Values as they were computed.

use diffusion_core::grid::{Grid, exponential, karras};
use diffusion_core::schedule::{BetaSchedule, Edm, Schedule, SubVp, Ve, Vp};

/// The most that a number may be off, relatively.
const TOLERANCE: f64 = 1e-12;

fn close(what: &str, ours: f64, exact: f64) -> f64 {
    within(TOLERANCE, what, ours, exact)
}

fn within(tolerance: f64, what: &str, ours: f64, exact: f64) -> f64 {
    let error = (ours - exact).abs() / exact.abs().max(f64::MIN_POSITIVE);
    let error = if ours == exact { 0.0 } else { error };
    assert!(error <= tolerance, "{what}: {ours:e}, exactly {exact:e}");
    error
}

#[test]
fn signal_of_tables_is_exact() {
    let mut worst: f64 = 0.0;
    for (name, steps, index, exact) in TABLES {
        let betas = match name {
            "linear" => BetaSchedule::Linear {
                start: 1e-4,
                end: 0.02,
            },
            "scaled" => BetaSchedule::ScaledLinear {
                start: 0.00085,
                end: 0.012,
            },
            "cosine" => BetaSchedule::Cosine,
            _ => BetaSchedule::Sigmoid {
                start: 1e-4,
                end: 0.02,
            },
        };
        let table = betas.table(steps).unwrap();
        let what = format!("{name} of {steps} at {index}");
        // The cosine's zero is at the end of the table, where its argument's last bit counts.
        let tolerance = if name == "cosine" { 2e-12 } else { TOLERANCE };
        let alpha_bar = table.alpha_bar()[index];
        worst = worst.max(within(tolerance, &what, alpha_bar, exact));
        let p = table.index(index as i64);
        worst = worst.max(within(tolerance, &what, p.alpha * p.alpha, exact));
        let sum: f64 = p.alpha.powi(2) + p.sigma.powi(2);
        assert!((sum - 1.0).abs() < 1e-15, "{what}: {sum}");
    }
    println!(
        "{} values of ᾱ, worst relative error {worst:.1e}",
        TABLES.len()
    );
}

#[test]
fn levels_and_rates_of_continuous_processes_are_exact() {
    let mut worst: f64 = 0.0;
    for (name, t, [alpha, sigma, d_log_alpha, g2]) in CONTINUOUS {
        let schedule: Box<dyn Schedule> = match name {
            "vp" => Box::new(Vp::default()),
            "sub-vp" => Box::new(SubVp::default()),
            "ve" => Box::new(Ve::default()),
            _ => Box::new(Edm::default()),
        };
        let (p, r) = (schedule.at(t), schedule.rates(t));
        for (what, ours, exact) in [
            ("alpha", p.alpha, alpha),
            ("sigma", p.sigma, sigma),
            ("drift", r.d_log_alpha, d_log_alpha),
            ("g²", r.g2, g2),
        ] {
            worst = worst.max(close(&format!("{name} {what} at {t}"), ours, exact));
        }
    }
    println!(
        "{} points, worst relative error {worst:.1e}",
        CONTINUOUS.len()
    );
}

#[test]
fn noise_levels_of_grids_are_exact() {
    for (low, high, n, i, by_power, by_logarithm) in LEVELS {
        let what = format!("level {i} of {n} from {high} to {low}");
        close(&what, karras(low, high, n, 7.0)[i], by_power);
        close(&what, exponential(low, high, n)[i], by_logarithm);
    }
}

#[test]
fn indices_are_those_of_diffusers_for_every_number_of_steps() {
    for (rule, total, count, folded) in INDICES {
        let grid = match rule {
            "leading" => Grid::Leading { offset: 0 },
            "linspace" => Grid::Linspace,
            _ => Grid::Trailing,
        };
        let (mut number, mut sum) = (0u64, 0u64);
        for n in 1..=total {
            for index in grid.indices(total, n).unwrap() {
                number += 1;
                let place = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                sum = sum.wrapping_add((index as u64 + 1).wrapping_mul(place));
            }
        }
        assert_eq!((number, sum), (count, folded), "{rule} of {total}");
    }
}

/// Rule, length of the table, indices of all numbers of steps together, and
/// `Σ (index + 1) · (place · 0x9e3779b97f4a7c15)` modulo 2⁶⁴.
#[rustfmt::skip]
const INDICES: [(&str, usize, u64, u64); 21] = [
    ("leading", 10, 55, 0x2dd8ae5430ea8ab0),
    ("linspace", 10, 55, 0x332e004a83fac1ee),
    ("trailing", 10, 55, 0x78ebebfdd422f646),
    ("leading", 50, 1275, 0x1584704909a36580),
    ("linspace", 50, 1275, 0x603111228af59389),
    ("trailing", 50, 1275, 0xc40c8b1d6bc981d1),
    ("leading", 100, 5050, 0x4c18fce2efff43d9),
    ("linspace", 100, 5050, 0x19ca61eda4700408),
    ("trailing", 100, 5050, 0xeb32c3c34a3c8759),
    ("leading", 250, 31375, 0xa374332111a70b2c),
    ("linspace", 250, 31375, 0xf2c68e03d9c4cd7a),
    ("trailing", 250, 31375, 0x5b53fde1905ddfca),
    ("leading", 1000, 500500, 0xe4cb99bfe5fb99cc),
    ("linspace", 1000, 500500, 0x4ffd2b454801cfb9),
    ("trailing", 1000, 500500, 0x6b51618044ecc53c),
    ("leading", 2000, 2001000, 0x8a8e11c0d129c962),
    ("linspace", 2000, 2001000, 0xa73f5f12a82662df),
    ("trailing", 2000, 2001000, 0x8a62d1fa6ad5d31a),
    ("leading", 4000, 8002000, 0x446bdff0f44f4e0f),
    ("linspace", 4000, 8002000, 0x54f201e779509203),
    ("trailing", 4000, 8002000, 0xb7f9e8a73d167d66),
];

/// Schedule, steps, index, ᾱ.
#[rustfmt::skip]
const TABLES: [(&str, usize, usize, f64); 84] = [
    ("linear", 10, 0, 0.9999),
    ("linear", 10, 1, 0.99758912),
    ("linear", 10, 2, 0.9930778003128888),
    ("linear", 10, 5, 0.9666630381658163),
    ("linear", 10, 7, 0.9388847950031216),
    ("linear", 10, 8, 0.9221830777053439),
    ("linear", 10, 9, 0.903739416151237),
    ("linear", 1000, 0, 0.9999),
    ("linear", 1000, 1, 0.9997800920720721),
    ("linear", 1000, 250, 0.5214230306185274),
    ("linear", 1000, 500, 0.07779665836502389),
    ("linear", 1000, 750, 0.003300158361569431),
    ("linear", 1000, 998, 4.118193638138452e-05),
    ("linear", 1000, 999, 4.035829765375682e-05),
    ("linear", 4000, 0, 0.9999),
    ("linear", 4000, 1, 0.9997950342535634),
    ("linear", 4000, 1000, 0.07463775845714969),
    ("linear", 4000, 2000, 3.7476951537318785e-05),
    ("linear", 4000, 3000, 1.2343954509917258e-10),
    ("linear", 4000, 3998, 2.7073799712489725e-18),
    ("linear", 4000, 3999, 2.653232371823993e-18),
    ("scaled", 10, 0, 0.99915),
    ("scaled", 10, 1, 0.9977006169477072),
    ("scaled", 10, 2, 0.9954949000694282),
    ("scaled", 10, 5, 0.9828161922929181),
    ("scaled", 10, 7, 0.9678823869868167),
    ("scaled", 10, 8, 0.9580846700916931),
    ("scaled", 10, 9, 0.9465876540505928),
    ("scaled", 1000, 0, 0.99915),
    ("scaled", 1000, 1, 0.9982960278384514),
    ("scaled", 1000, 250, 0.6737926252333225),
    ("scaled", 1000, 500, 0.27633268382297477),
    ("scaled", 1000, 750, 0.05616984800293739),
    ("scaled", 1000, 998, 0.0047166988998757495),
    ("scaled", 1000, 999, 0.00466009851307724),
    ("scaled", 4000, 0, 0.99915),
    ("scaled", 4000, 1, 0.9982995509275912),
    ("scaled", 4000, 1000, 0.2072634362093055),
    ("scaled", 4000, 2000, 0.005900670357971967),
    ("scaled", 4000, 3000, 1.0184148677322984e-05),
    ("scaled", 4000, 3998, 4.789061193761284e-10),
    ("scaled", 4000, 3999, 4.731592459436149e-10),
    ("cosine", 10, 0, 0.9720927371139692),
    ("cosine", 10, 1, 0.8987059205995089),
    ("cosine", 10, 2, 0.7869105111508293),
    ("cosine", 10, 5, 0.34080963975932405),
    ("cosine", 10, 7, 0.09404561267665383),
    ("cosine", 10, 8, 0.024091724140085854),
    ("cosine", 10, 9, 2.4091724140085857e-05),
    ("cosine", 1000, 0, 0.9999587157751783),
    ("cosine", 1000, 1, 0.999912575927368),
    ("cosine", 1000, 250, 0.8458879864968829),
    ("cosine", 1000, 500, 0.4922851724488026),
    ("cosine", 1000, 750, 0.14317864642609793),
    ("cosine", 1000, 998, 2.428766907034468e-06),
    ("cosine", 1000, 999, 2.4287669070344683e-09),
    ("cosine", 4000, 0, 0.9999901341811864),
    ("cosine", 4000, 1, 0.9999799648666317),
    ("cosine", 4000, 1000, 0.8467314331278858),
    ("cosine", 4000, 2000, 0.4934539796742658),
    ("cosine", 4000, 3000, 0.1439984139673798),
    ("cosine", 4000, 3998, 1.517980468849563e-07),
    ("cosine", 4000, 3999, 1.5179804688495631e-10),
    ("sigmoid", 10, 0, 0.9998507947991829),
    ("sigmoid", 10, 1, 0.999565449789529),
    ("sigmoid", 10, 2, 0.9987803317173163),
    ("sigmoid", 10, 5, 0.9763757872032149),
    ("sigmoid", 10, 7, 0.9406385505441496),
    ("sigmoid", 10, 8, 0.9220001622481224),
    ("sigmoid", 10, 9, 0.9036055262062967),
    ("sigmoid", 1000, 0, 0.9998507947991829),
    ("sigmoid", 1000, 1, 0.9997010188194536),
    ("sigmoid", 1000, 250, 0.9027989162246411),
    ("sigmoid", 1000, 500, 0.2988876278467589),
    ("sigmoid", 1000, 750, 0.005622918576075456),
    ("sigmoid", 1000, 998, 4.048962000555989e-05),
    ("sigmoid", 1000, 999, 3.968181990533207e-05),
    ("sigmoid", 4000, 0, 0.9998507947991829),
    ("sigmoid", 4000, 1, 0.9997014643750287),
    ("sigmoid", 4000, 1000, 0.6658151919756026),
    ("sigmoid", 4000, 2000, 0.008199217691013248),
    ("sigmoid", 4000, 3000, 1.0581973714301434e-09),
    ("sigmoid", 4000, 3998, 2.530111311538789e-18),
    ("sigmoid", 4000, 3999, 2.4796335799431866e-18),
];

/// Process, t, then α, σ, d ln α/dt and g².
#[rustfmt::skip]
const CONTINUOUS: [(&str, f64, [f64; 4]); 32] = [
    ("vp", 0.001, [0.9999450265110976, 0.010485416335094897, -0.05995, 0.1199]),
    ("sub-vp", 0.001, [0.9999450265110976, 0.0001099439557202749, -0.05995, 2.636311126968133e-05]),
    ("ve", 0.001, [1.0, 0.010085535676775158, 0.0, 0.0017327042232042544]),
    ("edm", 0.001, [1.0, 0.001, 0.0, 0.002]),
    ("vp", 0.01, [0.9990029973377464, 0.044643155244657055, -0.1495, 0.299]),
    ("sub-vp", 0.01, [0.9990029973377464, 0.001993011310198551, -0.1495, 0.0011906331073680422]),
    ("ve", 0.01, [1.0, 0.010889042680001354, 0.0, 0.0020197884946893153]),
    ("edm", 0.01, [1.0, 0.01, 0.0, 0.02]),
    ("vp", 0.1, [0.946721798820598, 0.3220525355247045, -1.0450000000000002, 2.0900000000000003]),
    ("sub-vp", 0.1, [0.946721798820598, 0.10371783563789104, -1.0450000000000002, 0.41105760905892064]),
    ("ve", 0.1, [1.0, 0.023436729115920995, 0.0, 0.00935665237980539]),
    ("edm", 0.1, [1.0, 0.1, 0.0, 0.2]),
    ("vp", 0.25, [0.7236571850830864, 0.6901596036263087, -2.5375, 5.075]),
    ("sub-vp", 0.25, [0.7236571850830864, 0.4763202784776236, -2.5375, 3.6832297125262]),
    ("ve", 0.25, [1.0, 0.08408964152537146, 0.0, 0.12045130124652628]),
    ("edm", 0.25, [1.0, 0.25, 0.0, 0.5]),
    ("vp", 0.5, [0.28118288079675235, 0.9596542020680362, -5.025, 10.05]),
    ("sub-vp", 0.5, [0.28118288079675235, 0.9209361875468394, -5.025, 9.987176581281734]),
    ("ve", 0.5, [1.0, 0.7071067811865476, 0.0, 8.517193191416238]),
    ("edm", 0.5, [1.0, 0.5, 0.0, 1.0]),
    ("vp", 0.75, [0.05866350301188082, 0.9982778137444381, -7.5125, 15.025]),
    ("sub-vp", 0.75, [0.05866350301188082, 0.996558593414375, -7.5125, 15.024822054728704]),
    ("ve", 0.75, [1.0, 5.946035575013606, 0.0, 602.2565062326314]),
    ("edm", 0.75, [1.0, 0.75, 0.0, 1.5]),
    ("vp", 0.9, [0.01699646326168927, 0.9998555496853503, -9.005, 18.01]),
    ("sub-vp", 0.9, [0.01699646326168927, 0.999711120236594, -9.005, 18.009998497038165]),
    ("ve", 0.9, [1.0, 21.33403503223242, 0.0, 7753.048517274932]),
    ("edm", 0.9, [1.0, 0.9, 0.0, 1.8]),
    ("vp", 1.0, [0.006571586494929615, 0.9999784068923386, -10.0, 20.0]),
    ("sub-vp", 1.0, [0.006571586494929615, 0.9999568142509396, -10.0, 19.99999996269982]),
    ("ve", 1.0, [1.0, 50.0, 0.0, 42585.965957081185]),
    ("edm", 1.0, [1.0, 1.0, 0.0, 2.0]),
];

/// σ_min, σ_max, levels, place, Karras' level with ρ = 7, the level with an even logarithm.
#[rustfmt::skip]
const LEVELS: [(f64, f64, usize, usize, f64, f64); 10] = [
    (0.002, 80.0, 18, 0, 80.0, 80.0),
    (0.002, 80.0, 18, 1, 57.58598472124816, 42.89242254953019),
    (0.002, 80.0, 18, 9, 1.9233398370400498, 0.2928905001857527),
    (0.002, 80.0, 18, 16, 0.007528019962784071, 0.003730262607928927),
    (0.002, 80.0, 18, 17, 0.002, 0.002),
    (0.0292, 14.6, 50, 0, 14.6, 14.6),
    (0.0292, 14.6, 50, 1, 13.416023790471671, 12.860914033863155),
    (0.0292, 14.6, 50, 25, 1.1996744188811195, 0.6128121162222595),
    (0.0292, 14.6, 50, 48, 0.035712468503712166, 0.03314849931175088),
    (0.0292, 14.6, 50, 49, 0.0292, 0.0292),
];
