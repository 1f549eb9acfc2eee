//! The IDX format of MNIST and Fashion-MNIST, gzipped or not.
//!
//! ```text
//! images: 00 00 08 03 | count | rows | columns | count·rows·columns bytes
//! labels: 00 00 08 01 | count | count bytes             (32-bit big-endian numbers)
//! ```
//!
//! Gzip is recognised by its first bytes, not by the file's name. A header's claim is compared
//! with the length of the file, or with what a gzip file of that length can hold, before memory
//! is taken; a gzip file that claims much is unpacked once to check it before it is kept.

use super::dataset::check_total;
use super::{Dataset, Labels, MAX_IMAGE_BYTES, MAX_SIDE, Pixels, input};
use diffusion_core::{Error, Report, Result};
use flate2::bufread::MultiGzDecoder;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// How much more a gzip file may unpack to than it is long, unless the result is small anyway.
const MAX_RATIO: u64 = 200;
/// What is read at a time.
const PIECE: u64 = 64 << 10;
/// A gzip file that claims more is unpacked twice, the first time to check it.
const MUCH: u64 = 32 << 20;

/// Images of an IDX file, with labels if the labels file lies beside it.
///
/// # Errors
/// Names the file and what is wrong with it: another format or type, a length that differs from
/// the header's, sizes over the limits, a damaged gzip stream, labels of another number.
pub fn read(path: &Path) -> Result<Dataset> {
    let beside = labels_companion(path);
    let labels = beside.as_deref().map(Idx::open).transpose()?;
    dataset(path.display().to_string(), Idx::open(path)?, labels)
}

/// Images and labels that are built into the program.
pub(super) fn from_bytes(
    name: &str,
    images: &'static [u8],
    labels: &'static [u8],
) -> Result<Dataset> {
    let images = Idx::new(Path::new("images"), images.len() as u64, images)?;
    let labels = Idx::new(Path::new("labels"), labels.len() as u64, labels)?;
    dataset(name.to_string(), images, Some(labels))
}

fn dataset(name: String, images: Idx, labels: Option<Idx>) -> Result<Dataset> {
    let ([count, rows, columns], values) = images.read::<3>()?;
    let labels = labels.map(|idx| read_labels(idx, count)).transpose()?;
    let shape = (1, rows as usize, columns as usize);
    Dataset::new(name, shape, Pixels::Levels { values, max: 255 }, labels)
}

fn read_labels(idx: Idx, images: u32) -> Result<Labels> {
    let path = idx.path;
    let ([count], values) = idx.read::<1>()?;
    if count != images {
        return Err(Report::file(path, format!("{count} labels"))
            .expected(format!("{images}, one for each image beside it"))
            .remedy("give the labels file that belongs to the images")
            .input());
    }
    let classes = values.iter().max().map_or(0, |&max| u32::from(max) + 1);
    Ok(Labels {
        values: values.into_iter().map(u32::from).collect(),
        classes: (0..classes).map(|class| class.to_string()).collect(),
    })
}

/// The training images of a folder that holds MNIST's files under their own names.
pub fn find(folder: &Path) -> Option<PathBuf> {
    ["train-images-idx3-ubyte", "train-images.idx3-ubyte"]
        .iter()
        .find_map(|name| beside(&folder.join(name), name))
}

/// The labels file beside an images file: `…images-idx3-ubyte…` to `…labels-idx1-ubyte…`.
pub fn labels_companion(images: &Path) -> Option<PathBuf> {
    let name = images.file_name()?.to_str()?;
    [
        ("images-idx3", "labels-idx1"),
        ("images.idx3", "labels.idx1"),
    ]
    .iter()
    .filter(|(from, _)| name.contains(from))
    .find_map(|(from, to)| beside(images, &name.replace(from, to)))
}

/// The test images beside `train-images-…`: `t10k-images-…` or `test-images-…`.
pub fn test_companion(images: &Path) -> Option<PathBuf> {
    let rest = images.file_name()?.to_str()?.strip_prefix("train-images")?;
    ["t10k-images", "test-images"]
        .iter()
        .find_map(|prefix| beside(images, &format!("{prefix}{rest}")))
}

/// The file `name` in the folder of `path`, gzipped or not.
fn beside(path: &Path, name: &str) -> Option<PathBuf> {
    let plain = name.strip_suffix(".gz").unwrap_or(name);
    [name.to_string(), plain.to_string(), format!("{plain}.gz")]
        .iter()
        .map(|name| path.with_file_name(name))
        .find(|file| file.is_file())
}

struct Idx<'a> {
    path: &'a Path,
    length: u64,
    gzip: bool,
    /// Whether `path` can be opened again.
    on_disk: bool,
    data: Box<dyn Read + 'a>,
}

