//! Pictures and sets of pictures: PNG, JPEG, IDX, CIFAR-10 and NumPy archives.

use super::build::{
    Member, adler32, chunk, crc32, gzip, gzipped, npy, png, png_header, stored, zeros, zeros_len,
    zip, zlib,
};
use super::{Sample, sample};

macro_rules! seed {
    ($name:literal) => {
        sample(
            $name,
            "valid",
            include_bytes!(concat!("../../bad/seeds/", $name)).to_vec(),
        )
    };
}

/// Small valid PNG files.
pub fn png_seeds() -> Vec<Sample> {
    let rows = [0u8, 10, 20, 30, 0, 40, 50, 60];
    let data = chunk(b"IDAT", &zlib(&stored(&rows), adler32(&rows)));
    vec![
        seed!("grey16.png"),
        seed!("one-bit.png"),
        seed!("alpha.png"),
        seed!("palette.png"),
        sample(
            "plain.png",
            "valid",
            png(&[png_header(3, 2, 8, 0, 0), data]),
        ),
    ]
}

/// PNG files that somebody thought of.
pub fn png_specials() -> Vec<Sample> {
    let rows = [0u8; 4];
    let idat = |raw: &[u8]| chunk(b"IDAT", &zlib(&stored(raw), adler32(raw)));
    let bomb = |n: usize| chunk(b"IDAT", &zlib(&zeros(n), 1));
    let mut out = Vec::new();
    let mut add = |what: &str, chunks: &[Vec<u8>]| out.push(sample("a.png", what, png(chunks)));
    for (width, height) in [
        (0, 1),
        (1, 0),
        (65_535, 65_535),
        (16_385, 1),
        (u32::MAX, 1),
        (1, u32::MAX),
    ] {
        for interlaced in [0, 1] {
            let header = png_header(width, height, 8, 6, interlaced);
            add(&format!("{width}x{height}"), &[header, idat(&rows)]);
        }
    }
    for depth in [0, 1, 2, 3, 4, 5, 8, 15, 16, 32, 255] {
        for color in [0, 1, 2, 3, 4, 5, 6, 7, 255] {
            let header = png_header(3, 1, depth, color, 0);
            add(
                &format!("{depth} bits of colour {color}"),
                &[header, idat(&[0; 25])],
            );
        }
    }
    add(
        "a bomb of 64 MiB behind 4x4",
        &[png_header(4, 4, 8, 0, 0), bomb(260_000)],
    );
    add(
        "a bomb of 250 MiB behind 16000x16000",
        &[png_header(16_000, 16_000, 8, 0, 0), bomb(1_000_000)],
    );
    add(
        "an interlace method of 7",
        &[png_header(3, 1, 8, 0, 7), idat(&rows)],
    );
    let header = || png_header(3, 1, 8, 0, 0);
    let text = |deflate: &[u8]| chunk(b"zTXt", &[b"key\0\0", &zlib(deflate, 1)[..]].concat());
    add(
        "a bomb in a text",
        &[header(), text(&zeros(200_000)), idat(&rows)],
    );
    let profile = |deflate: &[u8]| chunk(b"iCCP", &[b"key\0\0", &zlib(deflate, 1)[..]].concat());
    add(
        "a bomb in a profile",
        &[header(), profile(&zeros(200_000)), idat(&rows)],
    );
    add(
        "two palettes",
        &[
            png_header(3, 1, 8, 3, 0),
            chunk(b"PLTE", &[1; 6]),
            chunk(b"PLTE", &[2; 6]),
            idat(&rows),
        ],
    );
    add(
        "a palette of 257",
        &[
            png_header(3, 1, 8, 3, 0),
            chunk(b"PLTE", &[1; 771]),
            idat(&rows),
        ],
    );
    add(
        "an index beyond the palette",
        &[
            png_header(3, 1, 8, 3, 0),
            chunk(b"PLTE", &[1; 3]),
            idat(&[0, 9, 9, 9]),
        ],
    );
    add(
        "transparency of a wrong length",
        &[header(), chunk(b"tRNS", &[0; 9]), idat(&rows)],
    );
    add("a filter of 9", &[header(), idat(&[9, 1, 2, 3])]);
    add(
        "a thousand empty data chunks",
        &[
            header(),
            vec![chunk(b"IDAT", &[]); 1000].concat(),
            idat(&rows),
        ],
    );
    add(
        "a hundred thousand chunks",
        &[
            header(),
            vec![chunk(b"tEXt", b"a\0"); 100_000].concat(),
            idat(&rows),
        ],
    );
    add(
        "an animation",
        &[
            header(),
            chunk(b"acTL", &[0xff; 8]),
            chunk(b"fcTL", &[0xff; 26]),
            idat(&rows),
        ],
    );
    add(
        "an Exif of nothing",
        &[header(), chunk(b"eXIf", &[]), idat(&rows)],
    );
    add(
        "an Exif that points nowhere",
        &[
            header(),
            chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
            idat(&rows),
        ],
    );
    out
}

