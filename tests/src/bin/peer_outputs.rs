//! Runs a saved pipeline and writes its noise, states and images for another library to repeat:
//! `peer_outputs MODEL OUT.safetensors`.

use anyhow::Result;
use clap::Parser;
use diffusion_core::checkpoint::write_safetensors_atomic;
use diffusion_tests::outputs::outputs;
use diffusion_tests::unet::SavedUNet;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Sample from a model folder and write down everything that went in and came out.
///
/// `tests/peers/diffusers_loads_ours.py MODEL OUT.safetensors` then repeats the run with diffusers.
#[derive(Parser)]
#[command(name = "peer_outputs", verbatim_doc_comment)]
struct Args {
    /// A model folder, as `diffusion images train` writes it.
    model: PathBuf,
    /// Where to write the tensors.
    out: PathBuf,
    /// Steps of the run.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Images.
    #[arg(long, default_value_t = 2)]
    batch: usize,
    /// Seed of the noise.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A label for each image, as 3,0,10, for a network with classes.
    #[arg(long, value_delimiter = ',')]
    labels: Option<Vec<u32>>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let saved = SavedUNet::open(&args.model)?;
    let tensors = outputs(
        &saved,
        args.steps,
        args.batch,
        args.seed,
        args.labels.as_deref(),
    )?;
    write_safetensors_atomic(&args.out, &tensors, &BTreeMap::new())?;
    println!("{} tensors in {}", tensors.len(), args.out.display());
    Ok(())
}
