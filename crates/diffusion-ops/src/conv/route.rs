//! Which algorithm a convolution takes.

use super::Geometry;
use std::sync::atomic::{AtomicU8, Ordering};

/// How far convolutions may go with Winograd's minimal filtering.
///
/// Measured against a sum in `f64`, relative to the largest output, on 512 channels of random
/// maps: direct 2.4e-6, F(2, 3) 2.4e-6, F(4, 3) 3.7e-6 (1.8e-5 with the customary points).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Winograd {
    /// Never: every product of the definition is computed.
    Off = 1,
    /// F(2×2, 3×3) only.
    Two = 2,
    /// F(4×4, 3×3) too, wherever it is faster. The default.
    Four = 3,
}

/// The environment variable that limits [`Winograd`]: `off`, `2` or `4`.
pub const WINOGRAD_VARIABLE: &str = "DIFFUSION_WINOGRAD";

static LIMIT: AtomicU8 = AtomicU8::new(0);

/// The limit in force: that of [`set_winograd`], of [`WINOGRAD_VARIABLE`], or none.
pub fn winograd() -> Winograd {
    match LIMIT.load(Ordering::Relaxed) {
        1 => Winograd::Off,
        2 => Winograd::Two,
        3 => Winograd::Four,
        _ => {
            let limit = match std::env::var(WINOGRAD_VARIABLE)
                .unwrap_or_default()
                .as_str()
            {
                "off" | "0" => Winograd::Off,
                "2" => Winograd::Two,
                _ => Winograd::Four,
            };
            set_winograd(limit);
            limit
        }
    }
}

/// Sets the limit for all convolutions of this process. Results differ by rounding only.
pub fn set_winograd(limit: Winograd) {
    LIMIT.store(limit as u8, Ordering::Relaxed);
}

/// An algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Direct,
    Two,
    Four,
}

/// Costs in fused multiply-adds, as measured: what a tile takes for each channel on top of its
/// products; what transforming one filter takes when all of them stay in the cache; and when they
/// don't.
const TILE: [usize; 2] = [120, 300];
/// The first for a tile of a line.
const LINE_TILE: [usize; 2] = [40, 70];
const FILTER: [usize; 2] = [150, 250];
const FILTER_BEYOND_CACHE: [usize; 2] = [900, 1500];
/// Transformed filters that are surely out of the cache, in elements.
const CACHE: usize = 4 << 20;

/// Elements that share the transformed filters, for the choice of the algorithm.
const NOMINAL_BATCH: usize = 8;

impl Route {
    /// For `y = w ⋆ x`. An element of a batch has the same bits whatever the batch, so the choice
    /// is that for [`NOMINAL_BATCH`].
    pub fn forward(g: &Geometry, outputs: usize) -> Self {
        let g = Geometry {
            batch: NOMINAL_BATCH,
            ..*g
        };
        Self::cheapest(&g, outputs)
    }

    /// For `∂L/∂w`.
    pub fn weight_gradient(g: &Geometry, outputs: usize) -> Self {
        Self::cheapest(g, outputs)
    }

    fn cheapest(g: &Geometry, outputs: usize) -> Self {
        #[cfg(test)]
        if let Some(route) = *FORCED
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
        {
            return if g.is_3x3() || g.folded().is_some() {
                route
            } else {
                Self::Direct
            };
        }
        let limit = winograd();
        // Fewer channels than a vector has lanes would be padded with zeros.
        if let Some(map) = g.folded() {
            return Self::line(&map, outputs, limit);
        }
        if !g.is_3x3() || limit == Winograd::Off || g.channels < 8 || outputs < 8 {
            return Self::Direct;
        }
        let pairs = g.channels * outputs;
        let direct = 10 * g.batch * g.out_plane() * pairs;
        let cost = |m: usize, k: usize| {
            let tiles = g.batch * g.out_h.div_ceil(m) * g.out_w.div_ceil(m);
            let products = (m + 2) * (m + 2) * pairs;
            let filter = if products > CACHE {
                FILTER_BEYOND_CACHE[k]
            } else {
                FILTER[k]
            };
            tiles * (products + TILE[k] * (g.channels + outputs)) + filter * pairs
        };
        let two = cost(2, 0);
        let four = if limit == Winograd::Four {
            cost(4, 1)
        } else {
            usize::MAX
        };
        Self::least(direct, two, four)
    }

    /// For a line with three taps, folded.
    fn line(map: &Geometry, outputs: usize, limit: Winograd) -> Self {
        if limit == Winograd::Off || map.channels < 8 || outputs < 8 {
            return Self::Direct;
        }
        let pairs = map.channels * outputs;
        let direct = 10 * map.batch * map.out_plane() * pairs / 3;
        let cost = |m: usize, k: usize| {
            let tiles = map.batch * map.out_h.div_ceil(m) * map.out_w;
            let own = LINE_TILE[k] * (map.channels + outputs);
            tiles * ((m + 2) * pairs + own) + FILTER[k] * pairs
        };
        let four = if limit == Winograd::Four {
            cost(4, 1)
        } else {
            usize::MAX
        };
        Self::least(direct, cost(2, 0), four)
    }

    fn least(direct: usize, two: usize, four: usize) -> Self {
        if direct <= two.min(four) {
            Self::Direct
        } else if four <= two {
            Self::Four
        } else {
            Self::Two
        }
    }
}

#[cfg(test)]
static FORCED: std::sync::Mutex<Option<Route>> = std::sync::Mutex::new(None);

/// Runs a test with one algorithm for every kernel that it fits.
#[cfg(test)]
pub(super) fn forced<R>(route: Route, f: impl FnOnce() -> R) -> R {
    let set = |route| *FORCED.lock().unwrap() = route;
    set(Some(route));
    let out = f();
    set(None);
    out
}
