//! Which data a command uses: the options that `train` and `evaluate` share, and what a run noted.

use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, value_parser};
use diffusion_core::Report;
use diffusion_images::data::{Broken, Color, DataConfig, DataRecord, Fit, Splits};
use diffusion_images::run;
use std::fmt::Debug;
use std::path::Path;

/// Options of the data. `train` notes them beside the model; later commands need not repeat them.
#[derive(Args)]
pub struct DataArgs {
    /// `digits`, `mnist` or `emoji` (built in), an IDX or npz file, CIFAR-10's binary files, or a
    /// folder of PNG and JPEG images (sub-folders are classes). When absent: what the model's run noted;
    /// `digits` for a new run.
    #[arg(long)]
    data: Option<String>,
    /// Make images of a folder squares of this many pixels a side; needed where their sizes differ.
    #[arg(long, value_name = "PIXELS")]
    size: Option<u32>,
    /// How they become squares: the centre is cut out, or the whole is laid on white, or the whole is
    /// stretched. [default: crop]
    #[arg(long, value_parser = fits())]
    fit: Option<Fit>,
    /// Turn images of a folder into grey ones.
    #[arg(long)]
    grey: bool,
    /// Give grey images of a folder three channels.
    #[arg(long, conflicts_with = "grey")]
    rgb: bool,
    /// Files of a folder that are damaged or no images: an error that names them, or leave them out.
    /// [default: refuse]
    #[arg(long, value_parser = brokens())]
    broken: Option<Broken>,
    /// Memory for the decoded images of a folder, in MiB. Those beyond it are decoded again when they
    /// are needed; results are the same.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = value_parser!(u64).range(0..=1 << 24))]
    memory: u64,
}

fn fits() -> impl TypedValueParser<Value = Fit> {
    PossibleValuesParser::new(["crop", "pad", "stretch"]).map(|name| match name.as_str() {
        "pad" => Fit::Pad,
        "stretch" => Fit::Stretch,
        _ => Fit::Crop,
    })
}

fn brokens() -> impl TypedValueParser<Value = Broken> {
    PossibleValuesParser::new(["refuse", "skip"]).map(|name| match name.as_str() {
        "skip" => Broken::Skip,
        _ => Broken::Refuse,
    })
}

impl DataArgs {
    fn color(&self) -> Option<Color> {
        match (self.grey, self.rgb) {
            (true, _) => Some(Color::Grey),
            (_, true) => Some(Color::Rgb),
            _ => None,
        }
    }

    /// The options alone, on a source.
    fn plain(&self, source: &str) -> DataConfig {
        DataConfig {
            size: self.size,
            fit: self.fit.unwrap_or_default(),
            color: self.color().unwrap_or_default(),
            broken: self.broken.unwrap_or_default(),
            ..DataConfig::new(source)
        }
    }

    /// The data of a new run.
    pub fn new_run(&self) -> DataConfig {
        self.plain(self.data.as_deref().unwrap_or("digits"))
    }

    /// The data of a model that was trained before: what its run noted where nothing else is given.
    /// Another folder may be converted otherwise, the same one may not.
    pub fn of_model(&self, model: &Path) -> Result<(DataConfig, Option<DataRecord>)> {
        let Some(record) = run::remembered_data(model)? else {
            let Some(source) = &self.data else {
                return Err(Report::file(&run::data_file(model), "no such file")
                    .expected("a note of the data that the model learned from")
                    .remedy("say with --data which they are")
                    .config()
                    .into());
            };
            return Ok((self.plain(source), None));
        };
        let noted = &record.data;
        let source = self.data.as_ref().unwrap_or(&noted.source);
        let config = DataConfig::new(source);
        let folder = match config.is_folder() {
            Ok(folder) => folder,
            Err(error) if self.data.is_none() => {
                return Err(Report::file(&run::data_file(model), error)
                    .remedy("say with --data where the data are now")
                    .input()
                    .into());
            }
            Err(error) => return Err(error.into()),
        };
        if !folder {
            return Ok((self.plain(source), Some(record)));
        }
        let config = if config.absolute()?.source == noted.source {
            DataConfig {
                size: agree("--size", self.size.map(Some), noted.size)?,
                fit: agree("--fit", self.fit, noted.fit)?,
                color: agree("--grey, --rgb", self.color(), noted.color)?,
                broken: self.broken.unwrap_or(noted.broken),
                ..config
            }
        } else {
            DataConfig {
                size: self.size.or(noted.size),
                fit: self.fit.unwrap_or(noted.fit),
                color: self.color().unwrap_or(noted.color),
                broken: self.broken.unwrap_or(noted.broken),
                ..config
            }
        };
        Ok((config, Some(record)))
    }

    /// Whether other data are named than a run noted.
    pub fn names_other(&self, record: &DataRecord) -> Result<bool> {
        match &self.data {
            Some(source) => Ok(DataConfig::new(source).absolute()?.source != record.data.source),
            None => Ok(false),
        }
    }

    /// Refuses to be told of data where only `reader` would read them.
    pub fn unused(&self, reader: &str) -> Result<()> {
        let given = [
            ("--data", self.data.is_some()),
            ("--size", self.size.is_some()),
            ("--fit", self.fit.is_some()),
            ("--grey", self.grey),
            ("--rgb", self.rgb),
            ("--broken", self.broken.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(Report::new(*option, "given")
                .expected(format!("no data: only {reader} reads them"))
                .remedy(format!("leave {option} out"))
                .config()
                .into()),
            None => Ok(()),
        }
    }

    /// Reads the data. How many files were left out comes with them.
    pub fn open(&self, config: &DataConfig) -> Result<(Splits, usize)> {
        let (splits, skipped) = config.splits(self.memory << 20)?;
        Ok((splits, skipped.len()))
    }
}

/// What the run noted, unless something else is given, which is refused.
fn agree<T: PartialEq + Debug>(option: &str, given: Option<T>, noted: T) -> Result<T> {
    let show = |value: &T| {
        let text = format!("{value:?}").to_lowercase();
        let inner = text.strip_prefix("some(").and_then(|t| t.strip_suffix(')'));
        inner.unwrap_or(&text).to_string()
    };
    match given {
        Some(given) if given != noted => Err(Report::new(option, show(&given))
            .expected(format!("{}, as the model was trained with", show(&noted)))
            .remedy("leave the option out, or train a new model")
            .config()
            .into()),
        _ => Ok(noted),
    }
}

/// Refuses to go on with other images than a run began with.
pub fn must_be_those(record: &DataRecord, config: &DataConfig, splits: &Splits) -> Result<()> {
    let train = &splits.train;
    if train.digest() == record.digest {
        return Ok(());
    }
    let found = format!("{} training images that differ", train.len());
    Err(Report::new(format!("data `{}`", config.source), found)
        .expected(format!(
            "the {} images that the run began with",
            record.images
        ))
        .remedy("restore the data, or start another run in a new folder")
        .checkpoint()
        .into())
}
