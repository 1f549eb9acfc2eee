//! Hostile and damaged tensor files are refused with a message that helps; sound ones come back as
//! they were written.

#![allow(clippy::unwrap_used)] // Helper functions of tests, which clippy does not see as such.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use diffusion_core::Error;
use diffusion_core::checkpoint::{
    decode_safetensors, read_safetensors, write_atomic, write_safetensors_atomic,
};
use diffusion_core::limits::Limits;

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn decode(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, Error> {
    let len = bytes.len() as u64;
    decode_safetensors(
        &mut &*bytes,
        len,
        Path::new("x.safetensors"),
        &Limits::default(),
    )
}

fn sample() -> BTreeMap<String, Tensor> {
    let cpu = &Device::Cpu;
    let base = Tensor::new(&[[1.5f32, -2.0, 3.25], [0.0, 7.0, -0.5]], cpu).unwrap();
    let whole = Tensor::new(&[3u32, 0, 7], cpu).unwrap();
    let mut map = BTreeMap::new();
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        map.insert(format!("{dtype:?}"), base.to_dtype(dtype).unwrap());
    }
    for dtype in [DType::I64, DType::I32, DType::U32, DType::U8] {
        map.insert(format!("{dtype:?}"), whole.to_dtype(dtype).unwrap());
    }
    map.insert("transposed".into(), base.t().unwrap());
    map.insert("scalar".into(), Tensor::new(2.5f64, cpu).unwrap());
    map.insert(
        "empty".into(),
        Tensor::zeros((0, 4), DType::F32, cpu).unwrap(),
    );
    map
}

fn text(t: &Tensor) -> String {
    let values = t
        .to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1::<f64>()
        .unwrap();
    format!("{:?} {:?} {values:?}", t.dtype(), t.dims())
}

#[test]
fn every_element_type_survives_and_the_bytes_are_always_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_safetensors_atomic(&path, &sample(), &metadata).unwrap();
    let first = fs::read(&path).unwrap();
    let back = read_safetensors(&path, &Limits::default()).unwrap();
    assert_eq!(back.len(), sample().len());
    for (name, tensor) in sample() {
        assert_eq!(text(&back[&name]), text(&tensor), "{name}");
    }
    write_safetensors_atomic(&path, &back, &metadata).unwrap();
    assert_eq!(fs::read(&path).unwrap(), first);
    // The reference library agrees about what is in the file.
    let parsed = safetensors::SafeTensors::deserialize(&first).unwrap();
    assert_eq!(parsed.names().len(), sample().len());
    assert_eq!(parsed.tensor("transposed").unwrap().shape(), [3, 2]);
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        1,
        "a temporary file was left"
    );
}

#[test]
fn booleans_become_bytes() {
    let header = r#"{"b":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}}"#;
    let map = decode(&file(header, &[1, 0, 1])).unwrap();
    assert_eq!(map["b"].to_vec1::<u8>().unwrap(), [1, 0, 1]);
    let error = decode(&file(header, &[1, 2, 1])).unwrap_err().to_string();
    assert!(
        error.contains("tensor `b`: element 1 is 2; expected 0 or 1"),
        "{error}"
    );
}

