//! Kills training runs and compares what comes out with runs that nobody killed.
//!
//! The program starts itself as a child that trains a tiny model with frequent checkpoints, kills it
//! (SIGKILL) at chosen moments, half of them inside a checkpoint write, starts it again until it
//! finishes, and compares every file of the run folder byte by byte. It also sends SIGTERM and
//! SIGINT, and starts a second writer on a folder in use.
//!
//! ```text
//! crash --kills 20 --seed 0
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor, Var};
use clap::{Parser, ValueEnum};
use diffusion_core::checkpoint::{DiskStorage, Storage};
use diffusion_core::train::{
    Both, Cancel, Event, JsonLines, Loss, Objective, Outcome, Source, StepCtx, TrainConfig, Trainer,
};
use diffusion_nn::net::unet2d::{DownBlockType, UNet2D, UNet2DConfig, UpBlockType};
use diffusion_nn::{Mode, Store};
use diffusion_ops::rng::{Key, stream};

/// Kills training runs and checks that no byte changes.
#[derive(Debug, Parser)]
struct Args {
    /// How many times to kill.
    #[arg(long, default_value_t = 20)]
    kills: u64,
    /// Chooses the moments.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Be the child that trains.
    #[arg(long, hide = true)]
    child: bool,
    /// The child's run folder.
    #[arg(long, hide = true, default_value = "run")]
    out: PathBuf,
    /// What the child trains.
    #[arg(long, hide = true, default_value = "mlp")]
    model: Model,
    /// Microseconds that each operation on files takes longer.
    #[arg(long, hide = true, default_value_t = 0)]
    slow: u64,
}

/// The two models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Model {
    /// A perceptron on a mixture in the plane.
    Mlp,
    /// A U-Net on 8 × 8 images.
    Unet,
}

