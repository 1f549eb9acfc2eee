//! Which values of a configuration can be run.

use super::config::{CLASSES, Config, TABLES};
use crate::error::{Report, Result};

impl Config {
    /// What decides the runs of the class itself.
    ///
    /// # Errors
    /// `Unsupported` for what this version does not run, `Config` for what no version does.
    pub(super) fn check_run(&self, at: &str) -> Result<()> {
        let class = self.class.as_str();
        let one_of = |field: &str, value: &str, known: &[&str], open: &[&str]| {
            one_of(&format!("{at}: {field}"), value, known, open)
        };
        one_of("_class_name", class, &CLASSES, &TABLES)?;
        one_of(
            "timestep_spacing",
            self.spacing(),
            &["leading", "trailing", "linspace"],
            &[],
        )?;
        one_of(
            "final_sigmas_type",
            &self.final_sigmas_type,
            &["zero", "sigma_min"],
            &[],
        )?;
        if class == "DDPMScheduler" {
            one_of(
                "variance_type",
                self.variance_type.as_deref().unwrap_or("fixed_small"),
                &[
                    "fixed_small",
                    "fixed_small_log",
                    "fixed_large",
                    "learned_range",
                ],
                &["fixed_large_log", "learned"],
            )?;
        }
        if class == "EulerDiscreteScheduler" {
            one_of(
                "interpolation_type",
                &self.interpolation_type,
                &["linear", "log_linear"],
                &[],
            )?;
            one_of(
                "timestep_type",
                &self.timestep_type,
                &["discrete", "continuous"],
                &[],
            )?;
        }
        if class.starts_with("EDM") {
            one_of(
                "sigma_schedule",
                &self.sigma_schedule,
                &["karras", "exponential"],
                &[],
            )?;
        }
        if class == "UnCLIPScheduler" {
            one_of(
                "variance_type",
                self.variance_type.as_deref().unwrap_or("fixed_small_log"),
                &["fixed_small_log", "learned_range"],
                &[],
            )?;
        }
        if class.starts_with("FlowMatch") {
            one_of(
                "time_shift_type",
                &self.time_shift_type,
                &["exponential", "linear"],
                &[],
            )?;
        }
        self.check_solver(at)?;
        let spreads = [
            ("use_karras_sigmas", self.use_karras_sigmas),
            ("use_exponential_sigmas", self.use_exponential_sigmas),
            ("use_beta_sigmas", self.use_beta_sigmas),
        ];
        let chosen: Vec<&str> = spreads.iter().filter(|s| s.1).map(|s| s.0).collect();
        if chosen.len() > 1 {
            return Err(Report::new(at, chosen.join(" and "))
                .expected("at most one of them")
                .remedy("correct the file, or get it again")
                .config());
        }
        Ok(())
    }

    /// Algorithms, orders and rules of the classes that step in `λ`.
    fn check_solver(&self, at: &str) -> Result<()> {
        let class = self.class.as_str();
        let rules = ["midpoint", "heun", "logrho", "bh1", "bh2"];
        let (algorithms, most): (&[&str], usize) = match class {
            "DPMSolverMultistepScheduler" | "DPMSolverMultistepInverseScheduler" => (
                &[
                    "dpmsolver++",
                    "dpmsolver",
                    "sde-dpmsolver++",
                    "sde-dpmsolver",
                    "deis",
                ],
                3,
            ),
            "DPMSolverSinglestepScheduler" => {
                (&["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "deis"], 3)
            }
            "EDMDPMSolverMultistepScheduler" => (&["dpmsolver++", "sde-dpmsolver++", "deis"], 3),
            "DEISMultistepScheduler" => (&["deis", "dpmsolver", "dpmsolver++"], 3),
            "SASolverScheduler" => (&["data_prediction", "noise_prediction"], 3),
            "UniPCMultistepScheduler" => (&[], 9),
            _ => return Ok(()),
        };
        if let (Some(algorithm), false) = (&self.algorithm_type, algorithms.is_empty()) {
            one_of(&format!("{at}: algorithm_type"), algorithm, algorithms, &[])?;
        }
        if let Some(rule) = &self.solver_type {
            one_of(&format!("{at}: solver_type"), rule, &rules, &[])?;
        }
        let orders = [
            ("solver_order", self.solver_order, 1),
            ("predictor_order", self.predictor_order, 1),
            ("corrector_order", self.corrector_order, 0),
        ];
        for (field, order, least) in orders {
            let most = if field == "solver_order" { most } else { 4 };
            if !(least..=most).contains(&order) {
                return Err(Report::new(format!("{at}: {field}"), order)
                    .expected(format!("{least} to {most}"))
                    .remedy("correct the file, or get it again")
                    .config());
            }
        }
        let noise = matches!(
            self.algorithm_type.as_deref(),
            Some("dpmsolver" | "sde-dpmsolver")
        );
        if noise
            && class.starts_with("DPMSolver")
            && self.final_sigmas_type == "zero"
            && !class.contains("Inverse")
        {
            return Err(Report::new(
                format!("{at}: final_sigmas_type"),
                "zero, with an algorithm on the noise",
            )
            .expected("sigma_min")
            .remedy("correct the file, or use dpmsolver++")
            .config());
        }
        Ok(())
    }
}

/// Refuses a value that is neither `known` nor `open`, which means known but not done yet.
pub(super) fn one_of(at: &str, value: &str, known: &[&str], open: &[&str]) -> Result<()> {
    if known.contains(&value) {
        return Ok(());
    }
    let report = Report::new(at, value).expected(format!("one of {}", known.join(", ")));
    Err(match open.contains(&value) {
        true => report
            .remedy("this version does not have it yet")
            .unsupported(),
        false => report.remedy("correct the file, or get it again").config(),
    })
}
