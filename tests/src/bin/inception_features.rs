//! Features of images by the Inception network, for another library to compare:
//! `inception_features WEIGHTS IMAGES.safetensors OUT.safetensors`.

use anyhow::Result;
use candle_core::DType;
use clap::Parser;
use diffusion_core::checkpoint::{read_safetensors, write_safetensors_atomic};
use diffusion_core::limits::Limits;
use diffusion_images::metric::inception::Inception;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Compute the features of every tensor of images in a file, under its name.
///
/// `tests/peers/inception.py --binary …` calls it.
#[derive(Parser)]
#[command(name = "inception_features", verbatim_doc_comment)]
struct Args {
    /// The weights, under the names of pytorch-fid.
    weights: PathBuf,
    /// Images, `[B, 1 or 3, H, W]` in [−1, 1].
    images: PathBuf,
    /// Where to write the features, `[B, 2048]`.
    out: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let limits = Limits::default();
    let network = Inception::open(&args.weights, &limits)?;
    let mut features = BTreeMap::new();
    for (name, images) in read_safetensors(&args.images, &limits)? {
        features.insert(name, network.features(&images.to_dtype(DType::F32)?)?);
    }
    write_safetensors_atomic(&args.out, &features, &BTreeMap::new())?;
    println!("{} tensors in {}", features.len(), args.out.display());
    Ok(())
}
