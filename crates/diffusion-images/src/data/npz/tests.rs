//! Archives made byte by byte: what is read, and what is refused.

use super::super::{Options, open, splits};
use super::*;
use flate2::{Compression, write::DeflateEncoder};
use std::io::Write;

fn npy(descr: &str, shape: &str, values: &[u8]) -> Vec<u8> {
    let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text.bytes());
    bytes.extend(values);
    bytes
}

/// A zip archive; `lie` is added to the lengths that it states.
fn archive(members: &[(&str, Vec<u8>)], deflate: bool, lie: u32) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in members {
        let mut sum = Crc::new();
        sum.update(bytes);
        let packed = if deflate {
            let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        } else {
            bytes.clone()
        };
        let method: u16 = if deflate { 8 } else { 0 };
        let mut common = Vec::new();
        common.extend([20, 0, 0, 0]);
        common.extend(method.to_le_bytes());
        common.extend([0, 0, 0x21, 0]);
        common.extend(sum.sum().to_le_bytes());
        common.extend((packed.len() as u32).to_le_bytes());
        common.extend((bytes.len() as u32 + lie).to_le_bytes());
        common.extend((name.len() as u16).to_le_bytes());
        common.extend([0, 0]);
        let at = out.len() as u32;
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend(name.bytes());
        out.extend(packed);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(at.to_le_bytes());
        directory.extend(name.bytes());
    }
    let at = out.len() as u32;
    let count = (members.len() as u16).to_le_bytes();
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend([count, count].concat());
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(at.to_le_bytes());
    out.extend([0, 0]);
    out
}

fn read_bytes(bytes: &[u8]) -> Result<Dataset> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npz");
    std::fs::write(&path, bytes).unwrap();
    open(path.to_str().unwrap())
}

fn read_one(descr: &str, shape: &str, values: &[u8]) -> Result<Dataset> {
    read_bytes(&archive(
        &[("images.npy", npy(descr, shape, values))],
        false,
        0,
    ))
}

fn values(data: &Dataset) -> Vec<u8> {
    match data.pixels() {
        Pixels::Levels { values, .. } => values,
        Pixels::Real(_) => Vec::new(),
    }
}

#[test]
fn images_of_each_layout_and_labels_are_read() {
    for deflate in [false, true] {
        for (images, labels) in [("images", "labels"), ("x", "y"), ("arr_0", "y")] {
            let labels = (
                format!("{labels}.npy"),
                npy("<i8", "(2,)", &[2i64, 0].map(i64::to_le_bytes).concat()),
            );
            let images = (
                format!("{images}.npy"),
                npy("|u1", "(2, 1, 3)", &[0, 1, 2, 3, 4, 255]),
            );
            let members = [(labels.0.as_str(), labels.1), (images.0.as_str(), images.1)];
            let data = read_bytes(&archive(&members, deflate, 0)).unwrap();
            assert_eq!(
                (data.len(), data.channels(), data.height(), data.width()),
                (2, 1, 1, 3)
            );
            assert_eq!(values(&data), [0, 1, 2, 3, 4, 255]);
            assert_eq!(data.labels().unwrap(), [2, 0]);
            assert_eq!(data.classes(), ["0", "1", "2"]);
        }
    }
    let bytes: Vec<u8> = (0..12).collect();
    let last = read_one("|u1", "(1, 2, 2, 3)", &bytes).unwrap();
    assert_eq!(values(&last), [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]);
    let first = read_one("|u1", "(1, 3, 2, 2)", &bytes).unwrap();
    assert_eq!(values(&first), bytes);
    assert_eq!((first.channels(), first.height(), first.width()), (3, 2, 2));
    let sides = {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npz");
        let array = npy("|u1", "(12, 1, 1)", &bytes);
        std::fs::write(&path, archive(&[("x.npy", array)], true, 0)).unwrap();
        splits(path.to_str().unwrap(), &Options::default()).unwrap()
    };
    assert_eq!(sides.train.len() + sides.test.len(), 12);
}

#[test]
fn floats_must_be_in_minus_one_to_one_and_say_so() {
    let floats =
        |values: [f32; 2]| read_one("<f4", "(1, 1, 2)", &values.map(f32::to_le_bytes).concat());
    assert_eq!(
        floats([-1.0, 1.0]).unwrap().pixels(),
        Pixels::Real(vec![-1.0, 1.0])
    );
    let doubles = [0.5f64, -0.25].map(f64::to_be_bytes).concat();
    let data = read_one(">f8", "(1, 1, 2)", &doubles).unwrap();
    assert_eq!(data.pixels(), Pixels::Real(vec![0.5, -0.25]));
    for (values, clue) in [
        ([0.0, 1.0], "without a negative value"),
        ([0.0, 255.0], "value 1: 255"),
        ([-1.0, 1.000_001], "value 1"),
        ([f32::NAN, -1.0], "NaN"),
    ] {
        let message = floats(values).unwrap_err().to_string();
        assert!(
            message.contains(clue) && message.contains("uint8"),
            "{message}"
        );
    }
}

