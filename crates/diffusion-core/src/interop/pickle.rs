//! State dicts that PyTorch pickled (`.bin`, `.pth`), without running anything that is in them: zip
//! archives, and the form before version 1.6.
//!
//! A pickle is a program for a stack machine that may call any function. This reader knows the
//! instructions that build a dictionary of tensors and nothing else: a call outside a short list of
//! harmless constructors is an error, and what those make is an opaque value, never a tensor.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor, WithDType};
use half::{bf16, f16};

use super::archive::Archive;
use super::legacy::Legacy;
use super::unpickle::{Flaw, View, state_dict};
use crate::error::{Error, Report, Result};
use crate::limits::Limits;

/// The tensors of a state dict; one that lies under the key `state_dict` is found too.
///
/// # Errors
/// `Input` when torch.save did not write the file, it is damaged, or holds something else than tensors
/// by name; `Unsupported` for element types other than float, double, half, bfloat16, long, int,
/// byte and bool; `Limit` above `limits`; `Io` when it cannot be read.
pub fn read_pickle(path: &Path, limits: &Limits) -> Result<BTreeMap<String, Tensor>> {
    let (mut source, entries) = Source::open(path, limits)?;
    let mut entries: Vec<(String, View)> = entries.into_iter().collect();
    // Each storage is read once, whatever the names of the tensors in it.
    entries.sort_by(|a, b| (&a.1, &a.0).cmp(&(&b.1, &b.0)));
    // Views may overlap, but never be worth more than the whole file and a little.
    let mut left = source.len().saturating_add(SPARE);
    let mut out = BTreeMap::new();
    let mut storage: Option<(String, Vec<u8>)> = None;
    let mut last: Option<(View, Tensor)> = None;
    for (name, view) in entries {
        // Tied tensors are one tensor under several names.
        if let Some((same, tensor)) = &last
            && *same == view
        {
            out.insert(name, tensor.clone());
            continue;
        }
        let bytes = match storage.take() {
            Some((held, bytes)) if held == view.key => bytes,
            _ => source.read(&view.key, limits)?,
        };
        let tensor = tensor(path, &name, &view, &bytes, &mut left)?;
        storage = Some((view.key.clone(), bytes));
        out.insert(name, tensor.clone());
        last = Some((view, tensor));
    }
    Ok(out)
}

/// Where the numbers are.
enum Source {
    /// An archive, and what its members' names begin with.
    Archive(Archive, String),
    Legacy(Legacy),
}

impl Source {
    /// Opens a file of either form, with the named tensors that its pickle speaks of.
    fn open(path: &Path, limits: &Limits) -> Result<(Self, BTreeMap<String, View>)> {
        let flaw = |flaw| match flaw {
            Flaw::Wrong(what) => wrong(path, what),
            Flaw::TooMany(what, limit, field) => too_many(path, what, limit, field),
        };
        if Legacy::is_one(path)? {
            let (legacy, views) = Legacy::open(path, limits)?.map_err(flaw)?;
            return Ok((Self::Legacy(legacy), views));
        }
        let mut archive = Archive::open(path, limits)?;
        let program = archive
            .names()
            .find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"));
        let Some(program) = program.map(str::to_string) else {
            return Err(wrong(path, "an archive without data.pkl"));
        };
        let prefix = program.trim_end_matches("data.pkl").to_string();
        let order = format!("{prefix}byteorder");
        if archive.names().any(|name| name == order)
            && archive.read(&order, 16, "json_bytes")? != b"little"
        {
            return Err(Report::file(path, "big-endian data")
                .expected("little-endian data")
                .remedy("save the file again on a little-endian machine")
                .unsupported());
        }
        let bytes = archive.read(&program, limits.json_bytes, "json_bytes")?;
        let views = state_dict(&bytes, limits).map_err(flaw)?;
        Ok((Self::Archive(archive, prefix), views))
    }

    /// The bytes of the file.
    fn len(&self) -> u64 {
        match self {
            Self::Archive(archive, _) => archive.len(),
            Self::Legacy(legacy) => legacy.len(),
        }
    }

    /// The bytes of a storage.
    fn read(&mut self, key: &str, limits: &Limits) -> Result<Vec<u8>> {
        match self {
            Self::Archive(archive, prefix) => archive.read(
                &format!("{prefix}data/{key}"),
                limits.file_bytes,
                "file_bytes",
            ),
            Self::Legacy(legacy) => legacy.read(key),
        }
    }
}

/// By how much overlapping views may exceed the length of the file.
const SPARE: u64 = 16 << 20;

