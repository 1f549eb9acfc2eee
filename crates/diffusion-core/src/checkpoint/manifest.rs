//! The file that says what a checkpoint consists of, and by which it is judged.

use std::collections::BTreeMap;
use std::io::Read;

use serde::{Deserialize, Serialize};

/// The only format so far.
const FORMAT: u32 = 1;

/// What `MANIFEST.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    format: u32,
    pub step: u64,
    /// The shortest decimal that reads back as the same number; JSON numbers need not.
    score: Option<String>,
    pub files: BTreeMap<String, FileSeal>,
    /// Digest of all above, so that the manifest vouches for itself.
    #[serde(default)]
    seal: String,
}

/// Length and digest of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileSeal {
    pub bytes: u64,
    pub blake3: String,
}

impl Manifest {
    pub fn new(step: u64, score: Option<f64>, files: BTreeMap<String, FileSeal>) -> Self {
        let score = score.map(|s| format!("{s:?}"));
        Self {
            format: FORMAT,
            step,
            score,
            files,
            seal: String::new(),
        }
    }

    pub fn score(&self) -> Option<f64> {
        self.score.as_ref()?.parse().ok()
    }

    /// The bytes of the file, the seal included.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let json = |m: &Self| serde_json::to_vec_pretty(m).map_err(|e| e.to_string());
        let bare = Self {
            seal: String::new(),
            ..self.clone()
        };
        let seal = blake3::hash(&json(&bare)?).to_hex().to_string();
        json(&Self { seal, ..bare })
    }

    /// Accepts only what [`Manifest::to_bytes`] writes, byte for byte.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if manifest.format != FORMAT {
            return Err(format!("format {}; expected {FORMAT}", manifest.format));
        }
        if manifest.to_bytes()? != bytes {
            return Err("does not match its own seal".into());
        }
        Ok(manifest)
    }
}

/// The digest and length of everything that `reader` gives.
pub(super) fn digest(reader: &mut dyn Read) -> std::io::Result<FileSeal> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => {
                return Ok(FileSeal {
                    bytes,
                    blake3: hasher.finalize().to_hex().to_string(),
                });
            }
            Ok(n) => {
                bytes += n as u64;
                hasher.update(&buffer[..n]);
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row H2 of the table of promises: every byte, every value.
    #[test]
    fn no_changed_byte_of_a_manifest_is_accepted() {
        let seal = |n| FileSeal {
            bytes: n,
            blake3: blake3::hash(&[n as u8]).to_hex().to_string(),
        };
        let files = [("params.safetensors", 164), ("state.json", 13)];
        let files = files.map(|(name, n)| (name.to_string(), seal(n)));
        let manifest = Manifest::new(12, Some(0.25), BTreeMap::from(files));
        let sound = manifest.to_bytes().unwrap();
        assert_eq!(Manifest::parse(&sound).unwrap().step, 12);
        let mut changed = sound.clone();
        for at in 0..sound.len() {
            for value in (0..=255).filter(|v| *v != sound[at]) {
                changed[at] = value;
                let accepted = Manifest::parse(&changed).is_ok();
                assert!(!accepted, "byte {at} = {value}");
            }
            changed[at] = sound[at];
        }
        println!("{} changed manifests, all refused", 255 * sound.len());
    }
}
