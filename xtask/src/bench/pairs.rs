//! Two sides that do the same work in turns.

use anyhow::{Result, ensure};
use serde::Deserialize;

/// Seconds of each call of a turn.
#[derive(Clone, Debug, Deserialize)]
pub struct Times {
    /// Time that passed.
    pub wall: Vec<f64>,
    /// CPU time of all threads of the process.
    pub cpu: Vec<f64>,
}

/// Which time is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The CPU time of the process: a busy machine disturbs it least.
    Cpu,
    /// The time that passes.
    Wall,
}

impl Clock {
    /// CPU time on one thread, else wall time.
    pub fn of(threads: usize) -> Self {
        if threads == 1 { Self::Cpu } else { Self::Wall }
    }

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Wall => "wall",
        }
    }

    fn median(self, times: &Times) -> f64 {
        median(match self {
            Self::Cpu => &times.cpu,
            Self::Wall => &times.wall,
        })
    }
}

/// A side that works when it is its turn.
pub trait Player {
    /// Does the work `calls` times, in the given way where the side knows several.
    fn turn(&mut self, calls: usize, way: Option<&str>) -> Result<Times>;
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Turns of each side, each giving one ratio.
    pub pairs: usize,
    /// A turn repeats short calls for about so long.
    pub turn_seconds: f64,
}

/// What came of it, in seconds of a call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    pub ours: f64,
    pub ours_mad: f64,
    /// Ours on the wall clock, whichever was compared.
    pub ours_wall: f64,
    pub peer: f64,
    pub ratio: f64,
}

/// Calls of a turn are bounded, whatever the clock says.
const MOST_CALLS: f64 = 2000.0;

/// Lets the sides work in turns, never both at once, after a warm-up of each.
pub fn play(
    ours: &mut dyn Player,
    peer: &mut dyn Player,
    way: Option<&str>,
    clock: Clock,
    effort: Effort,
) -> Result<Outcome> {
    // The first call of each pays for what is made once.
    checked(ours.turn(1, None)?, 1)?;
    checked(peer.turn(1, way)?, 1)?;
    let ours_once = median(&checked(ours.turn(1, None)?, 1)?.wall);
    let peer_once = median(&checked(peer.turn(1, way)?, 1)?.wall);
    let fill = effort.turn_seconds / ours_once.max(peer_once).max(1e-7);
    let calls = fill.ceil().clamp(1.0, MOST_CALLS) as usize;
    let (mut left, mut right, mut wall, mut ratios) = (vec![], vec![], vec![], vec![]);
    for _ in 0..effort.pairs {
        let a = checked(ours.turn(calls, None)?, calls)?;
        let b = checked(peer.turn(calls, way)?, calls)?;
        let (ours, peer) = (clock.median(&a), clock.median(&b));
        ensure!(
            peer > 0.0,
            "the peer's {} clock stood still; measure on more threads",
            clock.name()
        );
        left.push(ours);
        right.push(peer);
        wall.push(median(&a.wall));
        ratios.push(ours / peer);
    }
    let ours = median(&left);
    let deviations: Vec<f64> = left.iter().map(|time| (time - ours).abs()).collect();
    Ok(Outcome {
        ours,
        ours_mad: median(&deviations),
        ours_wall: median(&wall),
        peer: median(&right),
        ratio: median(&ratios),
    })
}

fn checked(times: Times, calls: usize) -> Result<Times> {
    ensure!(
        times.wall.len() == calls && times.cpu.len() == calls,
        "a side was asked for {calls} calls and told the times of {} and {}",
        times.wall.len(),
        times.cpu.len()
    );
    Ok(times)
}

/// The middle value; of an even number the mean of the two in the middle. 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// Writes down whose turn it was; its CPU time is the given one, its wall time twice that.
    struct Script {
        name: char,
        seconds: Vec<f64>,
        log: Rc<RefCell<String>>,
        turns: usize,
    }

    impl Player for Script {
        fn turn(&mut self, calls: usize, way: Option<&str>) -> Result<Times> {
            self.log.borrow_mut().push(self.name);
            assert!(self.name == 'p' || way.is_none());
            let seconds = self.seconds[self.turns.min(self.seconds.len() - 1)];
            self.turns += 1;
            Ok(Times {
                wall: vec![2.0 * seconds; calls],
                cpu: vec![seconds; calls],
            })
        }
    }

    fn sides(ours: &[f64], peer: &[f64]) -> (Script, Script, Rc<RefCell<String>>) {
        let log = Rc::new(RefCell::new(String::new()));
        let side = |name, seconds: &[f64]| Script {
            name,
            seconds: seconds.to_vec(),
            log: log.clone(),
            turns: 0,
        };
        (side('o', ours), side('p', peer), log.clone())
    }

    const EFFORT: Effort = Effort {
        pairs: 3,
        turn_seconds: 0.1,
    };

    #[test]
    fn turns_alternate_and_ratios_are_of_pairs() {
        // After the warm-up both become slower together: the medians of the times move, the
        // ratios of the pairs don't.
        let (mut ours, mut peer, log) =
            sides(&[9.0, 1.0, 1.0, 2.0, 4.0], &[9.0, 2.0, 2.0, 4.0, 8.0]);
        let out = play(&mut ours, &mut peer, None, Clock::Cpu, EFFORT).unwrap();
        assert_eq!(*log.borrow(), "opopopopop");
        let expected = Outcome {
            ours: 2.0,
            ours_mad: 1.0,
            ours_wall: 4.0,
            peer: 4.0,
            ratio: 0.5,
        };
        assert_eq!(out, expected);
        let (mut ours, mut peer, _) = sides(&[1.0], &[2.0]);
        let out = play(&mut ours, &mut peer, None, Clock::Wall, EFFORT).unwrap();
        assert_eq!((out.ours, out.peer, out.ratio), (2.0, 4.0, 0.5));
    }

    #[test]
    fn short_calls_are_repeated() {
        struct Count(Vec<usize>);
        impl Player for Count {
            fn turn(&mut self, calls: usize, _: Option<&str>) -> Result<Times> {
                self.0.push(calls);
                let times = vec![0.01; calls];
                Ok(Times {
                    wall: times.clone(),
                    cpu: times,
                })
            }
        }
        let (mut ours, mut peer) = (Count(vec![]), Count(vec![]));
        play(&mut ours, &mut peer, None, Clock::Cpu, EFFORT).unwrap();
        assert_eq!(ours.0, [1, 1, 10, 10, 10]);
        assert_eq!(peer.0, ours.0);
    }

    #[test]
    fn times_that_are_missing_and_clocks_that_stand_are_refused() {
        struct Lazy;
        impl Player for Lazy {
            fn turn(&mut self, _: usize, _: Option<&str>) -> Result<Times> {
                Ok(Times {
                    wall: vec![],
                    cpu: vec![],
                })
            }
        }
        let error = play(&mut Lazy, &mut Lazy, None, Clock::Cpu, EFFORT).unwrap_err();
        assert!(error.to_string().contains("asked for 1 calls"), "{error}");
        let (mut ours, mut peer, _) = sides(&[1.0], &[0.0]);
        let error = play(&mut ours, &mut peer, None, Clock::Cpu, EFFORT).unwrap_err();
        assert!(
            error.to_string().contains("cpu clock stood still"),
            "{error}"
        );
    }

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}