fn too_many(path: &Path, what: &str, limit: u64, field: &str) -> Error {
    Report::file(path, format!("more than {limit} {what}"))
        .expected(format!("at most {limit}"))
        .remedy(format!(
            "raise the limit `{field}` if the file is to be trusted"
        ))
        .limit()
}

fn tensor(path: &Path, name: &str, view: &View, bytes: &[u8], left: &mut u64) -> Result<Tensor> {
    match view.class.as_str() {
        "FloatStorage" => typed(path, name, view, bytes, left, f32::from_le_bytes),
        "DoubleStorage" => typed(path, name, view, bytes, left, f64::from_le_bytes),
        "HalfStorage" => typed(path, name, view, bytes, left, f16::from_le_bytes),
        "BFloat16Storage" => typed(path, name, view, bytes, left, bf16::from_le_bytes),
        "LongStorage" => typed(path, name, view, bytes, left, i64::from_le_bytes),
        "IntStorage" => typed(path, name, view, bytes, left, i32::from_le_bytes),
        "ByteStorage" | "BoolStorage" => typed(path, name, view, bytes, left, u8::from_le_bytes),
        other => Err(
            Report::new(format!("{}: tensor `{name}`", path.display()), other)
                .expected("float, double, half, bfloat16, long, int, byte or bool")
                .remedy("convert the file to one of these element types")
                .unsupported(),
        ),
    }
}

fn typed<T: WithDType, const N: usize>(
    path: &Path,
    name: &str,
    view: &View,
    bytes: &[u8],
    left: &mut u64,
    decode: fn([u8; N]) -> T,
) -> Result<Tensor> {
    let values = bytes.as_chunks::<N>().0;
    let bad = || {
        let at = format!("{}: tensor `{name}`", path.display());
        let View {
            offset,
            shape,
            stride,
            ..
        } = view;
        Report::new(
            at,
            format!("shape {shape:?}, stride {stride:?}, offset {offset}"),
        )
        .expected(format!(
            "a view of the {} elements of its storage",
            values.len()
        ))
        .remedy("the file is damaged: copy or download it again")
        .input()
    };
    // A product that overflows beside a zero is refused too: strides are products of their own.
    let volume = view
        .shape
        .iter()
        .try_fold(1usize, |n, d| n.checked_mul((*d).max(1)))
        .ok_or_else(bad)?;
    let count = if view.shape.contains(&0) { 0 } else { volume };
    if view.shape.len() != view.stride.len() || count > values.len() {
        return Err(bad());
    }
    *left = left
        .checked_sub((count * N) as u64)
        .ok_or_else(|| too_many(path, "bytes of overlapping tensors", SPARE, "file_bytes"))?;
    let mut out = Vec::with_capacity(count);
    let mut place = vec![0usize; view.shape.len()];
    for _ in 0..count {
        let index = place
            .iter()
            .zip(&view.stride)
            .try_fold(view.offset, |sum, (i, s)| {
                sum.checked_add(i.checked_mul(*s)?)
            });
        let value = index.and_then(|i| values.get(i)).ok_or_else(bad)?;
        out.push(decode(*value));
        for (i, d) in place.iter_mut().zip(&view.shape).rev() {
            *i += 1;
            if *i < *d {
                break;
            }
            *i = 0;
        }
    }
    Ok(Tensor::from_vec(out, view.shape.as_slice(), &Device::Cpu)?)
}

fn wrong(path: &Path, what: impl std::fmt::Display) -> Error {
    Report::file(path, what)
        .expected("a pickled state dict: tensors by name, written by torch.save")
        .remedy("save the model as safetensors, or download it again")
        .input()
}

#[cfg(test)]
mod tests {
    use super::super::legacy::MAGIC;
    use super::*;
    use std::fs;

    /// A zip archive of stored members.
    fn zip(members: &[(&str, &[u8])]) -> Vec<u8> {
        let (mut out, mut directory) = (Vec::new(), Vec::new());
        for (name, bytes) in members {
            let at = out.len() as u32;
            let (n, size) = (name.len() as u16, bytes.len() as u32);
            let mut sizes = vec![0; 4];
            sizes.extend([size, size].map(u32::to_le_bytes).as_flattened());
            sizes.extend(n.to_le_bytes());
            sizes.extend([0; 2]);
            out.extend(b"PK\x03\x04\0\0\0\0\0\0\0\0\0\0");
            out.extend(&sizes);
            out.extend(name.as_bytes());
            out.extend(*bytes);
            directory.extend(b"PK\x01\x02\0\0\0\0\0\0\0\0\0\0\0\0");
            directory.extend(&sizes);
            directory.extend([0; 10]);
            directory.extend(at.to_le_bytes());
            directory.extend(name.as_bytes());
        }
        let (start, size, n) = (
            out.len() as u32,
            directory.len() as u32,
            members.len() as u16,
        );
        out.extend(&directory);
        out.extend(b"PK\x05\x06\0\0\0\0");
        out.extend([n, n].map(u16::to_le_bytes).as_flattened());
        out.extend([size, start].map(u32::to_le_bytes).as_flattened());
        out.extend([0; 2]);
        out
    }

