//! Integrals of smooth functions.

/// Positive nodes and weights of Gauss and Legendre's rule of 16 points on `[−1, 1]`.
const NODES: [(f64, f64); 8] = [
    (0.095_012_509_837_637_44, 0.189_450_610_455_068_5),
    (0.281_603_550_779_258_9, 0.182_603_415_044_923_58),
    (0.458_016_777_657_227_37, 0.169_156_519_395_002_54),
    (0.617_876_244_402_643_7, 0.149_595_988_816_576_73),
    (0.755_404_408_355_003, 0.124_628_971_255_533_87),
    (0.865_631_202_387_831_8, 0.095_158_511_682_492_79),
    (0.944_575_023_073_232_6, 0.062_253_523_938_647_894),
    (0.989_400_934_991_649_9, 0.027_152_459_411_754_095),
];

/// Halvings towards 0 before the rest is one piece.
const DEPTH: i32 = 50;

/// `∫_a^b f` by 16 points: exact for polynomials up to degree 31.
pub fn gauss_legendre(a: f64, b: f64, f: impl Fn(f64) -> f64) -> f64 {
    gauss_points(a, b).map(|(x, w)| w * f(x)).sum()
}

/// The 16 nodes of [`gauss_legendre`] with their weights, for integrands that are no numbers.
pub fn gauss_points(a: f64, b: f64) -> impl Iterator<Item = (f64, f64)> {
    let (middle, half) = (0.5 * (a + b), 0.5 * (b - a));
    NODES
        .iter()
        .flat_map(move |(x, w)| [-1.0, 1.0].map(|side| (middle + side * half * x, half * w)))
}

/// Ends of pieces that cover the way between `low ≥ 0` and `high`, each half as long as the one
/// before it: for integrands that are steep near 0.
pub fn halvings(low: f64, high: f64) -> Vec<f64> {
    let mut ends: Vec<f64> = (0..=DEPTH)
        .map(|k| high * 0.5f64.powi(k))
        .take_while(|end| *end > low)
        .collect();
    ends.push(low);
    ends.reverse();
    ends
}

/// The Lagrange basis polynomial of `nodes[j]` at `x`: 1 there, 0 at the other nodes.
pub fn lagrange(nodes: &[f64], j: usize, x: f64) -> f64 {
    nodes
        .iter()
        .enumerate()
        .filter(|(k, _)| *k != j)
        .map(|(_, node)| (x - node) / (nodes[j] - node))
        .product()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polynomials_and_exponentials_are_exact() {
        for degree in [0, 1, 7, 31] {
            let exact = (3f64.powi(degree + 1) - (-1f64).powi(degree + 1)) / f64::from(degree + 1);
            let ours = gauss_legendre(-1.0, 3.0, |x| x.powi(degree));
            assert!(
                (ours / exact - 1.0).abs() < 1e-13,
                "{degree}: {ours} {exact}"
            );
        }
        let ours = gauss_legendre(2.0, -1.0, f64::exp);
        assert!((ours - ((-1f64).exp() - 2f64.exp())).abs() < 1e-13);
    }

    /// A root has no Taylor series at 0, and 16 points alone are far off.
    #[test]
    fn halvings_reach_a_singular_end() {
        let ends = halvings(0.0, 2.0);
        let f = |x: f64| x.sqrt().recip();
        let ours: f64 = ends.windows(2).map(|w| gauss_legendre(w[0], w[1], f)).sum();
        assert!((ours - 2.0 * 2f64.sqrt()).abs() < 1e-8, "{ours}");
        assert!((gauss_legendre(0.0, 2.0, f) - ours).abs() > 1e-2);
        assert_eq!(halvings(0.3, 2.0), [0.3, 0.5, 1.0, 2.0]);
    }

    #[test]
    fn the_basis_interpolates() {
        let nodes = [0.3, -1.0, 2.0];
        let f = |x: f64| 1.0 - 2.0 * x + 0.5 * x * x;
        for x in [-3.0, 0.1, 5.0] {
            let ours: f64 = (0..3).map(|j| lagrange(&nodes, j, x) * f(nodes[j])).sum();
            assert!((ours - f(x)).abs() < 1e-12);
        }
    }
}