impl Model {
    fn name(self) -> &'static str {
        match self {
            Self::Mlp => "mlp",
            Self::Unet => "unet",
        }
    }

    fn config(self) -> TrainConfig {
        let (steps, checkpoint_every) = match self {
            Self::Mlp => (200, 10),
            Self::Unet => (60, 5),
        };
        TrainConfig {
            steps,
            checkpoint_every,
            batch_size: 4,
            lr: 1e-3,
            keep_last: 2,
            log_every: 1,
            seed: 7,
            ..TrainConfig::default()
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The child
// ---------------------------------------------------------------------------------------------

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
            let side = |axis: usize| if item >> (axis % 2) & 1 == 1 { 1.0 } else { -1.0 };
            values.extend(noise.iter().enumerate().map(|(i, z)| (side(i) + 0.1 * z) as f32));
        }
        let shape: Vec<usize> = [items.len()].into_iter().chain(self.shape.clone()).collect();
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
                let mode = Mode::Train { key: ctx.key(stream::DROPOUT, 0) };
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
            let shapes: [(&str, &[usize]); 4] =
                [("w1", &[3, 32]), ("b1", &[32]), ("w2", &[32, 2]), ("b2", &[2])];
            for (i, (name, shape)) in shapes.into_iter().enumerate() {
                let z = Key::new(2, stream::INIT).item(i as u64).normal(shape.iter().product());
                let z: Vec<f32> = z.iter().map(|z| 0.3 * *z as f32).collect();
                params.insert(name.to_string(), Var::from_vec(z, shape, cpu)?);
            }
            let net = Net::Mlp(params.clone());
            Ok((NoisePredictor { shape: vec![2], net }, params))
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
            Ok((NoisePredictor { shape: vec![1, 8, 8], net }, store.named()))
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

fn child(args: &Args) -> Result<ExitCode> {
    let cancel = Cancel::new();
    let signal = Arc::new(AtomicUsize::new(0));
    for number in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(number, cancel.flag())?;
        signal_hook::flag::register_usize(number, signal.clone(), number as usize)?;
    }
    let delay = Duration::from_micros(args.slow);
    let announce = move |event: &Event| match event {
        Event::Started { resumed_from } => println!("started {}", resumed_from.unwrap_or(0)),
        Event::Step { step, .. } => {
            println!("step {step}");
            std::thread::sleep(delay);
        }
        Event::Saving { step } => println!("saving {step}"),
        Event::Saved { step, .. } => println!("saved {step}"),
        Event::Rejected { path, why } => println!("rejected {} {why}", path.display()),
        _ => {}
    };
    let (mut objective, params) = build(args.model)?;
    let data = Data { shape: objective.shape.clone() };
    let mut trainer = Trainer::new(params, args.model.config().check()?)?
        .run_folder(&args.out)
        .identity(args.model.name())
        .storage(Box::new(Slow { disk: DiskStorage::new(), delay }));
    let metrics = JsonLines::new(args.out.join("metrics.jsonl"));
    let started = Instant::now();
    match trainer.run(&mut objective, &data, &mut Both(metrics, announce), &cancel) {
        Ok(Outcome::Finished { step }) => {
            println!("finished {step}");
            Ok(ExitCode::SUCCESS)
        }
        Ok(_) => Ok(ExitCode::from(128 + signal.load(Ordering::SeqCst) as u8)),
        Err(error) => {
            println!("refused after {} ms: {error}", started.elapsed().as_millis());
            Ok(ExitCode::FAILURE)
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The parent
// ---------------------------------------------------------------------------------------------

struct Running {
    process: Child,
    lines: Receiver<String>,
    /// What it resumed from, the last step that it announced, and the steps before a save.
    from: Option<u64>,
    step: u64,
    rejected: Vec<String>,
}

impl Running {
    fn start(model: Model, out: &Path, slow: u64) -> Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["--child", "--model", model.name(), "--slow", &slow.to_string(), "--out"])
            .arg(out)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let stdout = process.stdout.take().context("the child has no stdout")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::io::Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { process, lines, from: None, step: 0, rejected: Vec::new() })
    }

    /// The next line; none when the child has ended or `limit` is over.
    fn line(&mut self, limit: Duration) -> Option<String> {
        let line = match self.lines.recv_timeout(limit) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        };
        let number = |rest: &str| rest.parse::<u64>().unwrap_or(0);
        if let Some(rest) = line.strip_prefix("started ") {
            self.from = Some(number(rest));
        } else if let Some(rest) = line.strip_prefix("step ") {
            self.step = number(rest);
        } else if line.starts_with("rejected ") {
            self.rejected.push(line.clone());
        }
        Some(line)
    }

    /// Reads on until a line begins with `prefix`; false when the child ended before.
    fn wait_for(&mut self, prefix: &str) -> bool {
        while let Some(line) = self.line(Duration::from_secs(60)) {
            if line.starts_with(prefix) {
                return true;
            }
        }
        false
    }

    fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        self.drain();
        Ok(())
    }

    fn drain(&mut self) {
        while self.line(Duration::from_secs(60)).is_some() {}
    }

    fn signal(&self, name: &str) -> Result<()> {
        let command = format!("kill -{name} {}", self.process.id());
        ensure!(Command::new("sh").args(["-c", &command]).status()?.success(), "{command} failed");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fine when it has ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Every file of a run but the lock, by relative path.
fn contents(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if path.is_dir() {
            out.extend(contents(&path)?.into_iter().map(|(n, b)| (format!("{name}/{n}"), b)));
        } else if name != "lock" {
            out.insert(name, fs::read(path)?);
        }
    }
    Ok(out)
}

/// Names in the folder of checkpoints; none before it exists.
fn checkpoints(run: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return Vec::new() };
    entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

fn newest(run: &Path) -> u64 {
    let steps = checkpoints(run);
    steps.iter().filter_map(|n| n.strip_prefix("step-")?.parse().ok()).max().unwrap_or(0)
}

