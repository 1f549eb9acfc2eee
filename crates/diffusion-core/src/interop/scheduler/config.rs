//! The fields of a scheduler configuration, with the library's defaults.

use super::check::one_of;
use crate::error::{Report, Result};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// Classes that can be planned.
pub const CLASSES: [&str; 30] = [
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "IPNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
];

/// Classes whose table of betas is read, so that a model trained on it can be sampled in other ways,
/// but whose own runs cannot be planned.
pub const TABLES: [&str; 1] = ["RePaintScheduler"];

/// Classes that have no table of betas.
const WITHOUT_TABLE: [&str; 8] = [
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "IPNDMScheduler",
];

/// What a class takes for fields that a file leaves out, where that is not the common default.
fn defaults(class: &str) -> Vec<(&'static str, Value)> {
    match class {
        "CMStochasticIterativeScheduler" => vec![("num_train_timesteps", 40.into())],
        "PNDMScheduler" => vec![("set_alpha_to_one", false.into())],
        "LCMScheduler" | "TCDScheduler" => vec![
            ("beta_schedule", "scaled_linear".into()),
            ("clip_sample", false.into()),
        ],
        "UnCLIPScheduler" => vec![("beta_schedule", "squaredcos_cap_v2".into())],
        _ => Vec::new(),
    }
}

/// A scheduler configuration under the library's names. Fields that a class does not have are
/// simply not read by it; what was left out of the file takes the class's default.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // The names are the library's; its documentation is the reference.
pub struct Config {
    #[serde(rename = "_class_name")]
    pub class: String,
    pub num_train_timesteps: usize,
    pub beta_start: Option<f64>,
    pub beta_end: Option<f64>,
    pub beta_schedule: String,
    pub trained_betas: Option<Vec<f64>>,
    pub prediction_type: String,
    pub clip_sample: Option<bool>,
    pub clip_sample_range: f64,
    pub thresholding: bool,
    pub dynamic_thresholding_ratio: f64,
    pub sample_max_value: f64,
    pub timestep_spacing: Option<String>,
    pub steps_offset: i64,
    pub rescale_betas_zero_snr: bool,
    pub variance_type: Option<String>,
    pub set_alpha_to_one: bool,
    pub interpolation_type: String,
    pub timestep_type: String,
    pub use_karras_sigmas: bool,
    pub use_exponential_sigmas: bool,
    pub use_beta_sigmas: bool,
    pub use_lu_lambdas: bool,
    pub use_flow_sigmas: bool,
    pub final_sigmas_type: String,
    pub sigma_min: Option<f64>,
    pub sigma_max: Option<f64>,
    pub sigma_data: f64,
    pub sigma_schedule: String,
    pub rho: f64,
    pub solver_order: usize,
    pub algorithm_type: Option<String>,
    pub solver_type: Option<String>,
    pub lower_order_final: bool,
    pub predict_x0: bool,
    pub disable_corrector: Vec<usize>,
    pub solver_p: Option<Value>,
    pub predictor_order: usize,
    pub corrector_order: usize,
    pub skip_prk_steps: bool,
    pub original_inference_steps: usize,
    pub timestep_scaling: f64,
    pub clip_denoised: bool,
    pub s_noise: f64,
    pub shift: f64,
    pub flow_shift: f64,
    pub use_dynamic_shifting: bool,
    pub time_shift_type: String,
    pub shift_terminal: Option<f64>,
    pub invert_sigmas: bool,
    pub stochastic_sampling: bool,
    pub sampling_eps: Option<f64>,
    pub snr: f64,
    pub correct_steps: usize,
    pub beta_min: f64,
    pub beta_max: f64,
    pub euler_at_final: bool,
    #[serde(deserialize_with = "number_or_infinity")]
    pub lambda_min_clipped: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            class: String::new(),
            num_train_timesteps: 1000,
            beta_start: None,
            beta_end: None,
            beta_schedule: "linear".into(),
            trained_betas: None,
            prediction_type: "epsilon".into(),
            clip_sample: None,
            clip_sample_range: 1.0,
            thresholding: false,
            dynamic_thresholding_ratio: 0.995,
            sample_max_value: 1.0,
            timestep_spacing: None,
            steps_offset: 0,
            rescale_betas_zero_snr: false,
            variance_type: None,
            set_alpha_to_one: true,
            interpolation_type: "linear".into(),
            timestep_type: "discrete".into(),
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            use_lu_lambdas: false,
            use_flow_sigmas: false,
            final_sigmas_type: "zero".into(),
            sigma_min: None,
            sigma_max: None,
            sigma_data: 0.5,
            sigma_schedule: "karras".into(),
            rho: 7.0,
            solver_order: 2,
            algorithm_type: None,
            solver_type: None,
            lower_order_final: true,
            predict_x0: true,
            disable_corrector: Vec::new(),
            solver_p: None,
            predictor_order: 2,
            corrector_order: 2,
            skip_prk_steps: false,
            original_inference_steps: 50,
            timestep_scaling: 10.0,
            clip_denoised: true,
            s_noise: 1.0,
            shift: 1.0,
            flow_shift: 1.0,
            use_dynamic_shifting: false,
            time_shift_type: "exponential".into(),
            shift_terminal: None,
            invert_sigmas: false,
            stochastic_sampling: false,
            sampling_eps: None,
            snr: 0.15,
            correct_steps: 1,
            beta_min: 0.1,
            beta_max: 20.0,
            euler_at_final: false,
            lambda_min_clipped: f64::NEG_INFINITY,
        }
    }
}

