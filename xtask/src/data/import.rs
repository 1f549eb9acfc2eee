//! `cargo xtask data import`: whole data sets that the user has, checked against published hashes.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::{GzDecoder, MultiGzDecoder};
use sha2::{Digest, Sha256};

use super::hex;
use crate::shell;

/// Check a whole data set against the published hashes and copy it to where `--data` finds it.
///
/// NAME is mnist, fashion-mnist or cifar-10. PATH is a folder with the original files: for the first
/// two train-images-idx3-ubyte.gz and its three companions, gzipped or not; for the last
/// cifar-10-binary.tar.gz. Nothing is copied unless every file is right.
///
/// Example:
///   cargo xtask data import mnist ~/Downloads
///   diffusion images train --data target/data/mnist --out mnist-model
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// mnist, fashion-mnist or cifar-10.
    name: String,
    /// Where the original files are.
    path: PathBuf,
    /// The folder to make; target/data/NAME when absent.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// One original file.
struct Original {
    /// Its name without `.gz`.
    name: &'static str,
    /// Its unpacked length.
    bytes: u64,
    /// SHA-256 of the file as it was published.
    packed: &'static str,
    /// SHA-256 of what is in it, where it is known: files that were packed anew are right, too.
    content: Option<&'static str>,
}

/// Files of one data set.
enum Set {
    /// Files that are packed one by one.
    Files(&'static [Original]),
    /// Files of an archive: of these the names that are unpacked, and the length of each batch.
    Archive(&'static Original, &'static [&'static str], u64),
}

const SETS: [(&str, Set); 3] = [
    ("mnist", Set::Files(&MNIST)),
    ("fashion-mnist", Set::Files(&FASHION)),
    ("cifar-10", Set::Archive(&CIFAR, &CIFAR_FILES, 30_730_000)),
];

const MNIST: [Original; 4] = [
    Original {
        name: "train-images-idx3-ubyte",
        bytes: 47_040_016,
        packed: "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        content: Some("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    },
    Original {
        name: "train-labels-idx1-ubyte",
        bytes: 60_008,
        packed: "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        content: Some("65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    },
    Original {
        name: "t10k-images-idx3-ubyte",
        bytes: 7_840_016,
        packed: "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        content: Some("0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    },
    Original {
        name: "t10k-labels-idx1-ubyte",
        bytes: 10_008,
        packed: "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        content: Some("ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    },
];

const FASHION: [Original; 4] = [
    Original {
        name: "train-images-idx3-ubyte",
        bytes: 47_040_016,
        packed: "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        content: None,
    },
    Original {
        name: "train-labels-idx1-ubyte",
        bytes: 60_008,
        packed: "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        content: None,
    },
    Original {
        name: "t10k-images-idx3-ubyte",
        bytes: 7_840_016,
        packed: "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        content: Some("5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    },
    Original {
        name: "t10k-labels-idx1-ubyte",
        bytes: 10_008,
        packed: "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        content: Some("0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    },
];

const CIFAR: Original = Original {
    name: "cifar-10-binary.tar",
    bytes: 184_386_560,
    packed: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    content: None,
};

const CIFAR_FILES: [&str; 7] = [
    "batches.meta.txt",
    "data_batch_1.bin",
    "data_batch_2.bin",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "data_batch_5.bin",
    "test_batch.bin",
];

/// Checks and copies.
pub fn run(args: &Args) -> Result<ExitCode> {
    let Some((name, set)) = SETS.iter().find(|(name, _)| *name == args.name) else {
        let names = SETS.map(|(name, _)| name).join(", ");
        bail!("{}: no known data set; expected one of {names}", args.name);
    };
    let out = match &args.out {
        Some(out) => out.clone(),
        None => shell::target(&shell::root()?).join("data").join(name),
    };
    import(set, &args.path, &out)?;
    println!("{}: every file is the published one", out.display());
    println!(
        "next: diffusion images train --data {} --out {name}-model",
        out.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// Makes the folder `out`, or nothing.
fn import(set: &Set, from: &Path, out: &Path) -> Result<()> {
    ensure!(
        !out.exists(),
        "{}: exists already; remove it first, or choose another folder with --out",
        out.display()
    );
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    // Removed again unless it gets its name at the end.
    let folder = tempfile::Builder::new()
        .prefix(".import-")
        .tempdir_in(parent)
        .with_context(|| parent.display().to_string())?;
    match set {
        Set::Files(originals) => {
            for original in *originals {
                let file = find(from, original)?;
                let bytes = checked(&file, original)?;
                write(folder.path(), file.file_name().unwrap_or_default(), &bytes)?;
            }
        }
        Set::Archive(original, names, batch) => {
            let file = if from.is_file() {
                from.to_path_buf()
            } else {
                find(from, original)?
            };
            unpack(&file, original, names, *batch, folder.path())?;
        }
    }
    readable(folder.path())?;
    let made = folder.keep();
    std::fs::rename(&made, out).with_context(|| {
        let _ = std::fs::remove_dir_all(&made);
        out.display().to_string()
    })
}

/// Temporary folders are private; this one becomes the user's.
fn readable(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let all = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder, all).with_context(|| folder.display().to_string())?;
    }
    let _ = folder;
    Ok(())
}

fn write(folder: &Path, name: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    let mut file = File::create(&path).with_context(|| path.display().to_string())?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .with_context(|| path.display().to_string())
}

/// The file in the folder, gzipped or not.
fn find(folder: &Path, original: &Original) -> Result<PathBuf> {
    let packed = format!("{}.gz", original.name);
    [&packed, original.name]
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "{}: no {packed}; give the folder that holds the original files",
                folder.display()
            )
        })
}

