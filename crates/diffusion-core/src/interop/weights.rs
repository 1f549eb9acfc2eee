//! Weights as diffusers and PyTorch save them: safetensors, whole or in shards, and pickles.
//!
//! | preference | file of the stem `S` | what |
//! |---|---|---|
//! | 1 | `S.safetensors` | everything in one file |
//! | 2 | `S.safetensors.index.json` | the names of the tensors of several files |
//! | 3 | `S.fp16.safetensors` | half precision |
//! | 4 | `S.safetensors.index.fp16.json` | half precision in several files |
//! | 5 | `S.bin` | a pickled state dict ([`super::pickle`]) |
//! | 6 | `S.bin.index.json` | the names of the tensors of several pickles |
//! | 7 | `S.fp16.bin` | a pickled state dict in half precision |
//! | 8 | `S.bin.index.fp16.json` | half precision in several pickles |
//!
//! Where several exist the first wins: formats that can only hold tensors before pickles, and in each
//! full precision before half.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde::Deserialize;

use super::pickle::read_pickle;
use crate::checkpoint::read_safetensors;
use crate::error::{Report, Result};
use crate::limits::Limits;

type Reader = fn(&Path, &Limits) -> Result<BTreeMap<String, Tensor>>;

/// The weights in a folder, by name, on the CPU; half precision becomes f32.
///
/// `stem` is the file name without its endings: `diffusion_pytorch_model` for networks of
/// diffusers.
///
/// # Errors
/// `Input` when there is no weight file, when one is malformed, or when an index and its shards
/// contradict each other; `Limit` above `limits`; `Io` when a file cannot be read. Each names the
/// file.
pub fn load_weights(
    folder: &Path,
    stem: &str,
    limits: &Limits,
) -> Result<BTreeMap<String, Tensor>> {
    let file = |ending: &str| -> PathBuf { folder.join(format!("{stem}{ending}")) };
    let endings: [(&str, Reader); 8] = [
        (".safetensors", read_safetensors),
        (".safetensors.index.json", read_sharded),
        (".fp16.safetensors", read_safetensors),
        (".safetensors.index.fp16.json", read_sharded),
        (".bin", read_pickle),
        (".bin.index.json", read_sharded),
        (".fp16.bin", read_pickle),
        (".bin.index.fp16.json", read_sharded),
    ];
    for (ending, read) in endings {
        let path = file(ending);
        if path.exists() {
            let tensors = read(&path, limits)?;
            if tensors.is_empty() {
                return Err(Report::file(&path, "no tensor")
                    .expected("the weights of a network")
                    .remedy("save the model again")
                    .input());
            }
            return widened(tensors);
        }
    }
    Err(Report::file(folder, format!("no weight file {stem}.*"))
        .expected(format!(
            "{stem}.safetensors, {stem}.safetensors.index.json, {stem}.fp16.safetensors or {stem}.bin"
        ))
        .remedy("check that the download of the model is complete")
        .input())
}

/// The tensors of one file, told by its ending: `.safetensors`, an index `.json`, or a pickle
/// (`.bin`, `.pth`, `.pt`, `.ckpt`); half precision becomes f32.
///
/// # Errors
/// As [`load_weights`]; `Unsupported` for another ending.
pub fn load_weight_file(path: &Path, limits: &Limits) -> Result<BTreeMap<String, Tensor>> {
    let ending = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default();
    widened(match ending {
        "safetensors" => read_safetensors(path, limits)?,
        "json" => read_sharded(path, limits)?,
        "bin" | "pth" | "pt" | "ckpt" => read_pickle(path, limits)?,
        other => {
            return Err(Report::file(path, format!("the ending {other:?}"))
                .expected(".safetensors, .json (an index), .bin, .pth, .pt or .ckpt")
                .unsupported());
        }
    })
}

fn widened(tensors: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    tensors
        .into_iter()
        .map(|(name, tensor)| {
            let tensor = match tensor.dtype() {
                DType::F16 | DType::BF16 => tensor.to_dtype(DType::F32)?,
                _ => tensor,
            };
            Ok((name, tensor))
        })
        .collect()
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Every tensor that an index lists, from the shards beside it.
fn read_sharded(path: &Path, limits: &Limits) -> Result<BTreeMap<String, Tensor>> {
    let text = limits.read_text(path)?;
    let mut reader = serde_json::Deserializer::from_str(&text);
    let index: Index = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        Report::file(path, format!("{}: {}", error.path(), error.inner()))
            .expected("an index with a `weight_map` from tensor names to file names")
            .remedy("download the index again")
            .input()
    })?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let shards: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    let mut out = BTreeMap::new();
    for shard in shards {
        check_shard_name(path, shard)?;
        let file = folder.join(shard);
        if !file.exists() {
            return Err(Report::file(&file, "no such file")
                .expected(format!("the shard that {} lists", path.display()))
                .remedy("check that the download of the model is complete")
                .input());
        }
        let read: Reader = match shard.ends_with(".bin") {
            true => read_pickle,
            false => read_safetensors,
        };
        for (name, tensor) in read(&file, limits)? {
            match index.weight_map.get(&name) {
                Some(place) if place == shard => {
                    out.insert(name, tensor);
                }
                place => {
                    let found = match place {
                        Some(place) => {
                            format!("tensor `{name}`, which the index places in {place}")
                        }
                        None => format!("tensor `{name}`, which the index does not list"),
                    };
                    return Err(Report::file(&file, found)
                        .expected("only the tensors that the index places in this file")
                        .remedy("the files belong to different models: download them together")
                        .input());
                }
            }
        }
    }
    let missing: Vec<&str> = index
        .weight_map
        .keys()
        .filter(|name| !out.contains_key(*name))
        .map(String::as_str)
        .collect();
    if let Some(first) = missing.first() {
        return Err(Report::file(
            path,
            format!(
                "{} tensors that no shard holds, the first is `{first}`",
                missing.len()
            ),
        )
        .expected("every listed tensor in its shard")
        .remedy("the files belong to different models: download them together")
        .input());
    }
    Ok(out)
}