impl Config {
    /// Reads and checks a configuration; `at` names it in messages.
    ///
    /// # Errors
    /// As [`super::Scheduler::from_json`].
    pub fn from_json(text: &str, at: &str) -> Result<Self> {
        let text = with_defaults(quote_infinities(text));
        let mut reader = serde_json::Deserializer::from_str(&text);
        let config: Config = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            Report::field(at, error.path(), error.inner())
                .expected("a diffusers scheduler configuration")
                .remedy("correct the file, or get it again")
                .input()
        })?;
        config.check(at)?;
        Ok(config)
    }

    /// What decides the table and what the network says.
    fn check(&self, at: &str) -> Result<()> {
        let class = self.class.as_str();
        if !CLASSES.contains(&class) && !TABLES.contains(&class) {
            return Err(
                Report::new(format!("{at}: _class_name"), format!("{class:?}"))
                    .expected(format!(
                        "one of {}, {}",
                        CLASSES.join(", "),
                        TABLES.join(", ")
                    ))
                    .remedy("give the configuration of one of these")
                    .unsupported(),
            );
        }
        if !(1..=1_000_000).contains(&self.num_train_timesteps) {
            return Err(Report::new(
                format!("{at}: num_train_timesteps"),
                self.num_train_timesteps,
            )
            .expected("1 to 1000000")
            .remedy("correct the file, or get it again")
            .config());
        }
        one_of(
            &format!("{at}: beta_schedule"),
            &self.beta_schedule,
            &[
                "linear",
                "scaled_linear",
                "squaredcos_cap_v2",
                "sigmoid",
                "exp",
                "laplace",
            ],
            &[],
        )?;
        let kinds: &[&str] = match class {
            "EDMEulerScheduler" | "EDMDPMSolverMultistepScheduler" => &["epsilon", "v_prediction"],
            _ if self.use_flow_sigmas => &["flow_prediction"],
            _ => &["epsilon", "sample", "original_sample", "v_prediction"],
        };
        one_of(
            &format!("{at}: prediction_type"),
            &self.prediction_type,
            kinds,
            &[],
        )
    }

    /// Whether the class has a table of betas.
    pub(super) fn has_table(&self) -> bool {
        !WITHOUT_TABLE.contains(&self.class.as_str())
    }

    /// How timesteps are spaced: what the file says or the class's default.
    pub fn spacing(&self) -> &str {
        match (&self.timestep_spacing, self.class.as_str()) {
            (Some(spacing), _) => spacing,
            (
                None,
                "DDPMScheduler"
                | "DDPMParallelScheduler"
                | "DDIMScheduler"
                | "DDIMParallelScheduler"
                | "DDIMInverseScheduler"
                | "PNDMScheduler",
            ) => "leading",
            (None, _) => "linspace",
        }
    }
}

/// A configuration with the defaults of its class written out. What is no object stays what it is,
/// for the reader to refuse.
fn with_defaults(text: String) -> String {
    let Ok(Value::Object(mut fields)) = serde_json::from_str(&text) else {
        return text;
    };
    let class = fields.get("_class_name").and_then(Value::as_str);
    let missing = defaults(class.unwrap_or_default());
    if missing.iter().all(|(name, _)| fields.contains_key(*name)) {
        return text;
    }
    for (name, value) in missing {
        fields.entry(name).or_insert(value);
    }
    Value::Object(fields).to_string()
}

/// JSON has no infinity, but files written by Python do: the bare words become strings.
fn quote_infinities(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(c) = rest.chars().next() {
        if !in_string {
            let word = ["-Infinity", "Infinity", "NaN"]
                .into_iter()
                .find(|w| rest.starts_with(w));
            if let Some(word) = word {
                out.push('"');
                out.push_str(word);
                out.push('"');
                rest = &rest[word.len()..];
                continue;
            }
        }
        let mut taken = c.len_utf8();
        if in_string && c == '\\' {
            taken += rest[1..].chars().next().map_or(0, char::len_utf8);
        } else if c == '"' {
            in_string = !in_string;
        }
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    out
}

fn number_or_infinity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Given {
        Number(f64),
        Word(String),
    }
    match Given::deserialize(deserializer)? {
        Given::Number(number) => Ok(number),
        Given::Word(word) => match word.as_str() {
            "-Infinity" => Ok(f64::NEG_INFINITY),
            "Infinity" => Ok(f64::INFINITY),
            other => Err(serde::de::Error::custom(format!(
                "{other:?} is not a number"
            ))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bare_words_are_quoted() {
        let text = r#"{"a": -Infinity, "b": "Infinity \" NaN", "c": NaN}"#;
        let quoted = quote_infinities(text);
        assert_eq!(
            quoted,
            r#"{"a": "-Infinity", "b": "Infinity \" NaN", "c": "NaN"}"#
        );
        assert_eq!(quote_infinities("\"\\"), "\"\\");
        assert_eq!(quote_infinities("\"é\\é"), "\"é\\é");
    }
}
