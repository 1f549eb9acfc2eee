//! What the Fréchet distance needs of symmetric matrices: a factor and the eigenvalues.

/// A symmetric matrix, all of it stored, row by row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Symmetric {
    values: Vec<f64>,
    size: usize,
}

impl Symmetric {
    pub fn zeros(size: usize) -> Self {
        Self {
            values: vec![0.0; size * size],
            size,
        }
    }

    #[cfg(test)]
    pub fn from_fn(size: usize, f: impl Fn(usize, usize) -> f64) -> Self {
        let values = (0..size * size).map(|k| f(k / size, k % size)).collect();
        Self { values, size }
    }

    pub fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.size + j]
    }

    fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.size..][..self.size]
    }

    pub fn trace(&self) -> f64 {
        (0..self.size).map(|i| self.at(i, i)).sum()
    }

    /// `A ← A + s x xᵀ`
    pub fn add_outer(&mut self, x: &[f64], s: f64) {
        for (row, xi) in self.values.chunks_exact_mut(self.size).zip(x) {
            let by = s * xi;
            row.iter_mut().zip(x).for_each(|(a, xj)| *a += by * xj);
        }
    }

    /// `Cᵀ A C` for columns `C`.
    pub fn between(&self, columns: &[Vec<f64>]) -> Symmetric {
        let image: Vec<Vec<f64>> = columns
            .iter()
            .map(|c| (0..self.size).map(|i| dot(self.row(i), c)).collect())
            .collect();
        let mut out = Symmetric::zeros(columns.len());
        for (i, c) in columns.iter().enumerate() {
            for (j, image) in image.iter().enumerate().take(i + 1) {
                let value = dot(c, image);
                out.values[i * out.size + j] = value;
                out.values[j * out.size + i] = value;
            }
        }
        out
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Columns `L` with `L Lᵀ = A` for a positive semidefinite matrix: Cholesky's factor with the largest
/// remaining diagonal element as the next pivot, ended where what remains is rounding. There are as
/// many columns as the rank.
pub(crate) fn factor(matrix: &Symmetric) -> Vec<Vec<f64>> {
    let n = matrix.size;
    let mut rest: Vec<f64> = (0..n).map(|i| matrix.at(i, i)).collect();
    let largest = rest.iter().copied().fold(0.0, f64::max);
    let mut columns: Vec<Vec<f64>> = Vec::new();
    while columns.len() < n {
        let Some(pivot) = (0..n).max_by(|a, b| rest[*a].total_cmp(&rest[*b])) else {
            break;
        };
        if rest[pivot] <= 1e-13 * largest || rest[pivot] <= 0.0 {
            break;
        }
        let root = rest[pivot].sqrt();
        let column: Vec<f64> = (0..n)
            .map(|i| {
                let known: f64 = columns.iter().map(|c| c[i] * c[pivot]).sum();
                (matrix.at(i, pivot) - known) / root
            })
            .collect();
        rest.iter_mut().zip(&column).for_each(|(r, c)| *r -= c * c);
        // Exactly: a pivot is used once.
        rest[pivot] = 0.0;
        columns.push(column);
    }
    columns
}

/// All eigenvalues, ascending: Householder's reduction to three diagonals, then bisection with
/// Sturm's count (Golub and Van Loan, sections 8.3.1 and 8.4.1). Their absolute error is a few units
/// in the last place of the largest.
pub(crate) fn eigenvalues(matrix: Symmetric) -> Vec<f64> {
    let n = matrix.size;
    let (d, e) = tridiagonal(matrix);
    // Gershgorin's discs hold all of them.
    let radius = |i: usize| {
        let before = if i > 0 { e[i - 1].abs() } else { 0.0 };
        before + e.get(i).map_or(0.0, |v| v.abs())
    };
    let low = (0..n)
        .map(|i| d[i] - radius(i))
        .fold(f64::INFINITY, f64::min);
    let high = (0..n)
        .map(|i| d[i] + radius(i))
        .fold(f64::NEG_INFINITY, f64::max);
    let scale = low.abs().max(high.abs());
    (0..n)
        .map(|k| {
            let (mut a, mut b) = (low, high);
            // Eigenvalue k is the place where the count of smaller ones passes k.
            while b - a > f64::EPSILON * scale {
                let middle = 0.5 * (a + b);
                if middle <= a || middle >= b {
                    break;
                }
                if below(&d, &e, middle) > k {
                    b = middle;
                } else {
                    a = middle;
                }
            }
            0.5 * (a + b)
        })
        .collect()
}

/// The number of eigenvalues below `x`: the negative pivots of `T − x`.
fn below(d: &[f64], e: &[f64], x: f64) -> usize {
    let mut count = 0;
    let mut pivot = 1.0;
    for (i, d) in d.iter().enumerate() {
        let coupling = if i > 0 {
            e[i - 1] * e[i - 1] / pivot
        } else {
            0.0
        };
        pivot = d - x - coupling;
        if pivot == 0.0 {
            pivot = f64::MIN_POSITIVE;
        }
        count += usize::from(pivot < 0.0);
    }
    count
}

/// The diagonal and the one beside it of a similar matrix that has only these.
fn tridiagonal(mut a: Symmetric) -> (Vec<f64>, Vec<f64>) {
    let n = a.size;
    let mut beside = Vec::with_capacity(n.saturating_sub(1));
    for k in 0..n.saturating_sub(1) {
        // A reflection I − 2 v vᵀ/vᵀv takes the column below the diagonal to its first place.
        let mut v: Vec<f64> = (k + 1..n).map(|i| a.at(i, k)).collect();
        let norm = dot(&v, &v).sqrt();
        let first = v[0];
        let to = if first > 0.0 { -norm } else { norm };
        beside.push(to);
        v[0] -= to;
        let square = dot(&v, &v);
        if square == 0.0 {
            continue;
        }
        // A ← A − v wᵀ − w vᵀ with p = 2 A v / vᵀv and w = p − (vᵀp / vᵀv) v.
        let p: Vec<f64> = (k + 1..n)
            .map(|i| 2.0 * dot(&a.row(i)[k + 1..], &v) / square)
            .collect();
        let share = dot(&v, &p) / square;
        let w: Vec<f64> = p.iter().zip(&v).map(|(p, v)| p - share * v).collect();
        for (i, (vi, wi)) in v.iter().zip(&w).enumerate() {
            let row = &mut a.values[(k + 1 + i) * n..][k + 1..n];
            for ((x, vj), wj) in row.iter_mut().zip(&v).zip(&w) {
                *x -= vi * wj + wi * vj;
            }
        }
    }
    ((0..n).map(|i| a.at(i, i)).collect(), beside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use diffusion_ops::rng::Key;

    /// `B Bᵀ` of random numbers, of rank `r`.
    fn random(n: usize, r: usize) -> Symmetric {
        let values = Key::new(n as u64, 0).normal(n * r);
        let mut out = Symmetric::zeros(n);
        for column in 0..r {
            let x: Vec<f64> = (0..n).map(|i| values[i * r + column]).collect();
            out.add_outer(&x, 1.0);
        }
        out
    }

    #[test]
    fn eigenvalues_that_are_known() {
        // The second difference of n points: 2 − 2 cos(π k / (n + 1)).
        let n = 40;
        let chain = Symmetric::from_fn(n, |i, j| match i.abs_diff(j) {
            0 => 2.0,
            1 => -1.0,
            _ => 0.0,
        });
        for (k, value) in eigenvalues(chain).iter().enumerate() {
            let exact = 2.0 - 2.0 * (std::f64::consts::PI * (k + 1) as f64 / 41.0).cos();
            assert!((value - exact).abs() < 1e-14, "{k}: {value} {exact}");
        }
        // All ones: n once, 0 otherwise. And a matrix that is diagonal already.
        let ones = eigenvalues(Symmetric::from_fn(7, |_, _| 1.0));
        assert!((ones[6] - 7.0).abs() < 1e-14 && ones[..6].iter().all(|v| v.abs() < 1e-14));
        let plain = Symmetric::from_fn(3, |i, j| if i == j { [3.0, -1.0, 2.0][i] } else { 0.0 });
        let found = eigenvalues(plain);
        for (a, b) in found.iter().zip([-1.0, 2.0, 3.0]) {
            assert!((a - b).abs() < 1e-14, "{found:?}");
        }
        assert_eq!(eigenvalues(Symmetric::zeros(3)), [0.0; 3]);
        assert!(eigenvalues(Symmetric::zeros(0)).is_empty());
    }

    #[test]
    fn powers_of_a_random_matrix_have_the_traces_of_its_eigenvalues() {
        let a = random(50, 60);
        let found = eigenvalues(a.clone());
        let columns: Vec<Vec<f64>> = (0..50)
            .map(|j| (0..50).map(|i| f64::from(u8::from(i == j))).collect())
            .collect();
        let square: f64 = a.values.iter().map(|v| v * v).sum();
        assert_eq!(a.between(&columns), a);
        let sums = [found.iter().sum::<f64>(), found.iter().map(|v| v * v).sum()];
        for (sum, exact) in sums.iter().zip([a.trace(), square]) {
            assert!((sum / exact - 1.0).abs() < 1e-12, "{sum} {exact}");
        }
    }

    #[test]
    fn a_factor_gives_the_matrix_back_with_as_many_columns_as_its_rank() {
        for (n, r) in [(1, 1), (6, 6), (40, 7), (30, 50)] {
            let a = random(n, r);
            let columns = factor(&a);
            assert_eq!(columns.len(), n.min(r));
            let mut back = Symmetric::zeros(n);
            columns.iter().for_each(|c| back.add_outer(c, 1.0));
            let largest = a.values.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            for (x, y) in a.values.iter().zip(&back.values) {
                assert!((x - y).abs() < 1e-12 * largest);
            }
        }
        assert!(factor(&Symmetric::zeros(4)).is_empty());
    }
}
