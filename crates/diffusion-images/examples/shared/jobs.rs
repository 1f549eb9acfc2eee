//! Independent work side by side.
//!
//! The networks of a quick run are small: two trainings on a core each finish sooner than one after
//! the other on both. Results do not depend on it, as they do not on the number of threads.

use anyhow::{Context, Result};
use std::sync::Mutex;

/// Something to do, with a measure of how long it takes.
pub struct Job<'a, T> {
    pub cost: f64,
    pub work: Box<dyn FnOnce() -> Result<T> + Send + 'a>,
}

/// Does all jobs, the longest first, each on its share of the cores; the answers are in the order of
/// the jobs. After an error no further job is begun.
pub fn run<T: Send>(jobs: Vec<Job<'_, T>>) -> Result<Vec<T>> {
    let cores = rayon::current_num_threads();
    let workers = cores.min(jobs.len()).max(1);
    let mut queue: Vec<(usize, Job<'_, T>)> = jobs.into_iter().enumerate().collect();
    // The last one is taken first.
    queue.sort_by(|a, b| a.1.cost.total_cmp(&b.1.cost));
    let queue = Mutex::new(queue);
    let answers = Mutex::new(Vec::new());
    let take = || -> Option<(usize, Job<'_, T>)> { queue.lock().ok()?.pop() };
    let worker = || -> Result<()> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads((cores / workers).max(1))
            .stack_size(32 << 20)
            .build()?;
        while let Some((place, job)) = take() {
            let answer = pool.install(job.work);
            let failed = answer.is_err();
            if let Ok(mut answers) = answers.lock() {
                answers.push((place, answer));
            }
            if failed {
                if let Ok(mut queue) = queue.lock() {
                    queue.clear();
                }
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let started: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        started.into_iter().try_for_each(|thread| {
            thread
                .join()
                .ok()
                .context("a job ended without an answer")?
        })
    })?;
    let mut answers = answers.into_inner().ok().context("a job panicked")?;
    answers.sort_by_key(|(place, _)| *place);
    answers.into_iter().map(|(_, answer)| answer).collect()
}