/// Small valid JPEG files.
pub fn jpeg_seeds() -> Vec<Sample> {
    vec![
        seed!("color.jpg"),
        seed!("grey.jpg"),
        seed!("progressive.jpg"),
    ]
}

/// JPEG files that somebody thought of.
pub fn jpeg_specials(seeds: &[Sample]) -> Vec<Sample> {
    let mut out = Vec::new();
    for seed in seeds {
        let Some(frame) = seed
            .bytes
            .windows(2)
            .position(|w| matches!(w, [0xff, 0xc0 | 0xc2]))
        else {
            continue;
        };
        let mut sized = |height: u16, width: u16, more: Vec<u8>| {
            let mut bytes = seed.bytes.clone();
            bytes[frame + 5..frame + 7].copy_from_slice(&height.to_be_bytes());
            bytes[frame + 7..frame + 9].copy_from_slice(&width.to_be_bytes());
            let end = bytes.len() - 2;
            let added = more.len();
            bytes.splice(end..end, more);
            let what = format!("{}: {width}x{height}, {added} bytes more", seed.name);
            out.push(sample("a.jpg", what, bytes));
        };
        for (height, width) in [
            (0, 9),
            (9, 0),
            (1, 65_535),
            (65_535, 65_535),
            (16_385, 2),
            (4000, 4000),
        ] {
            sized(height, width, Vec::new());
            sized(height, width, vec![0x55; 70_000]);
        }
        // The last scan again and again: work without data.
        let scan = seed
            .bytes
            .windows(2)
            .rposition(|w| w == [0xff, 0xda])
            .unwrap_or(0);
        let again = seed.bytes[scan..seed.bytes.len() - 2].to_vec();
        sized(9, 13, again.repeat(200));
        sized(4000, 4000, again.repeat(1 + 40_000 / again.len()));
        for (at, value) in [
            (4, 12u8),
            (9, 0),
            (9, 255),
            (11, 0x00),
            (11, 0xff),
            (12, 200),
        ] {
            let mut bytes = seed.bytes.clone();
            bytes[frame + at] = value;
            out.push(sample(
                "a.jpg",
                format!("{}: byte {at} of the frame = {value}", seed.name),
                bytes,
            ));
        }
        for marker in [0xc4u8, 0xdb, 0xdd] {
            let mut bytes = seed.bytes.clone();
            let segment = [
                0xff, marker, 0, 20, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
                255, 255, 255, 255, 255,
            ];
            bytes.splice(2..2, segment);
            out.push(sample(
                "a.jpg",
                format!("{}: tables {marker:#x} of 255", seed.name),
                bytes,
            ));
        }
        let exif = [
            &[0xff, 0xe1, 0, 20][..],
            b"Exif\0\0II*\0\xff\xff\xff\xff\0\0\0\0",
        ]
        .concat();
        let mut bytes = seed.bytes.clone();
        bytes.splice(2..2, exif);
        out.push(sample(
            "a.jpg",
            format!("{}: an Exif that points nowhere", seed.name),
            bytes,
        ));
    }
    out
}

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
        let stream = [&block[..], &zeros(n)].concat();
        let what = format!("a header before {n} runs of zeros, some bytes short");
        let mut short = sample("a.gz", what, gzip(&stream, 0, 0));
        // The second is a ratio that gzip files of black images have.
        short.unpacked = zeros_len(n);
        out.push(short);
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
    let bomb = gzip(&zeros(1_000_000), 0, zeros_len(1_000_000) as u32);
    out.push(sample("data_batch_1.bin.gz", "a bomb of 250 MiB", bomb));
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
