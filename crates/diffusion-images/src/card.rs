//! The README of a model folder: what it is, what it learned from, how to use it.

use crate::config::ImageConfig;
use crate::data::Dataset;
use diffusion_core::Result;
use diffusion_core::checkpoint::write_atomic;
use std::fmt::Write;
use std::path::Path;

/// Writes `README.md` beside a model, in the form that model hubs read: a table of facts between
/// two lines of dashes, then text. A file that somebody has changed by hand is left alone.
///
/// # Errors
/// `Io` when the file cannot be written.
pub fn write(model: &Path, config: &ImageConfig, data: &Dataset, steps_done: u64) -> Result<()> {
    let file = model.join("README.md");
    if std::fs::read_to_string(&file).is_ok_and(|text| !text.contains(MARK)) {
        return Ok(());
    }
    write_atomic(&file, text(model, config, data, steps_done).as_bytes())
}

/// Tells a card that was written here.
const MARK: &str = "<!-- written by diffusion; remove this line to keep your changes -->";

fn text(model: &Path, config: &ImageConfig, data: &Dataset, steps_done: u64) -> String {
    let name = model.file_name().unwrap_or_default().to_string_lossy();
    let mut card = String::from(
        "---\nlibrary_name: diffusers\npipeline_tag: unconditional-image-generation\n",
    );
    card += "tags:\n- diffusion\n- ddpm\n---\n\n";
    // Writing to a string cannot fail.
    let _ = write!(card, "# {name}\n\n{MARK}\n\n");
    let (c, h, w) = (data.channels(), data.height(), data.width());
    let _ = writeln!(
        card,
        "A diffusion model of images of {h} x {w} pixels and {c} channel{}.\n",
        if c == 1 { "" } else { "s" }
    );
    let train = &config.train;
    // A path says more about a machine than about the data.
    let source = Path::new(data.name()).file_name();
    let source = source.map_or(data.name().into(), |name| name.to_string_lossy());
    let rows = [
        ("data", format!("{source}, {} training images", data.len())),
        (
            "classes",
            match (config.conditional, data.classes()) {
                (true, names) if !names.is_empty() => names.join(", "),
                _ => "none (unconditional)".to_string(),
            },
        ),
        (
            "network",
            format!("UNet, {:?} channels", config.network.block_out_channels),
        ),
        ("process", format!("{} steps", config.process.steps)),
        (
            "training",
            format!(
                "{steps_done} of {} steps of {} images, learning rate {}, seed {}",
                train.steps,
                train.batch_size * train.accumulate,
                train.lr,
                train.seed
            ),
        ),
    ];
    card += "| | |\n|---|---|\n";
    for (what, value) in rows {
        // A bar would end the cell.
        let _ = writeln!(card, "| {what} | {} |", value.replace('|', "\\|"));
    }
    card += "\nMake images:\n\n```sh\n";
    let _ = writeln!(
        card,
        "diffusion images sample --model {name} -n 64 --out grid.png"
    );
    card += "```\n\n```python\n";
    match config.network.num_class_embeds {
        None => {
            card += "from diffusers import DDPMPipeline\n";
            let _ = writeln!(
                card,
                "DDPMPipeline.from_pretrained(\"{name}\")(batch_size=4).images[0]"
            );
        }
        Some(labels) => {
            let null = labels.saturating_sub(1);
            let _ = write!(
                card,
                "import torch\nfrom diffusers import DDPMScheduler, UNet2DModel\n\n\
                 unet = UNet2DModel.from_pretrained(\"{name}\", subfolder=\"unet\").eval()\n\
                 scheduler = DDPMScheduler.from_pretrained(\"{name}\", subfolder=\"scheduler\")\n\
                 scheduler.set_timesteps(250)\n\
                 labels = torch.full((4,), 0)  # 0 to {}: classes.json has their names; {null}: no class\n\
                 x = torch.randn(4, {c}, {h}, {w})\n\
                 with torch.inference_mode():\n    \
                     for t in scheduler.timesteps:\n        \
                         x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample\n",
                null.saturating_sub(1),
            );
        }
    }
    if config.network.num_class_embeds.is_some() {
        let _ = write!(
            card,
            "```\n\n`DDPMPipeline` cannot pass a class. One class, or none, can be built into a model that it runs:\n\n\
             ```sh\ndiffusion convert {name} {name}-one --class none\n"
        );
    }
    card += "```\n\nThe licence of the data decides what may be done with the model; it is not known here.\n";
    card
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{data, preset};

    #[test]
    fn a_card_says_what_the_model_is_and_leaves_changed_ones_alone() {
        let digits = data::splits("digits", &data::Options::default())
            .unwrap()
            .train;
        let config = preset::preset("tiny", &digits).unwrap();
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &config, &digits, 7).unwrap();
        let file = folder.path().join("README.md");
        let text = std::fs::read_to_string(&file).unwrap();
        for part in [
            "---\nlibrary_name: diffusers",
            "8 x 8",
            "7 of 200 steps",
            "0, 1, 2",
        ] {
            assert!(text.contains(part), "no `{part}` in {text}");
        }
        assert!(text.contains("class_labels=labels") && text.contains("10: no class"));
        let mut plain = config.clone();
        plain.network.num_class_embeds = None;
        let plain = super::text(folder.path(), &plain, &digits, 7);
        assert!(plain.contains("DDPMPipeline.from_pretrained") && !plain.contains("class_labels"));
        write(folder.path(), &config, &digits, 9).unwrap();
        assert!(
            std::fs::read_to_string(&file)
                .unwrap()
                .contains("9 of 200 steps")
        );
        std::fs::write(&file, "mine").unwrap();
        write(folder.path(), &config, &digits, 11).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
    }
}
