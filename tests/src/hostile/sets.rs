//! Sets of pictures: IDX, CIFAR-10 and NumPy archives.

use super::build::{Member, crc32, gzip, gzipped, npy, zeros, zeros_len, zip};
use super::{Sample, sample};

fn idx(magic: [u8; 4], sizes: &[u32], data: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    bytes.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
    bytes.extend(data);
    bytes
}

/// Small valid IDX files.
pub fn idx_seeds() -> Vec<Sample> {
    let data: Vec<u8> = (0..24).collect();
    let good = idx([0, 0, 8, 3], &[4, 2, 3], &data);
    vec![
        sample("a-idx3-ubyte", "valid", good.clone()),
        sample("a-idx3-ubyte.gz", "valid", gzipped(&good)),
    ]
}

/// IDX files that somebody thought of.
pub fn idx_specials() -> Vec<Sample> {
    let mut out = Vec::new();
    for sizes in [
        [u32::MAX; 3],
        [1 << 16, 1 << 16, 1 << 16],
        [0, 2, 3],
        [4, 0, 3],
        [u32::MAX, 1, 1],
        [1, u32::MAX, 1],
        [1, 16_385, 1],
        [1, 16_384, 16_384],
    ] {
        let bytes = idx([0, 0, 8, 3], &sizes, &[7; 24]);
        out.push(sample(
            "a.gz",
            format!("{sizes:?} gzipped"),
            gzipped(&bytes),
        ));
        out.push(sample("a", format!("{sizes:?}"), bytes));
    }
    for kind in 0..16 {
        for dimensions in [0, 1, 2, 3, 4, 255] {
            let bytes = idx([0, 0, kind, dimensions], &[4, 2, 3], &[7; 24]);
            out.push(sample(
                "a",
                format!("type {kind}, {dimensions} dimensions"),
                bytes,
            ));
        }
    }
    out.push(sample(
        "a.gz",
        "a bomb of 250 MiB",
        gzip(&zeros(1_000_000), 0, zeros_len(1_000_000) as u32),
    ));
    let header = idx([0, 0, 8, 3], &[60_000, 64, 64], &[]);
    let block = [&[0, 16, 0, !16, 0xff][..], &header].concat();
    for n in [10_000, 952_558] {
        // The second is a ratio that gzip files of black images have.
        let stream = [&block[..], &zeros(n)].concat();
        let what = format!("a header before {n} runs of zeros, some bytes short");
        out.push(sample("a.gz", what, gzip(&stream, 0, 0)));
    }
    let mut nested = gzipped(&idx([0, 0, 8, 3], &[1, 1, 1], &[7]));
    for _ in 0..50 {
        nested = gzipped(&nested);
    }
    out.push(sample("a.gz", "gzip in gzip, fifty times", nested));
    let one = gzipped(&idx([0, 0, 8, 3], &[4, 2, 3], &[7; 24]));
    out.push(sample("a.gz", "a thousand gzip members", one.repeat(1000)));
    let long = [
        &[0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 255][..],
        &[b'a'; 1 << 20],
    ]
    .concat();
    out.push(sample("a.gz", "a name of a megabyte without an end", long));
    out
}

fn record(label: u8) -> Vec<u8> {
    let mut record = vec![label];
    record.extend((0..3072u32).map(|i| (i * 7) as u8));
    record
}

/// A small valid file of CIFAR-10.
pub fn cifar_seeds() -> Vec<Sample> {
    let records = [record(3), record(9)].concat();
    vec![
        sample("data_batch_1.bin", "valid", records.clone()),
        sample("data_batch_1.bin.gz", "valid", gzipped(&records)),
    ]
}

/// CIFAR-10 files that somebody thought of.
pub fn cifar_specials() -> Vec<Sample> {
    let name = "data_batch_1.bin";
    let mut out = Vec::new();
    for label in 10..=255 {
        out.push(sample(name, format!("label {label}"), record(label)));
    }
    for length in [0, 1, 2, 3071, 3072, 3074, 6145, 6147] {
        let bytes = [record(1), record(2), record(3)].concat()[..length].to_vec();
        out.push(sample(name, format!("{length} bytes"), bytes));
    }
    // The second is a whole number of black records, but for its checksum.
    for n in [1_000_000, 401360] {
        let bomb = gzip(&zeros(n), 0, zeros_len(n) as u32);
        let what = format!("a bomb of {} MiB", zeros_len(n) >> 20);
        out.push(sample("data_batch_1.bin.gz", what, bomb));
    }
    out
}

fn arrays(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    zip(&[Member::stored("images.npy", &npy(descr, shape, data))])
}

/// Small valid archives of NumPy.
pub fn npz_seeds() -> Vec<Sample> {
    let data: Vec<u8> = (0..24).collect();
    let labels = Member::stored(
        "labels.npy",
        &npy("<i8", "(2,)", &[[1u8, 0, 0, 0, 0, 0, 0, 0]; 2].concat()),
    );
    let images = |shape| Member::stored("images.npy", &npy("|u1", shape, &data));
    vec![
        sample(
            "a.npz",
            "valid",
            zip(&[images("(2, 3, 4)"), labels.clone()]),
        ),
        sample("a.npz", "valid", zip(&[images("(2, 2, 2, 3)"), labels])),
    ]
}