fn same(expected: &BTreeMap<String, Vec<u8>>, run: &Path) -> Result<()> {
    let found = contents(run)?;
    for name in expected.keys().chain(found.keys()) {
        match (expected.get(name), found.get(name)) {
            (Some(a), Some(b)) if a == b => {}
            (Some(_), Some(_)) => bail!("{name}: other bytes than those of the run without kills"),
            (Some(_), None) => bail!("{name}: missing"),
            _ => bail!("{name}: left behind"),
        }
    }
    Ok(())
}

/// Microseconds that each operation takes longer, so that a kill lands where it is meant to.
const SLOW: u64 = 2000;
/// Kills before a run is let to its end.
const KILLS_PER_RUN: u64 = 5;

struct Tally {
    kills: u64,
    exact: u64,
    inside: u64,
}

fn reference(model: Model, scratch: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let run = scratch.join(format!("{}-whole", model.name()));
    let mut running = Running::start(model, &run, 0)?;
    ensure!(running.wait_for("finished "), "the run without kills did not finish");
    running.drain();
    contents(&run)
}

/// Checks what a start found: the newest checkpoint, and at most one interval lost.
fn check_start(running: &Running, expected: u64, before: u64, every: u64) -> Result<u64> {
    let from = running.from.context("the child ended before it started")?;
    ensure!(running.rejected.is_empty(), "{}", running.rejected.join("; "));
    ensure!(from == expected, "resumed from step {from}, the newest checkpoint is {expected}");
    let lost = before.saturating_sub(from);
    ensure!(lost <= every, "lost {lost} steps, an interval has {every}");
    Ok(lost)
}

fn one_run(
    model: Model,
    run: &Path,
    plan: Key,
    kills: u64,
    expected: &BTreeMap<String, Vec<u8>>,
    tally: &mut Tally,
) -> Result<()> {
    let every = model.config().checkpoint_every;
    let (mut before, mut done) = (0, 0);
    let mut attempt = 0;
    while done < kills {
        let here = attempt * 8;
        let draw = |n: u64, bound| plan.step(here + n).below(bound);
        attempt += 1;
        let wanted = newest(run);
        let aim_inside = draw(0, 2) == 0;
        let mut running = Running::start(model, run, SLOW)?;
        let alive = if aim_inside {
            let mut alive = true;
            for _ in 0..=draw(1, 2) {
                alive = alive && running.wait_for("saving ");
            }
            for _ in 0..=draw(2, 16) {
                alive = alive && running.wait_for("op ");
            }
            alive
        } else {
            std::thread::sleep(Duration::from_millis(draw(3, 400)));
            running.process.try_wait()?.is_none()
        };
        running.kill()?;
        if !alive {
            // It finished before the kill: that is no kill, and the run has nothing left to lose.
            break;
        }
        let inside = checkpoints(run).iter().any(|n| n.starts_with(".tmp-"));
        let lost = match running.from {
            Some(_) => check_start(&running, wanted, before, every)?,
            None => 0,
        };
        before = before.max(running.step).max(wanted);
        done += 1;
        tally.kills += 1;
        tally.inside += u64::from(inside);
        println!(
            "kill {:>3}: {} at step {:>3}, {}, had resumed from {} and lost {lost} steps",
            tally.kills,
            model.name(),
            running.step.max(wanted),
            if inside { "inside a checkpoint write" } else { "between writes" },
            running.from.map_or("nothing yet".to_string(), |s| format!("step {s}")),
        );
    }
    let wanted = newest(run);
    let mut running = Running::start(model, run, 0)?;
    let finished = running.wait_for("finished ");
    running.drain();
    ensure!(finished, "the run did not finish after {done} kills");
    check_start(&running, wanted, before, every)?;
    same(expected, run)?;
    tally.exact += done;
    Ok(())
}

