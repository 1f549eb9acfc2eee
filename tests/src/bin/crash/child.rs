//! The child: trains a tiny model and says what it does.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use diffusion_core::checkpoint::{DiskStorage, Storage};
use diffusion_core::train::{
    Both, Cancel, Event, JsonLines, Loss, Objective, Outcome, Source, StepCtx, Trainer,
};
use diffusion_nn::net::unet2d::{DownBlockType, UNet2D, UNet2DConfig, UpBlockType};
use diffusion_nn::{Mode, Store};
use diffusion_ops::rng::{Key, stream};

use crate::{Args, Model};

/// Points of four clusters, or images made of them.
struct Data {
    shape: Vec<usize>,
}

impl Source for Data {
    type Batch = Tensor;

    fn len(&self) -> usize {
        37
    }

    fn batch(&self, items: &[usize], _epoch: u64) -> diffusion_core::Result<Tensor> {
        let size: usize = self.shape.iter().product();
        let mut values = Vec::with_capacity(size * items.len());
        for &item in items {
            let noise = Key::new(1, stream::TEST).item(item as u64).normal(size);
            let side = |axis: usize| {
                if item >> (axis % 2) & 1 == 1 {
                    1.0
                } else {
                    -1.0
                }
            };
            values.extend(
                noise
                    .iter()
                    .enumerate()
                    .map(|(i, z)| (side(i) + 0.1 * z) as f32),
            );
        }
        let shape: Vec<usize> = [items.len()]
            .into_iter()
            .chain(self.shape.clone())
            .collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

/// Predicts the noise in x_t = (1 − t) x_0 + t ε.
struct NoisePredictor {
    shape: Vec<usize>,
    net: Net,
}

enum Net {
    Mlp(BTreeMap<String, Var>),
    Unet(Box<UNet2D>),
}

impl Objective for NoisePredictor {
    type Batch = Tensor;

    fn losses(
        &mut self,
        _phase: usize,
        x: &Tensor,
        ctx: &StepCtx,
    ) -> diffusion_core::Result<Vec<Loss>> {
        let eps = ctx.noise(&self.shape, DType::F32, x.device())?;
        let times: Vec<f32> = ctx.times().iter().map(|&t| t as f32).collect();
        let time = Tensor::from_vec(times, ctx.items.len(), x.device())?;
        let mut wide = vec![1; x.dims().len()];
        wide[0] = ctx.items.len();
        let t = time.reshape(wide)?;
        let noisy = (x.broadcast_mul(&(1.0 - &t)?)? + eps.broadcast_mul(&t)?)?;
        let out = match &self.net {
            Net::Mlp(p) => {
                let input = Tensor::cat(&[&noisy, &t], 1)?;
                let hidden = input.matmul(&p["w1"])?.broadcast_add(&p["b1"])?.tanh()?;
                hidden.matmul(&p["w2"])?.broadcast_add(&p["b2"])?
            }
            Net::Unet(net) => {
                let mode = Mode::Train {
                    key: ctx.key(stream::DROPOUT, 0),
                };
                net.forward(&noisy, &(time * 1000.0)?, None, mode)
                    .map_err(|e| candle_core::Error::Msg(e.to_string()))?
            }
        };
        Ok(vec![Loss::new("simple", (out - eps)?.sqr()?.mean_all()?)])
    }
}

fn build(model: Model) -> Result<(NoisePredictor, BTreeMap<String, Var>)> {
    let cpu = &Device::Cpu;
    match model {
        Model::Mlp => {
            let mut params = BTreeMap::new();
            let shapes: [(&str, &[usize]); 4] = [
                ("w1", &[3, 32]),
                ("b1", &[32]),
                ("w2", &[32, 2]),
                ("b2", &[2]),
            ];
            for (i, (name, shape)) in shapes.into_iter().enumerate() {
                let z = Key::new(2, stream::INIT)
                    .item(i as u64)
                    .normal(shape.iter().product());
                let z: Vec<f32> = z.iter().map(|z| 0.3 * *z as f32).collect();
                params.insert(name.to_string(), Var::from_vec(z, shape, cpu)?);
            }
            let net = Net::Mlp(params.clone());
            Ok((
                NoisePredictor {
                    shape: vec![2],
                    net,
                },
                params,
            ))
        }
        Model::Unet => {
            let config = UNet2DConfig {
                in_channels: 1,
                out_channels: 1,
                down_block_types: vec![DownBlockType::DownBlock2D, DownBlockType::AttnDownBlock2D],
                up_block_types: vec![UpBlockType::AttnUpBlock2D, UpBlockType::UpBlock2D],
                block_out_channels: vec![8, 16],
                layers_per_block: 1,
                norm_num_groups: Some(4),
                dropout: 0.1,
                ..UNet2DConfig::default()
            };
            let store = Store::new(2, DType::F32, cpu);
            let net = Net::Unet(Box::new(UNet2D::new(&config, &store.root())?));
            Ok((
                NoisePredictor {
                    shape: vec![1, 8, 8],
                    net,
                },
                store.named(),
            ))
        }
    }
}

/// The disk, but slower, and it says what it does.
struct Slow {
    disk: DiskStorage,
    delay: Duration,
}

impl Slow {
    fn before(&self, what: &str) {
        if !self.delay.is_zero() {
            println!("op {what}");
            std::thread::sleep(self.delay);
        }
    }
}

impl Storage for Slow {
    fn create_dir(&mut self, path: &Path) -> std::io::Result<()> {
        self.before("create_dir");
        self.disk.create_dir(path)
    }
    fn create(&mut self, path: &Path) -> std::io::Result<()> {
        self.before("create");
        self.disk.create(path)
    }
    fn append(&mut self, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
        self.before("append");
        self.disk.append(path, bytes)
    }
    fn sync_file(&mut self, path: &Path) -> std::io::Result<()> {
        self.before("sync_file");
        self.disk.sync_file(path)
    }
    fn sync_dir(&mut self, path: &Path) -> std::io::Result<()> {
        self.before("sync_dir");
        self.disk.sync_dir(path)
    }
    fn rename(&mut self, from: &Path, to: &Path) -> std::io::Result<()> {
        self.before("rename");
        self.disk.rename(from, to)
    }
    fn remove_file(&mut self, path: &Path) -> std::io::Result<()> {
        self.before("remove_file");
        self.disk.remove_file(path)
    }
    fn remove_dir(&mut self, path: &Path) -> std::io::Result<()> {
        self.before("remove_dir");
        self.disk.remove_dir(path)
    }
    fn list(&self, path: &Path) -> std::io::Result<Vec<String>> {
        self.disk.list(path)
    }
    fn read(&self, path: &Path) -> std::io::Result<(Box<dyn Read + '_>, u64)> {
        self.disk.read(path)
    }
}

/// Trains until the end or a signal.
pub fn train(args: &Args) -> Result<ExitCode> {
    let cancel = Cancel::new();
    let signal = Arc::new(AtomicUsize::new(0));
    for number in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(number, cancel.flag())?;
        signal_hook::flag::register_usize(number, signal.clone(), number as usize)?;
    }
    let pause = Duration::from_micros(args.slow_steps);
    let announce = move |event: &Event| match event {
        Event::Started { resumed_from } => println!("started {}", resumed_from.unwrap_or(0)),
        Event::Step { step, .. } => {
            println!("step {step}");
            std::thread::sleep(pause);
        }
        Event::Saving { step } => println!("saving {step}"),
        Event::Saved { step, .. } => println!("saved {step}"),
        Event::Rejected { path, why } => println!("rejected {} {why}", path.display()),
        _ => {}
    };
    let (mut objective, params) = build(args.model)?;
    let data = Data {
        shape: objective.shape.clone(),
    };
    let mut trainer = Trainer::new(params, args.model.config().check()?)?
        .run_folder(&args.out)
        .identity(args.model.name())
        .storage(Box::new(Slow {
            disk: DiskStorage::new(),
            delay: Duration::from_micros(args.slow_files),
        }));
    let metrics = JsonLines::new(args.out.join("metrics.jsonl"));
    let started = Instant::now();
    match trainer.run(&mut objective, &data, &mut Both(metrics, announce), &cancel) {
        Ok(Outcome::Finished { step }) => {
            println!("finished {step}");
            Ok(ExitCode::SUCCESS)
        }
        Ok(_) => Ok(ExitCode::from(128 + signal.load(Ordering::SeqCst) as u8)),
        Err(error) => {
            println!(
                "refused after {} ms: {error}",
                started.elapsed().as_millis()
            );
            Ok(ExitCode::FAILURE)
        }
    }
}