#[test]
fn every_kind_of_damage_is_named() {
    let f32s = |offsets: &str| format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}"#);
    let two = |a: &str, b: &str| format!(r#"{{"a":{},"b":{}}}"#, f32s(a), f32s(b));
    let cases: Vec<(String, usize, &str)> = vec![
        (two("[0,4]", "[0,4]"), 4, "overlaps"),
        (two("[0,4]", "[2,6]"), 6, "overlaps"),
        (two("[0,4]", "[8,12]"), 12, "gap"),
        (two("[0,4]", "[4,8]"), 9, "9 bytes of data; expected 8"),
        (two("[0,4]", "[4,8]"), 7, "inside the 7 bytes"),
        (format!(r#"{{"a":{}}}"#, f32s("[4,0]")), 4, "offsets 4..0"),
        (
            format!(r#"{{"a":{}}}"#, f32s("[0,3]")),
            3,
            "3 bytes; expected 4, from F32 [1]",
        ),
        (
            format!(r#"{{"a":{0},"a":{0}}}"#, f32s("[0,4]")),
            4,
            "`a` appears twice",
        ),
        (
            format!(
                r#"{{"__metadata__":{{}},"__metadata__":{{}},"a":{}}}"#,
                f32s("[0,4]")
            ),
            4,
            "twice",
        ),
        (
            r#"{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}"#.into(),
            1,
            "F8_E4M3",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#.into(),
            4,
            "more than 2⁶⁴",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#.into(),
            4,
            "tensor `a`",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[1]}}"#.into(),
            4,
            "data_offsets",
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#.into(),
            4,
            "`x`",
        ),
        ("[]".into(), 0, "header"),
        ("{".into(), 0, "header"),
        ("[".repeat(100_000), 0, "header"),
    ];
    for (header, data, expected) in cases {
        let error = decode(&file(&header, &vec![0; data])).unwrap_err();
        assert!(
            matches!(error, Error::Input(_) | Error::Unsupported(_)),
            "{error}"
        );
        let error = error.to_string();
        assert!(error.contains(expected), "`{error}` lacks `{expected}`");
        assert!(
            error.contains("x.safetensors") && error.contains('('),
            "{error}"
        );
    }
}

#[test]
fn claims_are_checked_before_anything_is_allocated() {
    for claim in [u64::MAX, 1 << 40, 100] {
        let mut bytes = claim.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        let error = decode(&bytes).unwrap_err().to_string();
        assert!(error.contains("a header of"), "{error}");
    }
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let bytes = file(header, &[0]);
    let read = |limits: &Limits| {
        decode_safetensors(&mut &*bytes, bytes.len() as u64, Path::new("x"), limits)
    };
    let n = header.len() as u64;
    let limits = Limits::default();
    assert!(
        read(&Limits {
            safetensors_header: n,
            tensors: 1,
            ..limits.clone()
        })
        .is_ok()
    );
    for (limits, field) in [
        (
            Limits {
                safetensors_header: n - 1,
                ..limits.clone()
            },
            "safetensors_header",
        ),
        (
            Limits {
                tensors: 0,
                ..limits.clone()
            },
            "tensors",
        ),
        (
            Limits {
                file_bytes: n,
                ..limits.clone()
            },
            "file_bytes",
        ),
    ] {
        let error = read(&limits).unwrap_err();
        assert!(
            matches!(error, Error::Limit(_)) && error.to_string().contains(field),
            "{error}"
        );
    }
}

#[test]
fn no_truncation_and_no_header_byte_gets_through_in_silence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write_safetensors_atomic(&path, &sample(), &BTreeMap::new()).unwrap();
    let bytes = fs::read(&path).unwrap();
    for end in 0..bytes.len() {
        assert!(decode(&bytes[..end]).is_err(), "truncated at {end}");
    }
    let sound = decode(&bytes).unwrap();
    let (mut tried, mut refused) = (0, 0);
    for at in 0..256 {
        for value in (0..=255).filter(|v| *v != bytes[at]) {
            let mut mutant = bytes.clone();
            mutant[at] = value;
            tried += 1;
            // What is accepted has sane shapes; it is the manifest that tells whether it is right.
            match decode(&mutant) {
                Ok(map) => assert_eq!(map.len(), sound.len()),
                Err(_) => refused += 1,
            }
        }
    }
    println!("{refused} of {tried} changed headers refused");
    assert!(tried == 256 * 255 && refused * 10 > tried * 8, "{refused}");
}

#[test]
fn replacing_a_file_leaves_the_old_one_when_it_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.bin");
    write_atomic(&path, b"old").unwrap();
    write_atomic(&path, b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    let unsupported = Tensor::zeros(2, DType::I16, &Device::Cpu).unwrap();
    let map = BTreeMap::from([("t".to_string(), unsupported)]);
    let error = write_safetensors_atomic(&path, &map, &BTreeMap::new()).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"new");
    let nowhere = dir.path().join("missing/a.bin");
    assert!(matches!(
        write_atomic(&nowhere, b"x").unwrap_err(),
        Error::Io { .. }
    ));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_ne!(
            mode & 0o044,
            0,
            "readable by others as far as the umask allows: {mode:o}"
        );
    }
}
