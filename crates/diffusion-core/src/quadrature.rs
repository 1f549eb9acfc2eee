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

/// `∫_a^b f` by 16 points: exact for polynomials up to degree 31.
pub fn gauss_legendre(a: f64, b: f64, f: impl Fn(f64) -> f64) -> f64 {
    let (middle, half) = (0.5 * (a + b), 0.5 * (b - a));
    half * NODES
        .iter()
        .map(|(x, w)| w * (f(middle + half * x) + f(middle - half * x)))
        .sum::<f64>()
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