fn signals(model: Model, scratch: &Path, expected: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    for (name, code) in [("TERM", 143), ("INT", 130)] {
        let run = scratch.join(format!("{}-{name}", model.name()));
        let mut running = Running::start(model, &run, SLOW)?;
        ensure!(running.wait_for("step 13"), "the child did not reach step 13");
        let at = Instant::now();
        running.signal(name)?;
        let status = running.process.wait()?;
        let took = at.elapsed();
        running.drain();
        ensure!(status.code() == Some(code), "SIG{name}: {status}; expected exit code {code}");
        ensure!(took < Duration::from_secs(2), "SIG{name}: took {took:?}");
        ensure!(
            newest(&run) == running.step,
            "SIG{name}: stopped after step {} and saved step {}",
            running.step,
            newest(&run)
        );
        let stopped = running.step;
        let mut resumed = Running::start(model, &run, 0)?;
        ensure!(resumed.wait_for("finished "), "the run did not finish after SIG{name}");
        resumed.drain();
        check_start(&resumed, stopped, stopped, 0)?;
        same(expected, &run)?;
        let ms = took.as_millis();
        println!("SIG{name}: saved step {stopped} and ended with {code} in {ms} ms, bit-exact");
    }
    Ok(())
}

fn second_writer(model: Model, scratch: &Path) -> Result<()> {
    let run = scratch.join("two-writers");
    let mut first = Running::start(model, &run, SLOW)?;
    ensure!(first.wait_for("step "), "the first writer did not start");
    let mut second = Running::start(model, &run, 0)?;
    let line = second.line(Duration::from_secs(10)).context("the second writer said nothing")?;
    let owner = format!("in use by process {}", first.process.id());
    ensure!(line.starts_with("refused after ") && line.contains(&owner), "second writer: {line}");
    let ms: u64 = line.split(' ').nth(2).and_then(|n| n.parse().ok()).context("no time")?;
    ensure!(ms < 100, "the second writer was refused only after {ms} ms");
    ensure!(second.process.wait()?.code() == Some(1), "the second writer did not fail");
    ensure!(first.process.try_wait()?.is_none(), "the first writer ended");
    println!("second writer: refused after {ms} ms, naming process {}", first.process.id());
    Ok(())
}

/// A folder that goes when the program ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("diffusion-crash-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left lies in the system's folder for temporary files.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn parent(args: &Args) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut tally = Tally { kills: 0, exact: 0, inside: 0 };
    let models = [Model::Mlp, Model::Unet];
    let expected =
        [reference(models[0], &scratch.0)?, reference(models[1], &scratch.0)?];
    let mut round = 0;
    while tally.kills < args.kills {
        let which = round as usize % 2;
        let run = scratch.0.join(format!("run-{round}"));
        let plan = Key::new(args.seed, stream::TEST).item(round);
        let kills = KILLS_PER_RUN.min(args.kills - tally.kills);
        let before = (tally.kills, tally.inside);
        one_run(models[which], &run, plan, kills, &expected[which], &mut tally).with_context(
            || format!("run {round} ({}), after kill {}", models[which].name(), tally_text(before)),
        )?;
        fs::remove_dir_all(&run)?;
        round += 1;
        ensure!(round < 10 * args.kills + 10, "the children end before they can be killed");
    }
    signals(Model::Mlp, &scratch.0, &expected[0])?;
    second_writer(Model::Mlp, &scratch.0)?;
    println!(
        "crash: {} kills, {} bit-exact, {} inside a write",
        tally.kills, tally.exact, tally.inside
    );
    ensure!(tally.exact == tally.kills, "not all runs were bit-exact");
    ensure!(tally.inside * 3 >= tally.kills, "fewer than a third of the kills were inside a write");
    Ok(())
}

fn tally_text((kills, inside): (u64, u64)) -> String {
    format!("{kills} ({inside} inside a write)")
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = if args.child { child(&args) } else { parent(&args).map(|()| ExitCode::SUCCESS) };
    result.unwrap_or_else(|error| {
        eprintln!("crash: {error:#}");
        ExitCode::FAILURE
    })
}
