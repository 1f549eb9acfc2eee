//! What a user writes: a few steps on the built-in digits, and a picture of what came of it.

use std::error::Error;
use std::path::PathBuf;

use diffusion_images::candle_core::Device;
use diffusion_images::data::{self, Options};
use diffusion_images::diffusion_core::grid::Grid;
use diffusion_images::diffusion_core::guide::Clip;
use diffusion_images::diffusion_core::sample::SamplerConfig;
use diffusion_images::diffusion_core::train::{Cancel, Outcome, Quiet};
use diffusion_images::grid::{GridOptions, sample_grid};
use diffusion_images::model::{ImageModel, SampleRequest};
use diffusion_images::{preset, run};

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(std::env::args().nth(1).ok_or("usage: consumer-images FOLDER")?);
    let digits = data::splits("digits", &Options::default())?.train;
    let mut config = preset::preset("tiny", &digits)?;
    preset::set_steps(&mut config, 5);
    let (device, cancel) = (Device::Cpu, Cancel::new());
    let outcome = run::train(&config, &digits, &out, false, &device, &mut Quiet, &cancel)?;
    if outcome != (Outcome::Finished { step: 5 }) {
        return Err(format!("training ended early: {outcome:?}").into());
    }
    let model = ImageModel::open(&out, &device)?;
    let request = SampleRequest {
        count: 4,
        sampler: SamplerConfig::named("dpmpp-2m")?,
        grid: Grid::Trailing,
        steps: 5,
        labels: Some(vec![0, 1, 2, 3]),
        guidance: 2.0,
        clip: Clip::Static { range: 1.0 },
        batch: 4,
            brownian: false,
        seed: 0,
    };
    let images = model.sample(&request, &mut ())?;
    sample_grid(&images, &GridOptions::default())?.write_png(&out.join("grid.png"), &[])?;
    println!("{:?} {}", images.dims(), model.num_parameters());
    Ok(())
}
