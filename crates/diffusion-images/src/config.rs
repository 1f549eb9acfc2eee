//! What a training run is: network, process, objective, and how it is trained.

use diffusion_core::loss::{TimeLaw, Weight};
use diffusion_core::schedule::{BetaSchedule, Table};
use diffusion_core::train::TrainConfig;
use diffusion_core::{Report, Result, predict::Kind};
use diffusion_nn::net::unet2d::UNet2DConfig;
use serde::{Deserialize, Serialize};

/// What the network predicts; a scheduler file can say these three.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Predicts {
    /// The noise.
    #[default]
    Epsilon,
    /// The data.
    Sample,
    /// `v = α ε − σ x₀`.
    VPrediction,
}

impl Predicts {
    /// The prediction kind.
    pub fn kind(self) -> Kind {
        match self {
            Predicts::Epsilon => Kind::Epsilon,
            Predicts::Sample => Kind::X0,
            Predicts::VPrediction => Kind::Velocity,
        }
    }
}

/// The forward process of a run: a table of steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProcessConfig {
    /// Number of steps of the table.
    pub steps: usize,
    /// Its betas.
    pub betas: BetaSchedule,
    /// Whether the last step is rescaled to hold no signal; needs `v_prediction`.
    pub zero_terminal_snr: bool,
}

impl Default for ProcessConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            betas: BetaSchedule::ddpm(1000),
            zero_terminal_snr: false,
        }
    }
}

impl ProcessConfig {
    /// The table.
    ///
    /// # Errors
    /// `Config` for impossible betas.
    pub fn table(&self) -> Result<Table> {
        let table = self.betas.table(self.steps)?;
        Ok(if self.zero_terminal_snr {
            table.rescaled_to_zero_terminal_snr()
        } else {
            table
        })
    }
}

/// A whole training run, as read from TOML.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageConfig {
    /// The network, under diffusers' names. Sizes and channels follow the data.
    pub network: UNet2DConfig,
    /// The forward process.
    pub process: ProcessConfig,
    /// What the network predicts.
    pub predicts: Predicts,
    /// How much each noise level counts.
    pub weight: Weight,
    /// How noise levels are drawn.
    pub time: TimeLaw,
    /// Learn the classes of labelled data.
    pub conditional: bool,
    /// How often a label is withheld, so that the model also learns to do without.
    pub label_dropout: f64,
    /// Mirror training images left to right: a fair coin for each image in each epoch. Not for
    /// pictures whose sides mean something, such as digits and letters.
    pub flip: bool,
    /// Compute the insides of residual blocks again in the backward pass instead of keeping them:
    /// less memory, about a third more time.
    pub gradient_checkpointing: bool,
    /// The loop.
    pub train: TrainConfig,
}

impl Default for ImageConfig {
    fn default() -> Self {
        Self {
            network: UNet2DConfig::default(),
            process: ProcessConfig::default(),
            predicts: Predicts::default(),
            weight: Weight::default(),
            time: TimeLaw::default(),
            conditional: true,
            label_dropout: 0.1,
            flip: false,
            gradient_checkpointing: false,
            train: TrainConfig::default(),
        }
    }
}

impl ImageConfig {
    /// Reads a configuration from TOML over a base: tables are merged, everything else replaced.
    ///
    /// # Errors
    /// `Config` naming the file, the key and what was expected.
    pub fn from_toml(text: &str, at: &str, base: &ImageConfig) -> Result<Self> {
        let wrong = |field: &str, what: &str| {
            // A parser's message may have several lines.
            Report::field(at, field, what.trim().replace('\n', ", "))
                .expected("the configuration of a training run")
                .remedy("see `diffusion images train --print-config`")
                .config()
        };
        let overlay: toml::Table = text.parse().map_err(|e: toml::de::Error| {
            let before = e.span().and_then(|span| text.get(..span.start));
            let line = before.map_or(1, |before| 1 + before.matches('\n').count());
            wrong(&format!("line {line}"), e.message())
        })?;
        let mut merged = toml::Table::try_from(base).map_err(|e| wrong("", &e.to_string()))?;
        merge(&mut merged, overlay);
        serde_path_to_error::deserialize(toml::Value::Table(merged))
            .map_err(|e| wrong(&e.path().to_string(), e.inner().message()))
    }