/// A shard lies beside its index: a name that leads elsewhere would let an index read any file.
fn check_shard_name(index: &Path, name: &str) -> Result<()> {
    let plain = !name.is_empty()
        && !name.contains(['/', '\\', '\0', ':'])
        && !name.contains("..")
        && (name.ends_with(".safetensors") || name.ends_with(".bin"));
    if plain {
        return Ok(());
    }
    Err(Report::file(index, format!("the shard name {name:?}"))
        .expected(
            "a plain file name that ends in .safetensors or .bin, without folders and without `..`",
        )
        .remedy("do not use this file: its author is either careless or hostile")
        .input())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::write_safetensors_atomic;
    use crate::error::Error;
    use candle_core::Device;
    use std::fs;

    const STEM: &str = "diffusion_pytorch_model";

    fn save(path: &Path, entries: &[(&str, &[f32])], dtype: DType) {
        let tensors = entries
            .iter()
            .map(|(name, values)| {
                let tensor = Tensor::new(*values, &Device::Cpu).unwrap();
                (name.to_string(), tensor.to_dtype(dtype).unwrap())
            })
            .collect();
        write_safetensors_atomic(path, &tensors, &BTreeMap::new()).unwrap();
    }

    fn load(folder: &Path) -> Result<BTreeMap<String, Tensor>> {
        load_weights(folder, STEM, &Limits::default())
    }

    fn message(folder: &Path) -> String {
        let error = load(folder).unwrap_err();
        assert!(matches!(error, Error::Input(_)), "{error}");
        error.to_string()
    }

    fn index(folder: &Path, map: &[(&str, &str)]) {
        let map: BTreeMap<_, _> = map.iter().copied().collect();
        let text = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
        fs::write(folder.join(format!("{STEM}.safetensors.index.json")), text).unwrap();
    }

    #[test]
    fn full_precision_wins_and_half_becomes_single() {
        let dir = tempfile::tempdir().unwrap();
        let half = dir.path().join(format!("{STEM}.fp16.safetensors"));
        save(&half, &[("a", &[0.1])], DType::F16);
        let loaded = load(dir.path()).unwrap();
        assert_eq!(loaded["a"].dtype(), DType::F32);
        assert_eq!(
            loaded["a"].to_vec1::<f32>().unwrap(),
            [half::f16::from_f32(0.1).to_f32()]
        );
        save(
            &dir.path().join(format!("{STEM}.safetensors")),
            &[("a", &[0.1])],
            DType::F32,
        );
        assert_eq!(
            load(dir.path()).unwrap()["a"].to_vec1::<f32>().unwrap(),
            [0.1]
        );
        save(&half, &[("a", &[0.5])], DType::BF16);
        let one = load_weight_file(&half, &Limits::default()).unwrap();
        assert_eq!(one["a"].to_vec1::<f32>().unwrap(), [0.5]);
    }

    #[test]
    fn shards_are_put_together_and_checked_against_the_index() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (
            "m-00001-of-00002.safetensors",
            "m-00002-of-00002.safetensors",
        );
        save(&dir.path().join(one), &[("a", &[1.0])], DType::F32);
        save(
            &dir.path().join(two),
            &[("b", &[2.0]), ("c", &[3.0])],
            DType::F32,
        );
        index(dir.path(), &[("a", one), ("b", two), ("c", two)]);
        let names: Vec<String> = load(dir.path()).unwrap().into_keys().collect();
        assert_eq!(names, ["a", "b", "c"]);
        index(
            dir.path(),
            &[("a", one), ("b", two), ("c", two), ("d", two)],
        );
        assert!(message(dir.path()).contains("`d`"));
        index(dir.path(), &[("a", one), ("b", two)]);
        assert!(message(dir.path()).contains("`c`"));
        index(dir.path(), &[("a", two), ("b", two), ("c", two)]);
        assert!(message(dir.path()).contains("`a`"));
        index(dir.path(), &[("a", "gone.safetensors")]);
        assert!(message(dir.path()).contains("gone.safetensors"));
    }

    #[test]
    fn an_index_cannot_lead_out_of_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("unet");
        fs::create_dir(&inner).unwrap();
        save(
            &dir.path().join("x.safetensors"),
            &[("a", &[1.0])],
            DType::F32,
        );
        let absolute = dir.path().join("x.safetensors");
        for name in [
            "../x.safetensors",
            absolute.to_str().unwrap(),
            "",
            "x.pkl",
            "s/x.safetensors",
        ] {
            index(&inner, &[("a", name)]);
            assert!(message(&inner).contains("plain file name"), "{name}");
        }
    }

    #[test]
    fn a_folder_without_weights_says_what_it_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        assert!(message(dir.path()).contains("diffusion_pytorch_model.safetensors"));
        fs::write(
            dir.path().join(format!("{STEM}.safetensors.index.json")),
            "{}",
        )
        .unwrap();
        assert!(message(dir.path()).contains("weight_map"));
        fs::remove_file(dir.path().join(format!("{STEM}.safetensors.index.json"))).unwrap();
        fs::write(dir.path().join(format!("{STEM}.bin")), "<html>404</html>").unwrap();
        assert!(message(dir.path()).contains("diffusion_pytorch_model.bin"));
    }
}
