//! The cheapest path with a given number of steps (Watson et al. 2021, algorithm 1).
//!
//! ```text
//! C[0][0] = 0,   C[k][t] = min_{s<t} C[k−1][s] + L(t, s)
//! ```

use crate::error::{Report, Result};

/// The cheapest paths from node 0 to the last node, for every number of steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Paths {
    /// `C[k][t]`, infinite where there is no path.
    cost: Vec<Vec<f64>>,
    /// The node before `t` on the cheapest path of `k` steps.
    before: Vec<Vec<usize>>,
}

impl Paths {
    /// Solves for up to `most` steps, in `O(most · n²)`.
    ///
    /// `costs[s][t]` is the cost `L(t, s)` of the step between the nodes `s < t`; infinite and
    /// missing entries are steps that cannot be made, the rest of the table is not looked at.
    ///
    /// # Errors
    /// `Config` when the table is not square, has fewer than two nodes, or holds NaN.
    pub fn new(costs: &[Vec<f64>], most: usize) -> Result<Self> {
        let n = costs.len();
        let square = costs.iter().all(|row| row.len() == n);
        let above = |(s, row): (usize, &Vec<f64>)| row.iter().skip(s + 1).any(|c| c.is_nan());
        if n < 2 || !square || costs.iter().enumerate().any(above) {
            return Err(Report::new("table of costs", format!("{n} rows"))
                .expected("a square table of numbers with at least two nodes")
                .config());
        }
        let mut cost = vec![vec![f64::INFINITY; n]];
        cost[0][0] = 0.0;
        let mut before = vec![vec![0; n]];
        for k in 1..=most.min(n - 1) {
            let (mut best, mut from) = (vec![f64::INFINITY; n], vec![0; n]);
            for (s, row) in costs.iter().enumerate() {
                let so_far = cost[k - 1][s];
                for (t, step) in row.iter().enumerate().skip(s + 1) {
                    // Strictly: of equal paths the one with the earliest node wins.
                    if so_far + step < best[t] {
                        best[t] = so_far + step;
                        from[t] = s;
                    }
                }
            }
            cost.push(best);
            before.push(from);
        }
        Ok(Self { cost, before })
    }

    /// The most steps that were solved for.
    pub fn most(&self) -> usize {
        self.cost.len() - 1
    }

    /// The cost of the cheapest path of `steps` steps; infinite when there is none.
    pub fn cost(&self, steps: usize) -> f64 {
        let row = self.cost.get(steps).and_then(|row| row.last());
        row.copied().unwrap_or(f64::INFINITY)
    }

    /// The nodes of the cheapest path of `steps` steps, from 0 to the last.
    ///
    /// # Errors
    /// `Config` when there is no such path.
    pub fn path(&self, steps: usize) -> Result<Vec<usize>> {
        if !self.cost(steps).is_finite() {
            return Err(Report::new("steps", steps)
                .expected(format!(
                    "a number for which there is a path, at most {}",
                    self.most()
                ))
                .config());
        }
        let mut node = self.cost[steps].len() - 1;
        let mut path = vec![node];
        for k in (1..=steps).rev() {
            node = self.before[k][node];
            path.push(node);
        }
        path.reverse();
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diffusion_ops::rng::{Key, stream};

    fn table(n: usize, seed: u64) -> Vec<Vec<f64>> {
        Key::new(seed, stream::TEST)
            .uniform(n * n)
            .chunks(n)
            .map(<[f64]>::to_vec)
            .collect()
    }

    /// Every choice of `k − 1` nodes between the ends.
    fn brute(costs: &[Vec<f64>], k: usize) -> f64 {
        fn go(costs: &[Vec<f64>], at: usize, left: usize) -> f64 {
            let last = costs.len() - 1;
            if left == 1 {
                return costs[at][last];
            }
            (at + 1..last)
                .map(|next| costs[at][next] + go(costs, next, left - 1))
                .fold(f64::INFINITY, f64::min)
        }
        go(costs, 0, k)
    }

    #[test]
    fn no_path_is_cheaper() {
        for seed in 0..5 {
            let costs = table(13, seed);
            let paths = Paths::new(&costs, 12).unwrap();
            for k in [1, 2, 4, 7, 12] {
                let path = paths.path(k).unwrap();
                assert_eq!((path.len(), path[0], path[k]), (k + 1, 0, 12));
                let sum: f64 = path.windows(2).map(|w| costs[w[0]][w[1]]).sum();
                assert!((sum - paths.cost(k)).abs() < 1e-12);
                assert!((sum - brute(&costs, k)).abs() < 1e-12, "{k}");
            }
            assert_eq!(paths.path(12).unwrap(), (0..=12).collect::<Vec<_>>());
        }
    }

    #[test]
    fn refuses_what_has_no_path() {
        let mut costs = table(4, 1);
        costs[0][2] = f64::INFINITY;
        costs[0][3] = f64::INFINITY;
        costs[1][3] = f64::INFINITY;
        let paths = Paths::new(&costs, 9).unwrap();
        assert_eq!(paths.most(), 3);
        assert!(paths.path(2).is_err() && paths.path(4).is_err());
        assert_eq!(paths.path(3).unwrap(), [0, 1, 2, 3]);
        costs[1][2] = f64::NAN;
        assert!(Paths::new(&costs, 2).is_err());
        assert!(Paths::new(&costs[..1], 2).is_err());
    }
}