/// The bytes of a file, as they are, if they are the published ones or hold the published content.
fn checked(path: &Path, original: &Original) -> Result<Vec<u8>> {
    let bytes = read(path, original)?;
    let found = super::sha256(&bytes);
    if found == original.packed {
        return Ok(bytes);
    }
    let content = if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut content = Vec::new();
        // A byte more than there should be tells that there are too many.
        MultiGzDecoder::new(&bytes[..])
            .take(original.bytes + 1)
            .read_to_end(&mut content)
            .with_context(|| format!("{}: a damaged gzip file", path.display()))?;
        super::sha256(&content)
    } else {
        found.clone()
    };
    match original.content {
        Some(expected) if expected == content => Ok(bytes),
        Some(expected) => bail!(
            "{}: the content has sha256 {content}; expected {expected} (download the file again)",
            path.display()
        ),
        None => bail!(
            "{}: sha256 {found}; expected {} of {}.gz as it was published, which alone can be \
             checked (download the file again)",
            path.display(),
            original.packed,
            original.name
        ),
    }
}

/// A file that is no longer than the original can be.
fn read(path: &Path, original: &Original) -> Result<Vec<u8>> {
    let named = || path.display().to_string();
    let length = std::fs::metadata(path).with_context(named)?.len();
    // What does not shrink grows a little by packing.
    let most = original.bytes + original.bytes / 100 + 1024;
    ensure!(
        length <= most,
        "{}: {length} bytes; expected at most {most} (is it another file?)",
        path.display()
    );
    std::fs::read(path).with_context(named)
}

/// Unpacks the named files of an archive, which are looked for in any of its folders.
fn unpack(
    path: &Path,
    original: &Original,
    names: &[&str],
    batch: u64,
    folder: &Path,
) -> Result<()> {
    let named = || path.display().to_string();
    let found = hash_file(path)?;
    ensure!(
        found == original.packed,
        "{}: sha256 {found}; expected {} of {}.gz as it was published (download the file again)",
        path.display(),
        original.packed,
        original.name
    );
    let file = File::open(path).with_context(named)?;
    let mut archive = tar::Archive::new(GzDecoder::new(std::io::BufReader::new(file)));
    let mut missing = names.to_vec();
    for entry in archive.entries().with_context(named)? {
        let mut entry = entry.with_context(named)?;
        let inside = entry.path().with_context(named)?.into_owned();
        let Some(place) = missing.iter().position(|name| inside.ends_with(name)) else {
            continue;
        };
        let name = missing.swap_remove(place);
        let length = entry.size();
        ensure!(
            length == batch || !name.ends_with(".bin") && length < 4096,
            "{}: {name} has {length} bytes; expected {batch}",
            path.display()
        );
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).with_context(named)?;
        write(folder, name, &bytes)?;
    }
    ensure!(
        missing.is_empty(),
        "{}: no {} inside",
        path.display(),
        missing.join(", ")
    );
    Ok(())
}