    /// `_rebuild_tensor_v2(storage of `class` under `key`, offset, shape, stride)`.
    fn view(class: &str, key: &str, offset: u8, shape: [u8; 2], stride: [u8; 2]) -> Vec<u8> {
        let mut p = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage".to_vec();
        p.extend(format!("ctorch\n{class}\n").bytes());
        p.extend([b'X', key.len() as u8, 0, 0, 0]);
        p.extend(key.bytes());
        p.extend(b"X\x03\0\0\0cpuK\x06tQ");
        p.extend([b'K', offset]);
        for [a, b] in [shape, stride] {
            p.extend([b'K', a, b'K', b, 0x86]);
        }
        p.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        p
    }

    fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut p = b"\x80\x02ccollections\nOrderedDict\n)Rq\0(".to_vec();
        for (name, value) in entries {
            p.extend([b'X', name.len() as u8, 0, 0, 0]);
            p.extend(name.bytes());
            p.extend(value);
        }
        p.extend(b"u.");
        p
    }

    fn read(program: &[u8]) -> Result<BTreeMap<String, Tensor>> {
        let data: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let members: [(&str, &[u8]); 3] = [
            ("a/data.pkl", program),
            ("a/byteorder", b"little"),
            ("a/data/0", &data),
        ];
        read_file(&zip(&members))
    }

    fn read_file(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.bin");
        fs::write(&path, bytes).unwrap();
        read_pickle(&path, &Limits::default())
    }

    #[test]
    fn views_of_a_storage_are_read_whatever_their_strides() {
        let program = dict(&[
            ("whole", view("FloatStorage", "0", 0, [2, 3], [3, 1])),
            ("turned", view("FloatStorage", "0", 0, [3, 2], [1, 3])),
            ("tail", view("FloatStorage", "0", 4, [1, 2], [2, 1])),
        ]);
        let read = read(&program).unwrap();
        let rows = |name: &str| read[name].to_vec2::<f32>().unwrap();
        assert_eq!(rows("whole"), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
        assert_eq!(rows("turned"), [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]);
        assert_eq!(rows("tail"), [[4.0, 5.0]]);
    }

    #[test]
    fn a_state_dict_inside_a_checkpoint_is_found() {
        let mut inner = dict(&[("w", view("FloatStorage", "0", 0, [1, 1], [1, 1]))]);
        inner.pop();
        let outer = dict(&[
            ("epoch", b"K\x05".to_vec()),
            ("state_dict", inner[2..].to_vec()),
        ]);
        assert_eq!(read(&outer).unwrap().len(), 1);
    }

    /// The form before 1.6: two storages, the second of half precision.
    fn older(order: &[u8], count: u64) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(b"\x80\x02}q\0X\x0d\0\0\0little_endianq\x01");
        bytes.extend(order);
        bytes.extend(b"s.");
        bytes.extend(dict(&[
            ("b", view("HalfStorage", "94", 1, [1, 2], [2, 1])),
            ("a", view("FloatStorage", "93", 0, [2, 1], [1, 1])),
        ]));
        bytes.extend(b"\x80\x02]q\0(X\x02\0\0\x0093X\x02\0\0\x0094e.");
        bytes.extend(count.to_le_bytes());
        bytes.extend([1.5f32, -2.0].map(f32::to_le_bytes).as_flattened());
        bytes.extend(3u64.to_le_bytes());
        bytes.extend(
            [0.0, 0.5, 8.0]
                .map(|v| f16::from_f32(v).to_le_bytes())
                .as_flattened(),
        );
        bytes
    }

    #[test]
    fn the_form_before_1_6_is_read() {
        let read = read_file(&older(b"\x88", 2)).unwrap();
        assert_eq!(read["a"].to_vec2::<f32>().unwrap(), [[1.5], [-2.0]]);
        let b = read["b"].to_dtype(candle_core::DType::F32).unwrap();
        assert_eq!(b.to_vec2::<f32>().unwrap(), [[0.5, 8.0]]);
        let message = |bytes: &[u8]| read_file(bytes).unwrap_err().to_string();
        assert!(message(&older(b"\x89", 2)).contains("big-endian"));
        assert!(message(&older(b"\x88", u64::MAX)).contains("beyond its end"));
        let whole = older(b"\x88", 2);
        for end in 0..whole.len() {
            assert!(read_file(&whole[..end]).is_err(), "cut at {end}");
        }
        for at in MAGIC.len()..whole.len() {
            let mut spoilt = whole.clone();
            spoilt[at] ^= 0x55;
            // Nothing to assert about the value: it must come back, not panic or hang.
            let _ = read_file(&spoilt);
        }
    }

    #[test]
    fn nothing_is_called_and_nothing_outside_is_read() {
        let call = b"cos\nsystem\n(X\x02\0\0\0lstR".to_vec();
        let message = read(&dict(&[("w", call)])).unwrap_err().to_string();
        assert!(message.contains("a call of `system`"), "{message}");
        let plain = b"cnumpy\ndtype\n)R".to_vec();
        let message = read(&dict(&[("w", plain)])).unwrap_err().to_string();
        assert!(message.contains("`w`, which is no tensor"), "{message}");
        for (offset, shape, stride) in [
            (5, [1, 2], [1, 1]),
            (0, [2, 3], [4, 1]),
            (0, [7, 1], [0, 0]),
        ] {
            let program = dict(&[("w", view("FloatStorage", "0", offset, shape, stride))]);
            let error = read(&program).unwrap_err();
            assert!(matches!(error, Error::Input(_)), "{error}");
        }
        let message = |class: &str, key: &str| {
            read(&dict(&[("w", view(class, key, 0, [1, 1], [1, 1]))]))
                .unwrap_err()
                .to_string()
        };
        assert!(message("ShortStorage", "0").contains("ShortStorage"));
        assert!(message("FloatStorage", "../0").contains("data/../0"));
    }

    #[test]
    fn every_truncation_and_every_flipped_byte_is_an_error_or_a_tensor() {
        let program = dict(&[("w", view("FloatStorage", "0", 0, [2, 3], [3, 1]))]);
        for end in 0..program.len() {
            assert!(read(&program[..end]).is_err(), "cut at {end}");
        }
        for at in 0..program.len() {
            let mut spoilt = program.clone();
            spoilt[at] ^= 0x55;
            // Nothing to assert about the value: it must come back, not panic or hang.
            let _ = read(&spoilt);
        }
        let whole = zip(&[("a/data.pkl", &program), ("a/data/0", &[0; 24])]);
        assert_eq!(read_file(&whole).unwrap().len(), 1);
        for end in 0..whole.len() {
            assert!(read_file(&whole[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn what_is_no_archive_is_told_apart() {
        let message = |bytes: &[u8]| read_file(bytes).unwrap_err().to_string();
        assert!(message(b"<html>").contains("web page"));
        assert!(message(b"").contains("no zip archive"));
        let mut packed = zip(&[("a/data.pkl", b"N.")]);
        let at = packed.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
        packed[at + 10] = 8;
        assert!(message(&packed).contains("compressed"));
        assert!(message(&zip(&[("a/data.pkl", b"N.")])).contains("no dictionary"));
        assert!(message(&zip(&[("b", b"")])).contains("data.pkl"));
    }

    #[test]
    fn twenty_programs_that_would_run_something_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let witness = dir.path().join("witness");
        let touch = format!("touch {}", witness.display());
        let sound = view("FloatStorage", "0", 0, [1, 1], [1, 1]);
        let functions = [
            ("os", "system"),
            ("posix", "system"),
            ("nt", "system"),
            ("subprocess", "Popen"),
            ("subprocess", "check_output"),
            ("builtins", "eval"),
            ("builtins", "exec"),
            ("__builtin__", "eval"),
            ("builtins", "open"),
            ("builtins", "getattr"),
            ("builtins", "__import__"),
            ("importlib", "import_module"),
            ("runpy", "run_path"),
            ("shutil", "rmtree"),
            ("socket", "create_connection"),
            ("torch.hub", "load"),
            ("torch", "load"),
            ("numpy.testing._private.utils", "runstring"),
            ("pickle", "loads"),
            ("webbrowser", "open"),
        ];
        for (module, name) in functions {
            let text = |text: &str| {
                let mut p = vec![b'X'];
                p.extend((text.len() as u32).to_le_bytes());
                p.extend(text.bytes());
                p
            };
            let global = format!("c{module}\n{name}\n").into_bytes();
            let stack_global = [text(module), text(name), vec![0x93]].concat();
            // By REDUCE and NEWOBJ, its result thrown away before a dictionary that is sound.
            for (function, call) in [(&global, b'R'), (&stack_global, b'R'), (&global, 0x81)] {
                let mut program = b"\x80\x04".to_vec();
                program.extend([function, &text(&touch)[..], &[0x85, call, b'0']].concat());
                program.extend(&dict(&[("w", sound.clone())])[2..]);
                let message = read(&program).unwrap_err().to_string();
                assert!(
                    message.contains(&format!("a call of `{name}`")),
                    "{message}"
                );
            }
            // By the older instructions INST and OBJ.
            for old in [
                format!(
                    "({:}i{module}\n{name}\n.",
                    String::from_utf8(text("x")).unwrap()
                ),
                format!("(c{module}\n{name}\no."),
            ] {
                let message = read(old.as_bytes()).unwrap_err().to_string();
                assert!(message.contains("the instruction"), "{message}");
            }
        }
        assert!(!witness.exists());
    }

    #[test]
    fn a_small_file_cannot_become_a_large_model() {
        let data = vec![0u8; 1 << 20];
        let read = |program: &[u8]| {
            let members = [("a/data.pkl", program), ("a/data/0", &data)];
            read_file(&zip(&members))
        };
        // A thousand names of one tensor are one tensor; many overlapping ones are not.
        let wide = |offset: u8| {
            let mut p = view("FloatStorage", "0", offset, [0, 1], [1, 1]);
            // The first size, `K 0`, becomes 262 000 = 0x0003ff70.
            let at = p.windows(3).rposition(|w| w == [b'K', 0, b'K']).unwrap();
            p.splice(at..at + 2, [b'J', 0x70, 0xff, 3, 0]);
            p
        };
        let named = |offset: fn(usize) -> u8| -> Vec<u8> {
            let names: Vec<String> = (0..100).map(|i| format!("w{i:02}")).collect();
            let entries: Vec<(&str, Vec<u8>)> = names
                .iter()
                .enumerate()
                .map(|(i, name)| (name.as_str(), wide(offset(i))))
                .collect();
            dict(&entries)
        };
        let tied = read(&named(|_| 0)).unwrap();
        assert_eq!(tied.len(), 100);
        assert_eq!(tied["w07"].dims(), [262_000, 1]);
        let error = read(&named(|i| i as u8)).unwrap_err();
        assert!(matches!(error, Error::Limit(_)), "{error}");
        let twice = dict(&[("w", wide(0)), ("w", wide(0))]);
        assert!(read(&twice).unwrap_err().to_string().contains("`w` twice"));
    }

    #[test]
    fn a_program_just_below_the_limit_runs_and_one_just_above_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.bin");
        fs::write(&path, zip(&[("a/data.pkl", b"NN00}.")])).unwrap();
        let with = |pickle_ops| {
            let limits = Limits {
                pickle_ops,
                ..Limits::default()
            };
            read_pickle(&path, &limits)
        };
        assert!(with(6).unwrap().is_empty());
        let error = with(5).unwrap_err();
        assert!(matches!(error, Error::Limit(_)), "{error}");
        assert!(error.to_string().contains("pickle_ops"), "{error}");
        let long = zip(&[("a/data.pkl", &[b'('; 1_000_001])]);
        let error = read_file(&long).unwrap_err().to_string();
        assert!(error.contains("more than 1000000 instructions"), "{error}");
    }

    #[test]
    fn members_are_named_once_and_do_not_overlap() {
        let member: (&str, &[u8]) = ("a/data.pkl", b"}.");
        let message = |bytes: &[u8]| read_file(bytes).unwrap_err().to_string();
        assert!(message(&zip(&[member, member])).contains("twice"));
        let mut bytes = zip(&[member, ("a/data/0", &[7; 64])]);
        let at = bytes.windows(8).rposition(|w| w == b"a/data/0").unwrap();
        // The sizes of the second entry of the directory: packed and unpacked.
        let whole = bytes.len() as u32 - 20;
        for field in [at - 26, at - 22] {
            bytes[field..field + 4].copy_from_slice(&whole.to_le_bytes());
        }
        bytes[at - 4..at].copy_from_slice(&0u32.to_le_bytes());
        assert!(message(&bytes).contains("overlap"), "{}", message(&bytes));
    }
}