#[test]
fn every_cut_is_refused() {
    for deflate in [false, true] {
        let members = [
            (
                "images.npy",
                npy("|u1", "(2, 2, 2)", &[1, 2, 3, 4, 5, 6, 7, 8]),
            ),
            ("labels.npy", npy("|u1", "(2, 1)", &[0, 1])),
        ];
        let whole = archive(&members, deflate, 0);
        assert_eq!(read_bytes(&whole).unwrap().len(), 2);
        for length in 0..whole.len() {
            assert!(read_bytes(&whole[..length]).is_err(), "{length}");
        }
        // A changed pixel is found by the checksum, a changed length by the header.
        let mut changed = whole.clone();
        let place = 30 + "images.npy".len() + members[0].1.len() - 1;
        if !deflate {
            changed[place] ^= 1;
            let message = read_bytes(&changed).unwrap_err().to_string();
            assert!(message.contains("checksum"), "{message}");
        }
        assert!(read_bytes(&archive(&members, deflate, 1)).is_err());
    }
}

#[test]
fn wrong_arrays_are_named() {
    for (descr, shape, length, clues) in [
        ("|u1", "(4,)", 4, ["images.npy", "[4]"]),
        (
            "|u1",
            "(1, 2, 2, 4)",
            16,
            ["[1, 2, 2, 4]", "1 or 3 channels"],
        ),
        ("|u1", "(1, 3, 2, 3)", 18, ["[1, 3, 2, 3]", "one way"]),
        ("|u1", "(0, 2, 2)", 0, ["[0, 2, 2]", "at least one image"]),
        ("|u1", "(1, 1, 16385)", 16_385, ["16385", "16384x16384"]),
        ("<i4", "(1, 1, 1)", 4, ["type <i4", "uint8"]),
        ("|O", "(1, 1, 1)", 8, ["type |O", "astype"]),
        ("|u1", "(2, 2, 2)", 7, ["claims", "as the archive states"]),
        ("|u1", "(2, 2, 2)", 9, ["claims", "as the archive states"]),
        (
            "|u1",
            "(9999999999, 9999999999, 9)",
            1,
            ["9999999999", "numpy.save"],
        ),
        ("|u1", "(-1, 2, 2)", 4, ["(-1, 2, 2)", "numpy.save"]),
    ] {
        let message = read_one(descr, shape, &vec![0; length])
            .unwrap_err()
            .to_string();
        assert!(
            clues.iter().all(|clue| message.contains(clue)),
            "{clues:?}: {message}"
        );
    }
    assert!(read_one("|u1", "(1, 1, 16384)", &vec![0; 16_384]).is_ok());
    let image = || ("images.npy", npy("|u1", "(2, 1, 1)", &[1, 2]));
    for (labels, clue) in [
        (npy("|i1", "(2,)", &[0, 255]), "label 1: -1"),
        (
            npy("<u4", "(2,)", &[0, 0, 1, 0, 0, 0, 0, 0]),
            "label 0: 65536",
        ),
        (npy("|u1", "(3,)", &[0, 0, 0]), "[3]"),
        (npy("<f4", "(2,)", &[0; 8]), "integers"),
    ] {
        let members = [image(), ("labels.npy", labels)];
        let message = read_bytes(&archive(&members, false, 0))
            .unwrap_err()
            .to_string();
        assert!(message.contains(clue), "{clue}: {message}");
    }
    let members = [image(), ("y.npy", npy("<u2", "(2,)", &[255, 255, 0, 0]))];
    let data = read_bytes(&archive(&members, false, 0)).unwrap();
    assert_eq!(
        (data.labels().unwrap()[0], data.classes().len()),
        (65_535, 65_536)
    );
    let members = [("pictures.npy", npy("|u1", "(1, 1, 1)", &[1]))];
    let message = read_bytes(&archive(&members, false, 0))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("pictures.npy") && message.contains("`images`"),
        "{message}"
    );
}

#[test]
fn headers_that_numpy_does_not_write_are_refused() {
    for text in [
        "",
        "{}",
        "{'descr': '|u1', 'shape': (1, 1, 1)}",
        "{'descr': '|u1', 'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1)}",
        "{'descr': '|u1', 'fortran_order': True, 'shape': (1, 1, 1)}",
        "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (1, 1, 1)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1)} x",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1, , 1)}",
        "{'é",
    ] {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.bytes());
        assert!(Header::read("x", &mut bytes.as_slice()).is_err(), "{text}");
    }
    let huge = [
        b"\x93NUMPY\x02\x00".as_slice(),
        &[1, 0, 1, 0],
        &[b' '; 70_000],
    ]
    .concat();
    assert!(matches!(
        Header::read("x", &mut huge.as_slice()),
        Err(Error::Limit(_))
    ));
}

#[test]
fn ratios_just_below_and_just_above_the_limit() {
    let packed = 10_000;
    assert!(check_ratio("x", MAX_RATIO * packed, packed).is_ok());
    assert!(check_ratio("x", MAX_RATIO * (packed + 1), packed).is_err());
    assert!(check_ratio("x", SMALL, 1).is_ok());
    assert!(check_ratio("x", SMALL + 1, 1).is_err());
    // Zeros, a thousand to one.
    let bomb = npy("|u1", "(3, 1024, 1024)", &vec![0; 3 << 20]);
    let bomb = archive(&[("x.npy", bomb)], true, 0);
    assert!(bomb.len() < 10_000);
    assert!(matches!(read_bytes(&bomb), Err(Error::Limit(_))));
}