fn hash_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file
            .read(&mut buffer)
            .with_context(|| path.display().to_string())?;
        if read == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..read]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::sha256;

    fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
        let level = flate2::Compression::new(level);
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), level);
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    fn leak(text: String) -> &'static str {
        Box::leak(text.into_boxed_str())
    }

    /// An original with this content.
    fn original(name: &'static str, content: &[u8], known: bool) -> Original {
        Original {
            name,
            bytes: content.len() as u64,
            packed: leak(sha256(&gzip(content, 9))),
            content: known.then(|| leak(sha256(content))),
        }
    }

    #[test]
    fn right_files_are_copied_and_wrong_ones_named() {
        let folder = tempfile::tempdir().unwrap();
        let (from, out) = (folder.path().join("from"), folder.path().join("out/set"));
        std::fs::create_dir(&from).unwrap();
        let text = b"images images images images";
        let set = Set::Files(Box::leak(Box::new([
            original("images", text, true),
            original("labels", b"labels", false),
        ])));
        let put = |name: &str, bytes: &[u8]| std::fs::write(from.join(name), bytes).unwrap();
        let fails = |clues: &[&str]| {
            let message = format!("{:#}", import(&set, &from, &out).unwrap_err());
            for clue in clues {
                assert!(message.contains(clue), "no {clue:?} in: {message}");
            }
            // Nothing is left behind.
            let left = |path: &Path| std::fs::read_dir(path).map_or(0, Iterator::count);
            assert_eq!(left(&folder.path().join("out")), 0);
        };
        fails(&["from: no images.gz"]);
        put("images.gz", &gzip(text, 9));
        fails(&["no labels.gz"]);
        put("labels", b"labels");
        fails(&["labels: sha256", "expected", "as it was published"]);
        put("labels.gz", &gzip(b"lables", 9));
        fails(&["labels.gz: sha256"]);
        put("labels.gz", &gzip(b"labels", 9));
        put("images.gz", &gzip(b"images images images image5", 9));
        fails(&["images.gz: the content has sha256", &sha256(text)]);
        put("images.gz", &gzip(&[7; 100_000], 9));
        fails(&["images.gz: the content"]);
        put("images.gz", &[7; 5000]);
        fails(&["images.gz: 5000 bytes"]);
        put("images.gz", &gzip(text, 9)[..20]);
        fails(&["images.gz: a damaged gzip file"]);
        // Packed anew, with the same content.
        let stored = gzip(text, 0);
        put("images.gz", &stored);
        import(&set, &from, &out).unwrap();
        assert_eq!(std::fs::read(out.join("images.gz")).unwrap(), stored);
        assert!(out.join("labels.gz").is_file());
        let again = import(&set, &from, &out).unwrap_err().to_string();
        assert!(again.contains("exists already"), "{again}");
        // Not packed at all.
        std::fs::remove_file(from.join("images.gz")).unwrap();
        put("images", text);
        import(&set, &from, &folder.path().join("plain")).unwrap();
    }

    #[test]
    fn an_archive_is_unpacked_flat() {
        let folder = tempfile::tempdir().unwrap();
        let archive = |names: &[&str]| {
            let mut tar = tar::Builder::new(Vec::new());
            for name in names {
                let mut header = tar::Header::new_gnu();
                header.set_size(4);
                header.set_mode(0o644);
                tar.append_data(&mut header, format!("set/{name}"), &b"1234"[..])
                    .unwrap();
            }
            tar.into_inner().unwrap()
        };
        let attempt = |bytes: &[u8], names: &'static [&'static str], batch| {
            let original = Box::leak(Box::new(original("set.tar", bytes, false)));
            std::fs::write(folder.path().join("set.tar.gz"), gzip(bytes, 9)).unwrap();
            let set = Set::Archive(original, names, batch);
            let out = folder.path().join("out");
            let result = import(&set, folder.path(), &out);
            if result.is_ok() {
                let mut names = Vec::new();
                for entry in std::fs::read_dir(&out).unwrap() {
                    names.push(entry.unwrap().file_name().into_string().unwrap());
                }
                names.sort();
                assert_eq!(names, ["a.bin", "meta.txt"]);
                std::fs::remove_dir_all(&out).unwrap();
            }
            result.map_err(|error| format!("{error:#}"))
        };
        let whole = archive(&["a.bin", "meta.txt", "more.html"]);
        let names = &["a.bin", "meta.txt"];
        attempt(&whole, names, 4).unwrap();
        let message = attempt(&whole, names, 5).unwrap_err();
        assert!(
            message.contains("a.bin has 4 bytes; expected 5"),
            "{message}"
        );
        let message = attempt(&archive(&["a.bin"]), names, 4).unwrap_err();
        assert!(message.contains("no meta.txt inside"), "{message}");
        std::fs::write(folder.path().join("set.tar.gz"), "other").unwrap();
        let set = Set::Archive(
            Box::leak(Box::new(original("set.tar", b"", false))),
            names,
            4,
        );
        let out = folder.path().join("out");
        let message = import(&set, folder.path(), &out).unwrap_err().to_string();
        assert!(message.contains("set.tar.gz: sha256"), "{message}");
    }
}