impl<'a> Idx<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let length = input::check_regular(path)?;
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let idx = Self::new(path, length, BufReader::new(file))?;
        Ok(Self {
            on_disk: true,
            ..idx
        })
    }

    /// `length` bytes that `path` stands for in errors.
    fn new(path: &'a Path, length: u64, mut bytes: impl BufRead + 'a) -> Result<Self> {
        let gzip = bytes
            .fill_buf()
            .map_err(|e| Error::io(path, e))?
            .starts_with(&[0x1f, 0x8b]);
        let data: Box<dyn Read + 'a> = if gzip {
            Box::new(MultiGzDecoder::new(bytes))
        } else {
            Box::new(bytes)
        };
        Ok(Self {
            path,
            length,
            gzip,
            on_disk: false,
            data,
        })
    }

    /// The sizes in the header and exactly the bytes that they promise.
    fn read<const DIMS: usize>(mut self) -> Result<([u32; DIMS], Vec<u8>)> {
        let mut magic = [0; 4];
        self.fill(&mut magic, "the 4 bytes of the magic number")?;
        let expected = [0, 0, 8, DIMS as u8];
        if magic != expected {
            return Err(self.wrong_magic(magic, expected));
        }
        let mut sizes = [0u32; DIMS];
        for size in &mut sizes {
            let mut word = [0; 4];
            self.fill(&mut word, "the sizes in the header")?;
            *size = u32::from_be_bytes(word);
        }
        let claim = self.check_sizes(&sizes)?;
        let header = 4 + 4 * DIMS as u64;
        if self.gzip && self.on_disk && claim > MUCH {
            // Once without keeping it, so that memory is taken only for a sound file.
            let mut first = Self::open(self.path)?;
            first.fill(&mut vec![0; header as usize], "the header")?;
            first.body(claim, header, &mut |_| {})?;
        }
        let mut values: Vec<u8> = Vec::new();
        values
            .try_reserve_exact(claim as usize)
            .map_err(|_| input::out_of_memory(self.path, claim))?;
        self.body(claim, header, &mut |piece| values.extend_from_slice(piece))?;
        Ok((sizes, values))
    }

    fn check_sizes(&self, sizes: &[u32]) -> Result<u64> {
        let shape = sizes
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join("x");
        let report = Report::file(self.path, format!("a header that claims {shape} values"));
        if sizes.contains(&0) {
            return Err(report.expected("sizes of at least 1").remedy(AGAIN).input());
        }
        let image: u64 = sizes[1..].iter().map(|&s| u64::from(s)).product();
        if sizes[1..].iter().any(|&side| side > MAX_SIDE) || image > MAX_IMAGE_BYTES {
            return Err(report
                .expected(format!(
                    "images of at most {MAX_SIDE}x{MAX_SIDE} and {MAX_IMAGE_BYTES} bytes"
                ))
                .remedy("use smaller images")
                .limit());
        }
        let claim = image * u64::from(sizes[0]);
        let header = 4 + 4 * sizes.len() as u64;
        if self.gzip {
            if claim > MAX_IMAGE_BYTES && claim > MAX_RATIO * self.length {
                return Err(report
                    .expected(format!(
                        "at most {MAX_RATIO} bytes for each of the {} bytes of the gzip file",
                        self.length
                    ))
                    .remedy("unpack the file first if it is genuine")
                    .limit());
            }
        } else if claim + header != self.length {
            return Err(report
                .expected(format!(
                    "a file of {} bytes instead of {}",
                    claim + header,
                    self.length
                ))
                .remedy(AGAIN)
                .input());
        }
        check_total(&self.path.display().to_string(), claim)?;
        Ok(claim)
    }

    /// Gives exactly the bytes that the header claims to `keep`, piece by piece.
    fn body(mut self, claim: u64, header: u64, keep: &mut dyn FnMut(&[u8])) -> Result<()> {
        let mut buffer = vec![0; claim.min(PIECE) as usize];
        let mut left = claim;
        while left > 0 {
            let wanted = left.min(PIECE) as usize;
            let read = self.data.read(&mut buffer[..wanted]);
            let read = read.map_err(|e| self.broken(e))?;
            if read == 0 {
                let found = format!("the data ends after {} bytes", header + claim - left);
                return Err(Report::file(self.path, found)
                    .expected(format!("{} bytes as the header claims", claim + header))
                    .remedy(AGAIN)
                    .input());
            }
            keep(&buffer[..read]);
            left -= read as u64;
        }
        // The end must be read too: there gzip keeps its checksum.
        let mut beyond = [0; 1];
        match self.data.read(&mut beyond) {
            Ok(0) => Ok(()),
            Ok(_) => Err(Report::file(self.path, "more data than the header claims")
                .expected(format!("{} bytes", claim + header))
                .remedy(AGAIN)
                .input()),
            Err(error) => Err(self.broken(error)),
        }
    }

    fn fill(&mut self, buffer: &mut [u8], what: &str) -> Result<()> {
        self.data.read_exact(buffer).map_err(|error| {
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                let found = if self.length == 0 {
                    "an empty file"
                } else {
                    "the file ends early"
                };
                Report::file(self.path, found)
                    .expected(what)
                    .remedy(AGAIN)
                    .input()
            } else {
                self.broken(error)
            }
        })
    }

    fn broken(&self, error: std::io::Error) -> Error {
        use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
        match error.kind() {
            InvalidData | InvalidInput | UnexpectedEof if self.gzip => {
                Report::file(self.path, format!("a damaged gzip stream ({error})"))
                    .expected("a complete gzip file")
                    .remedy(AGAIN)
                    .input()
            }
            _ => Error::io(self.path, error),
        }
    }

    fn wrong_magic(&self, found: [u8; 4], expected: [u8; 4]) -> Error {
        let hex = |m: [u8; 4]| format!("{:02x} {:02x} {:02x} {:02x}", m[0], m[1], m[2], m[3]);
        let remedy = match found {
            [0, 0, 8, 1] => "this is a labels file: give the images file beside it",
            [0, 0, 8, 3] => "this is an images file: give it as the data, not as labels",
            [0x89, b'P', b'N', b'G'] | [0xff, 0xd8, ..] => {
                "this is a single picture: give the folder that holds it"
            }
            _ => "give an IDX file of bytes such as train-images-idx3-ubyte.gz, or a folder",
        };
        Report::file(self.path, format!("magic number {}", hex(found)))
            .expected(format!("{} (IDX)", hex(expected)))
            .remedy(remedy)
            .input()
    }
}

const AGAIN: &str = "download or copy the file again";