    /// The configuration as TOML.
    ///
    /// # Errors
    /// `Config` when a value cannot be written.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Report::new("config", e).config())
    }

    /// Checks what no single field can tell.
    ///
    /// # Errors
    /// `Config` naming the field, the value, what was expected and the remedy.
    pub fn check(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.label_dropout) {
            return Err(Report::new("label_dropout", self.label_dropout)
                .expected("a probability from 0 to 1")
                .remedy("leave it out for the usual value")
                .config());
        }
        if self.process.steps == 0 || self.process.steps > 100_000 {
            return Err(Report::new("process.steps", self.process.steps)
                .expected("1 to 100000")
                .remedy("leave it out for the usual value")
                .config());
        }
        if self.process.zero_terminal_snr && self.predicts == Predicts::Epsilon {
            return Err(Report::new(
                "process.zero_terminal_snr",
                "true with predicts = \"epsilon\"",
            )
            .expected("a prediction that is defined without signal")
            .remedy("set predicts = \"v_prediction\"")
            .config());
        }
        self.process.table()?;
        self.network.check().map_err(crate::from_nn)?;
        self.train.clone().check()?;
        Ok(())
    }

    /// diffusers' `scheduler_config.json` for this process.
    ///
    /// # Errors
    /// `Unsupported` when the table has no counterpart there.
    pub fn scheduler_json(&self) -> Result<serde_json::Value> {
        let (name, start, end, trained) = match &self.process.betas {
            BetaSchedule::Linear { start, end } => ("linear", *start, *end, None),
            BetaSchedule::ScaledLinear { start, end } => ("scaled_linear", *start, *end, None),
            BetaSchedule::Sigmoid { start, end } => ("sigmoid", *start, *end, None),
            BetaSchedule::Cosine => ("squaredcos_cap_v2", 1e-4, 0.02, None),
            BetaSchedule::Custom { betas } => ("linear", 1e-4, 0.02, Some(betas)),
        };
        let predicts =
            serde_json::to_value(self.predicts).map_err(|e| Report::new("predicts", e).config())?;
        Ok(serde_json::json!({
            "_class_name": "DDPMScheduler",
            "_diffusers_version": "0.42.1",
            "num_train_timesteps": self.process.steps,
            "beta_schedule": name,
            "beta_start": start,
            "beta_end": end,
            "trained_betas": trained,
            "prediction_type": predicts,
            "rescale_betas_zero_snr": self.process.zero_terminal_snr,
            "clip_sample": true,
            "clip_sample_range": 1.0,
            "variance_type": "fixed_small",
            "timestep_spacing": "leading",
            "steps_offset": 0,
            "thresholding": false,
            "dynamic_thresholding_ratio": 0.995,
            "sample_max_value": 1.0,
        }))
    }
}

fn merge(base: &mut toml::Table, overlay: toml::Table) {
    for (key, value) in overlay {
        match (base.get_mut(&key), value) {
            // A tagged choice (`kind = …`) is one value: mixing two would leave stray fields.
            (Some(toml::Value::Table(old)), toml::Value::Table(new))
                if !new.contains_key("kind") =>
            {
                merge(old, new);
            }
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_overrides_what_it_names_and_nothing_else() {
        let base = ImageConfig::default();
        let text = "predicts = \"v_prediction\"\ngradient_checkpointing = true\n[train]\nsteps = 7\n[process]\nbetas = { kind = \"cosine\" }";
        let read = ImageConfig::from_toml(text, "a.toml", &base).unwrap();
        assert_eq!(read.train.steps, 7);
        assert!(read.gradient_checkpointing && !base.gradient_checkpointing);
        assert_eq!(read.train.lr, base.train.lr);
        assert_eq!(read.predicts, Predicts::VPrediction);
        assert_eq!(read.process.betas, BetaSchedule::Cosine);
    }

    #[test]
    fn toml_round_trip() {
        let config = ImageConfig::default();
        let back = ImageConfig::from_toml(&config.to_toml().unwrap(), "b.toml", &config).unwrap();
        assert_eq!(back, config);
    }

    #[test]
    fn mistakes_are_named() {
        let base = ImageConfig::default();
        let message = |text: &str| {
            ImageConfig::from_toml(text, "a.toml", &base)
                .unwrap_err()
                .to_string()
        };
        assert!(message("[train]\nstepz = 7").contains("stepz"));
        assert!(message("[train]\nsteps = \"x\"").contains("train.steps"));
        assert!(message("[train").contains("a.toml"));
        assert!(message("predicts = \"noise\"").contains("predicts"));
        let mut bad = base.clone();
        bad.process.zero_terminal_snr = true;
        assert!(
            bad.check()
                .unwrap_err()
                .to_string()
                .contains("v_prediction")
        );
        let mut bad = base;
        bad.label_dropout = f64::NAN;
        assert!(
            bad.check()
                .unwrap_err()
                .to_string()
                .contains("label_dropout")
        );
    }
}