/// Archives of NumPy that somebody thought of.
pub fn npz_specials() -> Vec<Sample> {
    let mut out = Vec::new();
    let mut add = |what: &str, bytes: Vec<u8>| out.push(sample("a.npz", what, bytes));
    let data = [7u8; 24];
    for shape in [
        "()",
        "(24,)",
        "(0, 3, 4)",
        "(2, 0, 4)",
        "(2, 3, 5)",
        "(-2, 3, 4)",
        "(2, 3, 4, 1, 1)",
        "(18446744073709551615, 1, 1)",
        "(4294967296, 4294967296, 4)",
        "(99999999999999999999, 1, 1)",
        "(2, 3, 4",
        "2, 3, 4)",
        "[2, 3, 4]",
        "(2, 3, x)",
        "(2L, 3L, 4L)",
        "(1000000, 1000, 1000)",
        "(((((((((2, 3, 4)))))))))",
        "None",
    ] {
        add(&format!("shape {shape}"), arrays("|u1", shape, &data));
    }
    for descr in [
        "<u1", "|b1", "<f4", ">f8", "<f2", "<i2", ">u2", "|O", "|S24", "<U6", "<c16", "|V3",
        "<M8[ns]", "", "u1'}",
    ] {
        add(&format!("type {descr}"), arrays(descr, "(2, 3, 4)", &data));
    }
    for nesting in [100, 10_000, 1_000_000] {
        let shape = format!("{}2{}", "(".repeat(nesting), ")".repeat(nesting));
        if shape.len() < 60_000 {
            add(
                &format!("{nesting} parentheses"),
                arrays("|u1", &shape, &data),
            );
        }
    }
    let array = npy("|u1", "(2, 3, 4)", &data);
    let member = |name: &str| Member::stored(name, &array);
    add(
        "a name twice",
        zip(&[member("images.npy"), member("images.npy")]),
    );
    add(
        "two candidates",
        zip(&[member("images.npy"), member("x.npy"), member("arr_0.npy")]),
    );
    add("no array", zip(&[member("README")]));
    add("no member", zip(&[]));
    add(
        "a name that leads elsewhere",
        zip(&[member("../images.npy")]),
    );
    add("ten thousand members", zip(&vec![member("x"); 10_000]));
    let mut header = npy("|u1", "(1, 16000, 16000)", &[]);
    let block = |data: &[u8]| {
        let n = data.len() as u16;
        [&[0][..], &n.to_le_bytes(), &(!n).to_le_bytes(), data].concat()
    };
    for (what, size) in [
        ("an honest size", 1u32 << 28),
        ("a size of 100", 100),
        ("a size of 4 GiB", u32::MAX),
    ] {
        let bomb = Member {
            name: "images.npy".into(),
            method: 8,
            packed: [&block(&header)[..], &zeros(1_000_000)].concat(),
            size,
            crc: 0,
        };
        add(&format!("a bomb of 250 MiB with {what}"), zip(&[bomb]));
    }
    let n = 400_000;
    header = npy("|u1", &format!("({}, 1, 1)", zeros_len(n)), &[]);
    let wrong = Member {
        name: "images.npy".into(),
        method: 8,
        packed: [&block(&header)[..], &zeros(n)].concat(),
        size: header.len() as u32 + zeros_len(n) as u32,
        crc: 0,
    };
    add(
        "98 MiB of black pixels with a wrong checksum",
        zip(&[wrong]),
    );
    for method in [1, 8, 9, 12, 14, 93, 99, 0xffff] {
        add(
            &format!("method {method}"),
            zip(&[Member {
                method,
                ..member("images.npy")
            }]),
        );
    }
    add(
        "a wrong checksum",
        zip(&[Member {
            crc: crc32(&array) ^ 1,
            ..member("images.npy")
        }]),
    );
    add(
        "a wrong size",
        zip(&[Member {
            size: 1 << 30,
            ..member("images.npy")
        }]),
    );
    for (at, value) in [
        (0, 0u8),
        (6, 0),
        (6, 2),
        (6, 3),
        (6, 255),
        (8, 255),
        (9, 255),
        (9, 0),
        (8, 0),
    ] {
        header = array.clone();
        header[at] = value;
        add(
            &format!("byte {at} of the array = {value}"),
            zip(&[Member::stored("images.npy", &header)]),
        );
    }
    let short = |text: &str| {
        let mut array = b"\x93NUMPY\x01\0".to_vec();
        array.extend((text.len() as u16).to_le_bytes());
        array.extend(text.bytes());
        array.extend(data);
        zip(&[Member::stored("images.npy", &array)])
    };
    for text in [
        "",
        "{",
        "{}",
        "{'descr': '|u1'}",
        "{'shape': (2, 3, 4)}",
        "{'descr': '|u1', 'fortran_order': True, 'shape': (2, 3, 4)}",
        "{'descr': '|u1', 'descr': '<f8', 'fortran_order': False, 'shape': (2, 3, 4)}",
        "__import__('os').system('true')",
        "\n\n\n\n",
    ] {
        add(&format!("the header {text:?}"), short(text));
    }
    for labels in ["(1,)", "(3,)", "(2, 1)", "()", "(0,)"] {
        let array = npy("|u1", labels, &[1; 3]);
        add(
            &format!("labels of shape {labels}"),
            zip(&[member("images.npy"), Member::stored("labels.npy", &array)]),
        );
    }
    let negative = npy("<i8", "(2,)", &[0xff; 16]);
    add(
        "negative labels",
        zip(&[
            member("images.npy"),
            Member::stored("labels.npy", &negative),
        ]),
    );
    let huge = npy("<u8", "(2,)", &[0x7f; 16]);
    add(
        "absurd labels",
        zip(&[member("images.npy"), Member::stored("labels.npy", &huge)]),
    );
    out
}
